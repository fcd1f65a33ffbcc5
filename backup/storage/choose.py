"""Choose the kind of storage for a repository's location; there is one kind so far, a folder."""

from __future__ import annotations

from pathlib import Path

from backup.storage.base import Storage
from backup.storage.folder import FolderStorage, Modes


def storage_at(location: Path, *, group_read: bool = False) -> Storage:
    """Return the storage at a location; with `group_read`, the group may read what is created there."""
    return FolderStorage(location, Modes(0o640, 0o750) if group_read else Modes())
