"""
Run QEMU's programs and guestfish: without a shell, and out of reach of a Ctrl-C in the terminal.

This is the only module that uses `subprocess`.
"""

from __future__ import annotations

import errno
import logging
import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from backup.errors import Failed
from backup.runtime import meanwhile
from backup.runtime.ignoring import ignoring
from backup.runtime.shortage import NO_PROCESS
from backup.runtime.timeouts import TimedOut, Wait

_log = logging.getLogger(__name__)

DEVNULL = subprocess.DEVNULL
Process = subprocess.Popen[str]
Conversation = subprocess.Popen[bytes]

_PACKAGE = "install QEMU's tools: apt-get install qemu-utils (dnf install qemu-img)"
_TICK = 0.25
"""Seconds between two checks of a running program."""
_DEATH_SECONDS = 2.0
"""Time for a killed program to end."""
_WRITER_SECONDS = 30.0
"""Time for a program that writes to end by itself after a signal stopped pybackup."""
_left: list[Process] = []
"""Programs that keep running after this process ends.  Until then, the references keep their output open."""
_KEEP_BUFFERS = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(128 << 20)}
"""
Settings of glibc's malloc (mallopt(3)).  With the defaults, qemu-nbd returns the buffer of each large read to the
kernel and gets a new one, page by page, for the next read, which doubles its processor time.
"""


class ProgramFailed(Failed):
    """A program ended with an error; `stderr` is what the program printed."""

    def __init__(self, command: Sequence[str], stderr: str) -> None:
        super().__init__(f"{command[0]} failed: {one_line(stderr)}", hint=_PACKAGE)
        self.stderr = stderr


@dataclass(frozen=True, slots=True)
class Finished:
    """The output of a program that ended without an error."""

    stdout: str
    stderr: str


def filename(path: Path) -> str:
    """Return a path for a command line of QEMU: absolute, so that a colon or a dash has no special meaning."""
    return os.path.abspath(path)


def dies_with_us() -> list[str]:
    """
    Return the words to put before a command, so that the program dies with this process (PR_SET_PDEATHSIG).

    The shell compares its parent with this process, because a parent that died before PR_SET_PDEATHSIG took effect
    sends no signal.  setpriv belongs to util-linux, which is essential on Debian.  Without setpriv the list is empty,
    and a killed run leaves a read-only server behind.
    """
    setpriv = shutil.which("setpriv")
    check_parent = ["sh", "-c", 'test "$PPID" = "$0" && exec "$@"', str(os.getpid())]
    return [setpriv, "--pdeathsig", "KILL", "--", *check_parent] if setpriv else []


def stdout_of(command: Sequence[str], codes: Sequence[int] = (0,), pass_fds: Sequence[int] = ()) -> str:
    """Run a program that writes nothing and return its standard output.  A program that hangs is killed."""
    return run_to_end(command, codes, pass_fds, may_kill=True).stdout


def run_to_end(
    command: Sequence[str], codes: Sequence[int] = (0,), pass_fds: Sequence[int] = (), *, may_kill: bool = False
) -> Finished:
    """
    Run a program and return its standard output and standard error.

    Raises
    ------
    ProgramFailed
        The exit code is not one of `codes`.
    TimedOut
        The program did not end in time.  With `may_kill` the program is killed.  Otherwise it keeps running: a qemu-img
        that is killed while it writes the bitmaps of an image damages them.
    """
    process = popen(command, subprocess.PIPE, pass_fds)
    try:
        stdout, stderr = _wait_for(process, Wait(f"{shlex.join(command)} to end"))
    except TimedOut as timed_out:
        if may_kill:
            kill(process)
        else:
            _left.append(process)
            timed_out.hint = (
                f"process {process.pid} keeps running, since killing it could damage the image; "
                "check the storage of the image"
            )
        raise
    except BaseException:
        # The signal is for pybackup.  A qemu-img that writes the bitmaps of an image gets time to finish.
        with ignoring(_log, f"{command[0]} still runs", subprocess.TimeoutExpired):
            process.communicate(timeout=_WRITER_SECONDS)
        raise
    if process.returncode not in codes:
        raise ProgramFailed(command, stderr)
    return Finished(stdout, stderr)


def has_ended(process: Process, seconds: float) -> bool:
    """Wait for the end of a program; after `seconds` send SIGKILL, which may have no effect yet, and return False."""
    try:
        process.wait(max(seconds, 0))
    except subprocess.TimeoutExpired:
        process.kill()
        return False
    return True


def _wait_for(process: Process, wait: Wait) -> tuple[str, str]:
    """Wait for the end of a program, and read its output meanwhile: a full pipe would stop the program."""
    meanwhile.work(lambda: process.poll() is not None)
    while True:
        try:
            return process.communicate(timeout=_TICK)
        except subprocess.TimeoutExpired:
            wait.look()


def kill(process: Process) -> None:
    """Kill a program.  If its storage hangs, even SIGKILL has no effect until the storage answers again."""
    process.kill()
    with ignoring(_log, f"process {process.pid} is killed but has not ended", subprocess.TimeoutExpired):
        process.wait(_DEATH_SECONDS)
    for pipe in (process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()


def converse(
    command: Sequence[str], stderr: IO[str], environment: Mapping[str, str], pass_fds: Sequence[int]
) -> Conversation:
    """Start a program that reads commands and answers through pipes, as the leader of a process group of its own."""
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
    Start a program that reads no input.  Its output is kept if `stderr` is PIPE.

    Raises
    ------
    Failed
        The program cannot be run.
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
            # A Ctrl-C in the terminal is for pybackup: it must not kill a qemu-img in the middle of a write.
            start_new_session=True,
            umask=0o077,  # for the socket of a server: a client that can connect can read the whole disk
            env={**os.environ, **_KEEP_BUFFERS, "LC_ALL": "C"},
        )
    except OSError as error:
        raise Failed(
            f"{command[0]} cannot be run: {error.strerror}",
            hint=NO_PROCESS if error.errno == errno.EAGAIN else _PACKAGE,
        ) from None


def one_line(text: str) -> str:
    """Return the first three lines of a program's output as one line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return "; ".join(lines[:3]) or "no message"
