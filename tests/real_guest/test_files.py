"""Files are listed and fetched from points of real file systems, by libguestfs in a machine of its own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from initrd import CACHE, System
from lab import MIB, PYBACKUP, Result, call_pybackup, make_image, run
from live import private_tmp
from places import machine_at

from backup.guest import files
from backup.model.manifest import Manifest

pytestmark = pytest.mark.timeout(600)  # an emulated machine, on cores that others use as well

STRANGE = [
    "with space",
    "new\nbeef",
    "-dash",
    "$(touch pwned);`id`|\"q\"'s'\\n",
    "*?[a]",
    "#x",
    "ü",
    "\udcff.bin",
    "a:b, c",
]
"""Names that shells, guestfish and QEMU's options give a meaning."""


@pytest.fixture(scope="module")
def works(system: System) -> None:
    """libguestfs, with the kernel that the tests' guest has: the host need not have one of its own."""
    if not shutil.which("guestfish"):
        pytest.skip("guestfish is not installed: `tools/setup guest` installs it")
    version = system.kernel.name.removeprefix("vmlinuz-")
    # Debian 12 has a kernel's modules below /lib, Debian 13 below /usr/lib.
    [builtin] = CACHE.glob("root/**/modules.builtin")
    modules = builtin.parent
    run("depmod", "-b", modules.parents[2], version)
    if not Path("/lib/modules").exists():  # supermin wants to copy the folder's permissions
        try:
            Path("/lib/modules").mkdir()
        except OSError as error:
            pytest.skip(f"supermin needs /lib/modules: {error}")
    (CACHE / "appliance").mkdir(exist_ok=True)
    os.environ.update(
        LIBGUESTFS_BACKEND_SETTINGS="force_tcg",
        LIBGUESTFS_CACHEDIR=str(CACHE / "appliance"),
        SUPERMIN_KERNEL=str(system.kernel),
        SUPERMIN_KERNEL_VERSION=version,
        SUPERMIN_MODULES=str(modules),
    )


@dataclass(frozen=True, slots=True)
class Point:
    """A machine's newest point."""

    repository: Path
    machine: str

    def opened(self, filesystem: str | None = None, point: str | None = None):
        folder = machine_at(self.repository / self.machine)
        found: list[Manifest] = sorted(folder.contents().manifests.values(), key=lambda each: each.sequence)
        return files.open_files(folder, point or found[-1].point, self.machine, filesystem)

    def run(self, command: str, *args: str | Path) -> Result:
        given = [PYBACKUP, command, f"{self.machine}/latest", *args, "--repo", self.repository, "--json"]
        done = subprocess.run(given, check=False, capture_output=True, text=True)
        return Result(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def point_of(tmp_path: Path) -> Callable[[Path], Point]:
    """Back up a raw image."""

    def back_up(image: Path) -> Point:
        # QEMU's options end a name at a comma, and NBD's URIs begin before a colon.
        repository = tmp_path / "the: repo, itself"
        done = call_pybackup(["full", "--image", image, "--image-format", "raw", "--repo", repository])
        assert done.rc == 0, done.stderr
        return Point(repository, image.stem)

    return back_up


def make_tree(folder: Path) -> Path:
    """Files with strange names, links and a file of some size."""
    (folder / "etc").mkdir(parents=True)
    (folder / "etc/fstab").write_text("# nothing\n")
    (folder / "etc/fstab").chmod(0o640)
    (folder / "strange").mkdir()
    for number, name in enumerate(STRANGE):
        (folder / "strange" / name).write_bytes(b"content %d" % number)
        (folder / "strange" / f"dir {name}").mkdir()
        (folder / "strange" / f"dir {name}" / name).write_bytes(b"inside %d" % number)
    (folder / "link").symlink_to("etc/fstab")
    (folder / "away").symlink_to("/etc/passwd")
    (folder / "large").write_bytes(os.urandom(3 * MIB))
    (folder / "empty").mkdir()
    return folder


def require_same_tree(one: Path, other: Path) -> None:
    """diff finds no difference, in contents and in links; permissions and times are the same."""
    run("diff", "-r", "--no-dereference", one, other)
    for path in one.rglob("*"):
        if not path.is_symlink():
            there = other / path.relative_to(one)
            assert there.stat().st_mode == path.stat().st_mode, path
            assert int(there.stat().st_mtime) == int(path.stat().st_mtime), path


def test_an_ext4_without_partitions_at_two_points(works, tmp_path, point_of):
    tree = make_tree(tmp_path / "tree")
    run("mke2fs", "-q", "-t", "ext4", "-d", tree, tmp_path / "disk.raw", "24M")
    image = make_image(tmp_path / "disk.qcow2", "24M")
    convert = ["qemu-img", "convert", "-n", "-f", "raw", "-O", "qcow2", tmp_path / "disk.raw", image]
    run(*convert)
    point = Point(tmp_path / "the: repo, itself", "disk")
    options = ["--image", image, "--repo", point.repository, "--bitmap", "b1", "--json"]
    first = call_pybackup(["full", *options])
    assert first.rc == 0, first.stderr
    run("debugfs", "-w", "-R", "rm /etc/fstab", tmp_path / "disk.raw")
    run(*convert)
    second = call_pybackup(["incremental", *options])
    assert (second.rc, second.disk["kind"]) == (0, "incremental"), second
    with point.opened() as guest:
        assert [entry.name for entry in guest.list("/etc")] == []
    with point.opened(point=first.machine["point"]) as guest:
        found = {entry.name: entry for entry in guest.list("/")}
        assert sorted(found) == ["away", "empty", "etc", "large", "link", "lost+found", "strange"]
        assert (found["large"].kind, found["large"].size) == ("file", 3 * MIB)
        assert (found["away"].kind, found["away"].target) == ("link", "/etc/passwd")
        [fstab] = guest.list("/etc")
        assert (fstab.name, fstab.kind, fstab.mode, fstab.size) == ("fstab", "file", 0o640, 10)
        assert guest.list("/etc/fstab") == [fstab]
        assert sorted(entry.name for entry in guest.list("/strange")) == sorted(os.listdir(tree / "strange"))
        for number, name in enumerate(STRANGE):
            assert [entry.name for entry in guest.list(f"/strange/dir {name}")] == [name]
            assert guest.get(f"/strange/{name}", tmp_path / f"got {number}").files == 1
            run("cmp", tmp_path / f"got {number}", tree / "strange" / name)
        fetched = guest.get("/strange", tmp_path / "-got strange")
        assert (fetched.files, fetched.left_out) == (2 * len(STRANGE), ())
        require_same_tree(tree / "strange", tmp_path / "-got strange")
        guest.get("/", tmp_path / "got all")
        shutil.rmtree(tmp_path / "got all" / "lost+found")
        require_same_tree(tree, tmp_path / "got all")
        guest.get("/link", tmp_path / "got link")
        run("cmp", tmp_path / "got link", tree / "etc/fstab")
        for path in ("/nothing", "/etc/fstab/x", "/strange/new"):
            with pytest.raises(files.NotFound):
                guest.list(path)
            with pytest.raises(files.NotFound):
                guest.get(path, tmp_path / "got nothing")
        assert not (tmp_path / "got nothing").exists()
        assert not list(tmp_path.glob(".pybackup-*"))
        assert machine_at(point.repository / "disk").points_in_use().keys() == {first.machine["point"]}
    assert not list(Path().glob("pwned"))


def test_an_xfs_by_the_command_line_which_leaves_nothing(works, tmp_path, point_of):
    tree = make_tree(tmp_path / "tree")
    (tmp_path / "proto").write_text(
        "nothing\n0 0\nd--755 0 0\n"
        f"large ---644 0 0 {tree / 'large'}\n"
        f"etc d--755 0 0\nfstab ---640 0 0 {tree / 'etc/fstab'}\n$\n"
        "pipe p--644 0 0\n$\n"
    )
    with (tmp_path / "disk.raw").open("wb") as file:
        file.truncate(320 * MIB)
    run("mkfs.xfs", "-q", "-p", tmp_path / "proto", tmp_path / "disk.raw")
    point = point_of(tmp_path / "disk.raw")
    with private_tmp(tmp_path) as left:
        fetch_all_of_the_xfs(point, tree, tmp_path / "to")
        assert not list(left.glob("pybackup-*"))
    assert sorted(path.name for path in (tmp_path / "to").iterdir()) == ["all", "large"]


def fetch_all_of_the_xfs(point: Point, tree: Path, to: Path) -> None:
    listed = point.run("files")
    assert (listed.rc, listed.stderr) == (0, "")
    assert [*listed.document[0]] == ["name", "kind", "size", "mode", "modified", "target"]
    assert [(entry["name"], entry["kind"]) for entry in listed.document] == [
        ("etc", "directory"),
        ("large", "file"),
        ("pipe", "other"),
    ]
    to.mkdir()
    done = point.run("get", "/", to / "all")
    assert (done.rc, done.document["left_out"]) == (3, ["./pipe"])
    run("cmp", to / "all" / "large", tree / "large")
    run("cmp", to / "all" / "etc/fstab", tree / "etc/fstab")
    assert point.run("get", "/large", to).document["target"] == str(to / "large")
    run("cmp", to / "large", tree / "large")


def test_partitions_with_an_operating_system_and_without(works, tmp_path, point_of):
    root = tmp_path / "root"
    for name in ("bin", "etc", "boot", "usr", "var", "home"):
        (root / name).mkdir(parents=True)
    (root / "etc/os-release").write_text('ID=debian\nVERSION_ID="12"\nPRETTY_NAME="Debian"\n')
    (root / "etc/debian_version").write_text("12.0\n")
    (root / "etc/fstab").write_text("/dev/sda1 / ext4 defaults 0 1\n/dev/sda2 /boot ext4 defaults 0 2\n")
    boot = tmp_path / "boot"
    (boot / "grub").mkdir(parents=True)
    (boot / "grub/grub.cfg").write_text("menu\n")
    disk = tmp_path / "disk.raw"
    with disk.open("wb") as file:
        file.truncate(64 * MIB)
    table = "label: dos\nstart=2048, size=65536, type=83\nstart=67584, size=32768, type=83\n"
    subprocess.run(["sfdisk", "-q", disk], input=table, text=True, check=True)
    for folder, start, size in ((root, 1, "32M"), (boot, 33, "16M")):
        run("mke2fs", "-q", "-t", "ext4", "-E", f"offset={start * MIB}", "-d", folder, disk, size)
    point = point_of(disk)
    with point.opened() as guest:
        assert [entry.name for entry in guest.list("/boot/grub")] == ["grub.cfg"]
        assert "os-release" in [entry.name for entry in guest.list("/etc")]
    with point.opened("/dev/sda2") as guest:
        assert "grub" in [entry.name for entry in guest.list("/")]
    # Without an operating system nobody can tell which is meant.
    run("mke2fs", "-q", "-F", "-t", "ext4", "-E", f"offset={MIB}", disk, "32M")
    os.utime(disk)
    point = Point(point.repository, "disk")
    assert call_pybackup(["full", "--image", disk, "--image-format", "raw", "--repo", point.repository]).rc == 0
    with pytest.raises(files.UsageError) as asked, point.opened():
        pass
    assert "--filesystem: /dev/sda1 (ext4), /dev/sda2 (ext4)" in asked.value.hint


LVM = """
run
part-disk /dev/sda mbr
pvcreate /dev/sda1
vgcreate vg /dev/sda1
lvcreate root vg 60
lvcreate data vg 60
mkfs ext4 /dev/vg/root
mkfs ext4 /dev/vg/data
mount /dev/vg/root /
mkdir /bin
mkdir /etc
mkdir /data
write /etc/os-release "ID=debian\\nVERSION_ID=12\\n"
write /etc/debian_version "12.0\\n"
write /etc/fstab "/dev/vg/root / ext4 defaults 0 1\\n/dev/vg/data /data ext4 defaults 0 2\\n"
mount /dev/vg/data /data
mkdir /data/www
write /data/www/one shared
ln /data/www/one /data/www/other
touch /data/www/sparse
truncate-size /data/www/sparse 200000000
mknod-c 0666 1 3 /data/www/null
chown 33 34 /data/www/one
chown 33 34 /data/www
ln-s /nowhere /data/dangling
echo READY
"""


@pytest.mark.timeout(1200)  # three machines one after the other
def test_lvm_that_was_in_use_with_sparse_files_hard_links_and_owners(works, tmp_path, point_of):
    """Made by guestfish itself, which is killed before it unmounts: as in a backup of a guest that runs."""
    disk = tmp_path / "disk.raw"
    with disk.open("wb") as file:
        file.truncate(160 * MIB)
    given = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen(["guestfish", "--rw", "--format=raw", "-a", disk], **given) as making:
        making.stdin.write(LVM.replace("echo", "sync\necho"))
        making.stdin.flush()
        assert making.stdout.readline() == "READY\n"
        os.killpg(making.pid, signal.SIGKILL)
    point = point_of(disk)
    with point.opened() as guest:
        assert [entry.name for entry in guest.list("/data/www")] == ["null", "one", "other", "sparse"]
        [dangling] = guest.list("/data/dangling")
        assert (dangling.kind, dangling.target) == ("link", "/nowhere")
        done = guest.get("/data/www", tmp_path / "www")
        assert (done.files, done.left_out) == (3, ("./null",))
        assert (tmp_path / "www/one").samefile(tmp_path / "www/other")
        assert (tmp_path / "www/one").read_text() == "shared"
        sparse = (tmp_path / "www/sparse").stat()
        assert (sparse.st_size, sparse.st_blocks) == (200_000_000, 0)
        if os.geteuid() == 0:
            owners = [(path.stat().st_uid, path.stat().st_gid) for path in (tmp_path / "www", tmp_path / "www/one")]
            assert owners == [(33, 34), (33, 34)]
    with point.opened("/dev/vg/data") as guest:
        assert "www" in [entry.name for entry in guest.list("/")]


def test_a_kill_takes_guestfish_and_its_machine_along(works, tmp_path, point_of):
    run("mke2fs", "-q", "-t", "ext4", "-d", make_tree(tmp_path / "tree"), tmp_path / "disk.raw", "24M")
    point = point_of(tmp_path / "disk.raw")
    for number in (9, 15):
        command = [PYBACKUP, "files", "disk/latest", "--repo", point.repository]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            deadline = time.monotonic() + 120
            while not users("qemu-system", tmp_path):
                assert time.monotonic() < deadline
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.05)
            process.send_signal(number)
            assert process.wait(30) in {-9, 143}
        deadline = time.monotonic() + 20
        while left := users("", tmp_path):
            assert time.monotonic() < deadline, left
            time.sleep(0.1)


def users(program: str, folder: Path) -> list[str]:
    """Command lines that name the program, of processes that have a file open in the folder, or name it."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            line = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            opened = [os.readlink(fd) for fd in (path / "fd").iterdir()]
        except OSError:
            continue
        if program in line and int(path.name) != os.getpid() and any(str(folder) in name for name in (line, *opened)):
            found.append(line)
    return found
