"""The repository on disk: modes, first runs, the lock, publishing, leftovers, and being copied with plain tools."""

import fcntl
import json
import os
import shutil
import stat
import subprocess
import threading

import pytest
from forge import entry, manifest
from lab import PYBACKUP, Night, call_pybackup, make_image, run, write

from backup import digests, repository
from backup.errors import Damaged, Failed, Interrupted, Locked, NotFound
from backup.names import MARKER
from backup.repository import Modes, Repository


def modes(folder):
    return {
        str(path.relative_to(folder)): stat.S_IMODE(path.stat().st_mode)
        for path in (folder, *sorted(folder.rglob("*")))
    }


def back_up_with_umask(tmp_path, umask, *options):
    image = make_image(tmp_path / "disk.qcow2", "1M")
    done = subprocess.run(
        [PYBACKUP, *options, "full", "--image", image, "--repo", tmp_path / "repo"],
        check=False,
        capture_output=True,
        preexec_fn=lambda: os.umask(umask),
    )
    assert done.returncode == 0, done.stderr
    return modes(tmp_path / "repo")


@pytest.mark.parametrize("umask", [0o000, 0o077, 0o777])
def test_only_the_owner_can_read_whatever_the_umask(tmp_path, umask):
    found = back_up_with_umask(tmp_path, umask)
    assert {name: mode for name, mode in found.items() if mode != 0o600} == {".": 0o700, "disk": 0o700}
    assert len(found) == 7


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_group_read_lets_the_group_read_whatever_the_umask(tmp_path, umask):
    (tmp_path / "c.yaml").write_text("group_read: true\n")
    found = back_up_with_umask(tmp_path, umask, "--config", tmp_path / "c.yaml")
    assert {name: mode for name, mode in found.items() if mode != 0o640} == {".": 0o750, "disk": 0o750}
    assert len(found) == 7


def test_a_set_group_id_folder_keeps_its_bit_and_hands_it_on(tmp_path):
    tmp_path.chmod(0o2755)
    Repository.open_or_create(tmp_path / "repo", Modes(0o640, 0o750))
    assert modes(tmp_path / "repo") == {".": 0o2750, MARKER: 0o640}


def test_a_folder_that_holds_other_things_is_never_made_a_repository(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(NotFound):
        Repository.open_or_create(tmp_path)
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_a_fresh_file_system_and_what_a_killed_first_run_left_count_as_empty(tmp_path):
    (tmp_path / "lost+found").mkdir()
    (tmp_path / f"{MARKER}.0123abcd.tmp").write_text("{")
    Repository.open_or_create(tmp_path)
    assert Repository.open(tmp_path).machine_names() == []


@pytest.mark.parametrize("there", ["", "a", "a/b/repo"], ids=["no folder", "some", "left by a killed run"])
def test_the_names_of_all_new_folders_last_in_theirs(tmp_path, monkeypatch, there):
    (tmp_path / there).mkdir(parents=True, exist_ok=True)
    synced, real = [], os.fsync

    def fsync(fd):
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    Repository.open_or_create(tmp_path / "a/b/repo")
    new = {"": ["a/b", "a", ""], "a": ["a/b", "a"], "a/b/repo": ["a/b"]}[there]
    assert {str(tmp_path / folder) for folder in new} <= set(synced)


def test_first_runs_at_the_same_time_agree_on_one_id(tmp_path):
    found, start = [], threading.Barrier(8)

    def first_run():
        start.wait()
        found.append(Repository.open_or_create(tmp_path / "repo").identity)

    threads = [threading.Thread(target=first_run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert set(found) == {Repository.open(tmp_path / "repo").identity}
    assert os.listdir(tmp_path / "repo") == [MARKER]


def test_a_file_system_without_links_gets_its_marker_too(tmp_path, monkeypatch):
    def no_links(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    identity = Repository.open_or_create(tmp_path / "repo").identity
    assert Repository.open_or_create(tmp_path / "repo").identity == identity
    assert os.listdir(tmp_path / "repo") == [MARKER]


def test_the_second_writer_is_told_the_first_ones_host_and_pid(tmp_path):
    machine = Repository.open_or_create(tmp_path / "repo").machine("web1")
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
    repository = Repository.open_or_create(tmp_path / "repo")
    first = repository.machine("web1")
    with first.lock():
        repository.ownership("web1").require_alone()
    (first.path / "lock").write_text("host far pid 1\n")
    repository.ownership("web2").require_alone()
    assert (first.path / "lock").read_text() == "host far pid 1\n"
    with first.lock(), pytest.raises(Locked, match="web1 is locked"):
        repository.ownership("web2").require_alone()


def test_a_lock_that_somebody_only_looks_at_is_waited_for(tmp_path):
    machine = Repository.open_or_create(tmp_path / "repo").machine("web1")
    with machine.lock():
        pass
    fd = os.open(machine.path / "lock", os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_SH)
    looking = threading.Timer(0.1, os.close, [fd])
    looking.start()
    with machine.lock():
        looking.join()


def test_a_killed_holders_lock_is_free(tmp_path):
    path = tmp_path / "repo"
    Repository.open_or_create(path)
    code = (
        "import sys, time; from pathlib import Path; from backup.repository import Repository\n"
        f"with Repository.open(Path({str(path)!r})).machine('web1').lock(): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([PYBACKUP.with_name("python"), "-c", code], stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        machine = Repository.open(path).machine("web1")
        with pytest.raises(Locked, match=f"pid {holder.pid}"), machine.lock():
            pass
        holder.kill()
    with machine.lock():
        pass


def test_a_lock_that_is_a_pipe_or_a_link_holds_up_nothing(tmp_path):
    machine = Repository.open_or_create(tmp_path / "repo").machine("web1")
    with machine.lock():
        pass
    (machine.path / "lock").unlink()
    os.mkfifo(machine.path / "lock")
    with machine.lock():
        pass
    (machine.path / "lock").unlink()
    (tmp_path / "precious").write_text("x")
    (machine.path / "lock").symlink_to(tmp_path / "precious")
    with pytest.raises(Failed), machine.lock():
        pass
    assert (tmp_path / "precious").read_text() == "x"


def test_the_lock_holds_on_a_full_disk(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    machine = Repository.open_or_create(tmp_path / "repo").machine("web1")
    with machine.lock(), pytest.raises(Locked), machine.lock():
        pass


@pytest.mark.parametrize("failing", [1, 2, 3, 4])
@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), Interrupted(15)], ids=["error", "signal"])
def test_a_publish_that_fails_leaves_no_manifest_behind(tmp_path, monkeypatch, failing, error):
    machine = Repository.open_or_create(tmp_path / "repo").machine("web1")
    with machine.lock():
        before = sorted(os.listdir(machine.path))
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
        assert sorted(os.listdir(machine.path)) == before


def test_publish_syncs_the_folder_before_and_after_the_manifest_gets_its_name(tmp_path, monkeypatch):
    machine = Repository.open_or_create(tmp_path / "repo").machine("web1")
    done = []
    real_fsync, real_rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(os.readlink(f"/proc/self/fd/{fd}")), real_fsync(fd)))
    monkeypatch.setattr(os, "rename", lambda old, new: (done.append(f"to {new}"), real_rename(old, new)))
    with machine.lock():
        done.clear()
        path = machine.publish(manifest(1, entry(1)))
    assert done == [
        str(machine.path),
        f"{path}.tmp",
        f"to {path}",
        str(machine.path),
        str(machine.path.parent),
    ]


def test_leftovers_are_removed_and_what_is_not_ours_stays(tmp_path):
    night = Night.of(tmp_path)
    night.full()
    folder = night.repository / "disk"
    stem = "disk.20200101T000000Z-00000000"
    leftovers = [folder / name for name in (f"{stem}.qcow2", f"{stem}.b3", "20200101T000000Z-00000000.json.tmp")]
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


def test_folders_that_can_be_no_machines_are_passed_over_and_links_to_machines_are_not(tmp_path):
    night = Night.of(tmp_path)
    night.full()
    for name in ("lost+found", ".snapshots", "my notes"):
        (night.repository / name).mkdir()
    (tmp_path / "other-disk").mkdir()
    (night.repository / "disk").rename(tmp_path / "other-disk" / "disk")
    (night.repository / "disk").symlink_to(tmp_path / "other-disk" / "disk")
    done = call_pybackup(["list", "--json", "--repo", night.repository])
    assert (done.rc, [point["machine"] for point in done.document]) == (0, ["disk"])
    assert call_pybackup(["verify", "--json", "--repo", night.repository]).document["points"] == 1


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", 12),
        (b"{}", 12),
        (b"\xff" * 100, 12),
        (b"[" * 100_000, 12),
        (b'{"format": "pybackup repository", "version": 1, "id": "../../etc"}', 12),
        (b'{"format": "pybackup repository", "version": 2, "id": 5}', 1),
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


def test_a_signal_while_manifests_are_read_is_not_taken_for_a_damaged_one(tmp_path, monkeypatch):
    def stopped(*_):
        raise Interrupted(15)

    machine = Repository.open_or_create(tmp_path / "repo").machine("web1")
    with machine.lock():
        machine.publish(manifest(1, entry(1)))
    monkeypatch.setattr(repository, "read_raw", stopped)
    with pytest.raises(Interrupted):
        machine.contents()


def test_a_point_that_no_reader_would_take_is_not_published(tmp_path):
    machine = Repository.open_or_create(tmp_path / "repo").machine("web1")
    with machine.lock():
        before = os.listdir(machine.path)
        with pytest.raises(Damaged):
            machine.publish(manifest(1, entry(1), sequence=(1 << 62) + 1))
        assert os.listdir(machine.path) == before


def test_a_pipe_with_a_writer_is_no_file_of_the_repository(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "pipe").open("r+b", buffering=0) as writer:
        writer.write(b"x")
        with pytest.raises(Damaged, match="no plain file"):
            digests.open_plain(tmp_path / "pipe")


def test_sequence_is_one_more_than_the_highest(tmp_path):
    machine = Repository.open_or_create(tmp_path / "repo").machine("web1")
    with machine.lock():
        for number in (5, 2):
            machine.publish(manifest(number, entry(number)))
        assert machine.next_sequence(machine.contents()) == 6


def test_a_renamed_manifest_is_damage(tmp_path):
    machine = Repository.open_or_create(tmp_path / "repo").machine("web1")
    with machine.lock():
        machine.publish(manifest(1, entry(1))).rename(machine.path / "20261122T010000Z-00000009.json")
    [error] = machine.contents().damaged.values()
    assert error.exit_code == 12
    assert repository.VERSION == 1
