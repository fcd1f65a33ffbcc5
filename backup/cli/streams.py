"""
The three standard streams, made safe for a process that writes files.
"""

from __future__ import annotations

import io
import os
import sys
from typing import TYPE_CHECKING, TextIO

from backup.errors import Failed

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class ReaderGone(Failed):
    """The program that read standard output has ended (pybackup list | head); the program ends without a message."""

    def __init__(self) -> None:
        super().__init__("the reader of standard output has ended", hint="the command itself is done")


class _StandardOutput(io.FileIO):
    """Standard output whose write errors have a message and a hint, also when typer writes --help."""

    def write(self, data: ReadableBuffer, /) -> int:
        """
        Write bytes.

        Raises
        ------
        Failed
            The bytes cannot be written; ReaderGone if the reader has ended.  Later output is discarded.
        """
        try:
            return super().write(data)
        except OSError as error:
            mute(self)
            if isinstance(error, BrokenPipeError):
                raise ReaderGone from None
            raise Failed(
                f"standard output cannot be written: {error.strerror}",
                hint="the command itself is done; only its output is lost",
            ) from None


def prepare() -> None:
    """Open the streams that are closed, and report a failure to write standard output as an error of two lines."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            # Otherwise the first data file would get this number, and a library's message would land in the file.
            os.open(os.devnull, os.O_RDWR)
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115 - stays open as long as the process
    encoding = "utf-8" if sys.stdout is None else sys.stdout.encoding
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(_StandardOutput(1, "w", closefd=False)), encoding=encoding, line_buffering=os.isatty(1)
    )
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name may have characters that the encoding lacks


def mute(stream: TextIO | io.FileIO) -> None:
    """Discard what a stream that failed still buffers, and all later output: each write would fail again."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
