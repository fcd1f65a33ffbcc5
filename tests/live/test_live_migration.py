"""
A machine that is migrated is backed up where it runs, and nowhere else.

The QEMU that it left lives on with the images open, and reads from them what they held before.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from lab import MIB, call_pybackup
from live import Machine, Nights, Step, private_tmp, stopped_at

COPYING = Step("PartFile.put", "after", module="backup.repository.data_file_writer")


@pytest.fixture
def nights(tmp_path: Path) -> Iterator[Nights]:
    with Machine.of(tmp_path, "a", "b") as machine, private_tmp(machine.place):
        machine.start().write("a", 0, 200_000, 0x11)
        found = Nights.of(machine)
        found.full()
        machine.write("a", MIB, 1000, 0x21)
        yield found


@pytest.fixture
def there(nights: Nights) -> Iterator[Nights]:
    """The same disks in another QEMU, to which the machine can be migrated."""
    with Machine(nights.machine.folder, *nights.machine.disks.values()) as machine:
        machine.awaited = True
        machine.start()
        yield replace(nights, machine=machine)


def require_refused(nights: Nights, why: str) -> None:
    """Whatever looks at the machine's disks, or changes them, ends with that reason and does nothing."""
    points, bitmaps = nights.points(), [nights.machine.bitmaps(name) for name in nights.machine.disks]
    for wanted in ("full", "incremental", "rescan", "audit"):
        done = call_pybackup(nights.arguments(wanted))
        assert (done.rc, why in done.stderr) == (13, True), done
    place = ["--qmp", nights.machine.qmp]
    for other in (["map", *place, "--node", "a"], ["clean", *place, "--repo", nights.repository]):
        done = call_pybackup(other)
        assert (done.rc, why in done.stderr) == (13, True), done
    assert nights.points() == points
    assert [nights.machine.bitmaps(name) for name in nights.machine.disks] == bitmaps
    nights.require_nothing_left()


@pytest.mark.parametrize("capability", [None, "dirty-bitmaps"])
def test_a_machine_that_was_migrated_is_backed_up_where_it_runs_and_nowhere_else(nights, there, capability):
    """With the capability, the bitmaps that the QEMU it left still has look sound and see no write any more."""
    require_refused(there, "waits for a machine")
    for machine in (nights.machine, there.machine):
        asked = [{"capability": capability, "state": True}] if capability else []
        machine.monitor("migrate-set-capabilities", capabilities=asked)
    assert nights.machine.migrate(there.machine) == "completed"
    there.machine.write("b", 2 * MIB, 1000, 0x22)
    require_refused(nights, "was migrated to another QEMU")
    there.require_incremental("--no-fallback")
    there.require_own_bitmap_alone()


def test_a_migration_during_a_backup_fails_and_both_the_machine_and_the_backup_go_on(nights, there):
    held = nights.machine.held()
    with stopped_at(COPYING, nights.arguments("incremental", "--no-fallback")) as run:
        assert nights.machine.migrate(there.machine) == "failed"
        nights.machine.write("a", 0, 1000, 0x31)
        run.send_signal(signal.SIGCONT)
        assert run.wait(60) == 0
    [new] = nights.points() - set(nights.references)
    nights.references[new] = held
    nights.require_incremental("--no-fallback")
