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
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from backup.errors import Damaged, Failed, NotFound, UsageError
from backup.model import documents
from backup.model.documents import RANDOM, BadDocument, Fields
from backup.model.names import MARKER, RECOVERY, check_name, name_problem
from backup.repository.machine import Machine
from backup.storage.folder import (
    TEMPORARY,
    Modes,
    explained,
    is_folder,
    make_folder,
    read,
    sync_folder,
    write_temporary,
    write_whole,
)

FORMAT = "pybackup repository"
VERSION = 1
_MAX_MARKER = 64 << 10
_UNFINISHED_MARKER = re.compile(re.escape(MARKER) + r"\.[0-9a-f]{8}" + re.escape(TEMPORARY))


class Repository:
    """A folder of machines, with a marker that names it."""

    def __init__(self, path: Path, identity: str, modes: Modes) -> None:
        self.path = path
        self.identity = identity
        self.modes = modes

    @classmethod
    def open(cls, path: Path, modes: Modes = Modes()) -> Repository:
        """
        Open an existing repository.

        Raises
        ------
        NotFound
            There is none.
        Damaged, Failed
            The marker cannot be understood, or a newer program wrote it.
        """
        marker = path / MARKER
        try:
            content = read(marker, _MAX_MARKER)
        except (FileNotFoundError, NotADirectoryError):
            raise NotFound(
                f"there is no repository at {path} (no {MARKER} in it)",
                hint=f"mount its disk if that is missing, or name another folder; `pybackup init {path}` makes a "
                "repository in a new or empty folder",
            ) from None
        except OSError as error:
            raise Failed(f"{marker} cannot be read: {error.strerror}", hint="run as the repository's owner") from None
        return cls(path, _identity(content, marker), modes)

    @classmethod
    def create(cls, path: Path, modes: Modes = Modes(), identity: str | None = None) -> Repository:
        """
        Make a repository in a new or empty folder, with `identity` or a random id.  Only `pybackup init` does.

        Raises
        ------
        UsageError
            There is a repository already, the folder holds other things, or it lies in a repository.
        Failed
            It cannot be made.
        """
        require_outside(path)
        with explained(path):
            _require_free(path)
            _make(path, modes, identity or os.urandom(16).hex())
        made = cls.open(path, modes)
        made.tidy()
        return made

    def tidy(self) -> None:
        """
        Remove what a killed `init` left beside the marker, and write the recovery instructions where they are missing.

        Only writers call this.  What cannot be done is done by the next one.
        """
        with suppress(OSError):
            for name in os.listdir(self.path):
                if _UNFINISHED_MARKER.fullmatch(name):
                    os.unlink(self.path / name)
            if not os.path.lexists(self.path / RECOVERY):
                text = Path(__file__).parent.with_name(RECOVERY).read_bytes()
                write_whole(self.path / RECOVERY, text, self.modes.file)

    def machine_names(self) -> list[str]:
        """Names of the machines' folders, sorted; a folder that can be no machine's (lost+found) is none."""
        with explained(self.path), os.scandir(self.path) as entries:
            folders = [entry.name for entry in entries if is_folder(entry)]
        return sorted(name for name in folders if name_problem("machine", name) is None)

    def machine(self, name: str) -> Machine:
        """The folder of a machine, which need not exist yet."""
        return Machine(self.path / check_name("machine", name), self.modes)

    def ownership(self, machine: str | None) -> Ownership:
        """What is this repository's in a running QEMU; `machine` is the one whose lock is held, if any is."""
        return Ownership(self, machine)


def require_outside(path: Path) -> None:
    """
    Refuse a folder for a repository that lies in another repository.

    Raises
    ------
    UsageError
        It does.
    """
    for folder in Path(os.path.realpath(path)).parents:
        if os.path.lexists(folder / MARKER):
            raise UsageError(f"{path} lies in the repository {folder}", hint="name a folder outside of it")


def _require_free(path: Path) -> None:
    """Accept a path where nothing is, and an empty folder; the root of a fresh file system is empty too."""
    if os.path.lexists(path / MARKER):
        raise _exists_already(path)
    if not os.path.lexists(path):
        return
    if not path.is_dir():
        raise UsageError(f"{path} is no folder", hint=_NEW_FOLDER)
    other = sorted(name for name in os.listdir(path) if name != "lost+found" and not _UNFINISHED_MARKER.fullmatch(name))
    if other:
        raise UsageError(f"{path} is not empty: it holds {other[0]}", hint=_NEW_FOLDER)


def _exists_already(path: Path) -> UsageError:
    return UsageError(
        f"there is a repository at {path} already; nothing was changed",
        hint="use it as it is, or name a new or empty folder",
    )


_NEW_FOLDER = "name a new or empty folder; pybackup mixes its files with no others"


def _make(path: Path, modes: Modes, identity: str) -> None:
    """Make a repository where there is none, and the folders that lead to it; all their names last."""
    # The repository's folder counts as new where it is there: a first `init` may have been cut off before it lasted.
    new = [folder for folder in path.absolute().parents if not os.path.lexists(folder)]
    for folder in (*reversed(new), path):
        if not os.path.lexists(folder):
            make_folder(folder, modes.folder)
    document = {"format": FORMAT, "version": VERSION, "id": identity}
    _write_marker(path / MARKER, (json.dumps(document, indent=2) + "\n").encode(), modes.file)
    for folder in (path, *new):
        with suppress(PermissionError):  # a folder of others', which we may write to and not read
            sync_folder(folder.parent)


def _write_marker(path: Path, content: bytes, mode: int) -> None:
    """Write the marker, unless another `init` was faster: its id may be in bitmaps' names already."""
    temporary = path.with_name(f"{path.name}.{os.urandom(4).hex()}{TEMPORARY}")
    try:
        write_temporary(temporary, content, mode)
        try:
            os.link(temporary, path)
        except FileExistsError:
            raise _exists_already(path.parent) from None
        except OSError:  # a file system without links, or a run of the other's repository that tidied up
            if os.path.lexists(path):
                raise _exists_already(path.parent) from None
            os.rename(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def _identity(content: bytes, marker: Path) -> str:
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
        names = self.repository.machine_names()
        return any(os.path.lexists(self.repository.path / name / f"{point}.json") for name in names)

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
