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
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from backup.errors import Damaged, Failed, NotFound, UsageError
from backup.model import documents
from backup.model.documents import RANDOM, BadDocument, Fields
from backup.model.names import MARKER, RECOVERY, check_name, name_problem
from backup.repository.machine import Machine
from backup.storage.base import TEMPORARY, Storage
from backup.storage.refusals import explained

FORMAT = "pybackup repository"
VERSION = 1
_MAX_MARKER = 64 << 10
_UNFINISHED_MARKER = re.compile(re.escape(MARKER) + r"\.[0-9a-f]{8}" + re.escape(TEMPORARY))


class Repository:
    """A storage of machines, with a marker that names the repository."""

    def __init__(self, storage: Storage, identity: str) -> None:
        self.storage = storage
        self.identity = identity

    @property
    def location(self) -> str:
        """The repository's path or URL, for people."""
        return self.storage.location

    @classmethod
    def open(cls, storage: Storage) -> Repository:
        """
        Open an existing repository.

        Raises
        ------
        NotFound
            There is no repository.
        Damaged, Failed
            The marker cannot be understood, or a newer program wrote it.
        """
        path = storage.location
        root = storage.files()
        marker = root.path(MARKER)
        try:
            content = root.read(MARKER, _MAX_MARKER)
        except (FileNotFoundError, NotADirectoryError):
            raise NotFound(
                f"there is no repository at {path} (no {MARKER} in it)",
                hint=f"mount its disk if that is missing, or name another folder; `pybackup init {path}` makes a "
                "repository in a new or empty folder",
            ) from None
        except OSError as error:
            raise Failed(f"{marker} cannot be read: {error.strerror}", hint="run as the repository's owner") from None
        return cls(storage, _identity(content, marker))

    @classmethod
    def create(cls, storage: Storage, identity: str | None = None) -> Repository:
        """
        Create a repository in a new or empty place, with `identity` or a random id.  Only `pybackup init` calls this.

        Raises
        ------
        UsageError
            There is a repository already, the place holds other files, or it lies within a repository.
        Failed
            The repository cannot be created.
        """
        storage.require_outside()
        with explained(storage.location):
            _require_free(storage)
            _make(storage, identity or os.urandom(16).hex())
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


def _make(storage: Storage, identity: str) -> None:
    """Write the marker, unless another `init` was faster: its id may be in bitmaps' names already."""
    document = {"format": FORMAT, "version": VERSION, "id": identity}
    with storage.new():
        try:
            storage.files().publish_first(MARKER, (json.dumps(document, indent=2) + "\n").encode())
        except FileExistsError:
            raise _exists_already(storage.location) from None


def _identity(content: bytes, marker: str) -> str:
    try:
        document = documents.parse(content)
        if document.get("format") != FORMAT:
            raise BadDocument(f'its "format" is not "{FORMAT}"')
        version = Fields(document, "marker").number("version", low=1)
        if version > VERSION:
            raise Failed(
                f"{marker} has format version {version}; this program reads {VERSION}", hint="upgrade pybackup"
            )
        return Fields(document, "marker").matching("id", RANDOM)
    except BadDocument as error:
        raise Damaged(f"{marker} is not a repository's marker: {error}", hint=_MARKER_HINT) from None


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
        return self.repository.identity[:8]

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
