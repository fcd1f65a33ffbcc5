"""`pybackup prune`, `pin` and `unpin` as people and scripts use them."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest
from forge import replaced
from histories import History
from lab import Night, call_pybackup, check_repository, restore_and_cmp, write
from places import folder_of

POINT_FIELDS = ["point", "sequence", "created", "action", "reasons"]
REWRITE_FIELDS = ["point", "disk", "kind", "merged", "read_bytes", "stored_before", "stored_after"]
FUTURE_CLOCK = datetime(2099, 1, 1, 1, tzinfo=UTC)
FIELDS = ["machine", "points", "rewrites", "freed_bytes", "warnings", "dry_run", "error"]


@pytest.fixture
def history(tmp_path) -> History:
    """Six points of one disk, a day apart."""
    made = History.of(tmp_path, "command", 4096)
    for number in range(6):
        made.point("vda", full=number == 0, size=20 * 4096)
    return made


def prune(history: History, *options: str):
    return call_pybackup(["prune", "--repo", folder_of(history.machine).parent, *options])


def points(history: History) -> list[str]:
    return [found.point for found in sorted(history.manifests().values(), key=lambda found: found.sequence)]


def files(history: History) -> dict[str, tuple[int, int]]:
    return {
        path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder_of(history.machine).glob("*.*")
    }


def test_a_dry_run_says_what_a_run_then_does(history):
    before, names = files(history), points(history)
    options = ["--keep-last", "2", "--keep-weekly", "1", "--batch", "1", "--json"]
    planned = prune(history, "--dry-run", *options)
    assert (planned.rc, planned.stderr) == (0, "")
    assert files(history) == before
    done = prune(history, *options)
    assert (done.rc, done.stderr) == (0, "")
    [plan], [did] = planned.document, done.document
    assert (list(plan), list(did)) == (FIELDS, FIELDS)
    assert (plan["dry_run"], did["dry_run"]) == (True, False)
    assert plan["points"] == did["points"]
    assert [list(point) for point in plan["points"]] == [POINT_FIELDS] * 6
    assert [(point["point"], point["action"]) for point in plan["points"]] == [
        *((name, "remove") for name in names[:4]),
        *((name, "keep") for name in names[4:]),
    ]
    assert plan["points"][-1]["reasons"] == ["newest", "last", "weekly"]
    [planned_rewrite], [rewrite] = plan["rewrites"], did["rewrites"]
    assert list(rewrite) == REWRITE_FIELDS
    assert rewrite["merged"] == names[3::-1]
    assert (rewrite["point"], rewrite["disk"], rewrite["kind"]) == (names[4], "vda", "full")
    assert planned_rewrite["stored_after"] >= rewrite["stored_after"] > 0
    assert points(history) == names[4:]
    history.require_whole()
    history.require_tidy()
    assert did["freed_bytes"] == stored(before) - stored(files(history))
    assert prune(history, *options).document[0]["points"] == did["points"][4:]


def stored(found: dict[str, tuple[int, int]]) -> int:
    return sum(size for name, (size, _) in found.items() if name.endswith(".qcow2"))


def test_a_dry_run_for_people_has_a_line_for_each_point_and_each_rewrite(history, tmp_path):
    names = points(history)
    config = tmp_path / "c.yaml"
    config.write_text("repository: repo\nretention: {yearly: 9, share: 1000}\n")
    done = call_pybackup(
        ["--config", config, "prune", "--keep-last", "3", "--keep-within", "1d", "--batch", "9", "--dry-run"]
    )
    head, *lines, total = done.stdout.splitlines()
    assert head.split() == ["MACHINE", "POINT", "CREATED", "ACTION", "WHY"]
    assert [line.split()[1:4:2] for line in lines[:6]] == [[n, "wait"] for n in names[:3]] + [
        [n, "keep"] for n in names[3:]
    ]
    assert lines[0].endswith("until 9 points can be removed at once, or points with 1000 % of the full's bytes")
    assert lines[5].endswith("newest, within 1d, last")
    assert total.startswith("m: would remove 0 of 6 points, 3 waiting, 0 data files rewritten")
    done = prune(history, "--keep-last", "3", "--batch", "3")
    assert done.stdout.startswith("m: removed 3 of 6 points, 1 data file rewritten")
    assert len(done.stdout.splitlines()) == 1


def test_a_pinned_point_stays_until_it_is_unpinned(history, tmp_path):
    names, repo = points(history), folder_of(history.machine).parent
    assert (
        call_pybackup(["pin", f"m/{names[1]}", "--repo", repo]).stdout == f"point {names[1]} of machine m is pinned\n"
    )
    again = call_pybackup(["pin", folder_of(history.machine) / f"{names[1]}.json"])
    assert again.stdout == f"point {names[1]} of machine m is pinned already\n"
    history.require_tidy()
    copy = history.copied(tmp_path / "elsewhere")
    assert prune(copy, "--keep-last", "1", "--batch", "1").rc == 0
    assert points(copy) == [names[1], names[5]]
    copy.require_whole()
    listed = call_pybackup(["list", "--repo", folder_of(copy.machine).parent, "--json"]).document
    assert [point["pinned"] for point in listed] == [True, False]
    listed = call_pybackup(["list", "--repo", folder_of(copy.machine).parent]).stdout.splitlines()
    assert [line.endswith("  pinned") for line in listed] == [False, True, False]
    assert "pinned" in call_pybackup(["show", f"m/{names[1]}", "--repo", folder_of(copy.machine).parent]).stdout
    assert call_pybackup(["unpin", f"m/{names[1]}", "--repo", folder_of(copy.machine).parent]).rc == 0
    assert prune(copy, "--keep-last", "1", "--batch", "1").rc == 0
    assert points(copy) == [names[5]]
    copy.require_whole()
    copy.require_tidy()


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ([], "nothing says which points of machine m to keep"),
        (["--keep-last", "0"], "keep nothing"),
        (["--keep-last", "-1"], "'-1' is not a count"),
        (["--keep-daily", "many"], "'many' is not a count"),
        (["--keep-within", "30"], "'30' is not a duration"),
        (["--keep-last", "1", "--batch", "0"], "'0' is not a count"),
    ],
)
def test_wrong_usage_is_2_and_removes_nothing(history, options, what):
    before = files(history)
    done = prune(history, *options)
    assert done.rc == 2
    assert what in done.stderr
    assert len(done.stderr.splitlines()) == 2
    assert files(history) == before


def test_a_damaged_manifest_anywhere_refuses_the_machine(history):
    names = points(history)
    path = folder_of(history.machine) / f"{names[0]}.json"
    with replaced(path, path.read_bytes().replace(b"test", b"tes!")):
        before = files(history)
        for options in (["--dry-run"], []):
            done = prune(history, "--keep-last", "1", *options)
            assert done.rc == 12
            assert "is not pruned" in done.stderr
            assert len(done.stderr.splitlines()) == 2
            assert files(history) == before


def test_a_broken_chain_refuses_the_machine(history):
    names = points(history)
    (folder_of(history.machine) / f"{names[2]}.json").unlink()
    before = files(history)
    done = prune(history, "--keep-last", "1", "--dry-run", "--json")
    assert done.rc == 10
    assert done.document[0]["error"]["code"] == 10
    assert files(history) == before


def test_damage_in_a_file_that_is_merged_removes_nothing(history):
    names = points(history)
    path = folder_of(history.machine) / f"vda.{names[4]}.qcow2"
    content = bytearray(path.read_bytes())
    content[4096 + 100] ^= 1
    before = files(history)
    with replaced(path, bytes(content)):
        assert prune(history, "--keep-last", "2", "--batch", "1").rc == 12
    assert set(files(history)) == set(before)
    assert points(history) == names


def test_other_machines_are_pruned_when_one_cannot_be(history):
    other = folder_of(history.machine).parent / "a"
    other.mkdir()
    (other / "20260101T010000Z-00000001.json").write_text("{}")
    done = prune(history, "--keep-last", "1", "--batch", "1", "--json")
    assert done.rc == 12
    assert [found["error"] and found["error"]["code"] for found in done.document] == [12, None]
    assert len(points(history)) == 1
    assert prune(history, "m", "--keep-last", "1").rc == 0
    assert prune(history, "nobody", "--keep-last", "1").rc == 10


def test_a_folder_without_points_is_left_alone(history):
    other = folder_of(history.machine).parent / "notes"
    other.mkdir()
    (other / "a.txt").write_text("a")
    assert prune(history, "--keep-last", "9").rc == 0
    assert [path.name for path in other.iterdir()] == ["a.txt"]


def test_too_little_space_is_said_before_a_rewrite_and_what_needs_none_goes(history, monkeypatch):
    for _ in range(3):
        history.point("vda", full=True, size=20 * 4096)
    names = points(history)
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=1000, f_frsize=4096))
    options = ["--keep-last", "1", "--batch", "1"]
    call_pybackup(["pin", f"m/{names[2]}", "--repo", folder_of(history.machine).parent])
    planned = prune(history, "--dry-run", *options)
    assert planned.rc == 3
    assert "bytes" in planned.stderr
    assert points(history) == names
    done = prune(history, *options)
    assert done.rc == 1
    assert f"a rewrite of disk vda of point {names[2]} needs" in done.stderr
    assert "4096000 (3.9 MiB) are free" in done.stderr or "are free" in done.stderr
    assert points(history) == [*names[:3], names[8]], "what needs no rewriting went"
    history.require_whole()
    monkeypatch.undo()
    assert prune(history, *options).rc == 0
    assert points(history) == [names[2], names[8]]
    history.require_tidy()


def test_a_locked_machine_is_11(history):
    with history.machine.lock():
        assert prune(history, "--keep-last", "1").rc == 11
        assert prune(history, "--keep-last", "1", "--dry-run").rc == 0
        assert call_pybackup(["pin", f"m/{points(history)[0]}", "--repo", folder_of(history.machine).parent]).rc == 11


def test_the_configurations_words_and_a_machines_own(history, tmp_path):
    names = points(history)
    config = tmp_path / "c.yaml"
    disks = "{disks: {vda: {image: x.qcow2}}"
    config.write_text(f"repository: repo\nretention: {{last: 2, batch: 1}}\nmachines:\n  m: {disks}}}\n")
    done = call_pybackup(["--config", config, "prune", "--dry-run", "--json"])
    assert [point["action"] for point in done.document[0]["points"]] == ["remove"] * 4 + ["keep"] * 2
    own = "retention: {within: 2d, share: 1000}"
    config.write_text(f"repository: repo\nretention: {{last: 2, batch: 1}}\nmachines:\n  m: {disks}, {own}}}\n")
    done = call_pybackup(["--config", config, "prune", "--dry-run", "--json"])
    assert [point["action"] for point in done.document[0]["points"]] == ["wait"] * 4 + ["keep"] * 2
    done = call_pybackup(["--config", config, "prune", "--dry-run", "--keep-last", "9", "--json"])
    assert {point["action"] for point in done.document[0]["points"]} == {"keep"}
    assert points(history) == names


def test_a_prune_after_each_backup(tmp_path):
    night = Night.of(tmp_path)
    config = tmp_path / "c.yaml"
    head = (
        f"repository: {night.repository}\nbitmap: b1\nmachines:\n  disk: {{disks: {{disk: {{image: disk.qcow2}}}}}}\n"
    )
    config.write_text(head + "retention: {last: 2, batch: 2, after_backup: true}\n")
    for number in range(6):
        write(night.image, f"write -P {number} {number * 70}k 64k")
        done = call_pybackup(["--config", config, "incremental"])
        assert (done.rc, done.stderr) == (0, ""), done
    kept = sorted(night.repository.glob("disk/*.json"))
    assert len(kept) in (2, 3)
    assert "note: disk: removed" in done.stdout
    restore_and_cmp(night.repository, "disk/latest", night.image)
    check_repository(night.repository)
    kinds = [json.loads(path.read_bytes())["disks"][0]["kind"] for path in kept]
    assert sorted(kinds) == ["full"] + ["incremental"] * (len(kept) - 1)
    assert call_pybackup(["verify", "--deep", "--repo", night.repository]).rc == 0
    # What keeps it from pruning is a warning: the point is made.
    damaged = kept[0].with_name("20200101T000000Z-00000000.json")
    damaged.write_text("{}")
    write(night.image, "write -P 9 0 64k")
    done = call_pybackup(["--config", config, "incremental", "--json"])
    assert done.rc == 3
    assert any("not pruned: " in warning for warning in done.machine["warnings"])
    assert done.machine["point"] is not None


# Clocks that were wrong


def test_a_point_of_a_future_clock_removes_no_other_and_is_told_once(history):
    """The night's own clock said 2099, and so did the manifest."""
    history.started = FUTURE_CLOCK
    history.point("vda")
    names = points(history)
    planned = prune(history, "--dry-run", "--keep-within", "30d", "--json")
    assert (planned.rc, [point["action"] for point in planned.document[0]["points"]]) == (3, ["keep"] * 7)
    assert planned.document[0]["points"][-1]["reasons"] == ["newest", "its time is in the future"]
    [warning] = planned.document[0]["warnings"]
    assert names[-1] in warning
    assert "clock" in warning
    history.started = datetime(2026, 1, 1, 1, tzinfo=UTC)
    history.point("vda")
    planned = prune(history, "--dry-run", "--keep-daily", "7", "--json")
    assert [point["action"] for point in planned.document[0]["points"]] == ["keep"] * 8
    assert (planned.rc, planned.document[0]["warnings"]) == (0, []), "the clock is right again"
    assert prune(history, "--keep-daily", "2", "--batch", "1").rc == 0
    assert points(history) == names[5:] + points(history)[-1:]
    history.require_whole()


def test_a_backup_of_a_host_whose_clock_is_years_ahead_prunes_nothing_more(tmp_path, monkeypatch):
    night = Night.of(tmp_path, "4M")
    config = tmp_path / "c.yaml"
    config.write_text(
        f"repository: {night.repository}\nbitmap: b1\nretention: {{within: 4d, after_backup: true, batch: 1}}\n"
        f"machines: {{disk: {{disks: {{disk: {{image: {night.image}}}}}}}}}\n"
    )
    made = []
    for clock in ("2026-11-25", "2026-11-26", "2026-11-27", "2036-02-03", "2026-11-28"):

        class Clock(datetime):
            """The host's clock in this night."""

            @classmethod
            def now(cls, tz=None, text=clock):
                return datetime.fromisoformat(text).replace(tzinfo=tz)

        monkeypatch.setattr("backup.operations.backup.datetime", Clock)
        monkeypatch.setattr("backup.operations.prune.datetime", Clock)
        done = call_pybackup(["--config", config, "incremental"])
        made.append(done.rc)
        assert ("check this host's clock" in done.stderr) == clock.startswith("2036"), done
    assert made == [0, 0, 0, 3, 0]
    assert len(list((night.repository / "disk").glob("*.json"))) == 5
    check_repository(night.repository)
