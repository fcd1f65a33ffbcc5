"""
Disks with an iothread: QEMU 7.2.14 and later ones of that series abort when an NBD client leaves such a disk.

A backup that kills the machine is worse than none; so the machine must survive any end of a run, kill -9 included.
"""

import signal
import time

import pytest
from lab import MIB, call_pybackup, run, write
from live import Machine, Nights, Step, lost_in_the_handshake, private_tmp, remove_empty_folders, stopped_at

COPYING = Step("PartFile.put", "after", module="backup.repository.data_file_writer")


@pytest.fixture
def nights(tmp_path):
    """Two disks with a full, and writes after it."""
    with Machine.of(tmp_path, "a", "b") as machine, private_tmp(machine.place):
        machine.iothread = True
        written(machine, "a", 0, 200_000, 0x11)
        found = Nights.of(machine.start())
        found.full()
        machine.quit()
        written(machine, "a", MIB, 2 * MIB, 0x21)
        written(machine, "b", MIB, 300_000, 0x22)
        machine.start()
        yield found


def written(machine, name, offset, length, pattern):
    """While the machine is off: see Machine.iothread."""
    disk = machine.disks[name]
    write(disk.image, f"write -P {pattern} {offset} {length}")
    disk.model[offset : offset + length] = bytes([pattern]) * length


def require_running(machine):
    """Also a moment later: what QEMU closes, its iothread closes in its own time."""
    time.sleep(0.3)
    machine.monitor("query-status")
    assert machine.running, machine.log.read_text()


def test_a_machine_survives_its_backups_and_looks_at_it(nights):
    nights.require_incremental("--no-fallback")
    for look in (["incremental", "--dry-run"], ["full"]):
        assert nights.backup(*look).rc == 0
        require_running(nights.machine)
    bitmap = nights.own_bitmap
    shown = call_pybackup(["map", "--qmp", nights.machine.qmp, "--node", "a", "--bitmap", bitmap, "--totals"])
    assert shown.rc == 0, shown
    require_running(nights.machine)
    nights.require_nothing_left()


@pytest.mark.parametrize(
    "step",
    [
        Step("getfd", "before", 2),  # the first is the server's socket
        Step("getfd", "after", 5),
        Step("Clients.dial", "after", 3, module="backup.qmp.clients"),  # a client in its handshake
        Step("Export._split_contexts", "after", module="backup.nbd.export"),
        COPYING,
        Step("Machine.publish", "after", published=True, module="backup.repository.machine"),
        Step("block-export-del", "after", published=True),
        Step("closefd", "before", published=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
def test_a_machine_survives_any_end_of_a_run(nights, step, number):
    machine, points, held = nights.machine, nights.points(), nights.machine.held()
    with stopped_at(step, nights.arguments("incremental", "--no-fallback")) as run_:
        run_.send_signal(number)
        run_.send_signal(signal.SIGCONT)
        assert run_.wait(60) in {-number, 128 + number}
    require_running(machine)
    nights.references.update(dict.fromkeys(nights.points() - points, held))
    nights.require_making_up("--no-fallback")
    require_running(machine)
    nights.require_own_bitmap_alone()
    remove_empty_folders()
    machine.quit()
    for disk in machine.disks.values():
        assert "No errors" in run("qemu-img", "check", disk.image)


def test_a_machine_that_lost_its_backup_can_still_be_ended(nights):
    """QEMU waits for all requests before it ends; what it would send to the dead must not hold it up."""
    machine = nights.machine
    with stopped_at(COPYING, nights.arguments("incremental")) as run_:
        run_.kill()
        run_.wait(30)
    require_running(machine)
    machine.quit()
    machine.start()
    nights.require_making_up("--no-fallback")


def test_clean_after_a_killed_run_leaves_the_machine_alive(nights):
    with stopped_at(COPYING, nights.arguments("incremental")) as run_:
        run_.kill()
        run_.wait(30)
    nights.require_cleaned()
    require_running(nights.machine)


def test_an_instant_that_is_lost_while_a_disk_is_opened_does_not_hang_the_machine(nights):
    began = time.monotonic()
    with lost_in_the_handshake():
        done = nights.backup("incremental")
    assert (done.rc, "lost in the handshake" in done.stderr) == (13, True), done
    assert time.monotonic() - began < 20
    require_running(nights.machine)
    nights.require_nothing_left()
    nights.require_making_up("--no-fallback")
