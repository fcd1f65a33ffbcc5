"""
Read JSON documents that are not trusted: they are checked before, while and after they are parsed.

Manifests, the marker and the records of `verify` lie in a folder that others may be able to write to.  A digest proves
only that a document is what its last writer wanted.  So the size of a document is limited.  The limit on the size also
limits the memory: values take at most 44 times as much as their text (nested empty lists are the worst case).  Each
field is read by a method of `Fields` that checks its type, range and characters.
"""

from __future__ import annotations

import json
import re
from datetime import datetime
from typing import Any, NoReturn, TypeVar

MAX_BYTES = 4 << 20
"""Largest document, in bytes.  The manifest of a thousand disks takes a third of that."""
MAX_TEXT = 64 << 10
"""Longest text, in characters.  A Linux path has at most 4096 bytes; a message may hold a few paths."""
MAX_NUMBER = (1 << 62) - 1

DIGEST = re.compile(r"[0-9a-f]{64}")
RANDOM = re.compile(r"[0-9a-f]{32}")
WORD = re.compile(r"[!-~]([ -~]{0,62}[!-~])?")
"""A name or a few words that pybackup chose itself, such as its own name and version."""
_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z")

T = TypeVar("T")


class BadDocument(Exception):
    """A document is not valid; the message says why, in a few words."""


def moment_of(text: str) -> datetime:
    """
    Read a time of a document, such as "2026-11-22T01:00:00Z".

    Raises
    ------
    ValueError
        The text has another form, or is a time that does not exist (30 February).
    """
    if not _TIME.fullmatch(text):
        raise ValueError(text)
    return datetime.fromisoformat(text)


def shown(value: object) -> str:
    """Return a value for a message, shortened: a hostile document may hold megabytes."""
    text = repr(value[:100]) if isinstance(value, str) else repr(value)
    return text if len(text) <= 100 else text[:100] + "..."


def parse(content: bytes) -> dict[str, Any]:
    """
    Parse a JSON object in ASCII.

    JSON that other parsers refuse or read differently is refused as well: a field that appears twice, NaN and Infinity,
    and numbers of thousands of digits.

    Raises
    ------
    BadDocument
        The content is not such an object, or is larger than MAX_BYTES.
    """
    if len(content) > MAX_BYTES:
        raise BadDocument(f"it has {len(content)} bytes, more than {MAX_BYTES}")
    try:
        document = _DECODER.decode(content.decode("ascii"))
    except (ValueError, RecursionError) as error:
        # Other errors than JSONDecodeError have a text about Python, and not about the document.
        why = str(error) if isinstance(error, json.JSONDecodeError) else type(error).__name__
        raise BadDocument(f"it is not JSON ({why})") from None
    if not isinstance(document, dict):
        raise BadDocument("it is not a JSON object")
    return document


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        names = [name for name, _ in pairs]
        raise BadDocument(f"it has the field {shown(next(name for name in fields if names.count(name) > 1))} twice")
    return fields


def _no_number(text: str) -> NoReturn:
    raise BadDocument(f"it holds {text}, which is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_no_number)


class Fields:
    """
    Reads the fields of a JSON object; each method checks what its field may hold.

    Every run reads all manifests of a machine, and there may be a thousand of them.  So a valid field costs one check,
    and the place of a field in the document is put into words only for an error.

    Every method raises BadDocument if the field is missing or not valid.
    """

    __slots__ = ("_outer", "_place", "_value")

    def __init__(self, value: object, place: str, outer: Fields | None = None) -> None:
        self._place = place
        self._outer = outer
        if not isinstance(value, dict):
            raise BadDocument(f"{self.where()} is not an object")
        self._value: dict[str, Any] = value

    def where(self) -> str:
        """Return the object's place in the document, for messages."""
        return self._place if self._outer is None else f"{self._outer.where()}.{self._place}"

    def take(self, key: str, kind: type[T]) -> T:
        """Return a value of exactly this type."""
        value = self._value.get(key)
        if type(value) is not kind:
            raise BadDocument(f"{self.where()}.{key} is {shown(value)}, not {kind.__name__}")
        return value

    def has(self, key: str) -> bool:
        """Tell whether the field exists and is not null."""
        return self._value.get(key) is not None

    def number(self, key: str, low: int = 0, high: int = MAX_NUMBER) -> int:
        """Return a whole number within bounds."""
        value = self._value.get(key)
        if type(value) is int and low <= value <= high:
            return value
        raise BadDocument(f"{self.where()}.{key} is {shown(self.take(key, int))}, not between {low} and {high}")

    def matching(self, key: str, pattern: re.Pattern[str]) -> str:
        """Return a text that matches the whole pattern."""
        value = self._value.get(key)
        if type(value) is str and pattern.fullmatch(value):
            return value
        raise self._unwritten(key, self.take(key, str))

    def text(self, key: str) -> str:
        """
        Return a text for people, or a path.

        It holds no NUL, and no surrogates other than those that stand for a byte of a path that is not UTF-8.  It may
        hold control characters, as paths may: they are removed when the text is shown.
        """
        value = self.take(key, str)
        if len(value) <= MAX_TEXT and "\0" not in value and (value.isascii() or _is_encodable(value)):
            return value
        raise self._unwritten(key, value)

    def optional_text(self, key: str) -> str | None:
        """Return a text, or None if the field is missing or null."""
        return self.text(key) if self.has(key) else None

    def time(self, key: str) -> str:
        """Return a time that `moment_of` can read."""
        value = self.take(key, str)
        try:
            moment_of(value)
        except ValueError:
            raise self._unwritten(key, value) from None
        return value

    def inner(self, key: str) -> Fields:
        """Return an object within the object."""
        return Fields(self._value.get(key), key, self)

    def items(self, key: str) -> list[Fields]:
        """Return the objects of a list."""
        return [Fields(value, f"{key}[{i}]", self) for i, value in enumerate(self.take(key, list))]

    def texts(self, key: str) -> list[str]:
        """Return the texts of a list."""
        values = self.take(key, list)
        if not all(type(value) is str and len(value) <= MAX_TEXT for value in values):
            raise BadDocument(f"{self.where()}.{key} is {shown(values)}, not a list of texts")
        return values

    def _unwritten(self, key: str, value: str) -> BadDocument:
        return BadDocument(f"{self.where()}.{key} is {shown(value)}, which pybackup does not write there")


def _is_encodable(text: str) -> bool:
    """Tell whether the text can be the name of a file."""
    try:
        text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return True
