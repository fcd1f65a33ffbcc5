"""
Real NBD servers for tests: nbdkit and qemu-nbd, each on a socket of its own, ended by the process that started it.
"""

from __future__ import annotations

import json
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def _serving(command: Sequence[str | Path], listening: Any) -> Iterator[subprocess.Popen[bytes]]:
    # Kept in a file: shown when the server does not start, and no pipe that could fill.
    with tempfile.TemporaryFile() as said:
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        try:
            deadline = time.monotonic() + 20
            while not listening():
                if server.poll() is not None or time.monotonic() > deadline:
                    said.seek(0)
                    raise AssertionError(f"{command}: {said.read().decode()}")
                time.sleep(0.01)
            yield server
        finally:
            server.terminate()
            try:
                server.wait(timeout=5)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


@contextmanager
def nbdkit(folder: Path, *arguments: str | Path) -> Iterator[str]:
    """Serve with nbdkit on a unix socket; yields the URI.  `arguments` are options, plugin and parameters."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        address, ready = Path(place, "s"), Path(place, "pid")
        with _serving(["nbdkit", "-f", "-U", address, "-P", ready, *arguments], ready.exists):
            yield f"nbd+unix:///?socket={address}"


@contextmanager
def nbdkit_tcp(folder: Path, *arguments: str | Path) -> Iterator[int]:
    """Serve with nbdkit on a TCP port of localhost; yields the port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory(dir=folder) as place:
        ready = Path(place, "pid")
        command = ["nbdkit", "-f", "-i", "127.0.0.1", "-p", str(port), "-P", ready, *arguments]
        with _serving(command, ready.exists):
            yield port


@contextmanager
def qemu_nbd(image: Path, *options: str, image_format: str = "qcow2") -> Iterator[str]:
    """Serve an image read-only with qemu-nbd; yields the URI.  Without -t it ends with its first client."""
    with tempfile.TemporaryDirectory(dir=image.parent) as place:
        address, ready = Path(place, "s"), Path(place, "pid")
        command = ["qemu-nbd", "-r", "-f", image_format, "-k", address, f"--pid-file={ready}", *options, image]
        # The pid file is written once it listens; connecting to see would use up the one client.
        with _serving(command, lambda: ready.exists() and address.exists()):
            yield f"nbd+unix:///?socket={address}"


def nbdinfo_map(uri: str, context: str = "base:allocation") -> list[tuple[int, int, int]]:
    """Start, length and flags of a map as nbdinfo sees it, neighbours with equal flags merged."""
    done = subprocess.run(["nbdinfo", f"--map={context}", "--json", uri], check=True, capture_output=True)
    merged: list[tuple[int, int, int]] = []
    for found in json.loads(done.stdout):
        start, length, flags = found["offset"], found["length"], found["type"]
        if merged and merged[-1][2] == flags and merged[-1][0] + merged[-1][1] == start:
            merged[-1] = (merged[-1][0], merged[-1][1] + length, flags)
        else:
            merged.append((start, length, flags))
    return merged


@contextmanager
def running(image: Path, driver: str, *, writable: bool = True, file_driver: str = "file") -> Iterator[None]:
    """A process that has the image open as a running machine has it."""
    address = image.with_name("machine.sock")
    mode = f"read-only={'off' if writable else 'on'}"
    command = ["qemu-storage-daemon", "--blockdev", f"driver={file_driver},node-name=file,filename={image},{mode}"]
    command += ["--blockdev", f"driver={driver},node-name=disk,file=file,{mode}"]
    command += ["--nbd-server", f"addr.type=unix,addr.path={address}"]
    command += ["--export", f"type=nbd,id=e,node-name=disk,name=disk,writable={'on' if writable else 'off'}"]
    with subprocess.Popen(command) as process:
        try:
            deadline = time.monotonic() + 20
            while not address.exists():
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.01)
            yield
        finally:
            process.kill()
            process.wait()
            address.unlink(missing_ok=True)
