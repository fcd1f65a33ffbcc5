"""
A repository: its marker, and the machines that it holds.

The order in which a point is written (FORMAT.md, "Order of writing"); breaking a rule loses data:

1. every data file and digest file is written and durable,
2. a barrier makes their names durable,
3. the manifest is published whole: from here on the point exists,
4. a barrier makes the manifest's name durable, and the machine's folder if the machine is new.

A data file that no manifest names is a leftover of a run that was killed; readers never see it.  While prune replaces a
data file, the manifest names both files (see `replacement`); readers get the entry of the file that has the name.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from backup.errors import Damaged, Failed, NotFound, UsageError
from backup.model import documents
from backup.model.documents import RANDOM, BadDocument, Fields
from backup.model.names import MARKER, RECOVERY, check_name, name_problem
from backup.repository.machine import Machine
from backup.storage.base import TEMPORARY, Storage
from backup.storage.refusals import explained, require_answer

if TYPE_CHECKING:
    from backup.age.keys import Identities, Recipient

FORMAT = "pybackup repository"
PLAIN_VERSION, VERSION = 1, 2
"""Programs that know only version 1 use plain repositories, and refuse sealed ones."""
_MAX_MARKER = 64 << 10
MOST_RECIPIENTS = 100
"""Every file's header has a stanza for each recipient, and readers limit the length of a header."""
_UNFINISHED_MARKER = re.compile(re.escape(MARKER) + r"\.[0-9a-f]{8}" + re.escape(TEMPORARY))


@dataclass(frozen=True, slots=True)
class Marker:
    """What the marker says: the repository's id, and the recipients to which its files are sealed (none: plain)."""

    id: str
    recipients: tuple[Recipient, ...] = ()


class Repository:
    """
    A storage of machines, with a marker that names the repository.

    Attributes
    ----------
    storage : Storage
        The storage of the machines' files: of a sealed repository, the storage that seals and opens them.
    id : str
        32 random hexadecimal digits, which a copy of the repository shares.
    recipients : tuple of Recipient
        The recipients to which the files are sealed; empty for a plain repository.
    """

    def __init__(self, storage: Storage, marker: Marker, identities: Identities | None = None) -> None:
        self.id = marker.id
        self.recipients = marker.recipients
        self.storage = _sealed(storage, marker.recipients, identities) if marker.recipients else storage

    @property
    def location(self) -> str:
        """The repository's path or URL, for people."""
        return self.storage.location

    @property
    def sealed(self) -> bool:
        """Whether the repository's files are sealed."""
        return bool(self.recipients)

    @classmethod
    def open(cls, storage: Storage, identities: Identities | None = None) -> Repository:
        """
        Open an existing repository.

        Parameters
        ----------
        storage : Storage
            The place, which the marker may turn out to be sealed.
        identities : Identities or None
            What opens the files of a sealed repository; without them, files can only be listed, written and removed.

        Raises
        ------
        NotFound
            There is no repository.
        Damaged, Failed
            The marker cannot be understood, or a newer program wrote it; the package `cryptography` is missing.
        """
        path = storage.location
        root = storage.files()
        marker = root.path(MARKER)
        try:
            content = root.read(MARKER, _MAX_MARKER)
        except (FileNotFoundError, NotADirectoryError):
            raise NotFound(
                f"there is no repository at {path} (no {MARKER} in it)",
                hint=f"name another prefix; `pybackup init --copy-of REPO {path}` makes a second place there"
                if storage.traits.remote
                else f"mount its disk if that is missing, or name another folder; `pybackup init {path}` makes a "
                "repository in a new or empty folder",
            ) from None
        except OSError as error:
            require_answer(error)
            raise Failed(f"{marker} cannot be read: {error.strerror}", hint="run as the repository's owner") from None
        return cls(storage, _parsed(content, marker), identities)

    @classmethod
    def create(
        cls, storage: Storage, repository_id: str | None = None, recipients: Sequence[Recipient] = ()
    ) -> Repository:
        """
        Create a repository in a new or empty place, with this id or a random one.  Only `pybackup init` calls this.

        With recipients, the files are sealed to them.

        Raises
        ------
        UsageError
            There is a repository already, the place holds other files, or it lies within a repository.
        Failed
            The repository cannot be created.
        """
        storage.require_outside()
        if recipients:
            from backup.age import primitives  # noqa: PLC0415 - see `_sealed`

            primitives.require()
        if len(recipients) > MOST_RECIPIENTS:
            raise UsageError(f"{len(recipients)} recipients are too many", hint=f"name {MOST_RECIPIENTS} at most")
        with explained(storage.location):
            _require_free(storage)
            _make(storage, Marker(repository_id or os.urandom(16).hex(), tuple(dict.fromkeys(recipients))))
        made = cls.open(storage)
        made.tidy()
        return made

    def tidy(self) -> None:
        """
        Remove what a killed `init` left beside the marker, and write the recovery instructions if they are missing.

        Only commands that write call this.  An error is ignored: the next command tries again.
        """
        with suppress(OSError):
            root = self.storage.files()
            for name in root.listing():
                if _UNFINISHED_MARKER.fullmatch(name):
                    root.remove(name)
            if not root.has(RECOVERY):
                root.publish(RECOVERY, Path(__file__).parent.with_name(RECOVERY).read_bytes())

    def machine_names(self) -> list[str]:
        """Return the names of the machines, sorted; a folder that cannot be a machine (lost+found) is left out."""
        with explained(self.location):
            folders = self.storage.machines()
        return sorted(name for name in folders if name_problem("machine", name) is None)

    def machine(self, name: str) -> Machine:
        """Return a machine, which need not exist yet."""
        return Machine(self.storage, check_name("machine", name))

    def ownership(self, machine: str | None) -> Ownership:
        """Return the `Ownership` of this repository; `machine` is the one whose lock is held, or None."""
        return Ownership(self, machine)


def machine_with(storage: Storage, machines: Iterable[str], point: str) -> str | None:
    """Return the first of these machines that has a manifest of this point's name, damaged or not."""
    return next((name for name in machines if Machine(storage, name).has_point(point)), None)


def _require_free(storage: Storage) -> None:
    """Refuse a place that holds a repository or other files."""
    if storage.files().has(MARKER):
        raise _exists_already(storage.location)
    other = [name for name in storage.occupants() if not _UNFINISHED_MARKER.fullmatch(name)]
    if other:
        raise UsageError(f"{storage.location} is not empty: it holds {other[0]}", hint=_NEW_FOLDER)


def _exists_already(location: str) -> UsageError:
    return UsageError(
        f"there is a repository at {location} already; nothing was changed",
        hint="use it as it is, or name a new or empty folder",
    )


_NEW_FOLDER = "name a new or empty folder; pybackup mixes its files with no others"


def _make(storage: Storage, marker: Marker) -> None:
    """Write the marker, unless another `init` was faster: its id may be in bitmaps' names already."""
    document: dict[str, object] = {"format": FORMAT, "version": PLAIN_VERSION, "id": marker.id}
    if marker.recipients:
        document["version"] = VERSION
        document |= {"sealed": True, "recipients": [str(recipient) for recipient in marker.recipients]}
    with storage.new():
        try:
            storage.files().publish_first(MARKER, (json.dumps(document, indent=2) + "\n").encode())
        except FileExistsError:
            raise _exists_already(storage.location) from None


def _parsed(content: bytes, marker: str) -> Marker:
    try:
        document = documents.parse(content)
        if document.get("format") != FORMAT:
            raise BadDocument(f'its "format" is not "{FORMAT}"')
        fields = Fields(document, "marker")
        version = fields.number("version", low=1)
        if version > VERSION:
            raise Failed(
                f"{marker} has format version {version}; this program reads {VERSION}", hint="upgrade pybackup"
            )
        return Marker(fields.matching("id", RANDOM), () if version == PLAIN_VERSION else _recipients(fields))
    except BadDocument as error:
        raise Damaged(f"{marker} is not a repository's marker: {error}", hint=_MARKER_HINT) from None


def _sealed(storage: Storage, recipients: tuple[Recipient, ...], identities: Identities | None) -> Storage:
    """Return the storage that seals and opens files; a plain repository imports nothing of that."""
    from backup.age.keys import NO_IDENTITIES  # noqa: PLC0415 - see above
    from backup.storage.sealed import Keys, SealedStorage  # noqa: PLC0415

    return SealedStorage(storage, Keys(recipients, NO_IDENTITIES if identities is None else identities))


def _recipients(fields: Fields) -> tuple[Recipient, ...]:
    if not fields.take("sealed", bool):
        raise BadDocument('its "sealed" is not true')
    texts = fields.texts("recipients")
    if not 1 <= len(texts) <= MOST_RECIPIENTS:
        raise BadDocument(f"it names {len(texts)} recipients, not 1 to {MOST_RECIPIENTS}")
    from backup.age import keys as age_keys  # noqa: PLC0415 - see `_sealed`

    try:
        return tuple(age_keys.recipient(text) for text in texts)
    except UsageError as error:
        raise BadDocument(error.message) from None


_MARKER_HINT = 'bring it back from a copy; every manifest beside it names the id as "repository"'


@dataclass(frozen=True, slots=True)
class Ownership:
    """
    Decides which bitmaps and nodes in a running QEMU belong to this repository, and whether a run still needs them.

    `machine` is the machine whose lock is held, or None.
    """

    repository: Repository
    machine: str | None

    @property
    def short_id(self) -> str:
        """Eight hex digits of the repository's id."""
        return self.repository.id[:8]

    def has_point(self, point: str) -> bool:
        """Tell whether any machine has this point; a damaged manifest counts."""
        return machine_with(self.repository.storage, self.repository.machine_names(), point) is not None

    def require_alone(self) -> None:
        """
        Make sure that no run of another machine is in progress.

        Raises
        ------
        Locked
            A run is in progress.
        """
        for name in self.repository.machine_names():
            if name != self.machine:
                self.repository.machine(name).require_free()
