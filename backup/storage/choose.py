"""Choose the kind of storage for a repository's location: a folder of this host, or a bucket of an object store."""

from __future__ import annotations

import os
from pathlib import Path

from backup.model.location import Bucket, Location
from backup.storage.base import Storage
from backup.storage.folder import FolderStorage, Modes


def storage_at(location: Location, *, group_read: bool = False) -> Storage:
    """
    Return the storage at a location; with `group_read`, the group may read what is created in a folder.

    Raises
    ------
    UsageError, Failed
        The bucket cannot be used: there are no credentials, for example, or the library is not installed.
    """
    if isinstance(location, Bucket):
        from backup.storage.objects import ObjectStorage  # noqa: PLC0415 - folders need none of it

        return ObjectStorage(location, os.environ, Path(os.path.expanduser("~")))
    return FolderStorage(location, Modes(0o640, 0o750) if group_read else Modes())
