"""What reads a guest's files trusts neither the guest nor its names; guestfish itself is run by `make test-guest`."""

import io
import os
import tarfile

import pytest
from lab import Night, call_pybackup, run_pybackup

from backup.errors import Damaged, UsageError
from backup.guestfiles import mounts, target_of, unpack
from backup.qemu import programs

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
        ("./odd\udcff\nname", tarfile.REGTYPE, b"x"),
    )
    done = unpack(packed, tmp_path / "new")
    assert (done.files, done.bytes, done.left_out) == (3, 7, ("./device", "./pipe"))
    assert sorted(os.listdir(tmp_path / "new")) == ["hard", "odd\udcff\nname", "soft", "sub"]
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
    done = unpack(archive(tmp_path / "tar", *members), tmp_path / "new")
    assert os.listdir(outside) == []
    assert sorted(os.listdir(tmp_path / "new")) == ["absolute", "file", "link", "sub"]
    assert (done.files, len(done.left_out)) == (1, 8)
    assert (tmp_path / "new" / "absolute").read_bytes() == b"x"


def test_what_is_no_archive_is_refused(tmp_path):
    (tmp_path / "tar").write_bytes(os.urandom(2000))
    with pytest.raises(Damaged):
        unpack(tmp_path / "tar", tmp_path / "new")
    with pytest.raises(Damaged):
        unpack(archive(tmp_path / "t2", ("hard", tarfile.LNKTYPE, "gone")), tmp_path / "new2")


# What goes in


def test_no_character_of_a_path_means_anything_to_guestfish():
    assert programs._quoted("/etc/fstab") == '"/etc/fstab"'
    assert programs._quoted("/a b\n\"'\\$`;|#-<!\udcff") == (
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


@pytest.mark.parametrize("roots", [b"", b"/dev/sda1\n/dev/sda2\n"])
def test_between_several_the_user_chooses(roots):
    fish = Fish(list_filesystems=b"/dev/sda1: ext4\n/dev/sda2: xfs\n", inspect_os=roots)
    with pytest.raises(UsageError) as refused:
        mounts(fish, None)
    assert "--filesystem: /dev/sda1 (ext4), /dev/sda2 (xfs)" in refused.value.hint
    with pytest.raises(UsageError):
        mounts(Fish(list_filesystems=b""), None)


# The command line


@pytest.fixture
def night(tmp_path):
    night = Night.of(tmp_path)
    night.full()
    return night


def path_with(folder, *programs):
    """A PATH that has pybackup's programs and these."""
    folder.mkdir()
    for name, text in programs:
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    for name in ("qemu-img", "sh", "env"):
        found = next(place for place in os.environ["PATH"].split(":") if os.path.exists(f"{place}/{name}"))
        (folder / name).symlink_to(f"{found}/{name}")
    return {"PATH": str(folder)}


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
    assert run_pybackup(["get", "disk/latest", "/etc", tmp_path / "x", *repo], env=env).rc == 1
    assert run_pybackup(["files", "disk/latest", "etc", *repo], env=env).rc == 2
    assert run_pybackup(["files", "disk/latest", "/", "--disk", "other", *repo], env=env).rc == 10
    assert not (tmp_path / "started").exists()
    assert call_pybackup(["files", "disk/nothing", *repo]).rc == 10
