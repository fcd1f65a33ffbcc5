"""
The records of `verify`: when each data file of a machine was last read whole, and with what result (FORMAT.md).

The records are a file in the machine's folder, and only save work.  If a record is lost or damaged, or the data file
has another digest by now, the data file is verified again, and nothing else is lost.
"""

from __future__ import annotations

import errno
import io
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime

from backup.errors import Damaged, NotFound
from backup.model import digests, documents
from backup.model.documents import DIGEST, BadDocument, Fields, moment_of, shown
from backup.model.manifest import DataFile, is_data_name
from backup.repository.machine import Machine

NAME = "verified"
FORMAT = "pybackup verified"
VERSION = 2
_MAX_BYTES = 32 << 20
"""Largest file of records: a thousand points with a hundred disks each."""


@dataclass(frozen=True, slots=True)
class Record:
    """
    The result of the last verify that read all of a data file.

    Attributes
    ----------
    digest : str
        The manifest's digest of the digest file; a data file with another digest was not verified.
    checked : str
        When the verify began, UTC.
    deep : str or None
        When the last verify began that also decompressed all clusters without fault.
    code : int
        0 if the file was sound, else the exit code of the error.
    problem : str or None
        The error's message.
    """

    digest: str
    checked: str
    deep: str | None
    code: int
    problem: str | None

    def sound_since(self, deep: bool) -> datetime | None:  # noqa: FBT001
        """Return when the file was last found sound; None if it was not, or not with `deep`."""
        time = self.deep if deep else self.checked
        return None if self.code or time is None else moment_of(time)


Memory = Mapping[str, Record]
"""The records of a machine, by data file name."""


def record_of(memory: Memory, data: DataFile) -> Record | None:
    """Return the record of a data file; None if there is none, or if it is about another file of the same name."""
    record = memory.get(data.file)
    return record if record is not None and record.digest == data.digest else None


def known_damage(memory: Memory, files: Iterable[DataFile]) -> Damaged | None:
    """Return the damage that a verify has recorded for one of these files, or None."""
    for data in files:
        record = record_of(memory, data)
        if record is not None and record.code == Damaged.exit_code:
            message = f"{record.problem} (found by verify, {record.checked})"
            return Damaged(
                message, hint="bring the file back from a copy of the repository, then run `pybackup verify`"
            )
    return None


def recall(machine: Machine) -> Memory:
    """Return the records of a machine's data files; none if they cannot be read, for whatever reason."""
    try:
        content = machine.files.read(NAME, _MAX_BYTES)
    except OSError:
        return {}
    return decode(content) if len(content) <= _MAX_BYTES else {}


def remember(machine: Machine, added: Memory, present: Collection[str] | None) -> str | None:
    """
    Add records, and remove those of files that are not `present` (None: remove none).

    Returns
    -------
    str or None
        Why the records could not be written (a read-only repository, a full disk), or None.
    """

    def merged() -> bytes:
        known = {**recall(machine), **added}
        content = encode({name: record for name, record in known.items() if present is None or name in present})
        if len(content) > _MAX_BYTES:
            raise OSError(errno.EFBIG, f"it takes {len(content)} bytes, more than {_MAX_BYTES}")
        return content

    try:
        machine.files.update(NAME, merged)
    except OSError as error:
        return str(error.strerror)
    return None


def encode(memory: Memory) -> bytes:
    """Return the records as lines of JSON: the format, the records, and the digest of all lines before."""
    lines = [
        json.dumps({"format": FORMAT, "version": VERSION}),
        *(json.dumps({"file": name, **asdict(memory[name])}) for name in sorted(memory)),
    ]
    head = "".join(f"{line}\n" for line in lines).encode("ascii")
    return head + _tail(head)


def decode(content: bytes) -> Memory:
    """
    Read the records that `encode` returned; return none if the content is anything else.

    The digest is verified before anything is parsed, and each line is parsed on its own, so that little memory is
    needed.
    """
    try:
        if content.startswith(_FIRST_LINE):
            return dict(_records(content))
        return _decode_version_1(content)
    except (BadDocument, RecursionError):
        return {}


_FIRST_LINE = json.dumps({"format": FORMAT, "version": VERSION}).encode("ascii") + b"\n"


def _tail(head: bytes | memoryview) -> bytes:
    return json.dumps({"digest": digests.digest(head).hex()}).encode("ascii") + b"\n"


def _records(content: bytes) -> Iterator[tuple[str, Record]]:
    end = len(content) - len(_tail(b""))
    if content[end:] != _tail(memoryview(content)[:end]):
        raise BadDocument("its bytes do not match its digest")
    lines = io.BytesIO(content)
    lines.seek(len(_FIRST_LINE))
    while lines.tell() < end:
        fields = Fields(documents.parse(lines.readline()), "record")
        yield _data_name(fields.text("file")), _record(fields)


def _decode_version_1(content: bytes) -> Memory:
    """Read what programs before 2026-11-29 wrote: one document, with a digest of its parsed content."""
    document = documents.parse(content)
    if document.get("format") != FORMAT or document.get("version") != 1:
        raise BadDocument("its format is another")
    files = document.get("files")
    canonical = json.dumps(files, sort_keys=True, separators=(",", ":")).encode("ascii")
    if not isinstance(files, dict) or document.get("digest") != digests.digest(canonical).hex():
        raise BadDocument("its files do not match its digest")
    return {_data_name(name): _record(Fields(fields, "record")) for name, fields in files.items()}


def _data_name(name: str) -> str:
    if not is_data_name(name):
        raise BadDocument(f"{shown(name)} is no data file's name")
    return name


def _record(fields: Fields) -> Record:
    code, problem = fields.number("code"), fields.optional_text("problem")
    if code not in _CODES or (code == 0) != (problem is None):
        raise BadDocument(f"record.code is {code} and its problem {shown(problem)}")
    return Record(
        digest=fields.matching("digest", DIGEST),
        checked=fields.time("checked"),
        deep=fields.time("deep") if fields.has("deep") else None,
        code=code,
        problem=problem,
    )


_CODES = {0, Damaged.exit_code, NotFound.exit_code}
