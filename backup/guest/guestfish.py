"""guestfish, the shell of libguestfs: started once, it answers one command after another."""

from __future__ import annotations

import logging
import os
import re
import select
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from backup.errors import Damaged, Failed, UsageError
from backup.qemu.folders import private_folder
from backup.qemu.images import QCOW2
from backup.qemu.programs import Conversation, converse, dies_with_us, filename, one_line
from backup.runtime.ignoring import ignoring

_log = logging.getLogger(__name__)

_LONGEST_LINE = 8000
"""Characters of the longest command; guestfish's input buffer has 8192."""
_HARMLESS = re.compile(rb"[A-Za-z0-9/._-]")


class GuestfishError(Failed):
    """Guestfish refused a command; `text` is its message."""

    def __init__(self, text: str) -> None:
        super().__init__(f"libguestfs: {text}", hint="libguestfs-test-tool shows whether libguestfs works here")
        self.text = text


class Guestfish:
    """
    A running guestfish.  Commands that write a file write into `pipe` (descriptors of its reading and writing end).
    """

    def __init__(self, process: Conversation, complaints: IO[str], pipe: tuple[int, int]) -> None:
        self._process, self._complaints, self._pipe = process, complaints, pipe
        self._shown = 0  # bytes of complaints that were read already

    def ask(self, command: str, *arguments: str) -> bytes:
        """
        Run a command and return what it printed.

        Raises
        ------
        GuestfishError
            The command failed.
        """
        end = self._send(command, *arguments)
        output = bytearray()
        while not output.endswith(end):
            chunk = os.read(self._stdout, 1 << 20)
            if not chunk:
                raise self._end()
            output += chunk
        self._require_success()
        return bytes(output.removesuffix(end))

    @contextmanager
    def stream(self, command: str, path: str) -> Iterator[Stream]:
        """
        Run a command that writes a file (`download`, `tar-out`), and yield what it writes, as it arrives.

        An error in the block, other than Damaged, kills guestfish.

        Raises
        ------
        GuestfishError
            The command failed, and what was read is incomplete.
        """
        stream = Stream(self._pipe[0], self._stdout, self._send(command, path, f"/dev/fd/{self._pipe[1]}"))
        cut_off = None
        try:
            yield stream
        except Damaged as error:
            cut_off = error  # the message of guestfish, if there is one, is more exact
        except BaseException:
            self._process.kill()  # the rest of its output would be taken for the output of the next command
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
        """Send a command; return the line that guestfish prints when the command has ended."""
        mark = f"pybackup-{os.urandom(8).hex()}"
        line = " ".join([f"-{command}", *map(_quoted, arguments)])  # with the dash, an error does not end guestfish
        if len(line) > _LONGEST_LINE:
            raise UsageError("the path is too long for guestfish", hint="name a folder above it")
        assert self._process.stdin is not None
        with ignoring(_log, "guestfish has ended", BrokenPipeError):
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
        self._complaints.seek(self._shown)
        text = self._complaints.read()
        self._shown = self._complaints.tell()
        return one_line(text) if text.strip() else ""


class Stream:
    """What a guestfish command writes into the pipe `data`, until `end` appears on `stdout` (both are descriptors)."""

    def __init__(self, data: int, stdout: int, end: bytes) -> None:
        self._data, self._stdout, self._end = data, stdout, end
        self._output = b""
        self._ended = False
        self._poll = select.poll()  # select() is limited to small descriptors, and a long chain has many files open
        for fd in (data, stdout):
            self._poll.register(fd, select.POLLIN)

    def read(self, size: int = 1 << 16) -> bytes:
        """Return at most `size` bytes, and b"" at the end."""
        while True:
            ready = dict(self._poll.poll(0 if self._ended else None))
            if ready.get(self._data, 0) & select.POLLIN:
                return os.read(self._data, size)
            if self._ended:
                return b""
            chunk = os.read(self._stdout, 1 << 16)
            self._output += chunk
            self._ended = not chunk or self.complete

    @property
    def complete(self) -> bool:
        """Whether the command came to its end."""
        return self._output.endswith(self._end)


@contextmanager
def started(image: Path) -> Iterator[Guestfish]:
    """
    Start guestfish with a qcow2 image, which is not changed.  guestfish and its QEMU end with the block.

    Raises
    ------
    Failed
        guestfish is not installed.
    """
    if not shutil.which("guestfish"):
        raise Failed(
            "guestfish is not installed, and only libguestfs can read a guest's file system without root",
            hint="apt-get install guestfish (dnf install guestfs-tools); or see `pybackup serve --help`",
        )
    command = [*dies_with_us(), "guestfish", "--ro", f"--format={QCOW2}", "-a", filename(image)]
    with private_folder() as folder, tempfile.TemporaryFile("w+", errors="replace") as complaints:
        # The default is libvirt where it is installed, and libvirt may not read files that only this user may read.
        backend = os.environ.get("LIBGUESTFS_BACKEND", "direct")
        environment = {**os.environ, "LC_ALL": "C", "LIBGUESTFS_BACKEND": backend, "LIBGUESTFS_TMPDIR": str(folder)}
        reading, writing = os.pipe()
        try:
            process = converse(command, complaints, environment, pass_fds=[writing])
        except BaseException:
            os.close(reading)
            raise
        finally:
            os.close(writing)  # the pipe then ends when guestfish ends
        try:
            yield Guestfish(process, complaints, (reading, writing))
        finally:
            os.close(reading)
            # This kills its QEMU too, which has nothing to lose: guestfish leads a session and a process group.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with ignoring(_log, "end of a pipe to guestfish", OSError):
                    assert pipe is not None
                    pipe.close()


def _quoted(text: str) -> str:
    """Return an argument for guestfish; every byte that might have a meaning is written as a number."""
    return '"' + "".join(chr(b) if _HARMLESS.match(bytes([b])) else f"\\x{b:02x}" for b in os.fsencode(text)) + '"'
