"""Choose the kind of storage for a repository's location; there is one kind so far, a folder."""

from __future__ import annotations

from backup.errors import Failed
from backup.model.location import Bucket, Location
from backup.storage.base import Storage
from backup.storage.folder import FolderStorage, Modes


def storage_at(location: Location, *, group_read: bool = False) -> Storage:
    """Return the storage at a location; with `group_read`, the group may read what is created there."""
    if isinstance(location, Bucket):
        raise Failed(f"{location} is a bucket, which this version cannot use", hint="name a folder")
    return FolderStorage(location, Modes(0o640, 0o750) if group_read else Modes())
