"""
QEMU's guest agent, which freezes and thaws the file systems of a guest (fsfreeze).

The agent answers with JSON lines on a Unix socket, in the order of the requests.  No answer tells which request it
belongs to, and the socket may still contain the answer to an earlier client or to a request that timed out.  So each
request is preceded by a guest-sync-delimited, and everything before the answer to this command is dropped.

The agent's answers come from the guest and are not trusted: their length is limited, and each request has a deadline.
"""

from __future__ import annotations

import json
import random
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from backup.errors import Failed
from backup.qemu import sockets

_DELIMITER = b"\xff"
"""
A byte that JSON in UTF-8 never contains.  It resets the agent's parser, and precedes the agent's answer to a sync.
"""
_MAX_LINE = 64 << 10
"""Bytes of the longest answer; the answers to our requests have about thirty."""
_MAX_SHOWN = 300
"""Characters of the agent's text that a message shows."""
_STATUS, _FREEZE, _THAW = (f"guest-fsfreeze-{word}" for word in ("status", "freeze", "thaw"))
_STATES = {"frozen": True, "thawed": False}
_NO_AGENT = (
    "check that qemu-guest-agent runs in the guest, and that no other program (libvirt) is connected to its socket, "
    "which serves one client at a time"
)
_ASK_AGAIN = "run the command again; if the error persists, restart qemu-guest-agent in the guest"
_FROZEN_MAYBE = "the guest may be frozen; the next run thaws it, and so does: systemctl restart qemu-guest-agent"


class AgentError(Failed):
    """The guest agent cannot be reached, does not answer in time, refuses a request, or gives an invalid answer."""


class Agent:
    """
    A connection to a guest agent; a context manager.  Each request waits at most `timeout` seconds for its answer.

    After an AgentError of `freeze`, unless the agent refused, the guest may be frozen or may still become frozen.
    `thaw` works then, through this connection or a new one.
    """

    def __init__(self, path: Path, timeout: float = 10.0) -> None:
        self._path = path
        self._timeout = timeout
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._received = bytearray()

    def __enter__(self) -> Self:
        try:
            self._connect()
            self._sync(self._deadline())
        except BaseException:
            self._socket.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the connection.  The socket of the agent serves one client at a time."""
        self._socket.close()

    def frozen(self) -> bool:
        """Tell whether any program has frozen the guest's file systems."""
        return self._one_of(_STATES, self._ask(_STATUS), _STATUS)

    def freeze(self) -> int:
        """Freeze all file systems of the guest; return how many."""
        return self._count(self._ask(_FREEZE), _FREEZE)

    def thaw(self) -> int:
        """Thaw all file systems of the guest; return how many, 0 if none was frozen."""
        try:
            return self._count(self._ask(_THAW), _THAW)
        except AgentError as error:
            error.hint = _FROZEN_MAYBE
            raise

    # Requests and answers

    def _ask(self, command: str) -> object:
        deadline = self._deadline()
        self._sync(deadline)
        self._send({"execute": command}, deadline)
        answer = self._parsed(self._line(command, deadline), command)
        if isinstance(answer, dict) and "return" in answer:
            return answer["return"]
        if isinstance(answer, dict) and isinstance(answer.get("error"), dict):
            raise self._refusal(command, answer["error"])
        raise self._senseless(command, answer)

    def _sync(self, deadline: float) -> None:
        """Send a random number and drop everything that arrives before the number comes back."""
        number = random.getrandbits(48)
        question = "guest-sync-delimited"
        self._send({"execute": question, "arguments": {"id": number}}, deadline, before=_DELIMITER)
        while True:
            _, delimiter, answer = self._line(question, deadline).rpartition(_DELIMITER)
            if delimiter and self._parsed(answer, question) == {"return": number}:
                return

    def _parsed(self, line: bytes, question: str) -> object:
        try:
            value: object = json.loads(line)
        except (ValueError, RecursionError):
            raise self._senseless(question, line.decode(errors="replace")) from None
        return value

    def _count(self, value: object, question: str) -> int:
        if type(value) is not int or value < 0:
            raise self._senseless(question, value)
        return value

    def _one_of(self, states: Mapping[str, bool], value: object, question: str) -> bool:
        if not isinstance(value, str) or value not in states:
            raise self._senseless(question, value)
        return states[value]

    # Bytes and deadlines

    def _deadline(self) -> float:
        return time.monotonic() + self._timeout

    def _connect(self) -> None:
        self._socket.settimeout(self._timeout)
        try:
            sockets.connect_unix(self._socket, self._path)
        except BlockingIOError:  # the queue of a Unix socket is full: other clients are waiting already
            raise AgentError(f"the guest agent's socket {self._path} is busy", hint=_NO_AGENT) from None
        except OSError as error:
            raise AgentError(
                f"cannot connect to the guest agent's socket {self._path}: {error.strerror or error}",
                hint="name the socket of the agent's -chardev, and check that its QEMU runs",
            ) from error

    def _send(self, question: Mapping[str, Any], deadline: float, *, before: bytes = b"") -> None:
        command = str(question["execute"])
        try:
            self._socket.settimeout(self._left(deadline))
            self._socket.sendall(before + json.dumps(question).encode() + b"\n")
        except TimeoutError:
            raise self._late(command) from None
        except OSError as error:
            raise self._lost(command, error.strerror or str(error)) from error

    def _line(self, question: str, deadline: float) -> bytes:
        """Return the next line from the agent, without the line end."""
        searched = 0
        while (end := self._received.find(b"\n", searched)) < 0:
            if len(self._received) > _MAX_LINE:
                raise self._senseless(question, self._received[:_MAX_SHOWN].decode(errors="replace"))
            searched = len(self._received)
            self._received += self._more(question, deadline)
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        return line

    def _more(self, question: str, deadline: float) -> bytes:
        try:
            self._socket.settimeout(self._left(deadline))
            chunk = self._socket.recv(4096)
        except TimeoutError:
            raise self._late(question) from None
        except OSError as error:
            raise self._lost(question, error.strerror or str(error)) from error
        if not chunk:
            raise self._lost(question, "end of stream")
        return chunk

    @staticmethod
    def _left(deadline: float) -> float:
        """Return the seconds until the deadline, never 0, since a timeout of 0 would make the socket non-blocking."""
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left

    # Errors

    def _late(self, question: str) -> AgentError:
        return AgentError(
            f"the guest agent at {self._path} did not answer {question} within {self._timeout:g} s",
            hint=_FROZEN_MAYBE if question == _FREEZE else _NO_AGENT,
        )

    def _lost(self, question: str, why: str) -> AgentError:
        return AgentError(
            f"the connection to the guest agent at {self._path} was lost during {question}: {why}",
            hint=_FROZEN_MAYBE if question == _FREEZE else _ASK_AGAIN,
        )

    def _refusal(self, question: str, error: Mapping[str, object]) -> AgentError:
        text = f"{error.get('class')}: {error.get('desc')}"
        return AgentError(
            f"the guest agent at {self._path} refused {question}: {text[:_MAX_SHOWN]}",
            hint="see the agent's settings in the guest (block-rpcs) and its log",
        )

    def _senseless(self, question: str, answer: object) -> AgentError:
        return AgentError(
            f"the guest agent at {self._path} answered {question} with {str(answer)[:_MAX_SHOWN]!r}",
            hint=f"check that this is the socket of a guest agent; {_ASK_AGAIN}",
        )
