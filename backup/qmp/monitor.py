"""
QMP: commands to a running QEMU, and the events that QEMU sends.  This is the only module that uses `qemu.qmp`.

The library is asynchronous, and pybackup is not.  Each monitor has a thread that runs the library's event loop, so that
events are received while the rest of the program waits for something else.  QEMU serves one client at a time on a
socket; a second client can connect, but receives nothing.
"""

from __future__ import annotations

import asyncio
import errno
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

from qemu.qmp import ConnectError, ExecInterruptedError, ExecuteError, QMPClient, QMPError
from qemu.qmp.message import Message

from backup.errors import SourceError
from backup.qemu import sockets
from backup.qmp import answers
from backup.runtime import timeouts
from backup.runtime.ignoring import ignoring
from backup.runtime.timeouts import TimedOut, Wait
from backup.units import show_duration

_log = logging.getLogger(__name__)
# The library logs each failure; pybackup reports it to the user instead, once.
logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())

_T = TypeVar("_T")

_GREETING_SECONDS = 5.0
"""Time for QEMU's greeting, which does not come while QEMU serves another client on the socket."""
_COMMAND_SECONDS = 120.0
"""Time for an answer.  A transaction waits for all requests of the guest in flight, on any storage."""
_TICK = 0.25
"""Seconds between two checks of a wait."""
_HUNG_SECONDS = 5.0
"""Time for an answer after an earlier one did not come: the clean-up sends several commands to a QEMU that hangs."""
_CLOSE_SECONDS = 5.0
"""Time for each step of closing the connection."""
_LONGEST_MESSAGE = 6 << 20
"""
Bytes of the longest message, and of all events that wait.

QEMU's longest answer has one or two KiB for each node.  JSON takes up to thirty times its length in memory.
"""
_MOST_EVENTS = 10_000
"""Events that may wait for a call of `Monitor.events`, which is called several times a second while a disk is read."""
_UNUSED = {errno.ENOENT, errno.ECONNREFUSED}
"""Errors of a connection to a socket that does not exist, or that a killed QEMU left behind."""


class NotListening(SourceError):
    """No process listens on the socket, or there is no socket: the machine is off."""


class MonitorLost(SourceError):
    """The connection ended, or QEMU does not answer any more."""


@dataclass(frozen=True, slots=True)
class Event:
    """An event: its name in QEMU's QAPI schema, and its data."""

    name: str
    data: Mapping[str, Any]


class Monitor:
    """
    A connection to a QMP socket; safe to use from several threads.

    Parameters
    ----------
    path : Path
        The Unix socket.

    Raises
    ------
    SourceError
        The socket cannot be reached, or QEMU serves another client on it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._peer = 0
        self._hung = False
        self._client = QMPClient("pybackup", readbuflen=_LONGEST_MESSAGE)
        # The library would keep events without a limit.  A filter sees all events, and rejects them here.
        self._client.events.event_filter = self._heard
        self._events: list[Event] = []
        self._waiting_bytes = 0
        self._overrun = False
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
        """End the connection.  QEMU keeps everything that was made through it."""
        if self._loop.is_closed():
            return
        with ignoring(_log, "end of the QMP connection", Exception):
            self._run(self._client.disconnect(), _CLOSE_SECONDS)
        with ignoring(_log, "end of the QMP library's tasks", Exception):
            self._run(_end_tasks(), _CLOSE_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def version(self) -> str:
        """QEMU's version, "7.2.22" for example."""
        greeting = self._client.greeting
        assert greeting is not None
        return answers.show_version(greeting.QMP.version)

    def command(self, name: str, arguments: Mapping[str, object] | None = None) -> Any:
        """
        Execute a command and return QEMU's answer.

        Raises
        ------
        answers.Refused
            QEMU answered with an error.
        MonitorLost
            The connection ended before the answer.  Whether QEMU executed the command is unknown.
        SourceError
            The answer does not have the form that QEMU's schema requires.
        """
        _log.info("qmp: %s %s", name, dict(arguments or {}))
        return self._answer(name, self._client.execute(name, arguments))

    def pass_fd(self, fd: int, name: str, arguments: Mapping[str, object]) -> Any:
        """
        Execute a command that passes a file descriptor to QEMU (add-fd, getfd).  Our descriptor stays open.

        Raises
        ------
        Refused, MonitorLost, SourceError
            As in `command`.
        """
        _log.info("qmp: %s %s", name, dict(arguments))

        async def send() -> object:
            self._client.send_fd_scm(fd)
            return await self._client.execute(name, arguments)

        return self._answer(name, send())

    def events(self) -> list[Event]:
        """
        Return the events since the last call, in order.

        Raises
        ------
        MonitorLost
            There were too many events, and some were lost.
        """

        async def take() -> list[Event]:
            taken, self._events, self._waiting_bytes = self._events, [], 0
            return taken

        taken = self._run(take(), _COMMAND_SECONDS)
        if self._overrun:
            raise MonitorLost(
                f"the QMP peer at {self.path} sends events faster than they can be read",
                hint="does the socket belong to a QEMU?",
            )
        return taken

    def _heard(self, event: Message) -> bool:
        """Keep an event unless too many wait.  Returns False, which makes the library drop its copy."""
        self._waiting_bytes += len(bytes(event))
        if len(self._events) >= _MOST_EVENTS or self._waiting_bytes > _LONGEST_MESSAGE:
            self._overrun = True
        else:
            self._events.append(Event(str(event["event"]), _mapping(event.get("data"))))
        return False

    def alive(self) -> bool:
        """Tell whether the connection exists, as far as the library knows."""
        return self._client.runstate.name == "RUNNING"

    @property
    def peer(self) -> int:
        """The process id of the program that listens on the socket; 0 if the kernel does not tell."""
        return self._peer

    def working_folder(self) -> Path | None:
        """
        Return the folder at which QEMU's relative file names start; None if that is unknown.

        This is the folder of the process that listens on the socket: QEMU, or libvirtd, which uses no relative names.
        """
        with ignoring(_log, "working folder of the QMP peer", OSError):
            return Path(os.readlink(f"/proc/{self._peer}/cwd"))
        return None

    def _connect(self) -> None:
        # QEMU accepts a second client only after the first has left, but the kernel lets several connect before that.
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.settimeout(_GREETING_SECONDS)
            sockets.connect_unix(connection, self.path)
            self._peer, _, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            connection.settimeout(0)
            self._run(self._client.connect(connection), _GREETING_SECONDS)
            assert self._client.greeting is not None
            answers.require_version(self._client.greeting.QMP.version)
        except (NoAnswer, TimeoutError, TimedOut):
            connection.close()
            raise SourceError(
                f"QEMU sent no greeting on {self.path} within {_GREETING_SECONDS:.0f} s; is another program connected?",
                hint="a QMP socket serves one client at a time: give the machine a second one, "
                "-qmp unix:PATH,server=on,wait=off",
            ) from None
        except OSError as error:
            connection.close()
            unused = error.errno in _UNUSED
            raise (NotListening if unused else SourceError)(
                f"the QMP socket {self.path} cannot be used: {error.strerror or error}", hint=_hint(error)
            ) from None
        except ConnectError as error:
            connection.close()
            why = str(error.exc) or type(error.exc).__name__
            raise SourceError(
                f"the QMP socket {self.path} cannot be used: {why[: answers.MOST_SHOWN]}", hint=answers.NOT_QEMU
            ) from None

    def _answer(self, name: str, execution: Coroutine[Any, Any, object]) -> Any:
        seconds = timeouts.limit_within(_HUNG_SECONDS if self._hung else _COMMAND_SECONDS)
        try:
            answer = self._run(execution, seconds, name)
            answers.require_form(name, answer)
            return answer
        except ExecuteError as error:
            raise answers.Refused(name, error.error.error.desc) from None
        except (NoAnswer, TimedOut):
            self._hung = True
            raise MonitorLost(
                f"QEMU did not answer {name} within {show_duration(seconds)}",
                hint="check whether the storage of its disks, or of the scratch file, hangs",
            ) from None
        except (ExecInterruptedError, QMPError, EOFError, OSError):
            raise MonitorLost(
                f"the QMP connection {self.path} ended at {name}", hint="was the machine shut down, or QEMU killed?"
            ) from None

    def _run(self, work: Coroutine[Any, Any, _T], seconds: float, command: str = "") -> _T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        wait = Wait(f"QEMU's answer to {command} on {self.path}", seconds)
        try:
            while True:
                try:
                    return future.result(min(seconds, _TICK))
                except NoAnswer:
                    if future.done():  # the exception comes from `work`, not from our time limit
                        raise
                    wait.look()
        except BaseException:
            future.cancel()
            raise


def _hint(error: OSError) -> str:
    if error.errno == errno.ENAMETOOLONG:
        return "give the socket a shorter name"
    if error.errno in {errno.EACCES, errno.EPERM}:
        return "run pybackup as root, or as the user who owns the socket"
    return (
        "start the machine with -qmp unix:PATH,server=on,wait=off, and name that socket; "
        "if it is off on some nights, name its images as well (`image:` of each disk in the configuration)"
    )


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


async def _end_tasks() -> None:
    """Cancel the tasks that a failed connection left in the event loop."""
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
