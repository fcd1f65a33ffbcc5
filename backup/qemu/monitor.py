"""
QMP: commands to a running QEMU, and the events that it sends.  The only user of `qemu.qmp`.

The library is asynchronous and this program is not: a thread of the monitor's own runs the library's loop, so that
events are received whatever the rest of the program waits for.  QEMU serves one client at a time on a socket; a second
one connects and hears nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import struct
import threading
from collections.abc import Coroutine, Mapping
from concurrent.futures import TimeoutError as NoAnswer
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from qemu.qmp import ConnectError, EventListener, ExecInterruptedError, ExecuteError, QMPClient, QMPError

from backup.errors import SourceError

_log = logging.getLogger(__name__)
# The library tells each failure to its logger; we tell it to the user, once.
logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())

_T = TypeVar("_T")

_GREETING_SECONDS = 5.0
"""A socket that another client has connects and never greets."""
_COMMAND_SECONDS = 120.0
"""A transaction waits for all requests of the guest that are under way, on whatever storage."""
_HUNG_SECONDS = 5.0
"""For each command after one that had no answer: what tidies up asks a QEMU that hangs again and again."""


class Refused(SourceError):
    """QEMU answered a command with an error; `text` is QEMU's."""

    def __init__(self, command: str, text: str) -> None:
        busy = "block job" in text
        hint = "wait for that job of another program to end, or end it" if busy else "see the machine's log"
        super().__init__(f"QEMU refused {command}: {text}", hint=hint)
        self.text = text


class MonitorLost(SourceError):
    """The connection ended, or QEMU does not answer any more."""


@dataclass(frozen=True, slots=True)
class Event:
    """One event: its name, as QEMU's QAPI schema has it, and its data."""

    name: str
    data: Mapping[str, Any]


class Monitor:
    """
    A connection to a QMP socket; safe to use from several threads.

    Parameters
    ----------
    path : Path
        The unix socket.

    Raises
    ------
    SourceError
        The socket cannot be reached, or QEMU serves another client on it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._peer = 0
        self._hung = False
        self._client = QMPClient("pybackup")
        self._listener = EventListener()
        self._client.register_listener(self._listener)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="qmp", daemon=True)
        self._thread.start()
        try:
            self._connect()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection.  QEMU keeps all that was made through it."""
        if self._loop.is_closed():
            return
        with contextlib.suppress(Exception):
            self._run(self._client.disconnect(), 5.0)
        with contextlib.suppress(Exception):
            self._run(_end_tasks(), 5.0)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def version(self) -> str:
        """QEMU's version, "7.2.22" for example."""
        greeting = self._client.greeting
        assert greeting is not None
        found = _mapping(greeting.QMP.version["qemu"])
        return f"{found['major']}.{found['minor']}.{found['micro']}"

    def command(self, name: str, arguments: Mapping[str, object] | None = None) -> Any:
        """
        Execute a command and return what QEMU returns.

        Raises
        ------
        Refused
            QEMU answered with an error.
        MonitorLost
            The connection ended before the answer; whether the command was executed is not known.
        """
        _log.info("qmp: %s %s", name, dict(arguments or {}))
        return self._answer(name, self._client.execute(name, arguments))

    def pass_fd(self, fd: int, name: str, arguments: Mapping[str, object]) -> Any:
        """
        Execute a command that takes a file descriptor (add-fd, getfd); ours stays open.

        Raises
        ------
        Refused, MonitorLost
            As for `command`.
        """
        _log.info("qmp: %s %s", name, dict(arguments))

        async def send() -> object:
            self._client.send_fd_scm(fd)
            return await self._client.execute(name, arguments)

        return self._answer(name, send())

    def events(self) -> list[Event]:
        """Events since the last call, in order."""

        async def take() -> list[Event]:
            return [Event(str(found["event"]), _mapping(found.get("data"))) for found in self._listener.clear()]

        return self._run(take(), _COMMAND_SECONDS)

    def alive(self) -> bool:
        """Is the connection still there, as far as is known?"""
        return self._client.runstate.name == "RUNNING"

    def working_folder(self) -> Path | None:
        """
        The folder that QEMU's relative file names start from, where that can be known.

        It is the folder of whoever listens on the socket: QEMU, or a libvirtd (which names no relative files).
        """
        with contextlib.suppress(OSError):
            return Path(os.readlink(f"/proc/{self._peer}/cwd"))
        return None

    def _connect(self) -> None:
        # QEMU accepts a second client only after the first one; until its queue is full the connection succeeds.
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.settimeout(_GREETING_SECONDS)
            connection.connect(os.fspath(self.path))
            self._peer, _, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            connection.settimeout(0)
            self._run(self._client.connect(connection), _GREETING_SECONDS)
        except (NoAnswer, TimeoutError):
            connection.close()
            raise SourceError(
                f"QEMU does not greet on {self.path} within {_GREETING_SECONDS:.0f} s; is another program connected?",
                hint="a QMP socket serves one client at a time: give the machine a second one, "
                "-qmp unix:PATH,server=on,wait=off",
            ) from None
        except (ConnectError, OSError) as error:
            connection.close()
            cause = getattr(error, "exc", error)
            why = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
            raise SourceError(
                f"the QMP socket {self.path} cannot be used: {why}",
                hint="is the machine running? --qmp names the socket of its option -qmp unix:PATH,server=on,wait=off",
            ) from None

    def _answer(self, name: str, execution: Coroutine[Any, Any, object]) -> Any:
        seconds = _HUNG_SECONDS if self._hung else _COMMAND_SECONDS
        try:
            return self._run(execution, seconds)
        except ExecuteError as error:
            raise Refused(name, error.error.error.desc) from None
        except NoAnswer:
            self._hung = True
            raise MonitorLost(
                f"QEMU did not answer {name} within {seconds:.0f} s", hint="does its storage hang?"
            ) from None
        except (ExecInterruptedError, QMPError, EOFError, OSError):
            raise MonitorLost(
                f"the QMP connection {self.path} ended at {name}", hint="was the machine shut down, or QEMU killed?"
            ) from None

    def _run(self, work: Coroutine[Any, Any, _T], seconds: float) -> _T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(seconds)
        except BaseException:
            future.cancel()
            raise


def _mapping(found: object) -> Mapping[str, Any]:
    return found if isinstance(found, dict) else {}


async def _end_tasks() -> None:
    """End what a connection that never came about left in the loop."""
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
