"""
Random histories of real images under the real commands: every point that is kept restores bit for bit, by pybackup and
by QEMU alone, whatever was cut off when; and space comes back.

STORIES=FIRST:END tells other stories, STRIKES=EVERY:FROM strikes at every EVERYth step of those that there are, from
the FROMth on; `1:0` at each of them.
"""

from __future__ import annotations

import os
import random

import pytest
from stories import CALLS, Strike, Story, may_trace, must_stay, names

FIRST, END = (int(number) for number in os.environ.get("STORIES", "0:4").split(":"))
EVERY, FROM = (int(number) for number in os.environ.get("STRIKES", "12:0").split(":"))

traceable = pytest.mark.skipif(may_trace() is not None, reason=str(may_trace()))


def any_strike(rng: random.Random) -> dict[str, object]:
    """A kill at some moment or at some step, or a refusal."""
    if may_trace() is not None or rng.random() < 0.4:
        return {"kill_after": rng.uniform(0.01, 1.0) ** 2}
    call = rng.choice(CALLS)
    effect = rng.choice(["signal=SIGKILL", "signal=SIGKILL", "error=ENOSPC", "error=EIO", "signal=SIGTERM"])
    if effect.startswith("error") and call == "openat":
        call = "fsync"  # what cannot be opened at all is another story
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
        wanted = rng.choice(["rescan", "full"])  # as README says: no bitmap sees all of that
    if rng.random() < 0.3:
        ended = story.back_up(wanted, disks, **any_strike(rng))
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
    [report] = story.prune(*options).require(0).document
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
    except BaseException:
        print("\n".join(story.told))
        raise
