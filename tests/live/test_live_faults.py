"""
What can go wrong around a backup of a running machine ends in an error, no point, and a machine that goes on.

A connection that breaks, a QEMU that dies, a socket that another program has, a scratch folder without space.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

import pytest
from lab import MIB, PYBACKUP, call_pybackup
from lab import run as run_program
from live import (
    Machine,
    Nights,
    Qmp,
    Step,
    below_the_guest,
    kinds,
    lost_in_the_handshake,
    private_tmp,
    remove_empty_folders,
    stopped_at,
    wait_until,
)

from backup.errors import Failed
from backup.nbd.export import Lane
from backup.qmp import answers, leftovers, monitor
from backup.qmp import scratch as scratch_files
from backup.qmp.instant import Instant
from backup.qmp.monitor import Monitor

COPYING = Step("PartFile.put", "after", module="backup.repository.data_file_writer")
EXPORTED = Step("block-export-add", "after", 2)
MOMENTS = [
    Step("add-fd", "after", 2),
    Step("transaction", "before"),
    Step("transaction", "after"),
    EXPORTED,
    COPYING,
]
ALL_READ = Step("Instant.require_sound", "before", module="backup.qmp.instant")
"""All is read, and not yet known to be sound."""
LOOKED = Step("blockdev-add", "before")
"""The run knows the disks and has changed nothing."""
READ = Step("Machine.publish", "before", module="backup.repository.machine")
"""All is read, and known to be sound."""


@pytest.fixture
def nights(tmp_path: Path):
    with Machine.of(tmp_path, "a", "b") as machine, private_tmp(machine.place):
        machine.start()
        machine.write("a", 0, 200_000, 0x11)
        machine.write("b", MIB, 300_000, 0x12)
        found = Nights.of(machine)
        found.full()
        machine.write("a", 2 * MIB, 700_000, 0x21)
        machine.write("b", 100_000, 1000, 0x22)
        yield found


def ended(run: subprocess.Popen[str]) -> int:
    """Let a run go on from where it stands still; how it ends."""
    run.send_signal(signal.SIGCONT)
    return run.wait(60)


# The connection is cut


class Cable:
    """A socket that leads to a machine's QMP, descriptors included, until it is cut."""

    def __init__(self, machine: Machine) -> None:
        self._to = machine.qmp
        self.path = machine.place / "cable"
        self._ends: list[socket.socket] = []
        self._pumps: list[threading.Thread] = []

    def __enter__(self) -> Self:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen(4)
        self._accepting = threading.Thread(target=self._accept)
        self._accepting.start()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.join(20)
        self._listener.close()
        self.cut()

    def cut(self, *, for_good: bool = False) -> None:
        """End all connections; `for_good`: nobody listens any more either."""
        if for_good:
            self._listener.shutdown(socket.SHUT_RDWR)
        for end in self._ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for pump in self._pumps:
            pump.join(20)
            assert not pump.is_alive()
        for end in self._ends:
            end.close()
        self._ends, self._pumps = [], []

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.socket(socket.AF_UNIX)
                far.connect(str(self._to))
                self._ends += [near, far]
                for one, other in ((near, far), (far, near)):
                    pump = threading.Thread(target=_pump, args=(one, other))
                    self._pumps.append(pump)
                    pump.start()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while True:
            data, fds, _, _ = socket.recv_fds(source, 65536, 8)
            if not data:
                break
            socket.send_fds(sink, [data], fds)
            for fd in fds:
                os.close(fd)
    for end in (source, sink):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


def through(cable: Cable, nights: Nights) -> list[str | Path]:
    """An incremental's arguments, with the cable for the machine's socket."""
    given = nights.arguments("incremental", "--no-fallback")
    return [cable.path if word == nights.machine.qmp else word for word in given]


@pytest.mark.parametrize("step", [*MOMENTS[::2], ALL_READ], ids=str)
def test_a_connection_that_is_cut_is_an_error_and_the_next_run_makes_up_for_it(nights, step):
    points = nights.points()
    with Cable(nights.machine) as cable, stopped_at(step, through(cable, nights)) as run:
        cable.cut(for_good=True)
        nights.machine.write("a", MIB, 1000, 0x31)
        assert ended(run) == 13
    assert nights.points() == points
    nights.require_making_up("--no-fallback")
    nights.require_own_bitmap_alone()


@pytest.mark.parametrize("step", MOMENTS, ids=str)
def test_after_a_cut_nothing_is_left_when_the_machine_can_be_reached_again(nights, step):
    """A guest must not stand under a job of ours until the next night."""
    points = nights.points()
    with Cable(nights.machine) as cable, stopped_at(step, through(cable, nights)) as run:
        cable.cut()
        nights.machine.write("a", MIB, 1000, 0x31)
        assert ended(run) == 13
    assert nights.points() == points
    nights.require_nothing_left()
    nights.require_making_up("--no-fallback")
    nights.require_own_bitmap_alone()


def test_after_a_cut_a_guest_that_our_scratch_folder_stopped_goes_on(nights, monkeypatch):
    resumed, execute = [], Monitor.command
    monkeypatch.setattr(leftovers, "stopped_guest", lambda blocks, found: bool(found.jobs))
    monkeypatch.setattr(leftovers, "resume", resumed.append)
    with Cable(nights.machine) as cable:

        def command(self, name, arguments=None):
            if name == "block-export-add":
                cable.cut()
            return execute(self, name, arguments)

        monkeypatch.setattr(Monitor, "command", command)
        assert call_pybackup(through(cable, nights)).rc == 13
    assert len(resumed) == 1
    nights.require_nothing_left()


def test_a_connection_that_is_cut_when_all_is_read_is_a_point_with_a_warning(nights):
    held = nights.machine.held()
    with Cable(nights.machine) as cable, stopped_at(READ, through(cable, nights)) as run:
        cable.cut(for_good=True)
        nights.machine.write("a", MIB, 1000, 0x31)
        assert ended(run) == 3
    nights.references[nights.newest["point"]] = held
    nights.require_restored()
    nights.require_making_up("--no-fallback")
    nights.require_own_bitmap_alone()


# QEMU ends


@pytest.mark.parametrize("step", MOMENTS, ids=str)
def test_a_qemu_that_is_killed_is_an_error_and_the_next_run_a_rescan(nights, step):
    points = nights.points()
    with stopped_at(step, nights.arguments("incremental")) as run:
        nights.machine.write("a", MIB, 1000, 0x31)
        nights.machine.kill()
        assert ended(run) == 13
    assert nights.points() == points
    nights.require_nothing_left()
    nights.machine.start()
    nights.require_rescans("is missing")
    nights.require_restored()


def test_a_qemu_that_hangs_is_waited_for_once(nights, monkeypatch):
    """Not once more for each thing to tidy up, which the next run does."""
    for name, seconds in (("_COMMAND_SECONDS", 6.0), ("_HUNG_SECONDS", 0.2), ("_GREETING_SECONDS", 0.2)):
        monkeypatch.setattr(monitor, name, seconds)
    execute = Monitor.command

    def command(self, name, arguments=None):
        if name == "transaction":
            nights.machine.process.send_signal(signal.SIGSTOP)
        return execute(self, name, arguments)

    began = time.monotonic()
    with monkeypatch.context() as patched:
        patched.setattr(Monitor, "command", command)
        done = nights.backup("incremental")
    took = time.monotonic() - began
    nights.machine.process.send_signal(signal.SIGCONT)
    assert done.rc == 13, done
    assert "did not answer transaction" in done.machine["error"]["message"]
    assert took < 2 * 6.0
    nights.require_making_up("--no-fallback")
    nights.require_own_bitmap_alone()


def test_a_qemu_that_is_killed_when_all_is_read_leaves_a_point(nights):
    held = nights.machine.held()
    with stopped_at(READ, nights.arguments("incremental")) as run:
        nights.machine.write("a", MIB, 1000, 0x31)
        nights.machine.kill()
        assert ended(run) == 3
    nights.references[nights.newest["point"]] = held
    nights.require_sound()
    nights.machine.start()
    nights.require_fallback("is missing")


def test_a_machine_that_is_shut_down_during_a_backup_keeps_its_bitmaps(nights):
    points = nights.points()
    with stopped_at(COPYING, nights.arguments("incremental")) as run:
        nights.machine.write("a", MIB, 1000, 0x31)
        nights.machine.quit()
        assert ended(run) == 13
    assert nights.points() == points
    nights.require_nothing_left()
    nights.machine.start()
    nights.require_making_up("--no-fallback")
    nights.require_own_bitmap_alone()


def test_a_job_that_somebody_cancels_makes_no_point(nights):
    """What is read from then on is what the disk holds now."""
    points = nights.points()
    with stopped_at(COPYING, nights.arguments("incremental")) as run:
        for job in nights.machine.monitor("query-jobs"):
            nights.machine.monitor("job-cancel", id=job["id"])
        wait_until(lambda: not nights.machine.monitor("query-jobs"), "end of the jobs")
        nights.machine.write("a", 2 * MIB, 700_000, 0x31)
        assert ended(run) == 13
    assert nights.points() == points
    nights.require_nothing_left()
    nights.require_making_up("--no-fallback")
    nights.require_own_bitmap_alone()


# The socket


def test_a_socket_that_another_program_has_is_an_error_within_seconds(nights):
    other = Qmp(nights.machine.qmp)
    began = time.monotonic()
    done = nights.backup("incremental")
    assert time.monotonic() - began < 20
    other.close()
    assert done.rc == 13, done
    assert str(nights.machine.qmp) in done.machine["error"]["message"]
    assert "second" in done.machine["error"]["hint"]
    nights.require_incremental("--no-fallback")


def test_no_socket_no_listener_and_no_qmp_are_errors(nights):
    place = nights.machine.place
    (place / "file").touch()
    deaf = socket.socket(socket.AF_UNIX)
    deaf.bind(str(place / "deaf"))
    for name, why in (("none", "No such file"), ("file", "refused"), ("deaf", "refused")):
        given = [place / name if word == nights.machine.qmp else word for word in nights.arguments("full")]
        done = call_pybackup(given)
        assert done.rc == 13, done
        assert why in done.stderr
        assert len(done.stderr.splitlines()) == 2
    deaf.close()
    with babbling(place / "babbler") as address:
        given = [address if word == nights.machine.qmp else word for word in nights.arguments("full")]
        done = call_pybackup(given)
    assert done.rc == 13, done
    assert len(done.stderr.splitlines()) == 2, done


@contextmanager
def babbling(address: Path) -> Iterator[Path]:
    """A server of another protocol."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(address))
        listener.listen(1)

        def serve() -> None:
            with suppress(OSError):
                while True:
                    client, _ = listener.accept()
                    with client:
                        client.sendall(b"220 mail.example ESMTP\r\n")

        thread = threading.Thread(target=serve)
        thread.start()
        yield address
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(20)


@pytest.mark.parametrize("node", ["nope", "a.qcow2", ""])
def test_a_node_that_the_machine_does_not_have(nights, node):
    done = nights.backup_of("full", "--node", node, "--disk", "a")
    assert done.rc in {2, 13}, done
    assert "a" in done.machine["error"]["hint"]
    nights.require_incremental("--no-fallback")


@pytest.mark.parametrize("again", ["a", "dev-a"])
def test_one_disk_named_twice(nights, again):
    done = nights.backup_of("full", "--node", "a", "--disk", "x", "--node", again, "--disk", "y")
    assert done.rc == 2, done
    assert "same disk" in done.machine["error"]["message"]
    nights.require_incremental("--no-fallback")


def test_a_disk_that_is_unplugged_between_two_nights_is_an_error_that_names_it(nights):
    nights.machine.unplug("b")
    done = nights.backup("incremental")
    assert done.rc == 13, done
    assert "'b'" in done.machine["error"]["message"]
    done = nights.backup_of("incremental", "--node", "a", "--disk", "a")
    assert (done.rc, kinds(done)) == (0, {"incremental"}), done
    nights.require_sound()


# The disk is resized under the run


def test_a_disk_that_is_resized_while_the_run_looks_at_it(nights):
    """The overlay has the old size, QEMU refuses the transaction for both disks, and the run looks again."""
    with stopped_at(LOOKED, nights.arguments("incremental")) as run:
        nights.machine.resize("b", 5 * MIB)
        nights.machine.write("b", 5 * MIB - 512, 512, 0x41)
        assert ended(run) == 0
    [new] = nights.points() - set(nights.references)
    nights.references[new] = nights.machine.held()
    nights.require_sound()
    nights.require_own_bitmap_alone()
    nights.require_incremental("--no-fallback")


def test_a_bitmap_that_is_disabled_while_the_run_looks_at_it(nights):
    """QEMU takes it into the transaction without a word; what the guest wrote since is not in it."""
    with stopped_at(LOOKED, nights.arguments("incremental")) as run:
        nights.machine.monitor("block-dirty-bitmap-disable", node="a", name=nights.own_bitmap)
        nights.machine.write("a", MIB, 1000, 0x42)
        assert ended(run) == 3
    require_fallback_point(nights, "is disabled")


def test_an_external_snapshot_that_is_taken_while_the_run_looks_at_the_disk(nights):
    """The guest writes to another node than the one that the run has chosen."""
    with stopped_at(LOOKED, nights.arguments("incremental")) as run:
        below_the_guest(nights.machine, "a")
        nights.machine.write("a", MIB, 1000, 0x42)
        assert ended(run) == 3
    require_fallback_point(nights, "backing")


def require_fallback_point(nights: Nights, reason: str) -> None:
    """The new point is a rescan of disk "a" for the reason, and an incremental of "b"."""
    [new] = nights.points() - set(nights.references)
    nights.references[new] = nights.machine.held()
    first, second = nights.newest["disks"]
    assert (first["kind"], second["kind"]) == ("incremental", "incremental")
    assert first["reason"].startswith("rescan: ")
    assert reason in first["reason"]
    assert "rescan" not in second["reason"]
    nights.require_sound()
    nights.machine.write("a", MIB, 2000, 0x43)
    nights.require_making_up("--no-fallback")  # a bitmap of the first try may lie on the node that is lower now
    nights.require_incremental("--no-fallback")
    nights.require_own_bitmap_alone()


def test_a_bitmap_that_is_removed_while_the_run_looks_at_it(nights):
    with stopped_at(Step("transaction", "before"), nights.arguments("incremental", "--no-fallback")) as run:
        nights.machine.monitor("block-dirty-bitmap-remove", node="b", name=nights.own_bitmap)
        assert ended(run) in {13, 14}
    nights.require_nothing_left()
    nights.require_fallback("is missing", only=["b"])


# No space for what the guest overwrites


@pytest.fixture
def scratch(nights: Nights) -> Iterator[Path]:
    """A scratch folder on a file system of 4 MiB, of which a run leaves 2 free."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount")
    place = nights.machine.place / "scratch"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", place]
    mounted = subprocess.run(command, check=False, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no mount here: {mounted.stderr}")
    try:
        yield place
    finally:
        nights.machine.__exit__()
        subprocess.run(["umount", place], check=True)


def test_a_scratch_folder_with_less_space_than_must_stay_free_is_refused_before_anything_is_done(nights, scratch):
    done = nights.backup("incremental", "--scratch", scratch)
    assert done.rc in {1, 13}, done
    assert str(scratch) in done.machine["error"]["message"]
    assert done.machine["error"]["hint"]
    nights.require_nothing_left()
    nights.require_incremental("--no-fallback")


def with_reserve(
    nights: Nights, scratch: Path, *options: str, wanted: str = "incremental", reserve: str = "2M", more: str = ""
) -> list[str | Path]:
    """Arguments of a backup with a configuration: so much must stay free, and `more` lines."""
    config = nights.machine.folder / "c.yaml"
    config.write_text(f"scratch_reserve: {reserve}\n{more}")
    return ["--config", config, *nights.arguments(wanted, "--scratch", scratch, *options)]


def test_a_scratch_folder_that_fills_up_ends_the_backup_and_the_guest_goes_on(nights, scratch):
    machine, points = nights.machine, nights.points()
    machine.write("a", 0, 4 * MIB, 0x51)
    # Slow enough that the guest overwrites most of the disk meanwhile.
    with stopped_at(EXPORTED, with_reserve(nights, scratch, "--limit", "256K")) as run:
        run.send_signal(signal.SIGCONT)
        began = time.monotonic()
        for step in range(44):
            machine.write("a", step * 64 * 1024, 4096, 0x52)
        assert ended(run) == 13
        assert time.monotonic() - began < 10, "it did not read on to the end"
    assert nights.points() == points
    nights.require_nothing_left()
    assert not list(scratch.iterdir())
    machine.write("a", 0, 4 * MIB, 0x53)
    nights.require_making_up("--no-fallback")
    nights.require_own_bitmap_alone()


@pytest.mark.parametrize("step", [Step("transaction", "after"), EXPORTED, COPYING, ALL_READ], ids=str)
def test_a_guest_does_not_notice_a_full_scratch_folder_and_the_backup_fails(nights, scratch, step):
    """The run stands still and cannot end itself in time."""
    machine, points = nights.machine, nights.points()
    machine.write("a", 0, 4 * MIB, 0x51)
    with stopped_at(step, with_reserve(nights, scratch, reserve="0")) as run:
        overwrite(machine)
        assert ended(run) == 13
    assert nights.points() == points
    assert machine.monitor("query-status")["status"] == "running"
    nights.require_nothing_left()
    machine.write("a", 0, 4 * MIB, 0x53)
    nights.require_making_up("--no-fallback")
    nights.require_own_bitmap_alone()
    machine.quit()


@pytest.fixture
def unwatched(monkeypatch):
    """Nobody looks at the scratch folder, or at QEMU's events, while a disk is read."""
    monkeypatch.setattr(Instant, "_look", lambda self: None)


@pytest.mark.parametrize("wanted", ["full", "incremental", "rescan"])
def test_copies_that_are_lost_right_before_the_last_read_are_noticed(nights, scratch, unwatched, monkeypatch, wanted):
    """What is read there is zero, and QEMU calls the reading a success."""
    machine, submit, reads = nights.machine, Lane.submit, []
    machine.write("a", 0, 4 * MIB, 0x51)
    machine.write("b", 0, 4 * MIB, 0x52)
    more = "connections: 1\nrequests: 1\nspot_check: 0\n"
    given = with_reserve(nights, scratch, wanted=wanted, reserve="0", more=more)

    def counted(self, offset, view, token):
        reads.append(offset)
        if len(reads) == last:
            overwrite(machine)
        submit(self, offset, view, token)

    monkeypatch.setattr(Lane, "submit", counted)
    last = 0
    rehearsal = Nights(machine, machine.folder / "rehearsed.tmp")
    assert call_pybackup(with_reserve(rehearsal, scratch, wanted="full", reserve="0", more=more)).rc == 0
    nights.machine.write("a", 0, 4 * MIB, 0x53)
    nights.machine.write("b", 0, 4 * MIB, 0x54)
    points, last = nights.points(), len(reads)
    reads.clear()
    done = call_pybackup(given)
    assert len(reads) == last, "the guest wrote before the last read"
    assert (done.rc, "No space left on device" in done.stderr) == (13, True), done
    assert nights.points() == points
    nights.require_making_up("--no-fallback")


def test_a_copy_that_could_not_be_written_back_is_a_lost_one(nights, unwatched, monkeypatch):
    """tests/test_scratch.py has real storage of that kind."""
    points = nights.points()
    with monkeypatch.context() as patched:
        patched.setattr(scratch_files, "write_back_error", lambda fd: OSError(5, "Input/output error"))
        done = nights.backup("incremental")
    assert (done.rc, "lost what the guest overwrote (write: Input/output error)" in done.stderr) == (13, True), done
    assert nights.points() == points
    nights.require_making_up("--no-fallback")


def test_where_no_program_can_be_started_all_is_removed_all_the_same(nights, monkeypatch):
    def refuse(*_):
        raise Failed("dd cannot be run: Too many open files", hint="a test")

    monkeypatch.setattr(scratch_files, "popen", refuse)
    nights.require_incremental("--no-fallback")


@pytest.mark.parametrize("command", ["audit", "incremental --dry-run", "map", "map --totals", "map --json"])
def test_whatever_looks_at_an_instant_notices_a_lost_copy(nights, scratch, unwatched, monkeypatch, command):
    machine, opened = nights.machine, Instant.open
    for name in machine.disks:
        machine.write(name, 0, 4 * MIB, 0x51)
    wanted, *options = command.split()
    given = with_reserve(nights, scratch, *options, wanted=wanted, reserve="0")
    if wanted == "map":
        given = [*given[:2], "map", "--qmp", machine.qmp, "--node", "a", "--scratch", scratch, *options]
    assert call_pybackup(given).rc == 0

    def open_and_overwrite(self, number):
        export = opened(self, number)
        overwrite(machine)
        return export

    monkeypatch.setattr(Instant, "open", open_and_overwrite)
    done = call_pybackup(given)
    assert (done.rc, "lost what the guest overwrote" in done.stderr) == (13, True), done
    nights.require_nothing_left()


def test_a_guest_that_goes_on_after_an_error_is_given_none_and_the_run_ends_soon(nights, scratch):
    """Nothing must stay free there, and the device tells the guest of a failed write instead of stopping it."""
    nights.machine.werror = "report"
    nights.machine.restart()
    nights.machine.write("a", 0, 4 * MIB, 0x51)
    points = nights.points()
    with stopped_at(EXPORTED, with_reserve(nights, scratch, "--limit", "256K", reserve="0")) as run:
        run.send_signal(signal.SIGCONT)
        began = time.monotonic()
        overwrite(nights.machine)
        assert ended(run) == 13
        assert time.monotonic() - began < 10, "it did not read on to the end"
    assert nights.points() == points
    nights.machine.write("a", 0, 4 * MIB, 0x53)
    nights.require_making_up("--no-fallback")


def test_an_instant_that_is_lost_while_a_disk_is_opened_does_not_hang_the_machine(nights):
    """QEMU waits for its last client before it stops the server, and for nothing else meanwhile."""
    began = time.monotonic()
    with lost_in_the_handshake():
        done = nights.backup("incremental")
    assert (done.rc, "lost in the handshake" in done.stderr) == (13, True), done
    assert time.monotonic() - began < 20
    nights.require_making_up("--no-fallback")


# Storage that hangs


@pytest.fixture
def frozen(nights: Nights) -> Iterator[Freezer]:
    """A scratch folder on a file system of its own, which can be made to wait with every write."""
    if os.geteuid() != 0 or not os.path.exists("/dev/loop-control"):
        pytest.skip("needs root and loop devices")
    place, storage = nights.machine.place / "freezable", nights.machine.place / "storage"
    place.mkdir()
    with storage.open("wb") as file:
        file.truncate(64 * MIB)
    run_program("mkfs.ext4", "-q", storage)
    run_program("mount", "-o", "loop", storage, place)
    freezer = Freezer(place)
    try:
        yield freezer
    finally:
        freezer.thaw()
        nights.machine.__exit__()
        wait_until(lambda: subprocess.run(["umount", place], check=False).returncode == 0, "umount")


class Freezer:
    def __init__(self, place: Path) -> None:
        self.place = place
        self.frozen = False

    def freeze(self) -> None:
        run_program("fsfreeze", "-f", self.place)
        self.frozen = True

    def thaw(self) -> None:
        if self.frozen:
            run_program("fsfreeze", "-u", self.place)
        self.frozen = False


def test_while_the_scratch_storage_hangs_nothing_is_removed_from_the_machine(nights, frozen):
    """Each removal would hang QEMU until the storage answers."""
    machine, points = nights.machine, nights.points()
    given = [*with_reserve(nights, frozen.place, reserve="0")]
    with stopped_at(COPYING, given) as run:
        frozen.freeze()
        run.send_signal(signal.SIGTERM)
        run.send_signal(signal.SIGCONT)
        time.sleep(2)
        assert run.poll() is None
        assert {job["status"] for job in machine.monitor("query-jobs")} == {"running"}
        assert len(machine.monitor("query-block-exports")) == 2
        frozen.thaw()
        assert run.wait(60) == 143
    assert nights.points() == points
    nights.require_nothing_left()
    nights.require_making_up("--no-fallback")


IMPATIENT = """
from backup.qmp import instant
from backup.sources import running
instant._STORAGE_SECONDS = running._STORAGE_SECONDS = 1.0
"""


class Impatient(Step):
    """A step of a run that waits for scratch storage for a second only."""

    def command(self, number, arguments):
        python, option, driver, *words = super().command(number, arguments)
        return [python, option, IMPATIENT + driver, *words]


def test_scratch_storage_that_does_not_answer_in_time_is_left_to_the_next_run(nights, frozen):
    """Processes of their own: what hangs stays open until they end."""
    machine, held = nights.machine, nights.machine.held()
    given = with_reserve(nights, frozen.place, reserve="0")
    with stopped_at(Impatient(READ.name, READ.when, module=READ.module), given) as run:
        frozen.freeze()
        assert ended(run) == 3, "the point is made"
    nights.references[nights.newest["point"]] = held
    assert len(machine.monitor("query-jobs")) == 2
    main = [sys.executable, "-c", f"{IMPATIENT}\nfrom backup.cli.app import main\nmain()", *map(str, given)]
    refused = subprocess.run(main, check=False, capture_output=True, text=True, timeout=60)
    assert (refused.returncode, f"{frozen.place} does not answer" in refused.stderr) == (13, True), refused
    assert len(machine.monitor("query-jobs")) == 2
    frozen.thaw()
    machine.write("a", MIB, 1000, 0x31)
    nights.require_making_up("--no-fallback")
    nights.require_own_bitmap_alone()


# A QEMU that has no quorum


@pytest.fixture
def without_quorum(monkeypatch):
    """As a QEMU that was built without it, or may not use it."""
    execute = Monitor.command

    def command(self, name, arguments=None):
        if name == "blockdev-add" and arguments["file"]["driver"] == "quorum":
            raise answers.Refused(name, "Driver 'quorum' is not whitelisted")
        return execute(self, name, arguments)

    monkeypatch.setattr(Monitor, "command", command)


def test_without_a_quorum_a_backup_is_taken_and_says_what_a_full_scratch_folder_would_do(nights, without_quorum):
    done = nights.backup("incremental", "--no-fallback")
    assert (done.rc, kinds(done)) == (0, {"incremental"}), done
    [note] = done.stderr.splitlines()
    assert "not whitelisted" in note
    nights.require_sound()


def test_without_a_quorum_the_reserve_keeps_errors_from_the_guest(nights, scratch, without_quorum):
    machine, points = nights.machine, nights.points()
    machine.write("a", 0, 4 * MIB, 0x51)
    errors: list[OSError] = []
    began = threading.Event()

    def guest() -> None:
        began.wait(30)
        try:
            for step in range(44):
                machine.write("a", step * 64 * 1024, 4096, 0x52)
                time.sleep(0.02)
        except OSError as error:
            errors.append(error)

    writing = threading.Thread(target=guest)
    writing.start()
    with monkeypatched_open(began):
        done = call_pybackup(with_reserve(nights, scratch, "--limit", "256K"))
    writing.join(60)
    assert (done.rc, errors) == (13, []), done
    assert "ran out of space" in done.stderr
    assert nights.points() == points
    nights.require_nothing_left()


@contextmanager
def monkeypatched_open(began: threading.Event) -> Iterator[None]:
    """Tell when the first disk of an instant is opened."""
    opened = Instant.open

    def open_and_tell(self, number):
        began.set()
        return opened(self, number)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Instant, "open", open_and_tell)
        yield


@pytest.mark.parametrize("full", [True, False])
def test_a_guest_that_is_stopped_is_resumed_only_where_the_scratch_folder_was_full(nights, monkeypatch, full):
    """Else its own disk was the reason, or its administrator."""
    resumed = []
    monkeypatch.setattr(Instant, "_events", lambda self: {"STOP"})
    monkeypatch.setattr(leftovers, "is_full", lambda folder: full)
    monkeypatch.setattr(leftovers, "resume", resumed.append)
    assert nights.backup("incremental", "--no-fallback").rc == 0
    assert len(resumed) == full


def test_a_scratch_folder_is_known_to_later_runs_by_its_whole_name(nights, monkeypatch):
    monkeypatch.chdir(nights.machine.place)
    with stopped_at(EXPORTED, nights.arguments("incremental", "--scratch", "t")):
        [one, other] = nights.machine.monitor("query-fdsets")
    for kept in (one, other):
        assert f'["{nights.machine.place}/t"' in kept["fds"][0]["opaque"]
    nights.require_making_up("--no-fallback")


def overwrite(machine: Machine) -> None:
    """Write to each cluster of both disks."""
    for step in range(64):
        for name in machine.disks:
            machine.write(name, step * 64 * 1024, 4096, 0x52)


# Cleaning


def clean(nights: Nights):
    return call_pybackup(["clean", "--qmp", nights.machine.qmp, "--repo", nights.repository])


def test_clean_removes_what_a_killed_run_left_and_keeps_what_continues_the_chain(nights):
    machine, name = nights.machine, nights.own_bitmap
    with stopped_at(COPYING, nights.arguments("incremental")) as run:
        machine.write("a", MIB, 1000, 0x31)
        run.kill()
        run.wait(30)
    assert len(machine.leftovers()) > 5
    for _ in range(2):
        nights.require_cleaned()
        assert list(machine.bitmaps("a")) == [name]
    nights.require_incremental("--no-fallback")


def test_clean_leaves_a_run_alone(nights):
    with stopped_at(COPYING, nights.arguments("incremental")) as run:
        done = clean(nights)
        assert done.rc in {11, 13}, done  # the run holds the machine and the socket
        assert ended(run) == 0
    nights.references.update(dict.fromkeys(nights.points() - set(nights.references), nights.machine.held()))
    nights.require_sound()


def test_clean_leaves_another_repositorys_leftovers_and_a_foreign_nbd_server_alone(nights):
    machine = nights.machine
    other = Nights(machine, machine.folder / "other.tmp")
    other.full()
    with stopped_at(COPYING, other.arguments("incremental")) as run:
        run.kill()
        run.wait(30)
    before, bitmaps = machine.leftovers(), machine.bitmaps("a")
    assert clean(nights).rc == 0
    assert machine.leftovers() == before
    assert machine.bitmaps("a") == bitmaps
    assert clean(other).rc == 0
    remove_empty_folders()
    nights.require_nothing_left()
    address = machine.place / "foreign"
    machine.monitor("nbd-server-start", addr={"type": "unix", "data": {"path": str(address)}})
    assert clean(nights).rc == 0
    assert ["already running" in text for text in machine.leftovers()] == [True]
    assert not list(Path(tempfile.gettempdir()).glob("pybackup-*"))


def test_a_client_in_its_handshake_is_waited_for_before_the_server_is_stopped(nights, monkeypatch):
    """QEMU would wait for it, and do nothing else."""
    machine = nights.machine
    monkeypatch.setattr(leftovers, "_CLIENTS_SECONDS", 1.0)
    with stopped_at(EXPORTED, nights.arguments("incremental")) as run:
        run.kill()
        run.wait(30)
    [address] = {
        json.loads(fdset["fds"][0]["opaque"].partition(" ")[2])[1] for fdset in machine.monitor("query-fdsets")
    }
    with socket.socket(socket.AF_UNIX) as silent:
        silent.connect(address)
        done = clean(nights)
        assert (done.rc, "still has a client" in done.stderr) == (13, True), done
        assert machine.monitor("query-status")["status"] == "running"
        assert machine.monitor("query-jobs") == []
    nights.require_cleaned()
    nights.require_incremental("--no-fallback")


# The limit of open files


def test_a_run_that_may_open_too_few_files_names_the_limit_and_leaves_nothing_in_qemu(nights):
    before = nights.points()
    for limit in (8, 14, 21, 25, 32):
        words = " ".join(shlex.quote(str(word)) for word in (PYBACKUP, *nights.arguments("incremental")))
        done = subprocess.run(
            ["bash", "-c", f"ulimit -n {limit}; exec {words}"], check=False, capture_output=True, text=True, timeout=60
        )
        nights.require_nothing_left()
        assert done.returncode == 1, done
        error, hint = done.stderr.splitlines()
        assert error.endswith("Too many open files") or "temporary" in error
        assert "(ulimit -n" in hint
        assert nights.points() == before
    nights.require_incremental()
