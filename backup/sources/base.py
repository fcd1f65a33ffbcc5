"""
What `create` asks of a source, whichever it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from backup.errors import SourceError
from backup.model.disk import Claim, Sight
from backup.nbd.export import Export


class Source(Protocol):
    """Where one disk is read from."""

    @property
    def owns_bitmaps(self) -> bool:
        """Are its bitmaps ours to add and remove?"""

    def foreign_format(self) -> str | None:
        """The format of another program that the first bytes are of, where nobody named one; None: of none."""

    def guessed_format(self) -> str | None:
        """The format as its first bytes tell it, where nobody named one; nothing is opened by QEMU for it."""

    def look(self) -> Sight:
        """What it is at this moment."""

    def why_no_bitmap(self, sight: Sight) -> str | None:
        """Why no bitmap of ours can be started here; None when one can."""

    def remove_bitmap(self, name: str) -> None:
        """Remove a bitmap."""

    def qemu_version(self) -> str | None:
        """The version of the QEMU that reads it, where that is known."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What is wanted of a disk at the instant: bitmap `read` readable, bitmap `start` recording from then on."""

    sight: Sight
    read: str | None
    start: str | None


@dataclass(frozen=True, slots=True)
class Opened:
    """A disk opened for reading at the instant; `granularity` (bytes) is of the bitmap that was started."""

    export: Export
    granularity: int | None = None


@dataclass(frozen=True, slots=True)
class Freeze:
    """
    Whether the guest's file systems are flushed and frozen for the instant.

    `agent` is the guest agent's socket, None where there is none; `required` makes a failure an error; `rehearsed`
    only asks the agent whether it is there.
    """

    agent: Path | None = None
    wanted: bool = False
    required: bool = False
    rehearsed: bool = False


NO_FREEZE = Freeze()


class Moment(Protocol):
    """One instant of all disks, for as long as it can be read."""

    @property
    def disks(self) -> Sequence[Opened]:
        """In the order of the wishes."""

    @property
    def consistency(self) -> str:
        """`filesystem` where the guest had its file systems flushed and frozen, else `crash`."""

    @property
    def warnings(self) -> Sequence[str]:
        """What the user must know; complete only after the end."""

    @property
    def notes(self) -> Sequence[str]:
        """What the user may want to know."""

    def require_kept(self) -> None:
        """
        Make sure, at no cost, that nothing is known that ended the instant; asked all the time while it is read.

        Raises
        ------
        SourceError
            Something is.
        """

    def require_sound(self) -> None:
        """
        Make sure that all that was read belongs to the instant; asked before a point is published.

        Raises
        ------
        SourceError
            It does not.
        """


class Owner(Protocol):
    """Whose bitmaps and jobs are ours: what a host asks of the repository before it removes any."""

    @property
    def short_id(self) -> str:
        """Eight hex digits of the repository's id."""

    def has_point(self, point: str) -> bool:
        """Is it a point of any machine?"""

    def require_alone(self) -> None:
        """
        Make sure that no other machine's run is under way.

        Raises
        ------
        Locked
            One is.
        """


class Host(Protocol):
    """What a machine's disks are on."""

    def __enter__(self) -> object:
        """Connect."""

    def __exit__(self, *exc_info: object) -> None:
        """Let go."""

    def found(self) -> Sequence[tuple[str, Source]]:
        """Names and sources of disks that the connected host finds by itself; none where disks were named."""

    def recover(self, owner: Owner) -> Sequence[str]:
        """Remove what runs that were cut off left, and nothing else; says what."""

    def instant(
        self, wishes: Sequence[Wish], lanes: int, *, point: str, repository: Path | None, short_id: str
    ) -> AbstractContextManager[Moment]:
        """
        Open one instant of all disks, in the order of the host's sources, for reading by `lanes` connections each.

        `point` and `short_id` (of the repository) go into names; `repository` is the folder that is written to, if any.

        Raises
        ------
        Moved
            A disk changed since it was looked at: look again.
        NotStarted
            A bitmap cannot be started: wish for none, or try again.
        SourceError
            It cannot be opened.
        """


class Moved(SourceError):
    """A disk is not what it was when it was looked at."""

    def __init__(self, message: str) -> None:
        super().__init__(message, hint="is the machine being changed just now? run the command again")


class NotStarted(SourceError):
    """
    The bitmap that was wished for the disk of this number does not record, and `why`.

    `lasting`: the reason is a property of the disk, so that later nights will meet it as well.
    """

    def __init__(self, number: int, refused: SourceError, why: str, *, lasting: bool) -> None:
        super().__init__(refused.message, hint=refused.hint)
        self.number = number
        self.why = why
        self.lasting = lasting


_NO_CLAIM = Claim(None, None)


@dataclass(frozen=True, slots=True)
class DiskRequest:
    """
    One disk to back up.

    `claim` is the user's word about a bitmap of someone else's server.  `path` is the image's, where it is known before
    the image is opened: a disk of the machine is recognised by it.  `allow_plaintext` lets a running QEMU decrypt the
    disk.
    """

    name: str
    source: Source
    claim: Claim = _NO_CLAIM
    path: str | None = None
    allow_plaintext: bool = False
