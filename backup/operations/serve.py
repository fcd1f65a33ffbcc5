"""
Serve a disk of a point over NBD, by a qemu-nbd process on the data files of the chain.

Nothing is copied.  The manifests and the files' sizes and headers are checked, but no digest; QEMU checks each
compressed cluster as it is read.  A shared flock on each digest file keeps `prune` away while the disk is served.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from backup.errors import NotFound, UsageError
from backup.model.chain import Chain
from backup.model.manifest import Manifest
from backup.qemu import folders, servers, unnamed_images
from backup.qemu.programs import filename
from backup.qemu.servers import Address, PointServer
from backup.repository import data_file
from backup.repository.machine import Machine
from backup.repository.opened_chain import open_chain
from backup.storage.base import require_local_folder


@dataclass(frozen=True, slots=True)
class Served:
    """
    A disk that is being served.

    `size` is the size of the disk in bytes; `export_size` is the size that clients see, which QEMU rounds up to a
    multiple of 512 with zeroes.  `protected` is False if no lock keeps `prune` away.
    """

    uri: str
    size: int
    export_size: int
    protected: bool
    server: PointServer
    address: Address


def choose_disk(point: Manifest, disk: str | None) -> str:
    """
    Return the name of the disk that is meant: the named one, or the only one.

    Raises
    ------
    NotFound
        The point does not hold the disk.
    UsageError
        The point holds several disks, and none is named.
    """
    names = [entry.name for entry in point.disks]
    if disk is None and len(names) > 1:
        raise UsageError(f"point {point.point} holds {len(names)} disks", hint=f"name one: --disk {' or '.join(names)}")
    if disk is not None and disk not in names:
        raise NotFound(
            f"point {point.point} holds no disk {disk!r}", hint=f"the point holds these disks: {', '.join(names)}"
        )
    return disk or names[0]


def address(socket: Path | None, port: str | None, bind: str | None) -> Address | None:
    """
    Return the address that the options name, or None for a socket in a temporary folder.

    Raises
    ------
    UsageError
        The options contradict each other, or the port is not a port.
    """
    if socket is not None and (port is not None or bind is not None):
        raise UsageError("--socket together with --port or --bind", hint="give one of the two")
    if bind is not None and port is None:
        raise UsageError("--bind without --port", hint="name the port: --port 10809")
    if port is None:
        return None if socket is None else Address(socket)
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16):
        raise UsageError(f"{port!r} is not a port", hint="give a number from 1 to 65535; the port of NBD is 10809")
    return Address(None, bind or "127.0.0.1", int(port))


@contextmanager
def serving(machine: Machine, point: str, disk: str, where: Address | None, *, writable: bool) -> Iterator[Served]:
    """
    Serve a disk of a point until the block ends.  With `writable`, clients may write, and their writes are discarded.

    Raises
    ------
    BackupError
        The chain is damaged, as far as its headers tell, or cannot be served, or the address is in use.
    """
    folder = require_local_folder(machine.files)
    with ExitStack() as outer:
        address = where or Address(outer.enter_context(folders.private_folder()) / "nbd")

        @contextmanager
        def started(chain: Chain) -> Iterator[tuple[bool, PointServer]]:
            with data_file.hold(machine.files, chain) as protected, ExitStack() as stack:
                yield protected, _start(stack, folder, chain, address, writable=writable)

        with open_chain(machine, point, disk, started) as (chain, (protected, server)):
            export_size = -(-chain.size // 512) * 512
            yield Served(address.uri, chain.size, export_size, protected, server, address)


def _start(stack: ExitStack, folder: Path, chain: Chain, address: Address, *, writable: bool) -> PointServer:
    image = folder / chain.newest.entry.data.file
    overlay = stack.enter_context(unnamed_images.temporary_overlay(image)) if writable else None
    return stack.enter_context(servers.serve_point(image, address, overlay))


def commands(uri: str, where: Address, *, writable: bool) -> dict[str, str]:
    """Return shell commands that look into the disk, by the name of their program."""
    if where.socket is not None:
        guestfish = uri.replace("nbd+unix:///", "nbd://", 1)  # libguestfs' spelling
        client = ["-unix", str(where.socket), "/dev/nbd0"]
    else:
        host, port = uri.removeprefix("nbd://").removesuffix("/").rsplit(":", 1)
        guestfish, client = f"nbd://{host}:{port}", [host.strip("[]"), port, "/dev/nbd0"]
    drive = f"format=raw,{_qemu_file(uri, where)},if=virtio{'' if writable else ',snapshot=on'}"
    return {
        "guestfish": shlex.join(["guestfish", "--rw" if writable else "--ro", "--format=raw", "-a", guestfish, "-i"]),
        "nbd-client": shlex.join(["nbd-client", *client]),
        "qemu": shlex.join(["qemu-system-x86_64", "-m", "2G", "-drive", drive]),
    }


def _qemu_file(uri: str, where: Address) -> str:
    """
    Return the export as options of QEMU's -drive.

    The path of a socket is not written as part of a URI: QEMU 10 decodes a URI twice, and refuses bytes that are not
    UTF-8.
    """
    if where.socket is None:
        return f"file={uri}"
    return f"file.driver=nbd,file.server.type=unix,file.server.path={filename(where.socket).replace(',', ',,')}"
