"""
A small Linux for tests, put together from Debian's: its kernel for clouds, busybox, and QEMU's guest agent.

The kernel and busybox are downloaded and unpacked once, into .cache/guest of the checkout, and not installed; the agent
and its libraries are this machine's.  The initrd is made anew for each run, as it holds init.sh.
"""

from __future__ import annotations

import fcntl
import gzip
import lzma
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
CACHE = HERE.parent.parent / ".cache/guest"
KERNEL = "linux-image-cloud-amd64"
"""The package that depends on the newest kernel of its kind."""
MODULES = (
    *("virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci"),
    *("virtio_blk", "virtio_console"),
)
"""In the order of their dependencies; ext4 is built in."""


class Unavailable(Exception):
    """The packages cannot be had here."""


@dataclass(frozen=True)
class System:
    """What QEMU boots."""

    kernel: Path
    initrd: Path


def make_system(folder: Path) -> System:
    """Put the system together in a folder; raises Unavailable."""
    root = CACHE / "root"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several at once, one downloads
        if not root.exists():
            _download(root)
    [kernel] = root.glob("boot/vmlinuz-*")
    initrd = folder / "initrd.gz"
    initrd.write_bytes(gzip.compress(b"".join(_archive(root)), compresslevel=1))
    return System(kernel, initrd)


def _download(root: Path) -> None:
    """Download and unpack the packages; the folder appears under its name when it is whole."""
    scratch = CACHE / f"new.{os.getpid()}"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        if not _fetch(scratch):
            _apt("apt-get", "update", cwd=scratch)  # the lists are missing, or older than the mirror
            if not _fetch(scratch):
                raise Unavailable(f"{KERNEL} and busybox-static cannot be downloaded")
        for package in scratch.glob("*.deb"):
            subprocess.run(["dpkg", "-x", package, scratch / "root"], check=True)
        (scratch / "root").rename(root)
    finally:
        shutil.rmtree(scratch)


def _fetch(folder: Path) -> bool:
    depends = _apt("apt-cache", "depends", "--important", KERNEL, cwd=folder)
    kernels = [words[1] for line in depends.splitlines() if (words := line.split())[:1] == ["Depends:"]]
    if not kernels:
        return False
    _apt("apt-get", "download", kernels[0], "busybox-static", cwd=folder)
    return len(list(folder.glob("*.deb"))) == 2


def _apt(*command: str, cwd: Path) -> str:
    """Run apt; what it printed.  A failure shows in what is missing afterwards."""
    if not shutil.which(command[0]):
        raise Unavailable(f"there is no {command[0]} here")
    return subprocess.run(command, cwd=cwd, check=False, capture_output=True, text=True).stdout


def _archive(root: Path) -> Iterator[bytes]:
    """Yield the entries of a cpio archive in its "newc" form, which the kernel unpacks as its first file system."""
    agent = shutil.which("qemu-ga")
    assert agent, "qemu-ga is not here (make setup installs it)"
    [busybox] = root.glob("**/bin/busybox")
    files = {"init": HERE / "init.sh", "bin/busybox": busybox, "bin/qemu-ga": Path(agent)}
    files.update((f"modules/{name}.ko", path) for name, path in _modules(root))
    files.update((str(path).lstrip("/"), path) for path in _libraries(agent))
    folders = {str(parent) for name in files for parent in Path(name).parents} - {"."}
    for number, folder in enumerate(sorted(folders | {"dev", "proc", "sys"})):
        yield _entry(number, folder, 0o40755, b"")
    yield _entry(1000, "modules/order", 0o100644, "\n".join(name for name, _ in _modules(root)).encode())
    for number, (name, path) in enumerate(files.items(), 1001):
        content = path.read_bytes()
        yield _entry(number, name, 0o100755, lzma.decompress(content) if path.suffix == ".xz" else content)
    yield _entry(0, "TRAILER!!!", 0, b"")


def _modules(root: Path) -> Iterator[tuple[str, Path]]:
    """Name and file of each module that is not built into this kernel."""
    [builtin] = root.glob("**/modules.builtin")
    for name in MODULES:
        if f"/{name}.ko\n" not in builtin.read_text():
            [path] = root.glob(f"**/kernel/drivers/*/{name}.ko*")
            yield name, path


def _libraries(program: str) -> list[Path]:
    """Paths of the libraries that a program loads, here and in the guest."""
    said = subprocess.run(["ldd", program], check=True, capture_output=True, text=True).stdout
    return [Path(word) for line in said.splitlines() for word in line.split() if word.startswith("/")]


def _entry(number: int, name: str, mode: int, content: bytes) -> bytes:
    links, size = 1, len(content)
    fields = (number, mode, 0, 0, links, 0, size, 0, 0, 0, 0, len(name) + 1, 0)
    head = b"070701" + b"".join(b"%08X" % value for value in fields) + name.encode() + b"\0"
    return _padded(head) + _padded(content)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
