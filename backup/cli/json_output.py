"""
What scripts see with --json: one document on standard output.

A document is a frozen dataclass in the module of the command that writes it: its fields are the fields of the JSON
object, in the same order.  docs/json.md describes all documents, and a test compares that page with what is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

from backup.cli import output
from backup.errors import BackupError, Damaged, Interrupted

if TYPE_CHECKING:
    from backup.operations.verify import Problem


class ByteRange(TypedDict):
    """A range of a disk, in bytes."""

    start: int
    length: int


class ErrorDocument(TypedDict):
    """An error; `ranges` are the parts of the disk that damage affects, and are absent if they are not known."""

    code: int
    message: str
    hint: str
    ranges: NotRequired[list[ByteRange]]


class ProblemDocument(ErrorDocument):
    """Something damaged or missing, and where."""

    machine: str
    point: str | None
    disk: str | None


@dataclass(frozen=True, slots=True)
class Failure:
    """The document of a command that failed as a whole."""

    error: BackupError | Interrupted


def write(document: object) -> None:
    """Write a document to standard output."""
    import json

    output.out(json.dumps(document, indent=2, default=_encoded) + "\n")


def fields_of(value: Any) -> dict[str, Any]:
    """Return the fields of a dataclass by their names; nested values stay as they are."""
    return {field.name: getattr(value, field.name) for field in fields(value)}


def error_document(error: BackupError | Interrupted) -> ErrorDocument:
    """Return an error as scripts see it."""
    document: ErrorDocument = {"code": error.exit_code, "message": error.message, "hint": error.hint}
    if isinstance(error, Damaged) and error.ranges:
        document["ranges"] = byte_ranges(error.ranges)
    return document


def byte_ranges(ranges: Sequence[tuple[int, int]]) -> list[ByteRange]:
    """Return ranges, given by start and end, as scripts see them."""
    return [{"start": start, "length": end - start} for start, end in ranges]


def problem_documents(problems: Sequence[Problem]) -> list[ProblemDocument]:
    """Return problems as scripts see them."""
    return [{"machine": p.machine, "point": p.point, "disk": p.disk, **error_document(p.error)} for p in problems]


def _encoded(value: object) -> object:
    """Convert a value that the json module cannot write: an error, a document or a path."""
    if isinstance(value, BackupError | Interrupted):
        return error_document(value)
    if is_dataclass(value):
        return fields_of(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} in a JSON document")
