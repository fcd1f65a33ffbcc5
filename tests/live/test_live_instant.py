"""
A point is one instant of all disks, however much the guest writes meanwhile.

The guest numbers its writes and makes each to one disk and then to another, so that at any instant the first disk is
ahead by one number or none.
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from lab import MIB, call_pybackup, raw_copy, run_pybackup
from live import Machine, Nights, Step, Writer, disks_of, private_tmp, stopped_at

MOMENTS = [
    Step("transaction", "after"),
    Step("block-export-add", "after", 1),
    Step("PartFile.put", "after", module="backup.repository.data_file_writer"),
]


@pytest.fixture
def nights(tmp_path: Path):
    with Machine.of(tmp_path, "a", "b", size=Writer.END) as machine, private_tmp(machine.place):
        machine.start().write("a", 0, MIB, 0x61)
        yield Nights.of(machine)


def counts(nights: Nights, point: str) -> tuple[int, int]:
    """The numbers that the two disks of a point hold, restored by the program."""
    folder = nights.machine.folder / "restored.tmp"
    done = call_pybackup(["restore", f"m/{point}", folder, "--repo", nights.repository])
    assert done.rc == 0, done.stderr
    found = tuple(Writer.count((folder / f"{name}.raw").read_bytes()) for name in ("a", "b"))
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    return found


def counts_by_qemu(nights: Nights, point: str) -> tuple[int, int]:
    """The same, read by qemu-img from the data files."""
    found = []
    for name in disks_of(nights.repository, point):
        data = nights.repository / "m" / f"{name}.{point}.qcow2"
        raw = raw_copy(data, nights.machine.folder / "counted.tmp")
        found.append(Writer.count(raw.read_bytes()))
        raw.unlink()
    return found[0], found[1]


def under_fire(nights: Nights, writer: Writer, wanted: str, step: Step | None) -> str:
    """A backup while the guest writes; it stands still at the step until everything was overwritten.  The new point."""
    points, arguments = nights.points(), nights.arguments(wanted)
    if step is None:
        done = run_pybackup(arguments)
        assert (done.rc, done.stderr) == (0, "")
    else:
        with stopped_at(step, arguments) as run:
            writer.wait_for(Writer.SLOTS + 1)
            run.send_signal(signal.SIGCONT)
            assert run.wait(100) == 0
    [new] = nights.points() - points
    return new


def test_all_disks_of_a_point_are_of_one_instant_while_the_guest_writes(nights):
    taken = []
    with Writer(nights.machine, "a", "b") as writer:
        writer.wait_for(Writer.SLOTS + 1)
        for wanted, step in (("full", MOMENTS[0]), *(("incremental", step) for step in (*MOMENTS, None))):
            before = writer.written
            point = under_fire(nights, writer, wanted, step)
            taken.append((before, point, writer.written))
            writer.wait_for(3)
    assert writer.error is None
    for before, point, after in taken:
        a, b = counts(nights, point)
        assert before <= b <= a <= b + 1
        assert a <= after
        assert after > a + 1, "the guest wrote after the instant"
        assert counts_by_qemu(nights, point) == (a, b)
    nights.references = {point: {} for _, point, _ in taken}
    nights.require_nothing_left()
    done = nights.backup("incremental")
    assert (done.rc, done.stderr) == (0, "")
    newest = nights.newest["point"]
    nights.require_point(newest, nights.references[newest])
    assert [disk["kind"] for disk in nights.newest["disks"]] == ["incremental", "incremental"]
    nights.machine.quit()


def test_a_writer_that_a_backup_only_looked_at_between_two_writes_would_be_found_out(nights):
    """The judge can say no: two disks that were read one after the other are not one instant."""
    machine = nights.machine
    with Writer(machine, "a", "b") as writer:
        writer.wait_for(5)
        first = bytes(machine.disks["a"].model)
        writer.wait_for(5)
        second = bytes(machine.disks["b"].model)
    assert not Writer.count(second) <= Writer.count(first) <= Writer.count(second) + 1
