"""
guestfish, libguestfs' shell: one that is asked one command after the other.
"""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from backup.errors import Damaged, Failed, UsageError
from backup.qemu.folders import private_folder
from backup.qemu.images import QCOW2
from backup.qemu.programs import Conversation, converse, dies_with_us, filename, one_line

_LONGEST_LINE = 8000
"""Characters; guestfish reads lines into a buffer of 8192."""
_HARMLESS = re.compile(rb"[A-Za-z0-9/._-]")


class GuestfishError(Failed):
    """Guestfish refused a command; `text` is what it said."""

    def __init__(self, text: str) -> None:
        super().__init__(f"libguestfs: {text}", hint="libguestfs-test-tool shows whether libguestfs works here")
        self.text = text


class Guestfish:
    """A guestfish that is asked one command after the other; it writes files into `pipe` (reading, writing end)."""

    def __init__(self, process: Conversation, complaints: IO[str], pipe: tuple[int, int]) -> None:
        self._process, self._complaints, self._pipe = process, complaints, pipe
        self._heard = 0

    def ask(self, command: str, *arguments: str) -> bytes:
        """
        Run one command; what it printed.

        Raises
        ------
        GuestfishError
            It failed.
        """
        end = self._send(command, *arguments)
        said = bytearray()
        while not said.endswith(end):
            chunk = os.read(self._stdout, 1 << 20)
            if not chunk:
                raise self._end()
            said += chunk
        self._require_success()
        return bytes(said.removesuffix(end))

    @contextmanager
    def stream(self, command: str, path: str) -> Iterator[Stream]:
        """
        Run a command that writes a file (`download`, `tar-out`), and yield what it writes, as it comes.

        Another error than Damaged in the block ends guestfish.

        Raises
        ------
        GuestfishError
            It failed; then what was read is not all.
        """
        stream = Stream(self._pipe[0], self._stdout, self._send(command, path, f"/dev/fd/{self._pipe[1]}"))
        cut_off = None
        try:
            yield stream
        except Damaged as error:
            cut_off = error  # guestfish knows best why
        except BaseException:
            self._process.kill()  # what it goes on to write would be taken for the next command's
            raise
        while stream.read():
            pass
        if not stream.complete:
            raise self._end()
        self._require_success()
        if cut_off is not None:
            raise cut_off

    @property
    def _stdout(self) -> int:
        assert self._process.stdout is not None
        return self._process.stdout.fileno()

    def _send(self, command: str, *arguments: str) -> bytes:
        """Give a command; what guestfish prints when it is done."""
        mark = f"pybackup-{os.urandom(8).hex()}"
        line = " ".join([f"-{command}", *map(_quoted, arguments)])  # the dash: an error does not end guestfish
        if len(line) > _LONGEST_LINE:
            raise UsageError("the path is too long for guestfish", hint="name a folder above it")
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(f"{line}\necho {mark}\n".encode())
            self._process.stdin.flush()
        return f"{mark}\n".encode()

    def _require_success(self) -> None:
        text = self._complained()
        if "error: " in text:
            raise GuestfishError(text.partition("error: ")[2])

    def _end(self) -> GuestfishError:
        return GuestfishError(self._complained() or "guestfish ended")

    def _complained(self) -> str:
        self._complaints.seek(self._heard)
        text = self._complaints.read()
        self._heard = self._complaints.tell()
        return one_line(text) if text.strip() else ""


class Stream:
    """What a command of guestfish writes into the pipe `data`, until it prints `end` on `stdout` (descriptors)."""

    def __init__(self, data: int, stdout: int, end: bytes) -> None:
        self._data, self._stdout, self._end = data, stdout, end
        self._said = b""
        self._ended = False
        self._poll = select.poll()  # not select: the files of a long chain are open besides
        for fd in (data, stdout):
            self._poll.register(fd, select.POLLIN)

    def read(self, size: int = 1 << 16) -> bytes:
        """At most `size` bytes; none at the end."""
        while True:
            ready = dict(self._poll.poll(0 if self._ended else None))
            if ready.get(self._data, 0) & select.POLLIN:
                return os.read(self._data, size)
            if self._ended:
                return b""
            chunk = os.read(self._stdout, 1 << 16)
            self._said += chunk
            self._ended = not chunk or self.complete

    @property
    def complete(self) -> bool:
        """Did the command come to its end?"""
        return self._said.endswith(self._end)


@contextmanager
def started(image: Path) -> Iterator[Guestfish]:
    """
    Start guestfish with a qcow2 image, which it does not change; it and its QEMU end with the block.

    Raises
    ------
    Failed
        It is not installed.
    """
    if not shutil.which("guestfish"):
        raise Failed(
            "guestfish is not installed, and only libguestfs can read a guest's file system without root",
            hint="apt-get install guestfish (dnf install guestfs-tools); or see `pybackup serve --help`",
        )
    command = [*dies_with_us(), "guestfish", "--ro", f"--format={QCOW2}", "-a", filename(image)]
    with private_folder() as folder, tempfile.TemporaryFile("w+", errors="replace") as complaints:
        # libguestfs' default is libvirt, where there is one, which may not read what only we may read.
        backend = os.environ.get("LIBGUESTFS_BACKEND", "direct")
        environment = {**os.environ, "LC_ALL": "C", "LIBGUESTFS_BACKEND": backend, "LIBGUESTFS_TMPDIR": str(folder)}
        reading, writing = os.pipe()
        try:
            process = converse(command, complaints, environment, pass_fds=[writing])
        except BaseException:
            os.close(reading)
            raise
        finally:
            os.close(writing)  # so that it ends with guestfish
        try:
            yield Guestfish(process, complaints, (reading, writing))
        finally:
            os.close(reading)
            # With its QEMU, which has nothing to lose.  A session of its own is a process group of its own.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with suppress(OSError):
                    assert pipe is not None
                    pipe.close()


def _quoted(text: str) -> str:
    """An argument as guestfish reads it: every byte that could mean anything to it by its number."""
    return '"' + "".join(chr(b) if _HARMLESS.match(bytes([b])) else f"\\x{b:02x}" for b in os.fsencode(text)) + '"'
