"""
The repository: folders, the lock, and publishing a point whole or not at all.

Rules of order (FORMAT.md, "Order of writing"); breaking one of them loses data:

1. every data file and digest file is written under its own name and fsynced,
2. the machine's folder is fsynced,
3. the manifest is written under a temporary name, fsynced, and renamed: from here on the point exists,
4. the machine's folder is fsynced again, and the repository's folder when the machine is new.

A data file that no manifest names is a leftover of a run that was cut off; readers never see it.

While prune exchanges a data file, its manifest names both (see `exchange`); readers get the entry of the one that has
the name.
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
            There is none.
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
        Make a repository in a new or empty place, with `identity` or a random id.  Only `pybackup init` does.

        Raises
        ------
        UsageError
            There is a repository already, the folder holds other things, or it lies in a repository.
        Failed
            It cannot be made.
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
        Remove what a killed `init` left beside the marker, and write the recovery instructions where they are missing.

        Only writers call this.  What cannot be done is done by the next one.
        """
        with suppress(OSError):
            root = self.storage.files()
            for name in root.listing():
                if _UNFINISHED_MARKER.fullmatch(name):
                    root.remove(name)
            if not root.has(RECOVERY):
                root.publish(RECOVERY, Path(__file__).parent.with_name(RECOVERY).read_bytes())

    def machine_names(self) -> list[str]:
        """Names of the machines' folders, sorted; a folder that can be no machine's (lost+found) is none."""
        with explained(self.location):
            folders = self.storage.machines()
        return sorted(name for name in folders if name_problem("machine", name) is None)

    def machine(self, name: str) -> Machine:
        """The folder of a machine, which need not exist yet."""
        return Machine(self.storage, check_name("machine", name))

    def ownership(self, machine: str | None) -> Ownership:
        """What is this repository's in a running QEMU; `machine` is the one whose lock is held, if any is."""
        return Ownership(self, machine)


def machine_with(storage: Storage, machines: Iterable[str], point: str) -> str | None:
    """Return the first of these machines that has a manifest of this point's name, damaged or not."""
    return next((name for name in machines if Machine(storage, name).has_point(point)), None)


def _require_free(storage: Storage) -> None:
    """Accept a place where nothing is, and an empty one."""
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
    Tells what a running QEMU has of this repository, so that what a run left can be told from what one needs.

    `machine` is the one whose lock is held; None: none is.
    """

    repository: Repository
    machine: str | None

    @property
    def short_id(self) -> str:
        """Eight hex digits of the repository's id."""
        return self.repository.identity[:8]

    def has_point(self, point: str) -> bool:
        """Is it a point of any machine?  A damaged manifest counts."""
        return machine_with(self.repository.storage, self.repository.machine_names(), point) is not None

    def require_alone(self) -> None:
        """
        Make sure that no other machine's run is under way.

        Raises
        ------
        Locked
            One is.
        """
        for name in self.repository.machine_names():
            if name != self.machine:
                self.repository.machine(name).require_free()
