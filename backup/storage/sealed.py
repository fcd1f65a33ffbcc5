"""
A sealed storage: any other storage, in which each file is an age file of its own (`backup.age`).

    a file of the repository          the file in the place
    vda.POINT.qcow2                   vda.POINT.qcow2.age
    vda.POINT.qcow2.part              vda.POINT.qcow2.age.part      while it is written

The marker and RECOVERY.txt are in clear: they say what the place is, and how files come back without pybackup.  Names,
sizes and times are in clear as well.  To list, write and remove files takes no secret; to read a file takes the
identity of a recipient.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from backup.age import payload, primitives
from backup.age.header import FEW_BYTES, MOST_BYTES, BadHeader, Cut, NoKey
from backup.age.keys import NO_IDENTITIES, Identities, Recipient
from backup.age.payload import CHUNK, BadPayload, Head, Layout, Opener, Sealer
from backup.errors import NoIdentity, UsageError
from backup.model.manifest import UNFINISHED
from backup.model.names import MARKER, RECOVERY, SEALED
from backup.storage.base import TEMPORARY, Files, Listing, PartWriter, RangeReader, Stat, Storage, StreamWriter, Traits

_CLEAR = (MARKER, RECOVERY)
_ENDINGS = (UNFINISHED, TEMPORARY)
"""What a storage appends to the name of a file that is not complete."""
_STEP = 64 * CHUNK
_LONGEST_HEAD = MOST_BYTES + FEW_BYTES


def sealed_name(name: str) -> str:
    """Return the name of a repository's file in the place."""
    for ending in _ENDINGS:
        if name.endswith(ending):
            return name.removesuffix(ending) + SEALED + ending
    return name + SEALED


def plain_name(name: str) -> str | None:
    """Return the name of the repository's file that has this name in the place; None for a file of another kind."""
    for ending in ("", *_ENDINGS):
        if name.endswith(SEALED + ending):
            return name.removesuffix(ending).removesuffix(SEALED) + ending
    return None


def is_clear(name: str) -> bool:
    """Tell whether a file of the repository's own folder is in clear, as its temporary files are."""
    return any(name == clear or (name.startswith(clear) and name.endswith(TEMPORARY)) for clear in _CLEAR)


@dataclass(frozen=True, slots=True)
class Keys:
    """The recipients of a place, and the identities that the user named to read it."""

    recipients: tuple[Recipient, ...]
    identities: Identities = NO_IDENTITIES

    def refuse(self, location: str) -> None:
        """
        Explain why the identities do not open a file of the place; return if one of them should.

        Raises
        ------
        NoIdentity
            There is no identity, or none of a recipient of the place.
        """
        shown = " or ".join(str(recipient) for recipient in self.recipients)
        if not self.identities.keys:
            raise NoIdentity(
                f"{location} is sealed, and no identity is named to read it",
                hint=f"name the file of the identity of {shown} with --identity FILE, or in PYBACKUP_IDENTITY",
            )
        if not {identity.recipient for identity in self.identities.keys} & set(self.recipients):
            raise NoIdentity(
                f"{self.identities.file} does not open {location}, which is sealed to other recipients",
                hint=f"name the file of the identity of {shown}",
            )


class SealedStorage:
    """
    A storage whose files are sealed in another storage; a `base.Storage`.

    Raises
    ------
    Failed
        The package `cryptography` is missing.
    """

    def __init__(self, place: Storage, keys: Keys) -> None:
        primitives.require()
        self.place = place
        self.keys = keys
        self.location = place.location
        self.traits = Traits(place.traits.remote, rewritable=False, readable=bool(keys.identities.keys))

    def is_same_place(self, other: Storage) -> bool:
        """Tell whether another storage, sealed or not, is the same place."""
        return self.place.is_same_place(other.place if isinstance(other, SealedStorage) else other)

    def machines(self) -> list[str]:
        """Return the names of the folders."""
        return self.place.machines()

    def files(self, folder: str = "") -> SealedFiles:
        """Return the files of a machine's folder, or the repository's own."""
        return SealedFiles(self.place.files(folder), self.keys, self.location, clear=not folder)

    def require_outside(self) -> None:
        """
        Make sure that the place does not lie within another repository.

        Raises
        ------
        UsageError
            The place lies within another repository.
        """
        self.place.require_outside()

    def occupants(self) -> list[str]:
        """
        Return the names of what the place holds.

        Raises
        ------
        UsageError
            The place can hold nothing.
        """
        return self.place.occupants()

    def new(self) -> AbstractContextManager[None]:
        """Make the place if it does not exist."""
        return self.place.new()

    def close(self) -> None:
        """Give back what the place holds for this access."""
        self.place.close()


class SealedFiles:
    """
    The files of one folder of a sealed storage; a `base.Files`.

    Parameters
    ----------
    inner : Files
        The same folder of the place.
    location : str
        The place, for messages.
    clear : bool
        Whether the folder is the repository's own, in which some files are in clear.
    """

    def __init__(self, inner: Files, keys: Keys, location: str, *, clear: bool) -> None:
        self._inner = inner
        self._keys = keys
        self._place = location
        self._clear = clear
        self.location = inner.location

    def _name(self, name: str) -> str:
        return name if self._is_clear(name) else sealed_name(name)

    def _is_clear(self, name: str) -> bool:
        return self._clear and is_clear(name)

    def path(self, name: str) -> str:
        """Return the path or URL of the sealed file."""
        return self._inner.path(self._name(name))

    def local_folder(self) -> Path | None:
        """Return None: no other program can read the files."""
        return None

    # Queries

    def exists(self) -> bool:
        """
        Tell whether the folder exists.

        Raises
        ------
        Damaged, UsageError, Failed
            The name is not that of a folder of this machine.
        """
        return self._inner.exists()

    def listing(self) -> SealedListing:
        """List the repository's files.  Other files, and the lock, are left out."""
        return SealedListing(self._inner.listing(), self._name, self._plain, len(self._keys.recipients))

    def _plain(self, name: str) -> str | None:
        return name if self._is_clear(name) else plain_name(name)

    def has(self, name: str) -> bool:
        """Tell whether the sealed file exists."""
        return self._inner.has(self._name(name))

    def free_bytes(self) -> int | None:
        """Return how many bytes can still be sealed and written."""
        free = self._inner.free_bytes()
        return None if free is None else free // payload.SEALED_CHUNK * CHUNK

    # Reading

    def read(self, name: str, limit: int) -> bytes:
        """
        Return a small file's content, at most `limit` + 1 bytes.

        Raises
        ------
        NoIdentity
            No identity opens the file.
        """
        if self._is_clear(name):
            return self._inner.read(name, limit)
        self._require_identity()
        most = _LONGEST_HEAD + payload.longest_span(limit)
        sealed = self._inner.read(self._name(name), most)
        if len(sealed) > most:
            return self._start(name, limit + 1)
        with self._explained(name):
            opener = Opener(Head.parse(sealed), self._keys.identities.keys, len(sealed))
            return bytes(opener.open(0, sealed[opener.layout.head :]))[: limit + 1]

    def _start(self, name: str, length: int) -> bytes:
        reader = self.open(name)
        try:
            return bytes(reader.read_at(0, length))
        finally:
            reader.close()

    def open(self, name: str, *, once: int = 0) -> RangeReader:
        """
        Open a file for reading ranges.

        Raises
        ------
        NoIdentity
            No identity opens the file.
        """
        if self._is_clear(name):
            return self._inner.open(name, once=once)
        self._require_identity()
        longest = max(_LONGEST_HEAD, payload.longest_span(once)) if once else 0
        inner = self._inner.open(self._name(name), once=longest)
        try:
            with self._explained(name):
                opener = Opener(_head(inner), self._keys.identities.keys, inner.size)
        except BaseException:
            inner.close()
            raise
        return SealedReader(inner, opener, self.path(name), once=bool(once))

    def _require_identity(self) -> None:
        if not self._keys.identities.keys:
            self._keys.refuse(self._place)

    @contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        """Explain why a file cannot be opened: damage is an OSError, as of a disk that fails."""
        with _damage(self.path(name)):
            try:
                yield
            except NoKey as error:
                self._keys.refuse(self._place)
                raise BadHeader(str(error)) from None

    # Writing

    def create(self, name: str, part: int) -> PartWriter:
        """
        Refuse a file in parts: an age file is written in order.

        Raises
        ------
        UsageError
            The place is sealed.
        """
        del part
        if self._is_clear(name):
            raise ValueError(f"{name} is a small file")
        raise UsageError(
            f"{self._place} is sealed: points can be copied there, but not made or merged there",
            hint="back up to a repository that is not sealed, and copy its points to this one",
        )

    def stream(self, name: str, size: int) -> StreamWriter:
        """Create a file of `size` bytes that is written in order and sealed on the way."""
        if self._is_clear(name):
            return self._inner.stream(name, size)
        sealer = Sealer(self._keys.recipients, size)
        inner = self._inner.stream(self._name(name), sealer.layout.sealed)
        try:
            return SealedStreamWriter(inner, sealer)
        except BaseException:
            inner.close()
            raise

    def write(self, name: str, content: bytes) -> None:
        """Write a new file."""
        self._inner.write(self._name(name), self._sealed(name, content))

    def publish(self, name: str, content: bytes, *, replace: bool = False) -> None:
        """Write a small file, durable; the file appears whole or not at all."""
        self._inner.publish(self._name(name), self._sealed(name, content), replace=replace)

    def publish_first(self, name: str, content: bytes) -> None:
        """Publish a file; raise FileExistsError if the name exists."""
        self._inner.publish_first(self._name(name), self._sealed(name, content))

    def update(self, name: str, change: Callable[[], bytes]) -> None:
        """Replace a small file, durable, with what `change` returns."""
        self._inner.update(self._name(name), lambda: self._sealed(name, change()))

    def _sealed(self, name: str, content: bytes) -> bytes:
        if self._is_clear(name):
            return content
        sealer = Sealer(self._keys.recipients, len(content))
        return sealer.head + sealer.seal(0, content)

    def take_name(self, waiting: str, name: str) -> None:
        """Rename the file `waiting` to `name`, durable, in one step."""
        self._inner.take_name(self._name(waiting), self._name(name))

    def remove(self, name: str) -> None:
        """Remove a file."""
        self._inner.remove(self._name(name))

    def discard(self, name: str) -> None:
        """Remove a file and its unfinished parts."""
        self._inner.discard(self._name(name))

    def barrier(self) -> None:
        """Make all new names and all removals in the folder durable."""
        self._inner.barrier()

    def remove_folder(self) -> list[str]:
        """Remove the folder and its lock.  If the folder holds other files, only return their names."""
        return [self._plain(name) or name for name in self._inner.remove_folder()]

    # Locks

    def lock(self) -> AbstractContextManager[None]:
        """
        Take the writer's exclusive lock of the folder.

        Raises
        ------
        Locked
            Another process has the lock.
        """
        return self._inner.lock()

    def require_unlocked(self) -> None:
        """
        Make sure that no process has the writer's lock.

        Raises
        ------
        Locked
            A process has the lock.
        """
        self._inner.require_unlocked()

    def hold(self, names: Sequence[str]) -> AbstractContextManager[bool]:
        """Hold files as a reader."""
        return self._inner.hold([self._name(name) for name in names])

    def alone(self, names: Sequence[str]) -> AbstractContextManager[str | None]:
        """Keep readers from those files that exist."""
        return self._inner.alone([self._name(name) for name in names])


class SealedListing:
    """
    The repository's files in a folder of a sealed storage; a `base.Listing`.

    The sizes are those of the plain content.  They follow from the sizes of the sealed files, because pybackup gives
    every file a stanza for each recipient and nothing else.
    """

    def __init__(
        self,
        inner: Listing,
        sealed: Callable[[str], str],
        plain: Callable[[str], str | None],
        recipients: int,
    ) -> None:
        self._inner = inner
        self._sealed = sealed
        self._names = sorted(name for name in map(plain, inner) if name is not None)
        self._head = payload.head_length(recipients)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def stat(self, name: str) -> Stat:
        """Return a file's size and tag; the size of a file that is no whole sealed file is what the place says."""
        sealed = self._sealed(name)
        found = self._inner.stat(sealed)
        if sealed == name:
            return found
        try:
            return Stat(Layout.of_sealed(self._head, found.size).size, found.tag)
        except BadPayload:
            return found


class SealedReader:
    """A sealed file that is open for reading; a `base.RangeReader`."""

    def __init__(self, inner: RangeReader, opener: Opener, path: str, *, once: bool) -> None:
        self._inner = inner
        self._opener = opener
        self._path = path
        self._rooms = threading.local() if once else None
        self.size = opener.layout.size

    def read_at(self, offset: int, length: int) -> bytes | memoryview:
        """Return bytes [offset, offset + length), fewer where the file ends before."""
        if offset >= self.size > 0:
            return b""
        first, start, count = self._opener.layout.span(offset, length)
        sealed = self._inner.read_at(start, count)
        with _damage(self._path):
            if len(sealed) != count:
                raise BadPayload("it was cut off")
            content = self._opener.open(first, sealed, self._room(count))
        begin = offset - first * CHUNK
        return content[begin : begin + length]

    def _room(self, length: int) -> bytearray | None:
        """Return this thread's memory for what it reads once."""
        if self._rooms is None:
            return None
        room: bytearray | None = getattr(self._rooms, "room", None)
        if room is None or len(room) < length:
            room = self._rooms.room = bytearray(length)
        return room

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._inner.close()


_LENGTH = "the content has another length than was announced, by which its last chunk is known"


class SealedStreamWriter:
    """A new file that is sealed while it is written in order; a `base.StreamWriter`."""

    def __init__(self, inner: StreamWriter, sealer: Sealer) -> None:
        self._inner = inner
        self._sealer = sealer
        self._left = sealer.layout.size
        self._chunk = 0
        self._rest = bytearray()
        inner.write(sealer.head)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append bytes; whole chunks are sealed at once, and the rest waits."""
        view = memoryview(data)
        self._left -= len(view)
        if self._left < 0:
            raise ValueError(_LENGTH)
        if self._rest:
            missing = CHUNK - len(self._rest)
            self._rest += view[:missing]
            view = view[missing:]
            if len(self._rest) == CHUNK:
                self._seal(self._rest)
                self._rest = bytearray()
        whole = len(view) // CHUNK * CHUNK
        for start in range(0, whole, _STEP):
            self._seal(view[start : min(start + _STEP, whole)])
        self._rest += view[whole:]

    def _seal(self, chunks: bytearray | memoryview) -> None:
        self._inner.write(self._sealer.seal(self._chunk, chunks))
        self._chunk += max(1, -(-len(chunks) // CHUNK))

    def finish(self) -> None:
        """Seal the rest, make the file durable, and give the file its name."""
        if self._left:
            raise ValueError(_LENGTH)
        if self._rest or not self._chunk:
            self._seal(self._rest)
        self._inner.finish()

    def close(self) -> None:
        """Stop writing; a file that is not finished never gets its name."""
        self._inner.close()


def _head(inner: RangeReader) -> Head:
    """Read the head of a file: one short read, unless the header is unusually long."""
    try:
        return Head.parse(bytes(inner.read_at(0, FEW_BYTES)))
    except Cut:
        return Head.parse(bytes(inner.read_at(0, _LONGEST_HEAD)))


@contextmanager
def _damage(path: str) -> Iterator[None]:
    """Turn damage into an OSError that names the file."""
    try:
        yield
    except (BadHeader, BadPayload) as error:
        raise OSError(errno.EBADMSG, f"the sealed file is damaged: {error}", path) from None
