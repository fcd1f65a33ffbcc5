"""
Random histories of real images under the real commands: every point that is kept restores bit for bit, by pybackup and
by QEMU alone, whatever was cut off when; and space comes back.

STORIES=FIRST:END tells other stories, STRIKES=EVERY:FROM strikes at every EVERYth step of those that there are, from
the FROMth on; `1:0` at each of them.  SCENE=NAME strikes in another scene, STORY_SECONDS=N lets readers read so long.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
from lab import call_pybackup, run
from places import machine_at
from stories import (
    CALLS,
    Ended,
    Story,
    Strike,
    alone,
    apart,
    may_trace,
    must_stay,
    names,
    require_converted,
    same,
    started,
)

from backup.repository import chain_reader, data_file
from backup.repository.machine import Machine

FIRST, END = (int(number) for number in os.environ.get("STORIES", "0:2").split(":"))
EVERY, FROM = (int(number) for number in os.environ.get("STRIKES", "240:0").split(":"))

traceable = pytest.mark.skipif(may_trace() is not None, reason=str(may_trace()))


def any_strike(rng: random.Random, *, qemu: bool = False) -> dict[str, object]:
    """
    A kill at some moment or at some step, or a refusal; of a command that has QEMU's programs work for it, theirs too.
    """
    if may_trace() is not None or rng.random() < 0.4:
        return {"kill_after": rng.uniform(0.01, 1.0) ** 2}
    call = rng.choice(CALLS)
    effect = rng.choice(["signal=SIGKILL", "signal=SIGKILL", "error=ENOSPC", "error=EIO", "signal=SIGTERM"])
    if effect.startswith("error") and call == "openat":
        call = "fsync"  # what cannot be opened at all is another story
    if effect.startswith("error") and qemu and call == "write":
        call = "pwrite64"  # QEMU's threads wake each other with write, and wait for ever for one that failed
    most = {"openat": 300, "write": 40, "fsync": 30, "pwrite64": 30}.get(call, 8)
    return {"strike": Strike(call, rng.randint(1, most), effect, lasting=rng.random() < 0.3)}


def any_rules(rng: random.Random) -> tuple[dict[str, int], int]:
    rules = {"last": rng.randint(1, 4)}
    for rule in ("hourly", "daily", "weekly", "monthly"):
        if rng.random() < 0.25:
            rules[rule] = rng.randint(1, 4)
    return rules, rng.choice([0, 0, 0, 3])


def back_up(story: Story) -> None:
    rng = story.rng
    story.live()
    wanted = rng.choice(["incremental"] * 7 + ["rescan", "rescan", "full"])
    disks = [rng.choice(list(story.images))] if rng.random() < 0.3 else []
    if any(story.images[name].regrown for name in disks or story.images):
        wanted = rng.choice(["rescan", "full"])  # docs/bitmaps.md, "What pybackup cannot notice"
    if rng.random() < 0.3:
        ended = story.back_up(wanted, disks, **any_strike(rng, qemu=True))
        assert ended.rc < 0 or ended.struck or ended.rc in {0, 3}, ended
        story.require_whole()
    else:
        story.back_up(wanted, disks).require(0, 3)


def prune(story: Story) -> None:
    """Prune, mostly after a prune that was struck; what the policy keeps is there at any time."""
    rng = story.rng
    rules, within = any_rules(rng)
    stay = must_stay(list(story.known.values()), rules, within)
    batch = rng.choice([1, 1, 2, 4])
    options = [word for rule, number in rules.items() for word in (f"--keep-{rule}", str(number))]
    options += ["--batch", str(batch), *(["--keep-within", f"{within}d"] if within else [])]
    while rng.random() < 0.6:
        ended = story.prune(*options, **any_strike(rng))
        assert ended.rc <= 1 or (ended.struck and ended.rc == 143), ended
        found = story.require_whole()
        assert stay <= found, "what the policy keeps is gone"
        story.forget(found)
        story.prune("--keep-last", "1000").require(0)  # settles what was cut off, and removes nothing
        assert story.listed() == found
    [plan] = story.prune(*options, "--dry-run").require(0).document
    before = story.stored()
    [report] = story.prune(*options).require(0).document
    assert report["points"] == plan["points"]
    assert report["freed_bytes"] == before - story.stored()
    for planned, done in zip(plan["rewrites"], report["rewrites"], strict=True):
        assert done["stored_after"] <= planned["stored_after"], "a rewrite takes more room than was said"
    waiting = {point["point"] for point in report["points"] if point["action"] == "wait"}
    assert not waiting or batch > 1
    assert story.listed() == stay | waiting
    story.forget(stay | waiting)
    story.require_tidy()


def pin(story: Story) -> None:
    rng = story.rng
    point = rng.choice(sorted(story.known))
    word = rng.choice(["pin", "unpin"])
    story.run(word, f"m/{point}", **(any_strike(rng) if rng.random() < 0.3 else {}))
    story.require_whole()
    story.run(word, f"m/{point}").require(0)
    assert story.manifest(point)["pinned"] == (word == "pin")
    story.known[point] = story.known[point].pinned_as(word == "pin")


def copy(story: Story) -> None:
    """The second place holds what the first does, and what it held before."""
    second = story.at("second")
    story.run("copy", "m", second.repository, **(any_strike(story.rng) if story.rng.random() < 0.5 else {}))
    second.known = dict(story.ever)
    second.require_whole()
    story.run("copy", "m", second.repository).require(0)
    assert second.require_whole() >= set(story.known)
    second.require_tidy()


def end(story: Story) -> None:
    """All but the newest points go: nothing is left of the others, and what stays is no larger than a new full."""
    for point, kept in story.known.items():
        if kept.pinned:
            story.run("unpin", f"m/{point}").require(0)
            story.known[point] = kept.pinned_as(False)
    story.prune("--keep-last", "1", "--batch", "1").require(0)
    stay = must_stay(list(story.known.values()), {"last": 1})
    assert story.require_whole(deep=True) == stay
    story.forget(stay)
    story.require_tidy()
    if any(image.regrown for image in story.images.values()):
        story.back_up("rescan").require(0, 3)
    story.back_up("incremental").require(0, 3)
    story.require_whole()
    story.back_up("full").require(0)
    story.prune("--keep-last", "2", "--batch", "1").require(0)
    story.forget(story.require_whole())
    newest = sorted(story.known.values(), key=lambda point: point.sequence)
    before, full = ({disk["name"]: disk["data"] for disk in story.manifest(point.point)["disks"]} for point in newest)
    for disk, data in full.items():
        if data["cluster_size"] == before[disk]["cluster_size"]:
            assert before[disk]["size"] <= data["size"] * 1.1 + 5 * data["cluster_size"], "space does not come back"


@pytest.mark.parametrize("seed", range(FIRST, END))
def test_a_machines_life(tmp_path, seed):
    story = Story.of(tmp_path / "here", seed)
    try:
        for _ in range(story.rng.randint(6, 14)):
            deed = story.rng.choice([back_up] * 6 + [prune] * 4 + [pin, copy])
            if deed is back_up or story.known:
                deed(story)
        if not story.known:
            story.back_up("full").require(0)
        story.require_whole(deep=True)
        end(story)
    except BaseException as error:
        error.add_note("\n".join(story.told))
        raise


# Struck at every step

SCENE_PRUNE = ("--keep-last", "2", "--batch", "1")


def make_scene(folder: Path, seed: object) -> Story:
    """
    Two disks; points of one and of both; a chain that ended; and one pinned point between two that are shorter than
    what is before and after them.  A prune rewrites fronts and middles, and hides a tail that the pinned point has.
    """
    story = Story.of(folder, f"scene {seed}", disks=2, cluster="4K")
    image = story.images["vda"]
    size = image.size
    story.live()
    story.back_up("full").require(0)
    for each in story.images.values():
        each.play(f"write -P 7 0 {each.size // 1024}k")
    story.back_up("full").require(0)
    image.resize(size // 2 // 512 * 512)
    story.back_up("incremental").require(0)
    image.grow_back(size)
    story.back_up("incremental", ["vda"]).require(0)
    story.live()
    image.play(f"write -P 8 0 {image.size // 1024}k")
    before = set(story.known)
    story.take().require(0)
    [point] = set(story.known) - before
    story.run("pin", f"m/{point}").require(0)
    story.known[point] = story.known[point].pinned_as(True)
    size = image.size
    image.resize(size // 4 * 3 // 4096 * 4096 - 1536)
    story.back_up("incremental").require(0)
    image.grow_back(size)
    story.back_up("incremental", ["vda"]).require(0)
    for _ in range(2):
        story.live()
        story.take().require(0)
    story.live()
    story.require_whole()
    return story


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> Story:
    return make_scene(tmp_path_factory.mktemp("scene") / "here", os.environ.get("SCENE", "0"))


Kind = tuple[str, str, bool]
KILLS: list[Kind] = [(call, "signal=SIGKILL", False) for call in CALLS]
REFUSALS: list[Kind] = [
    (call, f"error={error}", lasting)
    for call, error in [("pwrite64", "ENOSPC"), ("write", "ENOSPC"), ("fsync", "EIO"), ("rename", "EIO")]
    for lasting in (False, True)
]
REFUSALS += [("unlink", "error=EIO", False), ("openat", "error=EIO", False)]


def steps(counts: Mapping[str, int], kinds: Sequence[Kind], every: int) -> list[Strike]:
    """Every so manieth of a run's steps; of those that change names, by which all turns, ten times as many."""
    found = [Strike(call, nth, how, lasting) for call, how, lasting in kinds for nth in range(1, counts[call] + 1)]
    names = [strike for strike in found if strike.call in {"rename", "unlink"}]
    rest = [strike for strike in found if strike not in names]
    often = max(1, every // 10)
    return [*names[FROM % often :: often], *rest[FROM % every :: every]]


def counted(story: Story, *words: str) -> Mapping[str, int]:
    """How often a command makes each of the calls."""
    calls = story.run(*words, strike=Strike(",".join(CALLS), 65535)).require(0).calls
    return {call: calls.get(call, 0) for call in CALLS}


@traceable
@pytest.mark.timeout(3600)
def test_a_prune_that_is_struck_at_any_step_leaves_every_point_whole_and_the_next_goes_on(scene, tmp_path):
    stay = must_stay(list(scene.known.values()), {"last": 2})
    counts = counted(scene.copied(tmp_path / "whole"), "prune", "m", *SCENE_PRUNE)
    assert min(counts[call] for call in CALLS if call != "ftruncate") > 3
    states = set()
    for number, strike in enumerate(steps(counts, KILLS + REFUSALS, EVERY)):
        story = scene.copied(tmp_path / "struck")
        ended = story.prune(*SCENE_PRUNE, strike=strike)
        assert ended.struck
        assert (ended.rc == -9) == (strike.effect == "signal=SIGKILL")
        require_plain(ended, *([2, 12] if strike.call == "openat" else []))  # the configuration; what may be damaged
        if (state := story.state()) in states:
            continue
        states.add(state)
        found = story.require_whole()
        assert stay <= found, f"{strike}: what the policy keeps is gone"
        goes_on(story, stay, backup_first=number % 3 == 0)


def require_plain(ended: Ended, *codes: int) -> None:
    """A command that could not do what it should says so in two lines, and never that something is damaged."""
    if ended.rc > 0:
        assert ended.rc in {1, 3, *codes}, ended
        assert all(line.startswith("pybackup: ") for line in ended.stderr.splitlines()), ended


def goes_on(story: Story, stay: set[str], *, backup_first: bool) -> None:
    """After a prune that was cut off: a backup continues the chain, and the next prune ends what was begun."""
    if backup_first:
        done = story.back_up("incremental").require(0)
        assert "incremental" in done.stdout
        story.require_tidy()
        story.forget(story.require_whole())
        stay = must_stay(list(story.known.values()), {"last": 2})
    story.prune(*SCENE_PRUNE).require(0)
    story.require_tidy()
    assert story.require_whole() == stay


@traceable
@pytest.mark.timeout(3600)
def test_a_backup_that_is_killed_at_any_step_after_a_prune_that_was_too(scene, tmp_path):
    """The backup begins by settling what the prune left; the one after it continues the chain."""
    cut = scene.copied(tmp_path / "cut")
    cut.prune(*SCENE_PRUNE, strike=Strike("rename", 2)).require(-9)  # the file that waits is listed and did not move
    assert any(name.endswith(".new") for name in names(cut.machine))
    for strike in steps(counted(cut.copied(tmp_path / "whole"), "incremental", "m"), KILLS, EVERY * 3):
        story = cut.copied(tmp_path / "struck")
        ended = story.back_up("incremental", strike=strike)
        assert ended.struck
        story.require_whole()
        if ended.rc in {0, -9}:  # else strace killed a program of QEMU's, which may have been writing the bitmap
            assert "incremental" in story.back_up("incremental").require(0).stdout
        else:
            story.back_up("incremental").require(0, 3)
        story.require_whole()
        story.require_tidy()


# A folder in which a prune was cut off


CUTS: list[Kind] = [("rename", "signal=SIGKILL", False), ("unlink", "signal=SIGKILL", False)]


@pytest.fixture(scope="module")
def cut_scenes(scene, tmp_path_factory) -> list[Story]:
    """The scene as prunes leave it that are killed right before each of their renames, and amid their removals."""
    folder = tmp_path_factory.mktemp("cut")
    found, states = [], set()
    for strike in steps(counted(scene.copied(folder / "whole"), "prune", "m", *SCENE_PRUNE), CUTS, EVERY):
        story = scene.copied(folder / f"{strike.call}{strike.nth}")
        story.prune(*SCENE_PRUNE, strike=strike).require(-9)
        if (state := story.state()) not in states:
            states.add(state)
            found.append(story)
    return found


@traceable
@pytest.mark.timeout(600)
def test_every_reader_works_where_a_prune_was_cut_off(cut_scenes, tmp_path):
    for story in cut_scenes:
        before = story.state()
        listed = story.require_whole(deep=True)
        newest = max(listed, key=lambda point: story.known[point].sequence)
        for words in (
            ["list", "m"],
            ["show", f"m/{newest}"],
            ["status", "m"],
            ["prune", "m", *SCENE_PRUNE, "--dry-run"],
        ):
            story.run(*words).require(0)
        for words in (["audit", "m"], ["incremental", "m", "--dry-run"], ["rescan", "m", "--dry-run"]):
            story.run(*words).require(0)
        for disk in story.images:
            require_served(story, newest, disk)
        second = story.at("second")
        story.run("copy", "m", second.repository).require(0)
        assert second.require_whole() == listed
        second.require_tidy()
        shutil.rmtree(second.repository)
        assert story.state() == before, "a reader wrote"
        done = story.back_up("rescan").require(0)
        assert "rescan" in done.stdout
        story.require_tidy()
        story.require_whole()


def require_served(story: Story, point: str, disk: str) -> None:
    """What qemu-nbd serves is what the point holds."""
    with started(["serve", f"m/{point}", "--disk", disk, "--repo", str(story.repository)]) as server:
        uri = next(word for line in server for word in line.split() if word.startswith("nbd+unix:"))
        run("qemu-img", "convert", "-f", "raw", "-O", "raw", uri, story.folder / "served.raw")
    expected = (story.folder / "known" / f"{point}.{disk}.raw").read_bytes()
    assert (story.folder / "served.raw").read_bytes()[: len(expected)] == expected


# A full disk


@pytest.fixture
def small(tmp_path) -> Path:
    """Where a small file system is mounted, in a name space of its own (`alone`)."""
    if os.geteuid() != 0:
        pytest.skip("to mount a small file system takes root")
    folder = tmp_path / "small"
    folder.mkdir()
    return folder


@contextmanager
def filled(folder: Path, *, left: int = 0) -> Iterator[None]:
    """The file system is full but for so many bytes."""
    filler = folder / "filler"
    try:
        with filler.open("wb", buffering=0) as file:
            for length in (1 << 20, 4096):
                with suppress(OSError):
                    while file.write(bytes(length)):
                        pass
        os.truncate(filler, max(0, filler.stat().st_size - left))
        yield
    finally:
        filler.unlink(missing_ok=True)


@traceable
@pytest.mark.timeout(1800)
def test_a_file_system_that_is_full_at_any_step_of_a_prune(scene, tmp_path, small):
    alone(small, lambda: fill_during_prunes(scene, tmp_path, small))


def fill_during_prunes(scene: Story, folder: Path, small: Path) -> None:
    stay = must_stay(list(scene.known.values()), {"last": 2})
    counts = counted(scene.copied(folder / "whole"), "prune", "m", *SCENE_PRUNE)
    for number, strike in enumerate(steps(counts, [(call, "signal=SIGSTOP", False) for call in CALLS], EVERY * 2)):
        for path in small.iterdir():
            shutil.rmtree(path)
        story = scene.copied(folder / "struck").moved_to(small / "repo")
        with ExitStack() as until:
            fill = partial(until.enter_context, filled(small))
            ended = story.prune(*SCENE_PRUNE, strike=strike, while_stopped=fill)
            assert ended.rc in {0, 1}, ended
            assert ended.rc == 0 or "No space left" in ended.stderr or "are free" in ended.stderr, ended
            require_plain(ended)
            found = story.require_whole()
            assert stay <= found
            again = story.prune(*SCENE_PRUNE)
            require_plain(again)
            assert stay <= story.require_whole()
            require_plain(story.back_up("incremental"))  # what was freed meanwhile may be enough for it
            story.forget(story.require_whole())
            still = must_stay(list(story.known.values()), {"last": 2})
        goes_on(story, still, backup_first=number % 2 == 0)


@pytest.mark.timeout(600)
def test_backups_and_prunes_on_a_file_system_with_little_room(scene, tmp_path, small):
    alone(small, lambda: live_in_little_room(scene, tmp_path, small))


def live_in_little_room(scene: Story, folder: Path, small: Path) -> None:
    """Whatever fails for want of room, nothing is lost; with room again everything goes on."""
    story = scene.copied(folder / "here").moved_to(small / "repo")
    for number in range(3 if EVERY > 20 else 12):
        story.live()
        wanted = "rescan" if any(image.regrown for image in story.images.values()) else "incremental"
        with filled(small, left=story.rng.choice([0, 8, 40, 200, 600, 2000]) * 1024):
            require_plain(story.back_up(wanted))
            require_plain(story.prune("--keep-last", "4", "--batch", "1"))
            story.forget(story.require_whole())
        assert wanted in story.back_up(wanted).require(0).stdout
        if number % 2:
            stay = must_stay(list(story.known.values()), {"last": 3})
            story.prune("--keep-last", "3", "--batch", "1").require(0)
            assert story.require_whole() == stay
            story.forget(stay)
        story.require_tidy()


# Readers while points come and go

SECONDS = float(os.environ.get("STORY_SECONDS", "3"))


def may_be_gone(story: Story, point: str, ended: Ended) -> None:
    """A command about a point may fail only where that point is gone, and then says so."""
    if ended.rc:
        ended.require(10)
        assert not (story.machine / f"{point}.json").exists(), ended


def read_restore(story: Story, rng: random.Random, own: Path) -> None:
    point = rng.choice(sorted(story.listed()))
    target = own / "restored.raw"
    ended = story.run("restore", f"m/{point}", target, "--disk", "vda", "--force")
    may_be_gone(story, point, ended)
    if ended.rc == 0:
        expected = story.awaited(point, "vda")
        assert target.read_bytes() == expected.read_bytes(), f"{point} restores to something else"


def read_verify(story: Story, rng: random.Random, own: Path) -> None:
    if rng.random() < 0.5:
        story.run("verify", "m", *rng.choice([[], ["--deep"]])).require(0)
    else:
        point = rng.choice(sorted(story.listed()))
        may_be_gone(story, point, story.run("verify", f"m/{point}"))


def read_overview(story: Story, rng: random.Random, own: Path) -> None:
    words = rng.choice([["list", "m"], ["status", "m"], ["status", "m"], ["show", "m/latest"]])
    story.run(*words).require(0)


def read_plans(story: Story, rng: random.Random, own: Path) -> None:
    ended = story.run("prune", "m", *SCENE_PRUNE, "--dry-run", "--json").require(0)
    assert ended.document[0]["error"] is None


def read_copy(story: Story, rng: random.Random, own: Path) -> None:
    """A copy may lack points that went meanwhile, and names them; what it has is whole."""
    second = story.at(str(own / "second"))
    ended = story.run("copy", "m", second.repository)
    gone = [line for line in ended.stderr.splitlines() if line.startswith("pybackup: error")]
    assert ended.rc in {0, 10}, ended
    for line in gone:
        named = re.search(r"m/(\S+?):", line)
        assert named is not None, line
        assert not (story.machine / f"{named[1]}.json").exists(), ended
    for point in second.listed():
        for disk in ("vda",):
            require_converted(second.machine, f"{disk}.{point}.qcow2", story.awaited(point, disk))
    shutil.rmtree(second.repository)


def read_served(story: Story, rng: random.Random, own: Path) -> None:
    """While a point is served it stays, or its files do; one that goes just then is refused."""
    point = rng.choice(sorted(story.listed()))
    expected = story.awaited(point, "vda").read_bytes()
    with started(["serve", f"m/{point}", "--disk", "vda", "--repo", str(story.repository)]) as server:
        said = [next(server, ""), next(server, "")]
        if "nbd+unix:" in said[1]:
            run("qemu-img", "convert", "-f", "raw", "-O", "raw", said[1].strip(), own / "served.raw")
            assert (own / "served.raw").read_bytes()[: len(expected)] == expected, (
                f"{point} is served as something else"
            )
        else:
            assert not (story.machine / f"{point}.json").exists(), said


READERS = [read_restore, read_verify, read_overview, read_plans, read_copy, read_served]


@pytest.mark.timeout(600 + SECONDS)
def test_readers_see_whole_points_while_backups_and_prunes_go_on(tmp_path):
    """Readers in processes of their own, in loops, while points are taken and removed; none sees anything wrong."""
    story = Story.of(tmp_path / "here", os.environ.get("SCENE", "readers"), disks=1, cluster="4K")
    for _ in range(3):
        story.live()
        story.back_up("full" if story.images["vda"].regrown else "incremental").require(0, 3)
    until = time.monotonic() + SECONDS
    with ExitStack() as readers:
        looked = [readers.enter_context(looping(story, reader, tmp_path, until)) for reader in READERS]
        rounds = 0
        while time.monotonic() < until:
            story.live()
            story.back_up("rescan" if story.images["vda"].regrown else "incremental").require(0, 3)
            rounds += 1
            if rounds % 2 == 0:
                story.prune("--keep-last", str(story.rng.randint(1, 3)), "--batch", "1").require(0)
                story.forget(story.listed())
    assert all(count.stat().st_size for count in looked), "a reader never came to its end"
    story.require_whole()
    story.require_tidy()


@contextmanager
def looping(story: Story, reader: Callable[..., None], folder: Path, until: float) -> Iterator[Path]:
    """Read again and again in a process; its failure is ours.  The file grows with each time."""
    own = folder / reader.__name__
    own.mkdir()
    with apart(lambda: read_until(story, reader, own, until)):
        yield own / "times"


def read_until(story: Story, reader: Callable[..., None], own: Path, until: float) -> None:
    rng = random.Random(reader.__name__)
    with (own / "times").open("ab", buffering=0) as times:
        while time.monotonic() < until:
            reader(story, rng, own)
            times.write(b".")


# A reader that a prune overtakes


def overtaken_readers(story: Story) -> dict[str, list[str]]:
    """Commands that take no lock, or another machine's; `{}` of a point that stays and builds on ones that go."""
    points = sorted(story.known.values(), key=lambda point: point.sequence)
    pinned = next(point.point for point in points if point.pinned)
    restore = ["restore", f"m/{points[-1].point}", str(story.folder / "overtaken.raw"), "--disk", "vda", "--force"]
    return {
        "restore": restore,
        "restore of the pinned": ["restore", f"m/{pinned}", *restore[2:]],
        "verify": ["verify", "m"],
        "verify of one": ["verify", f"m/{points[-1].point}"],
        "list": ["list", "m"],
        "show": ["show", f"m/{points[-1].point}"],
        "status": ["status", "m"],
        "prune": ["prune", "m", *SCENE_PRUNE, "--dry-run"],
        "incremental": ["incremental", "m", "--dry-run"],
        "rescan": ["rescan", "m", "--dry-run"],
        "copy": ["copy", "m", str(story.folder / "second")],
        "copy of one": ["copy", f"m/{points[-1].point}", str(story.folder / "second")],
    }


OVERTAKEN = [
    "restore", "restore of the pinned", "verify", "verify of one", "list", "show", "status", "prune", "incremental",
    "rescan", "copy", "copy of one",
]  # fmt: skip


@traceable
@pytest.mark.timeout(3600)
def test_a_reader_that_is_overtaken_by_a_prune_at_any_open_sees_whole_points(scene, tmp_path):
    """It is stopped before its nth open, a prune runs, to its end or until it is killed, and it goes on."""
    opens = []
    for reader in OVERTAKEN:
        story = scene.copied(tmp_path / "whole")
        calls = story.run(*overtaken_readers(story)[reader], strike=Strike("openat", 65535, alone=True)).calls
        opens += [(reader, nth) for nth in range(1, calls["openat"] + 1)]
    for reader, nth in opens[FROM % (EVERY * 2) :: EVERY * 2]:
        story = scene.copied(tmp_path / "here")
        kill = Strike("rename", nth % 7, "signal=SIGKILL") if nth % 2 and nth % 7 else None
        prune = partial(story.prune, *SCENE_PRUNE, strike=kill)
        words = overtaken_readers(story)[reader]
        ended = story.run(*words, strike=Strike("openat", nth, "signal=SIGSTOP", alone=True), while_stopped=prune)
        require_overtaken_well(story, reader, ended)


@pytest.mark.parametrize("words", [["status", "m"], ["prune", "m", *SCENE_PRUNE, "--dry-run"]], ids=["status", "prune"])
def test_what_was_read_of_a_machine_before_a_prune_is_no_damage_after_it(scene, tmp_path, monkeypatch, words):
    """Of the overtaken readers those that once took the prune for damage, without strace."""
    story = scene.copied(tmp_path / "here")
    stale = [machine_at(story.machine).contents()]
    story.prune(*SCENE_PRUNE).require(0)
    read = Machine.contents
    monkeypatch.setattr(Machine, "contents", lambda self, **how: stale.pop() if stale else read(self, **how))
    done = call_pybackup(["--config", story.config, *words])
    assert not stale
    assert (done.rc, done.stderr) == (0, ""), done


@pytest.mark.parametrize(
    ("word", "owner_and_name"),
    [("incremental", (data_file, "peeked")), ("rescan", (chain_reader, "checked"))],
    ids=["incremental", "rescan"],
)
def test_a_rehearsal_whose_chain_a_prune_changes_foresees_no_full(scene, tmp_path, monkeypatch, word, owner_and_name):
    """The prune comes between the look at the chain and its planning."""
    story = scene.copied(tmp_path / "here")
    prunes = [partial(story.prune, *SCENE_PRUNE)]
    original = getattr(*owner_and_name)

    def overtaken(*arguments, **keywords):
        if prunes:
            prunes.pop()().require(0)
        return original(*arguments, **keywords)

    monkeypatch.setattr(*owner_and_name, overtaken)
    done = call_pybackup(["--config", story.config, word, "m", "--dry-run"])
    assert not prunes
    assert (done.rc, done.stderr) == (0, ""), done
    assert "broken" not in done.stdout


def require_overtaken_well(story: Story, reader: str, ended: Ended) -> None:
    """What it says is true of the folder at some time, and what it made is whole."""
    if reader.startswith("copy"):  # it names those that went before it came to them
        ended.require(0, 10)
        for point in re.findall(r"error: m/(\S+?):", ended.stderr):
            assert not (story.machine / f"{point}.json").exists(), ended
    else:
        ended.require(0)
    if reader.startswith("restore"):
        point = ended.args[3].removeprefix("m/")
        assert same(story.folder / "overtaken.raw", story.folder / "known" / f"{point}.vda.raw")
    if reader.startswith("copy"):
        second = story.at("second")
        second.known = dict(story.ever)
        second.require_whole()
    if reader == "incremental":
        assert "incremental" in ended.stdout
        assert "full" not in ended.stdout
    if reader == "rescan":
        assert "full" not in ended.stdout
