"""What reads a guest's files trusts neither the guest nor its names; guestfish itself is run by `make test-guest`."""

import errno
import io
import os
import sys
import tarfile

import pytest
from fake_guestfish import FISH, path_with
from lab import MIB, Night, call_pybackup, run_pybackup

from backup.errors import Damaged, Failed, UsageError
from backup.guest import files, guestfish
from backup.guest.files import mount, mounts, target_of, unpack

# What comes out of a guest


def archive(path, *members):
    """A tar archive of (name, kind, content or target) as only a hostile program would write it."""
    with tarfile.open(path, "w") as tar:
        for name, kind, *more in members:
            info = tarfile.TarInfo(name)
            info.type, info.mode, info.mtime = kind, 0o6755, 1_700_000_000
            content = more[0] if kind == tarfile.REGTYPE else b""
            info.size = len(content)
            if kind in {tarfile.SYMTYPE, tarfile.LNKTYPE}:
                info.linkname = more[0]
            tar.addfile(info, io.BytesIO(content))
    return path


def unpacked(path, target):
    with path.open("rb") as file:
        return unpack(file, target)


def test_an_archive_is_unpacked_with_times_and_permissions_and_no_more(tmp_path):
    packed = archive(
        tmp_path / "tar",
        ("./", tarfile.DIRTYPE),
        ("./sub", tarfile.DIRTYPE),
        ("./sub/a", tarfile.REGTYPE, b"abc"),
        ("./hard", tarfile.LNKTYPE, "./sub/a"),
        ("./soft", tarfile.SYMTYPE, "/etc/passwd"),
        ("./device", tarfile.CHRTYPE),
        ("./pipe", tarfile.FIFOTYPE),
        ("./same pipe", tarfile.LNKTYPE, "./pipe"),
        ("./odd\udcff\nname", tarfile.REGTYPE, b"x"),
    )
    done = unpacked(packed, tmp_path / "new")
    assert (done.files, done.bytes, done.left_out) == (3, 4, ("./device", "./pipe", "./same pipe"))
    assert sorted(os.listdir(tmp_path / "new")) == ["hard", "odd\udcff\nname", "soft", "sub"]
    assert (tmp_path / "new" / "hard").samefile(tmp_path / "new" / "sub" / "a")
    assert (tmp_path / "new" / "hard").read_bytes() == b"abc"
    assert os.readlink(tmp_path / "new" / "soft") == "/etc/passwd"
    for name in ("sub", "sub/a"):
        status = (tmp_path / "new" / name).stat()
        assert (status.st_mode & 0o7777, status.st_mtime) == (0o755, 1_700_000_000), name


def test_nothing_is_written_outside_of_the_new_folder(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    members = [
        ("../outside/a", tarfile.REGTYPE, b"x"),
        ("/../outside/b", tarfile.REGTYPE, b"x"),
        ("link", tarfile.SYMTYPE, str(outside)),
        ("link/c", tarfile.REGTYPE, b"x"),
        ("link", tarfile.DIRTYPE),
        ("link/d", tarfile.REGTYPE, b"x"),
        ("file", tarfile.SYMTYPE, str(outside / "e")),
        ("file", tarfile.REGTYPE, b"x"),
        ("sub", tarfile.DIRTYPE),
        ("sub/../../outside/f", tarfile.REGTYPE, b"x"),
        ("nowhere/g", tarfile.REGTYPE, b"x"),
        ("/absolute", tarfile.REGTYPE, b"x"),
    ]
    done = unpacked(archive(tmp_path / "tar", *members), tmp_path / "new")
    assert os.listdir(outside) == []
    assert sorted(os.listdir(tmp_path / "new")) == ["absolute", "file", "link", "sub"]
    assert (done.files, len(done.left_out)) == (1, 8)
    assert (tmp_path / "new" / "absolute").read_bytes() == b"x"


def test_what_is_no_archive_is_refused(tmp_path):
    (tmp_path / "tar").write_bytes(os.urandom(2000))
    with pytest.raises(Damaged):
        unpacked(tmp_path / "tar", tmp_path / "new")
    whole = archive(tmp_path / "whole", ("a", tarfile.REGTYPE, b"x" * 5000))
    (tmp_path / "cut").write_bytes(whole.read_bytes()[:2000])
    with pytest.raises(Damaged):
        unpacked(tmp_path / "cut", tmp_path / "new2")


def test_a_link_to_what_did_not_come_is_left_out(tmp_path):
    (tmp_path / "secret").write_text("x")
    members = [("hard", tarfile.LNKTYPE, "gone"), ("out", tarfile.LNKTYPE, "../secret"), ("soft", tarfile.SYMTYPE, "/")]
    members.append(("through", tarfile.LNKTYPE, "soft"))
    done = unpacked(archive(tmp_path / "tar", *members), tmp_path / "new")
    assert (done.files, done.left_out, os.listdir(tmp_path / "new")) == (0, ("hard", "out", "through"), ["soft"])


def test_zeroes_become_holes(tmp_path):
    """A guest's sparse file may be larger than our disk."""
    content = b"a" * 70_000 + bytes(64 * MIB) + b"z" + bytes(1 * MIB)
    done = unpacked(archive(tmp_path / "tar", ("sparse", tarfile.REGTYPE, content)), tmp_path / "new")
    assert done.bytes == len(content)
    assert (tmp_path / "new" / "sparse").read_bytes() == content
    assert (tmp_path / "new" / "sparse").stat().st_blocks * 512 < MIB


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_root_gets_the_owners_too_by_number(tmp_path):
    with tarfile.open(tmp_path / "tar", "w") as tar:
        for name, kind in (("sub", tarfile.DIRTYPE), ("sub/a", tarfile.REGTYPE), ("soft", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.mode, info.uid, info.gid, info.uname, info.linkname = kind, 0o750, 33, 44, "root", "/etc"
            tar.addfile(info)
    unpacked(tmp_path / "tar", tmp_path / "new")
    for name in ("sub", "sub/a", "soft"):
        status = (tmp_path / "new" / name).lstat()
        assert (status.st_uid, status.st_gid) == (33, 44), name
    assert os.stat("/etc").st_uid == 0


# What goes in


def test_no_character_of_a_path_means_anything_to_guestfish():
    assert guestfish._quoted("/etc/fstab") == '"/etc/fstab"'
    assert guestfish._quoted("/a b\n\"'\\$`;|#-<!\udcff") == (
        '"/a\\x20b\\x0a\\x22\\x27\\x5c\\x24\\x60\\x3b\\x7c\\x23-\\x3c\\x21\\xff"'
    )


def test_where_a_path_goes(tmp_path):
    assert target_of("/etc/fstab", tmp_path) == tmp_path / "fstab"
    assert target_of("/etc/fstab", tmp_path / "new") == tmp_path / "new"
    for path in ("/", "/etc/.."):
        assert target_of(path, tmp_path) == tmp_path
    for path in ("etc", "", "-x", "/a\0b"):
        with pytest.raises(UsageError):
            target_of(path, tmp_path)


@pytest.fixture
def guest(tmp_path):
    """A PATH with a program that speaks like guestfish, and takes the host's files for the guest's."""
    return path_with(tmp_path / "bin", ("guestfish", FISH.replace("/usr/bin/env python3", sys.executable)))


def test_files_are_listed_and_fetched_by_the_command_line(night, guest, tmp_path):
    tree, to, repo = tmp_path / "tree", tmp_path / "to", ["--repo", night.repository]
    (tree / "sub").mkdir(parents=True)
    to.mkdir()
    (tree / "sub" / "\x1b[31mred").write_text("content")
    os.mkfifo(tree / "sub" / "pipe")
    (tree / "gone").symlink_to("/nowhere/at/all")
    shown = run_pybackup(["files", "disk/latest", tree / "sub", *repo], env=guest)
    assert (shown.rc, shown.stderr) == (0, "")
    assert [line.split()[-1] for line in shown.stdout.splitlines()] == ["NAME", "?[31mred", "pipe"]
    [link] = run_pybackup(["files", "disk/latest", tree / "gone", "--json", *repo], env=guest).document
    assert (link["kind"], link["target"]) == ("link", "/nowhere/at/all")
    assert run_pybackup(["files", "disk/latest", tree / "not", *repo], env=guest).rc == 10
    assert run_pybackup(["get", "disk/latest", tree / "gone", to, *repo], env=guest).rc == 10
    for folder in (to, to / "other"):
        done = run_pybackup(["get", "disk/latest", tree / "sub", folder, *repo], env=guest)
        warning = "pybackup: warning: not copied, as it is no file, folder or link: ./pipe\n"
        assert (done.rc, done.stderr) == (3, warning)
    again = run_pybackup(["get", "disk/latest", tree / "sub", to, *repo], env=guest)
    assert (again.rc, again.stderr.splitlines()[0]) == (2, f"pybackup: error: {to / 'sub'} exists")
    one = run_pybackup(["get", "disk/latest", tree / "sub" / "\x1b[31mred", to, "--json", *repo], env=guest)
    assert (one.rc, one.document["files"], one.document["bytes"]) == (0, 1, 7)
    assert {str(path.relative_to(to)) for path in to.rglob("*") if path.is_file()} == {
        "\x1b[31mred",
        "sub/\x1b[31mred",
        "other/\x1b[31mred",
    }
    assert sorted(os.listdir(to)) == ["\x1b[31mred", "other", "sub"]


def test_a_disk_that_is_full_is_told_and_leaves_nothing(fish, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"x" * 1000)
    write = files._write

    def full(content, path):
        write(content, path)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "_write", full)
    (tmp_path / "to").mkdir()
    with pytest.raises(Failed, match="cannot be written: No space left on device"):
        files.GuestFiles(fish).get(str(tmp_path / "file"), tmp_path / "to" / "x")
    assert os.listdir(tmp_path / "to") == []


@pytest.fixture
def fish(tmp_path, monkeypatch):
    """A program that speaks like guestfish and reads the host's files; its tar-out fails after it wrote."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "guestfish").write_text(FISH)
    (folder / "guestfish").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    with guestfish.started(tmp_path / "image") as found:
        yield found


def test_what_guestfish_writes_is_read_as_it_comes(fish, tmp_path):
    content = os.urandom(3 * MIB)
    (tmp_path / "file").write_bytes(content)
    for _ in range(20):
        with fish.stream("download", str(tmp_path / "file")) as stream:
            got = b"".join(iter(stream.read, b""))
        assert got == content
        assert fish.ask("nothing") == b""
    with fish.stream("download", str(tmp_path / "file")) as stream:
        assert stream.read(10) == content[:10]
    assert fish.ask("nothing") == b"", "what nobody read is not in the way"


def test_an_archive_that_guestfish_could_not_finish_is_told_in_its_words(fish, tmp_path):
    whole = archive(tmp_path / "whole", ("a", tarfile.REGTYPE, b"x" * 5000))
    (tmp_path / "cut").write_bytes(whole.read_bytes()[:2000])
    for number, name in enumerate(("whole", "cut")):
        with (
            pytest.raises(guestfish.GuestfishError, match="a damaged file system"),
            fish.stream("tar-out", str(tmp_path / name)) as stream,
        ):
            unpack(stream, tmp_path / f"new{number}")


def test_nobody_takes_the_rest_of_a_file_for_an_answer(fish, tmp_path):
    (tmp_path / "file").write_bytes(b"x" * 1000)
    with pytest.raises(OSError, match="full"), fish.stream("download", str(tmp_path / "file")):
        raise OSError("the disk is full")
    with pytest.raises(guestfish.GuestfishError, match="ended"):
        fish.ask("nothing")


def test_a_guestfish_that_ends_in_the_middle_is_no_end_of_a_file(fish, tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(guestfish.GuestfishError), fish.stream("exit", str(tmp_path / "file")) as stream:
        assert stream.read() == b""


# Which file systems


class Fish:
    """A guestfish with answers."""

    def __init__(self, **answers):
        self.answers = answers

    def ask(self, command, *_):
        return self.answers[command.replace("-", "_")]


def test_the_only_file_system_or_the_only_operating_system_is_mounted():
    one = Fish(list_filesystems=b"/dev/sda1: ext4\n/dev/sda2: swap\n")
    assert mounts(one, None) == [("/", "/dev/sda1")]
    system = Fish(
        list_filesystems=b"/dev/sda1: ext4\n/dev/vg/root: xfs\n/dev/sda3: unknown\n",
        inspect_os=b"/dev/vg/root\n",
        inspect_get_mountpoints=b"/boot: /dev/sda1\n/: /dev/vg/root\n/data: /dev/sdb1\n",
    )
    assert mounts(system, None) == [("/", "/dev/vg/root"), ("/boot", "/dev/sda1")]
    assert mounts(system, "/dev/sda1") == [("/", "/dev/sda1")]
    for wanted in ("/dev/sda3", "/dev/sdc", ""):
        with pytest.raises(UsageError) as refused:
            mounts(system, wanted)
        assert "/dev/vg/root (xfs)" in refused.value.hint


def test_a_file_system_that_cannot_be_mounted_keeps_nobody_from_the_others():
    class Damaged(Fish):
        def ask(self, command, device, place):
            self.answers.setdefault(command, []).append(place)
            if device in self.answers["damaged"]:
                raise guestfish.GuestfishError("bad superblock")
            return b""

    places = [("/", "/dev/sda1"), ("/boot", "/dev/sda2"), ("/home", "/dev/sda3")]
    fish = Damaged(damaged={"/dev/sda2"})
    assert mount(fish, places) == ["/dev/sda2 is not mounted at /boot: bad superblock"]
    assert fish.answers["mount-ro"] == ["/", "/boot", "/home"]
    with pytest.raises(Failed, match="/dev/sda1 cannot be mounted: bad superblock"):
        mount(Damaged(damaged={"/dev/sda1"}), places)


@pytest.mark.parametrize("roots", [b"", b"/dev/sda1\n/dev/sda2\n"])
def test_between_several_the_user_chooses(roots):
    fish = Fish(list_filesystems=b"/dev/sda1: ext4\n/dev/sda2: xfs\n", inspect_os=roots)
    with pytest.raises(UsageError) as refused:
        mounts(fish, None)
    assert "--filesystem: /dev/sda1 (ext4), /dev/sda2 (xfs)" in refused.value.hint
    for nothing in (b"", b"/dev/sda: unknown\n"):
        with pytest.raises(UsageError) as refused:
            mounts(Fish(list_filesystems=nothing), None)
        assert "--filesystem" not in refused.value.hint


# The command line


@pytest.fixture
def night(tmp_path):
    night = Night.of(tmp_path)
    night.full()
    return night


@pytest.mark.parametrize("command", [["files", "disk/latest"], ["get", "disk/latest", "/etc/fstab", "out"]])
def test_without_guestfish_there_is_a_hint(night, tmp_path, command):
    done = run_pybackup([*command, "--repo", night.repository], env=path_with(tmp_path / "bin"), cwd=tmp_path)
    assert done.rc == 1
    first, second = done.stderr.splitlines()
    assert "guestfish is not installed" in first
    assert "apt-get install guestfish" in second
    assert not (tmp_path / "out").exists()


def test_a_guestfish_that_fails_is_told_in_its_words(night, tmp_path):
    env = path_with(tmp_path / "bin", ("guestfish", "#!/bin/sh\necho 'libguestfs: error: no kernel' >&2\nexit 1\n"))
    done = run_pybackup(["files", "disk/latest", "--repo", night.repository, "--json"], env=env)
    assert (done.rc, len(done.stderr.splitlines())) == (1, 2)
    assert "no kernel" in done.document["error"]["message"]


def test_what_is_wrong_is_told_before_a_machine_is_started(night, tmp_path):
    env = path_with(tmp_path / "bin", ("guestfish", f"#!/bin/sh\ntouch {tmp_path}/started\n"))
    repo = ["--repo", night.repository]
    assert run_pybackup(["get", "disk/latest", "etc", tmp_path / "x", *repo], env=env).rc == 2
    (tmp_path / "x").touch()
    for target in (tmp_path / "x", tmp_path / "missing" / "x", tmp_path / "x" / "y"):
        done = run_pybackup(["get", "disk/latest", "/etc", target, *repo], env=env)
        assert (done.rc, len(done.stderr.splitlines())) == (2, 2), target
    assert run_pybackup(["get", "disk/latest", "/etc", "/proc/x", *repo], env=env).rc == 1
    assert run_pybackup(["files", "disk/latest", "etc", *repo], env=env).rc == 2
    assert run_pybackup(["files", "disk/latest", "/", "--disk", "other", *repo], env=env).rc == 10
    assert not (tmp_path / "started").exists()
    assert call_pybackup(["files", "disk/nothing", *repo]).rc == 10
