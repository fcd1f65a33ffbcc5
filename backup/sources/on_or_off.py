"""
A machine that runs on some nights and is off on others.

Its disks are read through QMP while the QMP socket answers, and else from their images, whose locks keep the machine
from starting meanwhile.  Both ways continue one chain: the bitmaps are kept in the images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from backup.model.disk import DiskState
from backup.qemu.images import ImageLocked
from backup.qmp.monitor import NotListening
from backup.sources.base import Capture, ListsBitmaps, Moment, Owner, Source
from backup.sources.image import ImageSource
from backup.sources.resting import AtRest
from backup.sources.running import NodeSource, Running


class OnOrOff:
    """
    The machine as a host; each `with` decides anew which way the machine is read.

    Parameters
    ----------
    running : Running
        The machine while it runs.
    images : sequence of ImageSource
        The images of its disks, in the order of the running machine's sources.
    """

    def __init__(self, running: Running, images: Sequence[ImageSource]) -> None:
        self._running = running
        self._resting = AtRest(images)
        self._is_on = False
        self.sources = tuple(_Disk(self, node, image) for node, image in zip(running.sources, images, strict=True))

    def __enter__(self) -> Self:
        try:
            self._running.__enter__()
            self._is_on = True
        except NotListening:
            self._is_on = False
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._is_on:
            self._running.__exit__(*exc_info)

    @property
    def is_on(self) -> bool:
        """Whether the QMP socket answered."""
        return self._is_on

    @property
    def socket(self) -> Path:
        """The QMP socket."""
        return self._running.socket

    def discover(self) -> Sequence[tuple[str, Source]]:
        """Return nothing: the user names both the node and the image of each disk."""
        return ()

    def lacks(self, disk: str, path: str) -> bool:
        """Return false: the user names every disk."""
        del disk, path
        return False

    def recover(self, owner: Owner) -> Sequence[str]:
        """Remove what runs that were cut off left in QEMU, or nothing while the machine is off."""
        return self._running.recover(owner) if self._is_on else self._resting.recover(owner)

    @contextmanager
    def instant(
        self, captures: Sequence[Capture], lanes: int, *, point: str, repository: Path | None, short_id: str
    ) -> Iterator[Moment]:
        """
        Capture one instant of all disks, in the way that was decided.

        Raises
        ------
        Moved, SourceError
            As `Running.instant` or `AtRest.instant`.
        """
        host = self._running if self._is_on else self._resting
        with (
            self.hinting(),
            host.instant(captures, lanes, point=point, repository=repository, short_id=short_id) as moment,
        ):
            yield moment

    @contextmanager
    def hinting(self) -> Iterator[None]:
        """Explain a locked image of a machine that seems to be off."""
        try:
            yield
        except ImageLocked as error:
            error.hint = (
                f"nothing listens on {self.socket}, so the machine seems to be off; if the machine runs: does it have "
                f"that socket (-qmp unix:{self.socket},server=on,wait=off)? else wait for the other program"
            )
            raise


class _Disk(ListsBitmaps):
    """A disk of the machine, by its node and by its image."""

    def __init__(self, host: OnOrOff, node: NodeSource, image: ImageSource) -> None:
        self._host = host
        self._node = node
        self._image = image

    @property
    def _now(self) -> NodeSource | ImageSource:
        return self._node if self._host.is_on else self._image

    def foreign_format(self) -> str | None:
        """Tell it by the image, while the machine is off."""
        return self._now.foreign_format()

    def guessed_format(self) -> str | None:
        """Tell it by the image, while the machine is off."""
        return self._now.guessed_format()

    def inspect(self) -> DiskState:
        """
        Inspect the node or the image.

        Raises
        ------
        SourceError
            The disk cannot be inspected, or the QEMU that answers has another image.
        """
        with self._host.hinting():
            return self._now.inspect()

    def why_no_bitmap(self, state: DiskState) -> str | None:
        """Ask the node or the image."""
        return self._now.why_no_bitmap(state)

    def remove_bitmap(self, name: str) -> None:
        """Remove a bitmap of the disk."""
        self._now.remove_bitmap(name)

    def qemu_version(self) -> str | None:
        """The version of the running QEMU, or of qemu-img."""
        return self._now.qemu_version()
