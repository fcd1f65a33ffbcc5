"""The repository on disk: modes, first runs, the lock, publishing, leftovers, and being copied with plain tools."""

import fcntl
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import threading
from pathlib import Path

import pytest
from forge import entry, manifest
from lab import (
    PYBACKUP,
    Night,
    call_pybackup,
    make_image,
    raw_copy,
    require_identical,
    restore_and_cmp,
    run,
    run_pybackup,
    write,
)
from places import create_repository, files_at, folder_of, repository_at

from backup.errors import Damaged, Failed, Interrupted, Locked, UsageError
from backup.model.names import MARKER, RECOVERY
from backup.repository import repository
from backup.storage.folder import Modes
from backup.storage.refusals import open_file


def modes(folder):
    return {
        str(path.relative_to(folder)): stat.S_IMODE(path.stat().st_mode)
        for path in (folder, *sorted(folder.rglob("*")))
    }


FOLDERS = (".", "repo", "repo/disk")


def back_up_with_umask(tmp_path, umask, *options):
    image = make_image(tmp_path / "disk.qcow2", "1M")
    repo = tmp_path / "new" / "repo"
    for command in (["init", repo], ["full", "--image", image, "--repo", repo]):
        done = subprocess.run(
            [PYBACKUP, *options, *command],
            check=False,
            capture_output=True,
            preexec_fn=lambda: os.umask(umask),
        )
        assert done.returncode == 0, done.stderr
    return modes(tmp_path / "new")


@pytest.mark.parametrize("umask", [0o000, 0o077, 0o777])
def test_only_the_owner_can_read_whatever_the_umask(tmp_path, umask):
    found = back_up_with_umask(tmp_path, umask)
    assert {name: mode for name, mode in found.items() if mode != 0o600} == dict.fromkeys(FOLDERS, 0o700)
    assert len(found) == len(FOLDERS) + 6


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_group_read_lets_the_group_read_whatever_the_umask(tmp_path, umask):
    (tmp_path / "c.yaml").write_text("group_read: true\n")
    found = back_up_with_umask(tmp_path, umask, "--config", tmp_path / "c.yaml")
    assert {name: mode for name, mode in found.items() if mode != 0o640} == dict.fromkeys(FOLDERS, 0o750)
    assert len(found) == len(FOLDERS) + 6


def test_group_read_lets_the_group_read_what_verify_remembers(tmp_path):
    (tmp_path / "c.yaml").write_text(f"group_read: true\nrepository: {tmp_path / 'repo'}\n")
    night, config = Night.of(tmp_path), ["--config", tmp_path / "c.yaml"]
    assert call_pybackup(["full", "--image", night.image, *config]).rc == 0
    for what in ([], ["disk"], ["disk/latest"]):
        (tmp_path / "repo" / "disk" / "verified").unlink(missing_ok=True)
        assert call_pybackup(["verify", *what, *config]).rc == 0
        assert (tmp_path / "repo" / "disk" / "verified").stat().st_mode & 0o777 == 0o640, what


def test_init_makes_a_repository_and_tells_where_it_lies(tmp_path):
    done = call_pybackup(["init", tmp_path / "repo"])
    identity = json.loads((tmp_path / "repo" / MARKER).read_bytes())["id"]
    assert (done.rc, done.stderr) == (0, "")
    mount_point = run("stat", "--format=%m", str(tmp_path)).strip()
    assert f"id {identity[:8]}, on the file system {mount_point} with " in done.stdout
    assert ("root file system" in done.stdout) == (mount_point == "/")
    shown = call_pybackup(["init", tmp_path / "second", "--json"]).document
    assert shown["repository"] == str(tmp_path / "second")
    assert (shown["copy_of"], shown["file_system"]) == (None, mount_point)
    assert shown["id"] == json.loads((tmp_path / "second" / MARKER).read_bytes())["id"] != identity
    assert call_pybackup(["--quiet", "init", tmp_path / "third"]).stdout == ""
    assert call_pybackup(["list", "--repo", tmp_path / "third"]).rc == 0


def test_a_second_init_changes_nothing(tmp_path):
    night = Night.of(tmp_path)
    night.full()
    before = {path: path.stat().st_mtime_ns for path in night.repository.rglob("*")}
    for inside in ("", "disk", "disk/new", "new/er"):
        done = call_pybackup(["init", night.repository / inside])
        assert (done.rc, len(done.stderr.splitlines())) == (2, 2), done
    assert {path: path.stat().st_mtime_ns for path in night.repository.rglob("*")} == before


COMMANDS = [
    ["full", "--image", "disk.qcow2"],
    ["full", "--image", "disk.qcow2", "--dry-run"],
    ["incremental", "--image", "disk.qcow2", "--bitmap", "b1"],
    ["rescan", "--image", "disk.qcow2"],
    ["audit", "--image", "disk.qcow2"],
    ["list"],
    ["show", "disk/latest"],
    ["restore", "disk/latest", "r.raw"],
    ["verify"],
    ["copy", "disk", "other"],
    ["serve", "disk/latest"],
    ["files", "disk/latest"],
    ["get", "disk/latest", "/etc", "etc"],
    ["status"],
    ["prune", "--keep-last", "1"],
    ["pin", "disk/latest"],
    ["unpin", "disk/latest"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_where_no_disk_is_mounted_no_command_makes_a_repository(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    make_image(tmp_path / "disk.qcow2", "1M")
    (tmp_path / "mnt").mkdir()
    before = (tmp_path / "disk.qcow2").read_bytes()
    for place in ("mnt", "mnt/backup"):
        done = call_pybackup([*command, "--repo", place], made=False)
        assert (done.rc, len(done.stderr.splitlines())) == (10, 2), done
        assert f"pybackup init {place}" in done.stderr
        (tmp_path / "c.yaml").write_text(
            f"repository: {place}\nbitmap: b1\nmachines: {{disk: {{disks: {{a: {{image: x}}, b: {{image: y}}}}}}}}\n"
        )
        done = call_pybackup(["--config", "c.yaml", *command], made=False)
        assert (done.rc, len(done.stderr.splitlines())) == (10, 2), done
    assert sorted(os.listdir(tmp_path)) == ["c.yaml", "disk.qcow2", "mnt"]
    assert os.listdir(tmp_path / "mnt") == []
    assert (tmp_path / "disk.qcow2").read_bytes() == before


def test_all_machines_of_a_repository_that_is_not_there_are_one_error(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "repository: none\nbitmap: b1\nmachines: {a: {disks: {d: {image: a}}}, b: {disks: {d: {image: b}}}}\n"
    )
    done = run_pybackup(["--config", tmp_path / "c.yaml", "incremental"], made=False)
    assert (done.rc, done.stdout, len(done.stderr.splitlines())) == (10, "", 2)


REMOTE = ["user@host:/srv/backup", "host:backup", "sftp:host:/srv", "s3:bucket/x", "nbd://h/e", ":x"]


@pytest.mark.parametrize("place", REMOTE)
def test_what_looks_remote_is_no_folder(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    night = Night.of(tmp_path)
    night.full()
    before = sorted(os.listdir(tmp_path))
    commands = [[*command, "--repo", place] for command in COMMANDS]
    commands += [["copy", "disk", place, "--repo", "repo"], ["init", place]]
    commands += [["init", "--copy-of", "repo", place], ["init", "--copy-of", place, "second"]]
    for command in commands:
        done = call_pybackup(command, made=False)
        assert (done.rc, len(done.stderr.splitlines())) == (2, 2), done
        assert repr(place) in done.stderr
    (tmp_path / "c.yaml").write_text(f"repository: {place!r}\nmachines: {{}}\n")
    done = call_pybackup(["--config", "c.yaml", "list"], made=False)
    assert (done.rc, done.stderr.count("line 1")) == (2, 1), done
    (tmp_path / "c.yaml").unlink()
    assert sorted(os.listdir(tmp_path)) == before


def test_a_folder_whose_name_has_a_colon_is_named_by_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Night.of(tmp_path)
    for place in ("./a:b", str(tmp_path / "c:d"), "sub/e:f"):
        assert call_pybackup(["init", place]).rc == 0
        assert call_pybackup(["full", "--image", "disk.qcow2", "--repo", place], made=False).rc == 0
    assert (tmp_path / "a:b" / MARKER).is_file()
    (tmp_path / "c.yaml").write_text("repository: ./a:b\n")
    assert len(call_pybackup(["--config", "c.yaml", "list", "--json"]).document) == 1


def test_a_run_removes_what_a_killed_init_left_beside_the_marker(tmp_path):
    night = Night.of(tmp_path)
    night.full()
    (night.repository / f"{MARKER}.0123abcd.tmp").write_text("{")
    (night.repository / f"{MARKER}.old").write_text("mine")
    assert call_pybackup(["list", "--repo", night.repository]).rc == 0
    assert (night.repository / f"{MARKER}.0123abcd.tmp").exists(), "a reader must remove nothing"
    assert night.incremental().rc == 0
    assert sorted(path.name for path in night.repository.iterdir() if path.is_file()) == [
        RECOVERY,
        MARKER,
        f"{MARKER}.old",
    ]


def test_a_set_group_id_folder_keeps_its_bit_and_hands_it_on(tmp_path):
    tmp_path.chmod(0o2755)
    create_repository(tmp_path / "repo", Modes(0o640, 0o750))
    assert modes(tmp_path / "repo") == {".": 0o2750, MARKER: 0o640, RECOVERY: 0o640}


def test_a_folder_that_holds_other_things_is_never_made_a_repository(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    for there in (tmp_path, tmp_path / "thesis.tex"):
        done = call_pybackup(["init", there])
        assert (done.rc, len(done.stderr.splitlines())) == (2, 2), done
    assert os.listdir(tmp_path) == ["thesis.tex"]
    assert (tmp_path / "thesis.tex").read_text() == "x"


def test_a_fresh_file_system_and_what_a_killed_first_run_left_count_as_empty(tmp_path):
    (tmp_path / "lost+found").mkdir()
    (tmp_path / f"{MARKER}.0123abcd.tmp").write_text("{")
    create_repository(tmp_path)
    assert repository_at(tmp_path).machine_names() == []


@pytest.mark.parametrize("there", ["", "a", "a/b/repo"], ids=["no folder", "some", "left by a killed run"])
def test_the_names_of_all_new_folders_last_in_theirs(tmp_path, monkeypatch, there):
    (tmp_path / there).mkdir(parents=True, exist_ok=True)
    synced, real = [], os.fsync

    def fsync(fd):
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    create_repository(tmp_path / "a/b/repo")
    new = {"": ["a/b", "a", ""], "a": ["a/b", "a"], "a/b/repo": ["a/b"]}[there]
    assert {str(tmp_path / folder) for folder in new} <= set(synced)


def test_of_several_inits_at_the_same_time_one_makes_the_repository(tmp_path):
    found, refused, start = [], [], threading.Barrier(8)

    def first_run():
        start.wait()
        try:
            found.append(create_repository(tmp_path / "repo").id)
        except UsageError as error:
            refused.append(error)

    threads = [threading.Thread(target=first_run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(found), len(refused)) == (1, 7)
    assert found == [repository_at(tmp_path / "repo").id]
    assert sorted(os.listdir(tmp_path / "repo")) == [RECOVERY, MARKER]


def test_a_file_system_without_links_gets_its_marker_too(tmp_path, monkeypatch):
    def no_links(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    identity = create_repository(tmp_path / "repo").id
    assert repository_at(tmp_path / "repo").id == identity
    with pytest.raises(UsageError):
        create_repository(tmp_path / "repo")
    assert sorted(os.listdir(tmp_path / "repo")) == [RECOVERY, MARKER]


def test_the_second_writer_is_told_the_first_ones_host_and_pid(tmp_path):
    machine = create_repository(tmp_path / "repo").machine("web1")
    with machine.lock(), pytest.raises(Locked, match=rf"host \S+ pid {os.getpid()}\b"), machine.lock():
        pass


def test_a_run_against_a_held_lock_ends_with_11_and_changes_nothing(tmp_path):
    night = Night.of(tmp_path)
    night.full()
    before = night.state()
    with open(night.repository / "disk" / "lock", "rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        done = night.incremental()
    assert done.rc == 11
    assert done.machine["error"]["code"] == 11
    assert night.state() == before


def test_a_look_whether_other_machines_are_locked_writes_nothing(tmp_path):
    repository = create_repository(tmp_path / "repo")
    first = repository.machine("web1")
    with first.lock():
        repository.ownership("web1").require_alone()
    (folder_of(first) / "lock").write_text("host far pid 1\n")
    repository.ownership("web2").require_alone()
    assert (folder_of(first) / "lock").read_text() == "host far pid 1\n"
    with first.lock(), pytest.raises(Locked, match="web1 is locked"):
        repository.ownership("web2").require_alone()


def test_a_lock_that_somebody_only_looks_at_is_waited_for(tmp_path):
    machine = create_repository(tmp_path / "repo").machine("web1")
    with machine.lock():
        pass
    fd = os.open(folder_of(machine) / "lock", os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_SH)
    looking = threading.Timer(0.1, os.close, [fd])
    looking.start()
    with machine.lock():
        looking.join()


def test_a_killed_holders_lock_is_free(tmp_path):
    path = tmp_path / "repo"
    create_repository(path)
    code = (
        "import sys, time; from pathlib import Path; from backup.repository.repository import Repository\n"
        "from backup.storage.folder import FolderStorage\n"
        f"with Repository.open(FolderStorage(Path({str(path)!r}))).machine('web1').lock():\n"
        "    print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([PYBACKUP.with_name("python"), "-c", code], stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        machine = repository_at(path).machine("web1")
        with pytest.raises(Locked, match=f"pid {holder.pid}"), machine.lock():
            pass
        holder.kill()
    with machine.lock():
        pass


ODD = {
    "pipe": lambda path, _: os.mkfifo(path),
    "folder": lambda path, _: path.mkdir(),
    "link": lambda path, precious: path.symlink_to(precious),
    "dangling link": lambda path, precious: path.symlink_to(precious.with_name("new")),
    "hard link": lambda path, precious: path.hardlink_to(precious),
    "socket": lambda path, _: listen(path),
}


def listen(path):
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))


@pytest.fixture
def deadline():
    """A pipe that is waited for must not hang the tests."""

    def expired(*_):
        raise AssertionError("it waits for ever")

    before = signal.signal(signal.SIGALRM, expired)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("deadline")
@pytest.mark.parametrize("odd", ODD)
def test_a_lock_that_is_no_plain_file_of_its_own_is_refused_and_nothing_is_written_through_it(
    tmp_path, monkeypatch, odd
):
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    night = Night.with_incremental(Path())
    precious, lock = tmp_path / "precious", night.repository / "disk" / "lock"
    precious.write_text("x" * 1000)
    lock.unlink()
    ODD[odd](lock, precious)
    before = [path for path in night.state()[1] if not path.endswith("verified")]
    for command in (
        ["incremental", "--image", night.image, "--bitmap", "b1"],
        ["prune", "--keep-last", "1"],
        ["pin", "disk/latest"],
    ):
        done = call_pybackup([*command, "--repo", night.repository])
        assert (done.rc, len(done.stderr.splitlines()), "lock" in done.stderr) == (1, 2, True), done
    assert [path for path in night.state()[1] if not path.endswith("verified")] == before
    assert (precious.read_text(), os.path.lexists("new")) == ("x" * 1000, False)
    for command in (["list"], ["verify"], ["status"], ["restore", "disk/latest", "r.raw"]):
        assert call_pybackup([*command, "--repo", night.repository]).rc == 0, command
    require_identical(raw_copy(night.image, Path("expected.raw")), Path("r.raw"))


@pytest.mark.usefixtures("deadline")
@pytest.mark.parametrize("odd", [odd for odd in ODD if odd != "folder"])
def test_leftovers_that_are_links_or_pipes_go_and_nothing_is_written_through_them(tmp_path, monkeypatch, odd):
    monkeypatch.chdir(tmp_path)
    night = Night.with_incremental(Path())
    precious, folder = tmp_path / "precious", night.repository / "disk"
    precious.write_text("x" * 1000)
    stem = "20200101T000000Z-00000000"
    names = [
        f"{stem}.json.tmp",
        f"disk.{stem}.qcow2",
        f"disk.{stem}.b3",
        f"disk.{stem}.qcow2.new",
        f"disk.{stem}.qcow2.part",
    ]
    for name in names:
        ODD[odd](folder / name, precious)
    ODD[odd](folder / f"{night.newest['point']}.json.tmp", precious)
    assert call_pybackup(["pin", "disk/latest", "--repo", night.repository]).rc == 0
    assert night.newest["pinned"] is True
    assert night.incremental().rc == 0
    assert (precious.read_text(), os.path.lexists("new")) == ("x" * 1000, False)
    night.require_restored()


@pytest.mark.usefixtures("deadline")
@pytest.mark.parametrize("odd", ODD)
def test_an_odd_file_in_the_place_of_what_verify_remembers_is_not_written_through(tmp_path, monkeypatch, odd):
    monkeypatch.chdir(tmp_path)
    night = Night.with_incremental(Path())
    precious, folder = tmp_path / "precious", night.repository / "disk"
    precious.write_text("x" * 1000)
    ODD[odd](folder / "verified.tmp", precious)
    done = call_pybackup(["verify", "--repo", night.repository])
    assert (done.rc, "could not be saved" in done.stderr) == (0, True), done
    (folder / "verified.tmp").rmdir() if odd == "folder" else (folder / "verified.tmp").unlink()
    ODD[odd](folder / "verified", precious)
    for command in (["verify"], ["verify", "--older-than", "30d"], ["status"]):
        assert call_pybackup([*command, "--repo", night.repository]).rc == 0, command
    assert (precious.read_text(), os.path.lexists("new")) == ("x" * 1000, False)


@pytest.mark.usefixtures("deadline")
@pytest.mark.parametrize("odd", [odd for odd in ODD if odd != "hard link"])
@pytest.mark.parametrize("which", ["json", "qcow2", "b3"])
def test_a_file_of_a_point_that_is_no_plain_file_is_damage_and_blocks_nobody(tmp_path, monkeypatch, odd, which):
    monkeypatch.chdir(tmp_path)
    night = Night.with_incremental(Path())
    [path] = (night.repository / "disk").glob(f"*{night.newest['point']}.{which}")
    path.rename("precious")
    ODD[odd](path, tmp_path / "precious")
    before = Path("precious").read_bytes()
    assert call_pybackup(["verify", "--repo", night.repository]).rc == 12
    assert call_pybackup(["restore", "disk/latest", "r.raw", "--repo", night.repository]).rc == 12
    assert call_pybackup(["status", "--repo", night.repository]).rc == 12
    done = night.incremental()
    assert (done.rc, done.disk["kind"]) == (3, "incremental" if which == "json" else "full")
    assert Path("precious").read_bytes() == before


def test_a_repository_that_was_copied_with_hard_links_restores_and_goes_on(tmp_path):
    night = Night.with_incremental(tmp_path)
    run("cp", "-al", night.repository, tmp_path / "snapshot")
    copied = {path: path.read_bytes() for path in (tmp_path / "snapshot" / "disk").iterdir()}
    restore_and_cmp(night.repository, "disk/latest", night.image)
    done = night.incremental()
    assert (done.rc, "hard links" in done.stderr) == (1, True), "two repositories would share one lock"
    (tmp_path / "snapshot" / "disk" / "lock").unlink()
    copied.pop(tmp_path / "snapshot" / "disk" / "lock")
    assert call_pybackup(["pin", "disk/latest", "--repo", night.repository]).rc == 0
    assert night.incremental().rc == 0
    assert call_pybackup(["prune", "--keep-last", "1", "--batch", "1", "--repo", night.repository]).rc == 0
    assert {path: path.read_bytes() for path in copied} == copied
    night.require_restored()


def test_a_machines_folder_that_is_a_link_leads_no_command_out_of_the_repository(tmp_path):
    night = Night.with_incremental(tmp_path)
    other = tmp_path / "other"
    assert call_pybackup(["init", "--copy-of", night.repository, other]).rc == 0
    assert call_pybackup(["copy", "disk", other, "--repo", night.repository]).rc == 0
    (other / "evil").symlink_to(night.repository / "disk")
    before = {path: path.read_bytes() for path in night.repository.rglob("*") if path.is_file()}
    source = ["--image", night.image, "--machine", "evil", "--disk", "disk"]
    for command in (
        ["full", *source],
        ["full", *source, "--dry-run"],
        ["incremental", *source, "--bitmap", "b1"],
        ["prune", "evil", "--keep-last", "1", "--batch", "1"],
        ["pin", "evil/latest"],
        ["verify", "evil"],
        ["list", "evil"],
        ["restore", "evil/latest", tmp_path / "r.raw"],
        ["copy", "evil", tmp_path / "third"],
    ):
        done = call_pybackup([*command, "--repo", other])
        assert (done.rc, len(done.stderr.splitlines())) == (12, 2), done
        assert f"{other}/evil of machine evil is a link" in done.stderr
    # The others are not hidden by it.
    assert call_pybackup(["prune", "--keep-last", "1", "--batch", "1", "--repo", other]).rc == 12
    listed = call_pybackup(["list", "--json", "--repo", other])
    assert (listed.rc, [point["machine"] for point in listed.document]) == (3, ["disk"])
    assert "evil" in listed.stderr
    states = call_pybackup(["status", "--json", "--repo", other])
    assert (states.rc, {disk["machine"]: disk["code"] for disk in states.document["disks"]}) == (
        12,
        {"disk": 0, "evil": 12},
    )
    verified = call_pybackup(["verify", "--json", "--repo", other])
    assert (verified.rc, verified.document["points"], len(verified.document["problems"])) == (12, 1, 1)
    assert {path: path.read_bytes() for path in night.repository.rglob("*") if path.is_file()} == before


def test_two_machines_do_not_share_a_folder_where_the_file_system_knows_no_case(tmp_path, monkeypatch):
    """As the kernel shows such a file system: a name in other letters finds the folder, and a list has the real one."""
    night = Night.of(tmp_path)
    night.full()
    before = night.state()
    fold(monkeypatch, night.repository, "DISK", "disk")
    image = make_image(tmp_path / "other.qcow2", "1M")
    source = ["--image", image, "--machine", "DISK", "--disk", "disk"]
    for command in (
        ["full", *source],
        ["incremental", *source, "--bitmap", "b1"],
        ["restore", "DISK/latest", tmp_path / "r.raw"],
        ["prune", "DISK", "--keep-last", "1"],
        ["list", "DISK"],
    ):
        done = call_pybackup([*command, "--repo", night.repository])
        assert (done.rc, len(done.stderr.splitlines())) == (2, 2), done
        assert "the folder disk" in done.stderr
    assert night.state() == before
    night.require_restored()


def fold(monkeypatch, folder, name, real):
    """Let `name` in a folder find what `real` does, as on a file system without case."""
    lstat, lexists = os.lstat, os.path.lexists

    def folded(path):
        return folder / real if Path(path) == folder / name else path

    monkeypatch.setattr(os, "lstat", lambda path, **more: lstat(folded(path), **more))
    monkeypatch.setattr(os.path, "lexists", lambda path: lexists(folded(path)))


def test_the_lock_holds_on_a_full_disk(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    machine = create_repository(tmp_path / "repo").machine("web1")
    with machine.lock(), pytest.raises(Locked), machine.lock():
        pass


@pytest.mark.parametrize("failing", [1, 2, 3, 4])
@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), Interrupted(15)], ids=["error", "signal"])
def test_a_publish_that_fails_leaves_no_manifest_behind(tmp_path, monkeypatch, failing, error):
    machine = create_repository(tmp_path / "repo").machine("web1")
    with machine.lock():
        before = sorted(os.listdir(folder_of(machine)))
        calls, real = [], os.fsync

        def fsync(fd):
            calls.append(fd)
            if len(calls) == failing:
                raise error
            real(fd)

        monkeypatch.setattr(os, "fsync", fsync)
        with pytest.raises((Failed, Interrupted)):
            machine.publish(manifest(1, entry(1)))
        assert len(calls) >= failing
        assert sorted(os.listdir(folder_of(machine))) == before


def test_publish_syncs_the_folder_before_and_after_the_manifest_gets_its_name(tmp_path, monkeypatch):
    machine = create_repository(tmp_path / "repo").machine("web1")
    done = []
    real_fsync, real_rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(os.readlink(f"/proc/self/fd/{fd}")), real_fsync(fd)))
    monkeypatch.setattr(os, "rename", lambda old, new: (done.append(f"to {new}"), real_rename(old, new)))
    with machine.lock():
        done.clear()
        path = machine.publish(manifest(1, entry(1)))
    assert done == [
        str(folder_of(machine)),
        f"{path}.tmp",
        f"to {path}",
        str(folder_of(machine)),
        str(folder_of(machine).parent),
    ]


def test_leftovers_are_removed_and_what_is_not_ours_stays(tmp_path):
    night = Night.of(tmp_path)
    night.full()
    folder = night.repository / "disk"
    stem = "disk.20200101T000000Z-00000000"
    names = ("qcow2", "qcow2.part", "qcow2.new", "qcow2.new.part", "b3")
    leftovers = [folder / f"{stem}.{name}" for name in names] + [folder / "20200101T000000Z-00000000.json.tmp"]
    foreign = [folder / name for name in ("notes.txt", "disk.qcow2", "x.b3", f"{stem}.qcow2.bak", "my.json.tmp")]
    for path in (*leftovers, *foreign):
        path.write_text("x")
    assert call_pybackup(["list", "--repo", night.repository]).rc == 0
    assert all(path.exists() for path in leftovers), "a reader must remove nothing"
    assert night.incremental().rc == 0
    assert not [path for path in leftovers if path.exists()]
    assert all(path.exists() for path in foreign)


def test_nothing_is_removed_while_a_manifest_cannot_be_read(tmp_path):
    night = Night.of(tmp_path)
    night.full()
    newest = night.repository / "disk" / f"{night.newest['point']}.json"
    content = newest.read_bytes()
    newest.write_bytes(content[:-10])
    done = night.incremental()
    assert (done.rc, done.disk["kind"]) == (3, "full")
    assert newest.name in done.stderr
    newest.write_bytes(content)
    assert call_pybackup(["verify", "--repo", night.repository]).rc == 0
    sequences = [json.loads(path.read_bytes())["sequence"] for path in newest.parent.glob("*.json")]
    assert sorted(sequences) == [1, 2], "a damaged manifest's sequence was given away again"


def test_a_copy_without_times_under_another_name_restores_and_continues(tmp_path):
    night = Night.of(tmp_path)
    night.full()
    write(night.image, "write -P 7 64k 64k")
    assert night.incremental().rc == 0
    copy = tmp_path / "elsewhere"
    run("cp", "-r", "--no-preserve=all", night.repository, copy)
    shutil.rmtree(night.repository)
    (copy / "disk").rename(copy / "renamed")
    # The oldest point gets the newest time.
    for path in sorted(copy.rglob("*.json"), reverse=True):
        os.utime(path)
    moved = Night(night.image, copy)
    moved.require_restored("renamed")
    write(night.image, "write -P 8 128k 64k")
    done = moved.incremental("--machine", "renamed")
    assert (done.rc, done.disk["kind"]) == (0, "incremental"), done
    moved.require_restored("renamed")


def test_what_can_be_no_machine_is_passed_over(tmp_path):
    night = Night.of(tmp_path)
    night.full()
    for name in ("lost+found", ".snapshots", "my notes"):
        (night.repository / name).mkdir()
    (night.repository / "file").write_text("x")
    os.mkfifo(night.repository / "pipe")
    done = call_pybackup(["list", "--json", "--repo", night.repository])
    assert (done.rc, [point["machine"] for point in done.document]) == (0, ["disk"])
    assert call_pybackup(["verify", "--json", "--repo", night.repository]).document["points"] == 1


ID, AGE = b"0123456789abcdef" * 2, b"age13aqvttdk3ujkyjh9kg2w5an6dmy5mq5a84a4uxk3hfhnugfc9p0sy5p2wh"


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", 12),
        (b"{}", 12),
        (b"\xff" * 100, 12),
        (b"[" * 100_000, 12),
        (b'{"format": "pybackup repository", "version": 1, "id": "../../etc"}', 12),
        (b'{"format": "pybackup repository", "version": 3, "id": 5}', 1),
        (b'{"format": "pybackup repository", "version": 2, "id": "%s"}' % ID, 12),
        (b'{"format": "pybackup repository", "version": 2, "id": "%s", "sealed": true, "recipients": []}' % ID, 12),
        (b'{"format": "pybackup repository", "version": 2, "id": "%s", "sealed": true, "recipients": [1]}' % ID, 12),
        (b'{"format": "pybackup repository", "version": 2, "id": "%s", "sealed": true, "recipients": ["a"]}' % ID, 12),
        (
            b'{"format": "pybackup repository", "version": 2, "id": "%s", "sealed": 1, "recipients": ["%s"]}'
            % (ID, AGE),
            12,
        ),
        (b" " * (1 << 20), 12),
    ],
)
def test_a_bad_marker_is_refused_and_no_point_needs_it(tmp_path, content, code):
    night = Night.of(tmp_path)
    night.full()
    (night.repository / MARKER).write_bytes(content)
    for args in (["list"], ["verify"], ["restore", "disk/latest", tmp_path / "r.raw"]):
        assert call_pybackup([*args, "--repo", night.repository]).rc == code
    before = night.state()
    assert night.incremental().rc == code
    assert night.state() == before
    path = next((night.repository / "disk").glob("*.json"))
    assert call_pybackup(["restore", path, tmp_path / "r.raw"]).rc == 0


@pytest.mark.parametrize(
    "make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")], ids=["pipe", "folder", "link"]
)
def test_something_else_in_the_markers_place_is_refused_at_once(tmp_path, make):
    make(tmp_path / MARKER)
    done = call_pybackup(["list", "--repo", tmp_path])
    assert done.rc == 1
    assert len(done.stderr.splitlines()) == 2


def test_an_unreadable_repository_is_no_bug(tmp_path):
    night = Night.of(tmp_path)
    night.full()
    # pytest's folders are root's alone; the chain down to ours is opened for this test only where it is pytest's.
    for folder in (tmp_path, *tmp_path.parents):
        if "pytest" in str(folder):
            folder.chmod(folder.stat().st_mode | 0o011)
    for args in (["list", "--repo", night.repository], ["full", "--image", night.image, "--repo", night.repository]):
        done = subprocess.run(
            ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", PYBACKUP, *args],
            check=False,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1, done.stderr
        assert "bug" not in done.stderr
        assert "Permission denied" in done.stderr
        assert len(done.stderr.splitlines()) == 2


def as_nobody(*command):
    return subprocess.run(
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", PYBACKUP, *command],
        check=False,
        capture_output=True,
        text=True,
    )


@pytest.fixture
def open_folder():
    """A folder that others may enter; pytest's own become the owner's alone when another pytest starts."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def test_a_machines_folder_that_cannot_be_read_does_not_hide_the_others(open_folder):
    night = Night.of(open_folder)
    night.full()
    for path in (night.repository, *night.repository.rglob("*")):
        path.chmod(0o755)
    (night.repository / "secret").mkdir(mode=0o700)
    listed = as_nobody("list", "--json", "--repo", night.repository)
    assert listed.returncode == 3, listed
    assert [point["machine"] for point in json.loads(listed.stdout)] == ["disk"]
    assert "secret: Permission denied" in listed.stderr
    states = as_nobody("status", "--json", "--repo", night.repository)
    codes = {disk["machine"]: disk["code"] for disk in json.loads(states.stdout)["disks"]}
    assert (states.returncode, codes) == (1, {"disk": 0, "secret": 1})
    verified = as_nobody("verify", "--json", "--repo", night.repository)
    assert (verified.returncode, json.loads(verified.stdout)["points"]) == (1, 1)
    assert as_nobody("list", "disk", "--repo", night.repository).returncode == 0
    done = as_nobody("restore", "secret/latest", open_folder / "r.raw", "--repo", night.repository)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 2), done


READ_ONLY = """
mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" || exit 77
shift
exec "$@"
"""


def read_only(repo, *command):
    """Run a command where the repository lies on a file system that is mounted read-only."""
    done = subprocess.run(
        ["unshare", "--mount", "bash", "-c", READ_ONLY, "_", repo, PYBACKUP, *command, "--repo", repo],
        check=False,
        capture_output=True,
        text=True,
    )
    if done.returncode == 77 or done.stderr.startswith("unshare: "):
        pytest.skip("mounting is not allowed here")
    return done


def test_a_repository_on_a_read_only_mount_is_read_and_refused_to_writers(tmp_path):
    night = Night.with_incremental(tmp_path)
    before = night.state()
    assert call_pybackup(["init", "--copy-of", night.repository, tmp_path / "other"]).rc == 0
    for command in (
        ["list"],
        ["show", "disk/latest"],
        ["verify", "--deep"],
        ["status"],
        ["restore", "disk/latest", tmp_path / "r.raw"],
        ["copy", "disk", tmp_path / "other"],
        ["incremental", "--image", night.image, "--bitmap", "b1", "--dry-run"],
        ["prune", "--keep-last", "1", "--dry-run"],
    ):
        done = read_only(night.repository, *command)
        assert done.returncode == 0, done
    require_identical(raw_copy(night.image, tmp_path / "expected.raw"), tmp_path / "r.raw")
    restore_and_cmp(tmp_path / "other", "disk/latest", night.image)
    for command in (["incremental", "--image", night.image, "--bitmap", "b1"], ["prune", "--keep-last", "1"]):
        done = read_only(night.repository, *command)
        assert (done.returncode, len(done.stderr.splitlines()), "Read-only" in done.stderr) == (1, 2, True), done
    assert night.state() == before


def test_a_signal_while_manifests_are_read_is_not_taken_for_a_damaged_one(tmp_path, monkeypatch):
    def stopped(*_):
        raise Interrupted(15)

    machine = create_repository(tmp_path / "repo").machine("web1")
    with machine.lock():
        machine.publish(manifest(1, entry(1)))
    monkeypatch.setattr("backup.repository.machine.read_raw", stopped)
    with pytest.raises(Interrupted):
        machine.contents()


def test_a_point_that_no_reader_would_take_is_not_published(tmp_path):
    machine = create_repository(tmp_path / "repo").machine("web1")
    with machine.lock():
        before = os.listdir(folder_of(machine))
        with pytest.raises(Damaged):
            machine.publish(manifest(1, entry(1), sequence=(1 << 62) + 1))
        assert os.listdir(folder_of(machine)) == before


def test_a_pipe_with_a_writer_is_no_file_of_the_repository(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "pipe").open("r+b", buffering=0) as writer:
        writer.write(b"x")
        with pytest.raises(Damaged, match="not a plain file"):
            open_file(files_at(tmp_path), "pipe")


def test_sequence_is_one_more_than_the_highest(tmp_path):
    machine = create_repository(tmp_path / "repo").machine("web1")
    with machine.lock():
        for number in (5, 2):
            machine.publish(manifest(number, entry(number)))
        assert machine.next_sequence(machine.contents()) == 6


def test_a_renamed_manifest_is_damage(tmp_path):
    machine = create_repository(tmp_path / "repo").machine("web1")
    with machine.lock():
        Path(machine.publish(manifest(1, entry(1)))).rename(folder_of(machine) / "20261122T010000Z-00000009.json")
    [error] = machine.contents().damaged.values()
    assert error.exit_code == 12
    assert repository.PLAIN_VERSION == 1
