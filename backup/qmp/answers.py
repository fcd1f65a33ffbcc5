"""
The form of QEMU's answers: types, ranges and lengths of all values that pybackup uses, checked on arrival.

The peer on a QMP socket may be another program, or a QEMU that behaves in an unexpected way.  Code that uses an answer
relies on these checks.  The forms follow QEMU's QAPI schema; keys that are not listed here are ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from backup.errors import SourceError

Shape = Callable[[object, str], None]
"""A check of a value.  The text tells where in the answer the value is, for the error message."""

MOST_SHOWN = 500
"""Characters of the peer's text that a message shows."""
NOT_QEMU = "does the socket belong to a QEMU (-qmp unix:PATH,server=on,wait=off), and not to another program?"
"""The hint about a peer whose answers are not QEMU's."""

_MOST_BYTES = 1 << 62
"""The largest size of a disk, as in a manifest."""
_MOST_ENTRIES = 20_000
"""The most entries of a list; QEMU's lists have a handful of entries for each disk."""


class Refused(SourceError):
    """QEMU answered a command with an error; `text` is QEMU's message."""

    def __init__(self, command: str, text: str) -> None:
        text = text[:MOST_SHOWN]
        busy = "block job" in text
        hint = "wait until the job of another program has ended, or end it" if busy else "see the machine's log"
        super().__init__(f"QEMU refused {command}: {text}", hint=hint)
        self.text = text


class _Odd(Exception):
    """A value does not have the expected form."""


def _text(most: int) -> Shape:
    def check(value: object, where: str) -> None:
        if type(value) is not str:
            raise _Odd(f"{where} is not a text")
        if len(value) > most:
            raise _Odd(f"{where} has {len(value)} characters")
        # The operating system accepts neither in a name.
        if "\0" in value or any("\ud800" <= char <= "\udfff" for char in value):
            raise _Odd(f"{where} has a character that no name can have")

    return check


def _number(low: int, high: int) -> Shape:
    def check(value: object, where: str) -> None:
        if type(value) is not int:
            raise _Odd(f"{where} is not a whole number")
        if not low <= value <= high:
            raise _Odd(f"{where} is not between {low} and {high}")

    return check


def _flag(value: object, where: str) -> None:
    if type(value) is not bool:
        raise _Odd(f"{where} is neither true nor false")


def _each(shape: Shape) -> Shape:
    def check(value: object, where: str) -> None:
        if type(value) is not list:
            raise _Odd(f"{where} is not a list")
        if len(value) > _MOST_ENTRIES:
            raise _Odd(f"{where} has {len(value)} entries")
        for number, entry in enumerate(value):
            shape(entry, f"{where}[{number}]")

    return check


def _object(needed: Mapping[str, Shape], optional: Mapping[str, Shape] | None = None) -> Shape:
    def check(value: object, where: str) -> None:
        if type(value) is not dict:
            raise _Odd(f"{where} is not an object")
        for key, shape in needed.items():
            if key not in value:
                raise _Odd(f"{where} has no {key!r}")
            shape(value[key], f"{where}.{key}")
        for key, shape in (optional or {}).items():
            if key in value:
                shape(value[key], f"{where}.{key}")

    return check


_NAME, _FILE = _text(4096), _text(64 << 10)
_BYTES = _number(0, _MOST_BYTES)
_ID = _number(0, (1 << 64) - 1)

_BITMAP = _object(
    {
        "granularity": _number(1, 1 << 32),
        "count": _BYTES,
        "recording": _flag,
        "persistent": _flag,
        "busy": _flag,
    },
    {"name": _NAME, "inconsistent": _flag},
)
_FORMAT = _object({}, {"compat": _NAME, "encrypt": _object({"format": _NAME})})
_IMAGE = _object(
    {"virtual-size": _BYTES},
    {"actual-size": _BYTES, "format-specific": _object({}, {"data": _FORMAT})},
)
_NODE = _object(
    {"node-name": _NAME, "drv": _NAME, "ro": _flag, "file": _FILE, "image": _IMAGE},
    {"dirty-bitmaps": _each(_BITMAP)},
)
_DEVICE = _object(
    {"device": _NAME},
    {"qdev": _NAME, "io-status": _NAME, "inserted": _object({"node-name": _NAME})},
)
_GRAPH_NODE = _object({"id": _ID, "type": _NAME, "name": _NAME})
_GRAPH_EDGE = _object({"parent": _ID, "child": _ID, "name": _NAME, "perm": _each(_NAME), "shared-perm": _each(_NAME)})

_VERSION = _object({"qemu": _object(dict.fromkeys(("major", "minor", "micro"), _number(0, 1 << 31)))})

_ANSWERS: Mapping[str, Shape] = {
    "add-fd": _object({"fdset-id": _ID}),
    "query-block": _each(_DEVICE),
    "query-block-exports": _each(_object({"id": _NAME, "node-name": _NAME})),
    "query-fdsets": _each(_object({"fdset-id": _ID, "fds": _each(_object({}, {"opaque": _FILE}))})),
    "query-iothreads": _each(_object({})),
    "query-jobs": _each(_object({"id": _NAME, "status": _NAME})),
    "query-named-block-nodes": _each(_NODE),
    "query-status": _object({"status": _NAME}),
    "query-version": _VERSION,
    "x-debug-query-block-graph": _object({"nodes": _each(_GRAPH_NODE), "edges": _each(_GRAPH_EDGE)}),
}
"""The forms of the answers that pybackup uses, by command."""

_REPLY = _object({}, {"error": _object({"desc": _FILE})})


def require_form(command: str, answer: object) -> None:
    """
    Check the form of the answer to a command.

    Raises
    ------
    SourceError
        The answer does not have the form that QEMU's schema requires.
    """
    shape = _ANSWERS.get(command)
    if shape is not None:
        _require(shape, answer, command)


def require_version(version: object) -> None:
    """
    Check the form of the version in a greeting.

    Raises
    ------
    SourceError
        The version does not have the form that QEMU's schema requires.
    """
    _require(_VERSION, version, "the greeting's version")


def answer_of(command: str, reply: object) -> Any:
    """
    Take the answer to a command from QEMU's reply.

    Raises
    ------
    Refused
        The reply is an error.
    SourceError
        The reply or the answer does not have the form that QEMU's schema requires.
    """
    _require(_REPLY, reply, "the reply")
    assert isinstance(reply, dict)
    if "error" in reply:
        raise Refused(command, reply["error"]["desc"])
    answer = reply.get("return")
    require_form(command, answer)
    return answer


def show_version(version: Mapping[str, Any]) -> str:
    """Return the version of a greeting or of query-version as text, "7.2.22" for example."""
    numbers = version["qemu"]
    return f"{numbers['major']}.{numbers['minor']}.{numbers['micro']}"


def _require(shape: Shape, value: object, what: str) -> None:
    try:
        shape(value, what)
    except _Odd as odd:
        raise SourceError(
            f"the QMP peer's answer does not have the form of QEMU's: {odd}",
            hint=NOT_QEMU,
        ) from None
