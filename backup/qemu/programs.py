"""
How QEMU's programs, and guestfish, are run: no shell, no way to die of a Ctrl-C.  The only user of `subprocess`.
"""

from __future__ import annotations

import errno
import logging
import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from backup.errors import Failed
from backup.runtime.shortage import NO_PROCESS
from backup.runtime.timeouts import TimedOut, Wait

_log = logging.getLogger(__name__)

DEVNULL = subprocess.DEVNULL
Process = subprocess.Popen[str]
Conversation = subprocess.Popen[bytes]

_PACKAGE = "install QEMU's tools: apt-get install qemu-utils (dnf install qemu-img)"
_TICK = 0.25
"""Seconds between looks at a program that runs."""
_DEATH_SECONDS = 2.0
"""How long a program may take to die."""
_MOMENTS = 30.0
"""How long a program that writes may take to end when we were told to stop."""
_left: list[Process] = []
"""Programs that go on without us; kept, so that their output is not closed as long as this process lives."""
_KEEP_BUFFERS = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(128 << 20)}
"""
For glibc's malloc (mallopt(3)): else qemu-nbd gives the buffer of each large read back to the kernel and gets another,
page by page, for the next; that doubles its processor time.
"""


def filename(path: Path) -> str:
    """A path as QEMU's programs take it: absolute, so that no colon or dash at its start means anything else."""
    return os.path.abspath(path)


def dies_with_us() -> list[str]:
    """
    What to put before a command so that it dies when this process does (PR_SET_PDEATHSIG).

    A parent that was killed before the setting sends no signal any more, so that the shell looks whether it still is
    the parent.  setpriv is util-linux's and essential on Debian; without it a killed run leaves a read-only server.
    """
    found = shutil.which("setpriv")
    still_there = ["sh", "-c", 'test "$PPID" = "$0" && exec "$@"', str(os.getpid())]
    return [found, "--pdeathsig", "KILL", "--", *still_there] if found else []


class ProgramFailed(Failed):
    """A program ended with an error."""

    def __init__(self, command: Sequence[str], stderr: str) -> None:
        super().__init__(f"{command[0]} failed: {one_line(stderr)}", hint=_PACKAGE)
        self.stderr = stderr


@dataclass(frozen=True, slots=True)
class Finished:
    """What a program that ended well printed."""

    stdout: str
    stderr: str


def run(command: Sequence[str], codes: Sequence[int] = (0,), pass_fds: Sequence[int] = ()) -> str:
    """
    Run a program that leaves nothing half-written, as `finish` does; its standard output.

    A program that hangs is killed.
    """
    return finish(command, codes, pass_fds, may_kill=True).stdout


def finish(
    command: Sequence[str], codes: Sequence[int] = (0,), pass_fds: Sequence[int] = (), *, may_kill: bool = False
) -> Finished:
    """
    Run a program to its end; its standard output and standard error.

    Raises
    ------
    ProgramFailed
        It ended with another code than one of `codes`.
    TimedOut
        It did not end in time.  It is killed if `may_kill`, and else goes on: a qemu-img that is ended while it writes
        an image's bitmaps damages them.
    """
    process = popen(command, subprocess.PIPE, pass_fds)
    try:
        stdout, stderr = _ended(process, Wait(f"{shlex.join(command)} to end"))
    except TimedOut as timed_out:
        if may_kill:
            kill(process)
        else:
            _left.append(process)
            timed_out.hint = (
                f"process {process.pid} goes on, as its end could harm the image; look at the image's storage"
            )
        raise
    except BaseException:
        # A signal stops us, not a qemu-img that is writing an image's bitmaps; it needs only moments.
        with suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=_MOMENTS)
        raise
    if process.returncode not in codes:
        raise ProgramFailed(command, stderr)
    return Finished(stdout, stderr)


def has_ended(process: Process, seconds: float) -> bool:
    """Wait for a program's end; if it has not come in so many seconds, SIGKILL it, which may have no effect yet."""
    try:
        process.wait(max(seconds, 0))
    except subprocess.TimeoutExpired:
        process.kill()
        return False
    return True


def _ended(process: Process, wait: Wait) -> tuple[str, str]:
    """Await a program's end, and what it printed.  Its output is read all the time: a full pipe would stop it."""
    while True:
        try:
            return process.communicate(timeout=_TICK)
        except subprocess.TimeoutExpired:
            wait.look()


def kill(process: Process) -> None:
    """End a program now.  One whose storage hangs ends when it goes on: not even SIGKILL ends it before."""
    process.kill()
    with suppress(subprocess.TimeoutExpired):
        process.wait(_DEATH_SECONDS)
    for pipe in (process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()


def converse(
    command: Sequence[str], stderr: IO[str], environment: Mapping[str, str], pass_fds: Sequence[int]
) -> Conversation:
    """Start a program that is told what to do, and answers, through pipes; it leads a process group of its own."""
    _log.info("run: %s", shlex.join(command))
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        start_new_session=True,
        env=environment,
        pass_fds=pass_fds,
    )


def popen(command: Sequence[str], stderr: int | IO[str], pass_fds: Sequence[int] = ()) -> Process:
    """
    Start a program that reads nothing; what it prints is kept where `stderr` is PIPE.

    Raises
    ------
    Failed
        It cannot be run.
    """
    _log.info("run: %s", shlex.join(command))
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if stderr == subprocess.PIPE else subprocess.DEVNULL,
            stderr=stderr,
            text=True,
            errors="replace",
            pass_fds=pass_fds,
            # A Ctrl-C in the terminal is for us; a qemu-img must not die of it half-way through a write.
            start_new_session=True,
            umask=0o077,  # of a server's socket: who may connect may read everything
            env={**os.environ, **_KEEP_BUFFERS, "LC_ALL": "C"},
        )
    except OSError as error:
        raise Failed(
            f"{command[0]} cannot be run: {error.strerror}",
            hint=NO_PROCESS if error.errno == errno.EAGAIN else _PACKAGE,
        ) from None


def one_line(text: str) -> str:
    """The first lines of what a program said, as one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return "; ".join(lines[:3]) or "no message"
