"""
What `verify` remembers of a machine's data files: when each was read whole, and what was found (FORMAT.md).

It lies in the machine's folder, for convenience only.  A memory that is lost, damaged, or of a file that is another by
now (its digest tells) means no more than that the file is verified again.
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
"""Of a thousand points with a hundred disks each."""


@dataclass(frozen=True, slots=True)
class Record:
    """
    What was found in a data file when all of it was read last.

    Attributes
    ----------
    digest : str
        The manifest's digest of its digest file; a file that has another one was not verified.
    checked : str
        When, UTC.
    deep : str or None
        When all its clusters were decompressed as well, without fault.
    code : int
        0: it was sound.  Else the error's exit code.
    problem : str or None
        The error's message.
    """

    digest: str
    checked: str
    deep: str | None
    code: int
    problem: str | None

    def sound_since(self, deep: bool) -> datetime | None:  # noqa: FBT001
        """When the file was last found to be sound; None where it was not, or not with `deep`."""
        time = self.deep if deep else self.checked
        return None if self.code or time is None else moment_of(time)


Memory = Mapping[str, Record]
"""Records by data file's name."""


def record_of(memory: Memory, data: DataFile) -> Record | None:
    """What is remembered of a data file; None where that was another file of the same name."""
    found = memory.get(data.file)
    return found if found is not None and found.digest == data.digest else None


def known_damage(memory: Memory, files: Iterable[DataFile]) -> Damaged | None:
    """Damage of one of these files that a verify has found; None: none is known."""
    for data in files:
        record = record_of(memory, data)
        if record is not None and record.code == Damaged.exit_code:
            found = f"{record.problem} (found by verify, {record.checked})"
            return Damaged(found, hint="bring the file back from a copy of the repository, then run `pybackup verify`")
    return None


def recall(machine: Machine) -> Memory:
    """What is remembered of a machine's data files; nothing where it cannot be read, whatever the reason."""
    try:
        content = machine.files.read(NAME, _MAX_BYTES)
    except OSError:
        return {}
    return decode(content) if len(content) <= _MAX_BYTES else {}


def remember(machine: Machine, found: Memory, present: Collection[str] | None) -> str | None:
    """
    Add to what is remembered, and forget files that are not `present` (None: forget none).

    Returns
    -------
    str or None
        Why that was not possible (a read-only repository, a full disk); None: it was.
    """

    def merged() -> bytes:
        known = {**recall(machine), **found}
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
    """Write the memory as a line of JSON for what it is, one for each record, and one with the digest of all before."""
    lines = [
        json.dumps({"format": FORMAT, "version": VERSION}),
        *(json.dumps({"file": name, **asdict(memory[name])}) for name in sorted(memory)),
    ]
    head = "".join(f"{line}\n" for line in lines).encode("ascii")
    return head + _tail(head)


def decode(content: bytes) -> Memory:
    """
    Read what `encode` wrote; nothing where it is anything else.

    The digest comes before the parser, and each line is parsed on its own, so that no more memory is taken than records
    take.
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
    """What programs before 2026-11-29 wrote: one document, whose digest is over what was parsed."""
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
