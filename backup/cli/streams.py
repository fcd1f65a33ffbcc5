"""
The three standard streams, as a process needs them that may write files.
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
    """The program that read standard output has ended (pybackup list | head): no error of ours, and no message."""

    def __init__(self) -> None:
        super().__init__("the reader of standard output is gone", hint="what was to be done is done")


class _StandardOutput(io.FileIO):
    """Standard output, which says what keeps it from being written, to typer's writers of --help as to ours."""

    def write(self, data: ReadableBuffer, /) -> int:
        """
        Write bytes.

        Raises
        ------
        Failed
            They cannot be written; ReaderGone where nothing reads them.  From then on all output goes nowhere.
        """
        try:
            return super().write(data)
        except OSError as error:
            mute(self)
            if isinstance(error, BrokenPipeError):
                raise ReaderGone from None
            raise Failed(
                f"standard output cannot be written: {error.strerror}",
                hint="what was to be done is done; only its report is lost",
            ) from None


def prepare() -> None:
    """Open those that are closed, and make the output fail with an error of two lines."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            # Else the first data file would get this number, and a library's message would land in it.
            os.open(os.devnull, os.O_RDWR)
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115 - as long as the process
    encoding = "utf-8" if sys.stdout is None else sys.stdout.encoding
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(_StandardOutput(1, "w", closefd=False)), encoding=encoding, line_buffering=os.isatty(1)
    )
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal's encoding lacks


def mute(stream: TextIO | io.FileIO) -> None:
    """Send nowhere what a stream that failed still holds, and all that follows: it would fail again."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
