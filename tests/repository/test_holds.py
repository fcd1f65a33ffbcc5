"""
What is in use stays: readers that need a chain for longer hold it, whenever they begin; prune asks before each step.

Also where an flock is one of fcntl's locks, as on NFS: QEMU's locks meet it there, and an exclusive one needs a file
that is open for writing.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import threading
from contextlib import ExitStack

import pytest
from histories import History
from lab import call_pybackup, make_image
from places import folder_of

from backup.cli.output import Quiet
from backup.engine import merge
from backup.errors import Failed, NotFound
from backup.guest import files, guestfish
from backup.model import chain
from backup.operations import prune, serve
from backup.operations.prune import Request
from backup.planning.retention import Batch, Policy
from backup.repository import data_file
from backup.repository.replacement import settle

NEWEST = Request(Policy(last=1), Batch(1), workers=1)
KINDS = {fcntl.LOCK_SH: fcntl.F_RDLCK, fcntl.LOCK_EX: fcntl.F_WRLCK}


def flock_of_nfs(fd: int, operation: int) -> None:
    """What an NFS client makes of an flock: a lock of the whole file, of the kind that QEMU takes."""
    wait = fcntl.F_OFD_SETLK if operation & fcntl.LOCK_NB else fcntl.F_OFD_SETLKW
    fcntl.fcntl(fd, wait, struct.pack("hhqqi4x", KINDS[operation & ~fcntl.LOCK_NB], os.SEEK_SET, 0, 0, 0))


@pytest.fixture(params=["local", "NFS"])
def file_system(request, monkeypatch):
    if request.param == "NFS":
        monkeypatch.setattr(fcntl, "flock", flock_of_nfs)


@pytest.fixture
def history(tmp_path) -> History:
    """A full and three incrementals on it."""
    history = History.of(tmp_path, "holds", 4096)
    for number in range(4):
        history.point("vda", full=number == 0, size=30 * 4096)
    return history


def points(history: History) -> list[str]:
    return sorted(history.manifests(), key=lambda point: history.manifests()[point].sequence)


def serving(history: History, point: str):
    return serve.serving(history.machine, point, "vda", None, writable=False)


def holding(history: History, point: str):
    return data_file.hold(history.machine.files, chain.build(history.manifests(), point, "vda"))


def actions(report: prune.Report) -> list[tuple[str, tuple[str, ...]]]:
    return [(point.action, point.reasons) for point in report.points]


@pytest.mark.usefixtures("file_system")
def test_a_chain_that_is_served_stays_and_goes_afterwards(history):
    first, second, third, newest = points(history)
    with serving(history, second) as served:
        assert served.protected
        assert history.machine.points_in_use() == {first: "in use", second: "in use"}
        report = prune.prune(history.machine, NEWEST, Quiet())
        assert [point.point for point in report.points if point.action == "remove"] == [third]
        with serving(history, newest):
            pass
    history.require_whole()
    assert prune.prune(history.machine, NEWEST, Quiet()).removed == 2
    assert points(history) == [newest]
    history.require_whole()
    history.require_tidy()


def no_writing(monkeypatch) -> None:
    """Let nobody write to files that are there already: another user owns them."""
    real = os.open

    def read_only(path, flags, *more, **folder):  # rmtree passes dir_fd since Python 3.13
        if str(path).endswith((".b3", ".qcow2")) and flags & os.O_ACCMODE == os.O_RDWR:
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, flags, *more, **folder)

    monkeypatch.setattr(os, "open", read_only)


@pytest.mark.usefixtures("file_system")
def test_a_reader_needs_no_right_to_write(history, monkeypatch):
    first = points(history)[0]
    with ExitStack() as reader:
        with monkeypatch.context() as patched:
            no_writing(patched)
            assert reader.enter_context(serving(history, first)).protected
        assert history.machine.points_in_use() == {first: "in use"}
    assert history.machine.points_in_use() == {}


def test_a_prune_needs_no_right_to_write_to_the_files_it_removes(history, monkeypatch):
    no_writing(monkeypatch)
    with serving(history, points(history)[0]):
        assert prune.prune(history.machine, NEWEST, Quiet()).removed == 2
    assert prune.prune(history.machine, NEWEST, Quiet()).removed == 1


def test_what_an_older_program_serves_stays(history):
    first = points(history)[0]
    with open(folder_of(history.machine) / f"vda.{first}.qcow2", "rb") as data:
        fcntl.flock(data, fcntl.LOCK_SH)
        report = prune.prune(history.machine, NEWEST, Quiet())
    assert actions(report)[0] == ("keep", ("in use",))
    assert report.removed == 2


def no_locks(monkeypatch) -> None:
    """Have the file system give no locks, but for the machine's."""
    real = fcntl.flock

    def flock(fd, operation):
        if operation & fcntl.LOCK_EX and os.readlink(
            f"/proc/self/fd/{fd if isinstance(fd, int) else fd.fileno()}"
        ).endswith((".b3", ".qcow2")):
            raise OSError(errno.ENOLCK, "No locks available")
        real(fd, operation)

    monkeypatch.setattr(fcntl, "flock", flock)


def test_points_of_which_there_is_no_telling_stay_with_a_warning(history, monkeypatch):
    no_locks(monkeypatch)
    before = history.listing()
    done = call_pybackup(["prune", "--keep-last", "1", "--batch", "1", "--repo", folder_of(history.machine).parent])
    assert done.rc == 3, done
    [warning] = done.stderr.splitlines()
    assert warning == (
        "pybackup: warning: m: 3 points not removed: cannot determine whether it is in use: No locks available"
    )
    assert history.listing() == before


def test_a_backup_whose_prune_cannot_tell_warns_as_well(tmp_path, monkeypatch):
    image = make_image(tmp_path / "disk.qcow2", "1M")
    config = tmp_path / "c.yaml"
    config.write_text(
        f"repository: {tmp_path / 'repo'}\nretention: {{last: 1, batch: 1, after_backup: true}}\n"
        f"machines: {{m: {{disks: {{vda: {{image: {image}}}}}}}}}\n"
    )
    assert call_pybackup(["--config", config, "full"]).rc == 0
    no_locks(monkeypatch)
    done = call_pybackup(["--config", config, "full", "--json"])
    assert done.rc == 3, done
    [warning] = done.machine["warnings"]
    assert warning == "1 point not removed: cannot determine whether it is in use: No locks available"


def during(monkeypatch, step: str, action) -> None:
    """Do something when a prune begins its first such step: `consolidate` takes hours for large disks."""
    real = getattr(merge, step)
    done = []

    def doing(*args, **more):
        if not done:
            done.append(action())
        return real(*args, **more)

    monkeypatch.setattr(merge, step, doing)  # which a prune imports when it merges


@pytest.mark.usefixtures("file_system")
@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_what_is_served_from_the_middle_of_a_prune_on_stays(history, monkeypatch, number):
    all_points = points(history)
    with ExitStack() as stack:
        during(monkeypatch, "consolidate", lambda: stack.enter_context(serving(history, all_points[number])))
        report = prune.prune(history.machine, NEWEST, Quiet())
        kept = 4 if number == 3 else number + 2  # what the newest takes over goes, but for what is served
        assert report.removed == 4 - kept
        assert [report.points[held].reasons[-1] for held in range(number + 1)] == ["in use"] * (number + 1)
        assert len(report.rewrites) == (0 if number == 3 else 1)
        assert set(points(history)) == {point.point for point in report.points if point.action == "keep"}
        assert history.machine.points_in_use().keys() == set(all_points[: number + 1])
        history.require_tidy()
    history.require_whole()
    assert prune.prune(history.machine, NEWEST, Quiet()).removed == kept - 1
    history.require_whole()


def test_what_a_point_needs_that_could_not_be_rewritten_stays_when_its_reader_has_gone(history, monkeypatch):
    *older, newest = points(history)
    reader = ExitStack()
    during(monkeypatch, "consolidate", lambda: reader.enter_context(holding(history, newest)))
    during(monkeypatch, "discard", reader.close)
    report = prune.prune(history.machine, NEWEST, Quiet())
    children = [*older[1:], newest]
    assert actions(report)[:3] == [("keep", (f"point {child} builds on it",)) for child in children]
    assert set(points(history)) == {*older, newest}
    assert history.machine.points_in_use() == {}
    history.require_whole()
    history.require_tidy()


@pytest.mark.usefixtures("file_system")
def test_a_reader_that_comes_in_an_exchange_waits_and_sees_its_end(history, monkeypatch):
    newest = points(history)[-1]
    before = chain.build(history.manifests(), newest, "vda")
    order = []

    def read() -> None:
        started.set()
        with ExitStack() as held:
            held.enter_context(history.machine.files.hold([before.newest.entry.data.digests]))
            order.append("held")

    started = threading.Event()
    reader = threading.Thread(target=read)
    real = prune.exchange

    def exchange(*args):
        reader.start()
        started.wait()
        reader.join(0.2)
        order.append("exchange")
        return real(*args)

    monkeypatch.setattr(prune, "exchange", exchange)
    prune.prune(history.machine, NEWEST, Quiet())
    reader.join()
    assert order == ["exchange", "held"]
    assert chain.build(history.manifests(), newest, "vda") != before


@pytest.mark.parametrize("number", [0, 3], ids=["removed", "rewritten"])
def test_files_of_a_chain_that_a_prune_changes_just_then_are_not_called_missing(history, monkeypatch, number):
    point, real = points(history)[number], data_file.hold

    def held(*args):
        prune.prune(history.machine, NEWEST, Quiet())
        return real(*args)

    def started(path):
        raise Failed(f"started on {path.name}", hint="")

    monkeypatch.setattr(data_file, "hold", held)
    monkeypatch.setattr(guestfish, "started", started)
    with (
        pytest.raises(Failed if number else NotFound) as stopped,
        files.open_files(history.machine, point, "vda", None),
    ):
        pass
    assert stopped.value.message == f"started on vda.{point}.qcow2" if number else point in stopped.value.message
    assert ".b3" not in stopped.value.message


def test_an_exchange_that_was_cut_off_is_taken_back_where_somebody_uses_the_former_file(history, monkeypatch):
    newest = points(history)[-1]
    real = os.rename

    def waiting():
        return folder_of(history.machine).glob("*.new")

    def rename(source, target):
        if str(source).endswith(".qcow2.new"):
            raise OSError(errno.EIO, "Input/output error")
        real(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", rename)
        patched.setattr(prune, "settle", lambda machine: None if list(waiting()) else settle(machine))
        with pytest.raises(Exception, match="Input/output error"):
            prune.prune(history.machine, NEWEST, Quiet())
    assert len(list(waiting())) == 1
    data = folder_of(history.machine) / f"vda.{newest}.qcow2"
    with holding(history, newest), history.machine.lock():
        inode = data.stat().st_ino
        settle(history.machine)
        assert data.stat().st_ino == inode
    history.require_tidy()
    history.require_whole()


def locked_files(monkeypatch):
    """The names of the files whose locks are asked for, in order."""
    asked = []
    flock = fcntl.flock

    def noted(fd, operation):
        asked.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd if isinstance(fd, int) else fd.fileno()}")))
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", noted)
    return asked


def test_the_digest_file_is_locked_before_the_data_file_and_where_it_is_held_the_data_file_is_left_alone(
    history, monkeypatch
):
    """A reader that starts a QEMU holds the digest file: a lock on the data file would meet QEMU's."""
    disks = [found.disks[0] for found in list(history.manifests().values())[:2]]
    asked = locked_files(monkeypatch)
    with history.machine.unused(*disks) as why_not:
        assert why_not is None
    assert asked == [name for disk in disks for name in (disk.data.digests, disk.data.file)]
    asked.clear()
    with open(folder_of(history.machine) / disks[0].data.digests, "rb") as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        asked.clear()
        with history.machine.unused(disks[0]) as why_not:
            assert why_not == "in use"
    assert asked == [disks[0].data.digests]
