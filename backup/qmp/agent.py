"""
QEMU's guest agent: ask a guest to write out its file systems and hold them still (fsfreeze), and let them go on.

The agent answers JSON lines on a unix socket, in the order of the questions.  Nothing in an answer says which question
it is for, and the socket may still hold what an earlier client, or a question that took too long, was answered; so each
question begins with a guest-sync-delimited, and all that comes before its answer is dropped.

What comes from the agent is the guest's word: its length is bounded and each question has a deadline.
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
"""Never part of JSON in UTF-8: resets the agent's parser, and stands before its answer to a sync."""
_MAX_LINE = 64 << 10
"""Bytes of one answer; those asked for here have about thirty."""
_MAX_SHOWN = 300
"""Characters of the agent's own words in an error."""
_STATUS, _FREEZE, _THAW = (f"guest-fsfreeze-{word}" for word in ("status", "freeze", "thaw"))
_STATES = {"frozen": True, "thawed": False}
_NO_AGENT = (
    "see that qemu-guest-agent runs in the guest and that no other program (libvirt) is connected to its socket: "
    "one at a time is served"
)
_ASK_AGAIN = "run the command again; if it stays so, restart qemu-guest-agent in the guest"
_FROZEN_MAYBE = "the guest may be frozen; the next run thaws it, and so does: systemctl restart qemu-guest-agent"


class AgentError(Failed):
    """The guest agent cannot be reached, does not answer in time, refuses, or makes no sense."""


class Agent:
    """
    A connection to a guest agent, made when entered, that waits at most `timeout` seconds for each answer.

    After an AgentError of `freeze` that is no refusal the guest may be frozen or become so: `thaw` can still be asked,
    here or by a new connection.
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
        """End the connection: the agent's socket serves one at a time."""
        self._socket.close()

    def frozen(self) -> bool:
        """Whether the guest's file systems are frozen, by whomever."""
        return self._one_of(_STATES, self._ask(_STATUS), _STATUS)

    def freeze(self) -> int:
        """Freeze all file systems of the guest; how many."""
        return self._count(self._ask(_FREEZE), _FREEZE)

    def thaw(self) -> int:
        """Thaw all file systems of the guest; how many, 0 when none was frozen."""
        try:
            return self._count(self._ask(_THAW), _THAW)
        except AgentError as error:
            error.hint = _FROZEN_MAYBE
            raise

    # One question, one answer

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
        """Send a number and drop all that comes until it comes back."""
        wanted = random.getrandbits(48)
        question = "guest-sync-delimited"
        self._send({"execute": question, "arguments": {"id": wanted}}, deadline, before=_DELIMITER)
        while True:
            _, delimiter, answer = self._line(question, deadline).rpartition(_DELIMITER)
            if delimiter and self._parsed(answer, question) == {"return": wanted}:
                return

    def _parsed(self, line: bytes, question: str) -> object:
        try:
            found: object = json.loads(line)
        except (ValueError, RecursionError):
            raise self._senseless(question, line.decode(errors="replace")) from None
        return found

    def _count(self, value: object, question: str) -> int:
        if type(value) is not int or value < 0:
            raise self._senseless(question, value)
        return value

    def _one_of(self, states: Mapping[str, bool], value: object, question: str) -> bool:
        if not isinstance(value, str) or value not in states:
            raise self._senseless(question, value)
        return states[value]

    # Bytes

    def _deadline(self) -> float:
        return time.monotonic() + self._timeout

    def _connect(self) -> None:
        self._socket.settimeout(self._timeout)
        try:
            sockets.connect_unix(self._socket, self._path)
        except BlockingIOError:  # the queue of a unix socket is full: others are waiting already
            raise AgentError(f"the guest agent's socket {self._path} is busy", hint=_NO_AGENT) from None
        except OSError as error:
            raise AgentError(
                f"cannot connect to the guest agent's socket {self._path}: {error.strerror or error}",
                hint="give the socket of the agent's -chardev, and see that its QEMU runs",
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
        """The next line of the agent, without its end."""
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
            found = self._socket.recv(4096)
        except TimeoutError:
            raise self._late(question) from None
        except OSError as error:
            raise self._lost(question, error.strerror or str(error)) from error
        if not found:
            raise self._lost(question, "end of stream")
        return found

    @staticmethod
    def _left(deadline: float) -> float:
        """Seconds until then, more than none: a timeout of zero would mean not to wait at all."""
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
        said = f"{error.get('class')}: {error.get('desc')}"
        return AgentError(
            f"the guest agent at {self._path} refused {question}: {said[:_MAX_SHOWN]}",
            hint="see the agent's settings in the guest (block-rpcs) and its log",
        )

    def _senseless(self, question: str, answer: object) -> AgentError:
        return AgentError(
            f"the guest agent at {self._path} answered {question} with {str(answer)[:_MAX_SHOWN]!r}",
            hint=f"see that this is the socket of a guest agent; {_ASK_AGAIN}",
        )
