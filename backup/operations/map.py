"""Open one disk of a source to show its extents; nothing is stored, and nothing of the instant stays."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from backup.errors import SourceError
from backup.model.disk import DiskState
from backup.sources.base import Capture, DiskRequest, Host, Opened


@contextmanager
def open_disk(host: Host, disk: DiskRequest, bitmap: str | None, warn: Callable[[str], None]) -> Iterator[Opened]:
    """
    Open one instant of a host's only disk, with the bitmap of this exact name if any.

    Raises
    ------
    SourceError
        The disk cannot be opened, or has no such bitmap.
    """
    with host:
        disk.source.expect_bitmaps([] if bitmap is None else [bitmap])
        state = disk.source.inspect()
        if state.owns_bitmaps and bitmap is not None:  # a server's open disk names the bitmaps that it offers
            _require_bitmap(state, bitmap, warn)
        captures = [Capture(state, bitmap, None)]
        point = f"map-{os.urandom(4).hex()}"
        with host.instant(captures, 1, point=point, repository=None, short_id="0" * 8) as moment:
            yield moment.disks[0]
            moment.require_sound()


def _require_bitmap(state: DiskState, name: str, warn: Callable[[str], None]) -> None:
    bitmap = state.bitmap(name)
    if bitmap is None:
        below = name in state.lower_bitmaps
        where = " (a file below it has one, which does not record writes to the image itself)" if below else ""
        raise SourceError(f"{state.path} has no dirty bitmap {name!r}{where}", hint=_where_names_are(state))
    if not bitmap.recording:
        warn(f"bitmap {name} is disabled: it has no record of later writes")


def _where_names_are(state: DiskState) -> str:
    """Tell the user which exact names there are, or what shows them."""
    if state.bitmaps or state.lists_bitmaps:
        return f"it has: {', '.join(shown.name for shown in state.bitmaps) or 'none'}"
    return "give the whole name, FAMILY.REPO8.POINT; `pybackup show MACHINE` names the bitmap that a point started"
