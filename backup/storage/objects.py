"""
A storage in a bucket of an object store (S3): a second place, to which points are copied.

The names are a folder's names (FORMAT.md), so that what another program downloads is a repository.  A small file is one
request; a large one is uploaded in parts, and appears when the upload is completed.  A server makes each object durable
before it answers, and shows it in every later listing.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from backup.errors import BackupError, UsageError
from backup.model.location import Bucket
from backup.model.manifest import is_point_id
from backup.model.names import MARKER, SEALED
from backup.runtime.ignoring import ignoring
from backup.storage import leases as lease_objects
from backup.storage.base import IN_USE, TEMPORARY, Names, PartWriter, Stat, Storage, Traits, Unavailable
from backup.storage.credentials import find
from backup.storage.folder import FolderFiles, Modes
from backup.storage.host_state import HostState, state_folder
from backup.storage.leases import Leases, Terms
from backup.storage.object_client import Client, Folder, Upload
from backup.storage.refusals import explained

_log = logging.getLogger(__name__)

LOCK = "lock"
"""An empty object that every machine has, as in a folder: a machine without points exists by it."""
_FRESH = 1.0
"""Seconds for which `exists` keeps its listing for the same thread's next `listing`."""
_NO_READERS_SECONDS = 5.0
"""For so long `alone` does not look for readers again; they are looked for anyway before anything is removed."""
_MARKER_BYTES = 64 << 10
_INIT_PATIENCE = 20.0


class InUse(Unavailable, PermissionError):
    """A file may not be removed now, because a reader may read it."""

    def __init__(self, path: str) -> None:
        super().__init__(
            errno.EACCES,
            "a reader uses files of the machine",
            path,
            hint="run the command again when no restore, verify or serve of the machine runs",
        )


class ObjectStorage:
    """
    A repository's place in a bucket; a `base.Storage`.

    Parameters
    ----------
    environment, home : mapping, Path
        Where credentials and the folder for state are looked for.

    Raises
    ------
    UsageError
        There are no credentials, or settings that cannot be used.
    Failed
        obstore is not installed.
    """

    def __init__(self, bucket: Bucket, environment: Mapping[str, str], home: Path, terms: Terms = Terms()) -> None:
        access = find(bucket, environment, home)
        self.location = str(bucket)
        self.place = f"{access.endpoint or 'aws'} {self.location}"
        self.client = Client(bucket, access)
        self.state = HostState(state_folder(environment, home), self.place)
        self.leases = Leases(self.client, self.state, terms)
        self.traits = Traits(remote=True, rewritable=False)
        self._bucket, self._access = bucket, access
        self._files: dict[str, ObjectFiles] = {}
        self._lock = threading.Lock()
        self._marker: bytes | None = None

    def is_same_place(self, other: Storage) -> bool:
        """Tell whether another storage is the same prefix of the same bucket at the same server."""
        return isinstance(other, ObjectStorage) and other.place == self.place

    def machines(self) -> list[str]:
        """Return the names of the folders."""
        return list(self.client.list().folders)

    def files(self, folder: str = "") -> ObjectFiles:
        """Return the files of a folder."""
        with self._lock:
            return self._files.setdefault(folder, ObjectFiles(self, folder))

    def require_outside(self) -> None:
        """
        Make sure that no prefix that leads here is a repository.

        Raises
        ------
        UsageError
            The place lies within another repository.
        NoAnswer, Failed
            The server does not tell.
        """
        parts = self._bucket.prefix.split("/") if self._bucket.prefix else []
        for count in range(len(parts)):
            above = Client(replace(self._bucket, prefix="/".join(parts[:count])), self._access)
            # A key may have no permission above its prefix.
            with explained(self.location), suppress(FileNotFoundError, PermissionError):
                above.head(MARKER)
                raise UsageError(
                    f"{self.location} lies in the repository {above.location}",
                    hint="name a prefix outside of that repository",
                )

    def occupants(self) -> list[str]:
        """Return the names below the prefix; none where there is nothing."""
        listed = self.client.list()
        return sorted([*(name for name in listed.objects if not _is_lease(name)), *listed.folders])

    @contextmanager
    def new(self) -> Iterator[None]:
        """Do nothing: a prefix exists by its objects."""
        yield

    def close(self) -> None:
        """End the leases of this access."""
        self.leases.close()

    def notes(self, folder: str) -> FolderFiles:
        """Return the files of this host about a machine of this repository."""
        if self._marker is None:
            try:
                self._marker = self.client.get(MARKER, _MARKER_BYTES)
            except FileNotFoundError:
                self._marker = b""
        return FolderFiles(self.state.notes(self._marker.hex()) / (folder or "repository"), Modes())

    def note_marker(self, content: bytes) -> None:
        """Note the marker that was read: it tells this repository from others that were at this location."""
        self._marker = content


class ObjectFiles:
    """The files of one folder of a bucket; a `base.Files`."""

    def __init__(self, storage: ObjectStorage, folder: str) -> None:
        self._storage = storage
        self._folder = folder
        self._client = storage.client
        self._leases = storage.leases
        self.location = self._client.path(folder)
        self._exists = not folder
        self._listed: dict[int, tuple[float, Folder]] = {}
        self._readers_checked = False
        self._no_readers_until = 0.0
        self._kept: set[str] = set()
        """Names of which the server refused the removal; they may be overwritten."""

    def path(self, name: str) -> str:
        """Return a file's URL, for messages."""
        return f"{self.location}/{name}"

    def local_folder(self) -> Path | None:
        """Return None: the files are not on this host."""
        return None

    # Queries

    def exists(self) -> bool:
        """Tell whether the folder has any object but leases; the same thread's next `listing` uses the answer."""
        self._listed.pop(threading.get_ident(), None)
        if self._exists and (not self._folder or self._leases.writes(self._folder)):
            return True
        listed = self._client.list(self._folder)
        self._listed[threading.get_ident()] = (time.monotonic(), listed)
        return any(not _is_lease(name) for name in listed.objects)

    def listing(self) -> Names:
        """List the folder, one request for each thousand names; without leases, and with this host's notes."""
        at, listed = self._listed.pop(threading.get_ident(), (0.0, None))
        if listed is None or time.monotonic() - at > _FRESH:
            listed = self._client.list(self._folder)
        files = {name: Stat(it.size, it.tag) for name, it in listed.objects.items() if name and not _is_lease(name)}
        if self._folder and not files:
            raise self._missing_folder()
        return Names({**self._note_stats(), **files}, self.location)

    def has(self, name: str) -> bool:
        """Tell whether a file has this name."""
        if self._note(name):
            return True
        try:
            self._client.head(self._name(name))
        except FileNotFoundError:
            return False
        return True

    def free_bytes(self) -> int | None:
        """Return None: a bucket's limit, if it has one, is not told."""
        return None

    # Reading

    def read(self, name: str, limit: int) -> bytes:
        """Return a small file's content, at most `limit` + 1 bytes."""
        notes = self._note(name)
        if notes is not None:
            return notes.read(name, limit)
        content = self._client.get(self._name(name), limit)[: limit + 1]
        if not self._folder and name == MARKER:
            self._storage.note_marker(content)
        return content

    def open(self, name: str, *, once: int = 0) -> ObjectReader:
        """Open a file for reading ranges, with a reader's lease of the folder until the storage is closed."""
        del once
        reader = ObjectReader(self._client, self._name(name))
        if self._folder:
            self._leases.share(self._folder)
        return reader

    # Writing

    def create(self, name: str, part: int) -> PartWriter:
        """
        Refuse: a bucket takes a file's parts in order only.

        Raises
        ------
        UsageError
            Always.
        """
        del part
        raise UsageError(
            f"{self.path(name)} cannot be written: a bucket is a second place, and takes copies of points only",
            hint="make backups to a repository in a folder, and copy them: `pybackup copy`",
        )

    def stream(self, name: str, size: int) -> ObjectWriter:
        """Create a file that is written in order; it is uploaded in parts, and appears when it is finished."""
        self._require_new(name)
        return ObjectWriter(self._client, self._name(name), size, lambda: self._leases.require_valid(self._folder))

    def write(self, name: str, content: bytes) -> None:
        """Write a new file."""
        self._require_new(name)
        self._put(name, content)

    def _require_new(self, name: str) -> None:
        self._require_folder()
        if name not in self._kept and self.has(name):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), self.path(name))

    def publish(self, name: str, content: bytes, *, replace: bool = False) -> None:
        """Write a small file; a server shows the whole object or the one before."""
        self._require_folder()
        if replace and not self.has(name):
            raise self._missing(name)
        self._put(name, content)

    def publish_first(self, name: str, content: bytes) -> None:
        """Publish a file under the folder's exclusive lease, unless the name exists."""
        with self._leases.exclusive(self._folder, _INIT_PATIENCE):
            self._require_new(name)
            self._put(name, content)

    def _put(self, name: str, content: bytes) -> None:
        self._leases.require_valid(self._folder)
        self._readers_checked = False
        self._client.put(self._name(name), content)

    def update(self, name: str, change: Callable[[], bytes]) -> None:
        """Replace a note of this host, in its folder for state."""
        notes = self._storage.notes(self._folder)
        folder = Path(notes.location)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        notes.update(name, change)

    def take_name(self, waiting: str, name: str) -> None:
        """Copy a file within the server to the other name, where it appears whole, and remove the first name."""
        self._leases.require_valid(self._folder)
        self._client.head(self._name(waiting))
        self._client.copy(self._name(waiting), self._name(name))
        self._delete(waiting)

    def remove(self, name: str) -> None:
        """Remove a file."""
        if not self.has(name):
            raise self._missing(name)
        self.discard(name)

    def discard(self, name: str) -> None:
        """Remove a file; no error if it does not exist."""
        notes = self._note(name)
        if notes is not None:
            notes.discard(name)
            return
        self._delete(name)

    def _delete(self, name: str) -> None:
        self._leases.require_valid(self._folder)
        try:
            self._require_no_reader(name)
            self._client.delete(self._name(name))
        except PermissionError:
            self._kept.add(name)
            raise

    def barrier(self) -> None:
        """Do nothing, if the folder exists: what a server has confirmed is durable."""
        self._require_folder()

    def remove_folder(self) -> list[str]:
        """Remove the folder's lock and this host's notes.  If there are other files, only return their names."""
        others = [name for name in self.listing() if name != LOCK]
        if not others:
            self._delete(LOCK)
            self._exists = False
        return others

    # Locks

    @contextmanager
    def lock(self) -> Iterator[None]:
        """
        Hold the exclusive lease of the folder; a missing folder is made.

        Raises
        ------
        Locked
            Another process has the lease.
        """
        with ExitStack() as stack:
            with explained(self.location):
                stack.enter_context(self._leases.exclusive(self._folder))
                self._listed.clear()  # others may have written until now
                self._readers_checked = False
                self._listed.clear()
                if not self._exists:
                    self._make_folder()
            yield

    def _make_folder(self) -> None:
        if not self.has(LOCK):
            self._client.put(self._name(LOCK), b"")
        self._exists = True

    def require_unlocked(self) -> None:
        """
        Make sure that no process has the exclusive lease.

        Raises
        ------
        Locked
            A process has the lease.
        """
        with explained(self.location):
            self._leases.require_unlocked(self._folder)

    @contextmanager
    def hold(self, names: Sequence[str]) -> Iterator[bool]:
        """Have a reader's lease of the folder; yields False if the access key may not write it."""
        with self._leases.shared(self._folder) as protected:
            listed = self.listing()
            for name in names:
                listed.stat(name)
            yield protected

    @contextmanager
    def alone(self, names: Sequence[str]) -> Iterator[str | None]:
        """
        Look for readers of the folder; they are looked for again before a file is removed whose manifest is gone.

        A reader that comes after that look reads the manifests again, and sees that the file's point is gone.
        """
        del names
        if time.monotonic() > self._no_readers_until:
            if self._leases.has_readers(self._folder):
                yield IN_USE
                return
            self._no_readers_until = time.monotonic() + _NO_READERS_SECONDS
        yield None

    def _require_no_reader(self, name: str) -> None:
        """Look for readers, after a manifest was removed and before the first of its files is."""
        if _is_manifest(name):
            self._readers_checked = False
        elif self._folder and not self._readers_checked:
            if self._leases.has_readers(self._folder):
                raise InUse(self.path(name))
            self._readers_checked = True

    # Shared by the methods above

    def _name(self, name: str) -> str:
        return f"{self._folder}/{name}" if self._folder else name

    def _require_folder(self) -> None:
        if not self._exists:
            if not self.exists():
                raise self._missing_folder()
            self._exists = True

    def _missing_folder(self) -> FileNotFoundError:
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.location)

    def _missing(self, name: str) -> FileNotFoundError:
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.path(name))

    def _note(self, name: str) -> FolderFiles | None:
        """Return this host's notes about the folder if they have a file of this name."""
        notes = self._notes()
        return notes if notes is not None and notes.has(name) else None

    def _note_stats(self) -> dict[str, Stat]:
        notes = self._notes()
        if notes is None:
            return {}
        listed = notes.listing()
        return {name: listed.stat(name) for name in listed if not name.endswith(TEMPORARY)}

    def _notes(self) -> FolderFiles | None:
        if not self._storage.state.has_notes():
            return None
        notes = self._storage.notes(self._folder)
        return notes if Path(notes.location).is_dir() else None


def _is_manifest(name: str) -> bool:
    """Tell whether a name is a manifest's, sealed or not."""
    return is_point_id(name.removesuffix(SEALED).removesuffix(".json")) and ".json" in name


def _is_lease(name: str) -> bool:
    return lease_objects.NAME.fullmatch(name) is not None


class ObjectReader:
    """
    An object that is open for reading ranges; a `base.RangeReader`.

    Every request names the e_tag that the object had when it was opened, so no byte of another object is returned.
    """

    def __init__(self, client: Client, name: str) -> None:
        self._client = client
        self._name = name
        found = client.head(name)
        self.size = found.size
        self._tag = found.tag

    def read_at(self, offset: int, length: int) -> bytes | memoryview:
        """Return bytes [offset, offset + length), fewer where the file ends before."""
        length = min(length, self.size - offset)
        return self._client.get_range(self._name, offset, length, self._tag) if length > 0 else b""

    def close(self) -> None:
        """Do nothing: no connection is held."""


class ObjectWriter:
    """A large object that is written in order; a `base.StreamWriter`."""

    def __init__(self, client: Client, name: str, size: int, require_valid: Callable[[], None]) -> None:
        self._require_valid = require_valid
        require_valid()
        self._upload: Upload | None = client.upload(name, size)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append bytes."""
        self._require_valid()
        assert self._upload is not None
        self._upload.write(data)

    def finish(self) -> None:
        """Complete the object."""
        self._require_valid()
        assert self._upload is not None
        self._upload.finish()
        self._upload = None

    def close(self) -> None:
        """Stop; the server forgets the parts of an object that is not finished."""
        upload, self._upload = self._upload, None
        if upload is not None:
            with ignoring(_log, "stopping an upload", OSError, BackupError):
                upload.abort()
