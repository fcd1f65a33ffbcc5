"""
What operations ask of a source, whichever kind it is.

    Source    one disk: its state, its bitmaps
    Host      what all disks of a machine are on; it captures one instant of them
    Moment    the captured instant, for as long as its disks can be read
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from backup.errors import BackupError, SourceError
from backup.model.disk import NO_CLAIM, Claim, DiskState

if TYPE_CHECKING:
    from backup.model.open_disk import OpenDisk


class Source(Protocol):
    """What one disk is read from."""

    def foreign_format(self) -> str | None:
        """Another program's format (vmdk, for example) that the image begins with; None: raw, qcow2, or given."""

    def guessed_format(self) -> str | None:
        """The format that the image's first bytes tell, without a program opening the image; None: it was given."""

    def expect_bitmaps(self, names: Collection[str]) -> None:
        """
        Tell which bitmaps the disk may have; called for all disks of the machine before `inspect`.

        Only libvirt needs to be told, because it does not list the bitmaps that QEMU has; see `ListsBitmaps`.
        """

    def expect_removal(self, names: Collection[str]) -> None:
        """
        Tell which bitmaps `remove_bitmap` will be called for; called for all disks of the machine before that.

        Only libvirt makes use of that: it can remove the bitmaps of several disks at once.
        """

    def inspect(self) -> DiskState:
        """
        Inspect the disk without changing it.

        Raises
        ------
        SourceError
            The disk cannot be inspected.
        """

    def why_no_bitmap(self, state: DiskState) -> str | None:
        """Explain why pybackup can start no bitmap on the disk; None: it can."""

    def remove_bitmap(self, name: str) -> None:
        """
        Remove the bitmap of this exact name.

        Raises
        ------
        BackupError
            The bitmap cannot be removed.
        """

    def qemu_version(self) -> str | None:
        """The version of the QEMU that reads the disk; None: unknown."""


class ListsBitmaps:
    """The part of a `Source` that lists every bitmap and removes each on its own: it need not be told any name."""

    __slots__ = ()

    def expect_bitmaps(self, names: Collection[str]) -> None:
        """Do nothing: `inspect` lists all bitmaps."""

    def expect_removal(self, names: Collection[str]) -> None:
        """Do nothing: each bitmap is removed on its own."""


@dataclass(frozen=True, slots=True)
class Capture:
    """
    What one disk must offer at the instant.

    `state` is what the disk was when it was inspected, and must be still.  `read_bitmap` is the exact name of the
    bitmap that can be read then, `start_bitmap` that of the bitmap that records from then on; None: none.
    """

    state: DiskState
    read_bitmap: str | None
    start_bitmap: str | None


@dataclass(frozen=True, slots=True)
class Opened:
    """
    A disk at the captured instant.

    `bitmap` is the name by which `disk` knows the bitmap that was to be read.  `granularity` (bytes) is that of the
    bitmap that was started.
    """

    disk: OpenDisk
    bitmap: str | None = None
    granularity: int | None = None


@dataclass(frozen=True, slots=True)
class Freeze:
    """
    Whether the guest's file systems are flushed and frozen for the instant.

    `agent` is the socket of the guest agent; None: the machine has none.  `required` makes a failure an error;
    `rehearsed` only asks whether the agent answers.
    """

    agent: Path | None = None
    wanted: bool = False
    required: bool = False
    rehearsed: bool = False


NO_FREEZE = Freeze()


@dataclass(frozen=True, slots=True)
class MachineState:
    """
    What a source knows of the machine beside its disks: the content of each small file, by its role
    (`manifest.SUFFIXES`).

    `warnings` say what is there and could not be read, `notes` what is not kept by design.
    """

    files: Mapping[str, bytes]
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


NO_MACHINE_STATE = MachineState({})


class Moment(Protocol):
    """One instant of all disks, for as long as it can be read."""

    @property
    def disks(self) -> Sequence[Opened]:
        """The disks, in the order of the captures."""

    @property
    def consistency(self) -> str:
        """`filesystem` where the guest had flushed and frozen its file systems, else `crash`."""

    @property
    def warnings(self) -> Sequence[str]:
        """What the user must know; complete only after the end."""

    @property
    def notes(self) -> Sequence[str]:
        """What the user may want to know."""

    @property
    def machine(self) -> MachineState:
        """The small files of the machine, read as soon as the instant was captured."""

    def require_kept(self) -> None:
        """
        Make sure, at no cost, that nothing is known to have ended the instant; called often while disks are read.

        Raises
        ------
        SourceError
            The instant has ended.
        """

    def require_sound(self) -> None:
        """
        Make sure that all bytes that were read belong to the instant; called before a point is published.

        Raises
        ------
        SourceError
            Some may not belong to the instant.
        """


class Owner(Protocol):
    """The repository whose bitmaps and jobs a host may remove."""

    @property
    def short_id(self) -> str:
        """The first eight hex digits of the repository's id."""

    def has_point(self, point: str) -> bool:
        """Whether any machine of the repository has this point."""

    def require_alone(self) -> None:
        """
        Make sure that no other machine of the repository is being backed up.

        Raises
        ------
        Locked
            Another machine is being backed up.
        """


class Host(Protocol):
    """What all disks of a machine are on."""

    def __enter__(self) -> object:
        """Connect."""

    def __exit__(self, *exc_info: object) -> None:
        """Disconnect."""

    def discover(self) -> Sequence[tuple[str, Source]]:
        """
        Names and sources of all disks of the machine, where the user named none; empty where disks were named.

        Raises
        ------
        SourceError
            The machine has no disk to back up, or two disks would have one name.
        """

    def lacks(self, disk: str, path: str) -> bool:
        """
        Tell whether the machine, all of whose disks are meant, has no disk of this name and none at this path.

        False for a disk that is excluded, and wherever the user names the disks.

        Raises
        ------
        SourceError
            The machine does not tell.
        """

    def recover(self, owner: Owner) -> Sequence[str]:
        """
        Remove what runs of this repository that were cut off have left, and nothing else; say what was removed.

        Raises
        ------
        Locked
            The remains may belong to another run that goes on.
        SourceError
            The remains cannot be removed.
        """

    def instant(
        self, captures: Sequence[Capture], lanes: int, *, point: str, repository: Path | None, short_id: str
    ) -> AbstractContextManager[Moment]:
        """
        Capture one instant of all disks, in the order of the host's sources, to be read through `lanes` lanes each.

        `point` and `short_id` (of the repository) go into names; `repository` is the folder that is written to, if any.

        Raises
        ------
        Moved
            A disk has changed since it was inspected: inspect it again.
        NotStarted
            A bitmap cannot be started: capture without it, or try again.
        SourceError
            A disk cannot be opened.
        """


@dataclass(frozen=True, slots=True)
class Unavailable:
    """A host that cannot be used: why shows when it is used, so that other machines are backed up before."""

    error: BackupError

    def __enter__(self) -> object:
        raise self.error

    def __exit__(self, *exc_info: object) -> None:
        return None

    def discover(self) -> Sequence[tuple[str, Source]]:
        """Raise the error."""
        raise self.error

    def lacks(self, disk: str, path: str) -> bool:
        """Raise the error."""
        del disk, path
        raise self.error

    def recover(self, owner: Owner) -> Sequence[str]:
        """Raise the error."""
        del owner
        raise self.error

    def instant(
        self, captures: Sequence[Capture], lanes: int, *, point: str, repository: Path | None, short_id: str
    ) -> AbstractContextManager[Moment]:
        """Raise the error."""
        del captures, lanes, point, repository, short_id
        raise self.error


class Moved(SourceError):
    """A disk has changed since it was inspected."""

    def __init__(self, message: str) -> None:
        super().__init__(message, hint="is the machine being changed just now? run the command again")


class NotStarted(SourceError):
    """
    The new bitmap of the disk with this number does not record; `why` says the reason.

    `lasting`: the reason is a property of the disk, so that every later backup will meet it as well.
    """

    def __init__(self, number: int, refused: SourceError, why: str, *, lasting: bool) -> None:
        super().__init__(refused.message, hint=refused.hint)
        self.number = number
        self.why = why
        self.lasting = lasting


@dataclass(frozen=True, slots=True)
class DiskRequest:
    """
    One disk to back up.

    `claim` is the user's word about a bitmap on someone else's server.  `path` is the image's, where it is known before
    the image is opened: pybackup recognises a disk of the machine by its path.  `allow_plaintext` allows a running
    QEMU to decrypt the disk.  `trust_data_file`: the user states that nothing writes to the external data file of the
    image except through the image.
    """

    name: str
    source: Source
    claim: Claim = NO_CLAIM
    path: str | None = None
    allow_plaintext: bool = False
    trust_data_file: bool = False
