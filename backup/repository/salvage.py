"""
Salvage: find what can be proven of a damaged chain, and which ranges of the disk are lost (FORMAT.md, "Salvage").

    stored cluster    proven by the digest of its block; a compressed one also by the checksum of its own frame
    table, head       proven by the digest of its block, or by accounting for the whole file: see `_accounted`
    holder unknown    if a table of a file in the chain is not proven, no older file's bytes may pass for the point's:
                      the range is lost, unless a newer file holds it
    link missing      a manifest that is missing or unreadable is replaced by the data file that its child's head names,
                      if that file agrees with its digest file

A range that is not proven is listed, and reads as zeroes.  There is one exception: an uncompressed cluster in a block
that fails its digest is listed, and is written as it is stored.  A proven table says that these bytes are the point's,
and nearly all of the 4 MiB will be right.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from backup import qcow2
from backup.errors import BackupError, Damaged, DamagedBlock, NotFound
from backup.model import chain as chains
from backup.model import digests, manifest
from backup.model.chain import Chain, Link
from backup.model.digests import BLOCK, LENGTH, block_count
from backup.model.extents import Mask, Offsets, edges, windows
from backup.model.manifest import BitmapRecord, ByteCounts, DataFile, DiskEntry, Parent, SourceRecord
from backup.repository import checked_file
from backup.repository.checked_file import BlockCache, CheckedFile
from backup.repository.cluster_index import NOBODY, Index
from backup.repository.data_file import check_head
from backup.repository.machine import Contents, Machine
from backup.repository.opened_chain import open_unchanged
from backup.storage.base import Files
from backup.storage.refusals import NoAnswer, open_file, require_answer

U64 = npt.NDArray[np.uint64]

ZEROES, AS_STORED = "zeroes", "as stored"
UNKNOWN = np.uint64((1 << 64) - 1)
"""Stands for an L2 entry that is not proven; no file holds this value."""
_UNKNOWN_KIND = 255
_WINDOW = 1 << 20
"""Clusters resolved at once; whole L2 tables for every size of cluster."""
_MOST_MIXES = 1 << 10
"""Most combinations of stored and recomputed digests that are tried for a damaged digest file."""
_SHOWN = 4
"""Most ranges that a message lists."""


@dataclass(frozen=True, slots=True)
class Lost:
    """
    A range of the disk (bytes) that could not be proven, and why.

    `content` says what was written there: ZEROES, or AS_STORED for the bytes of a damaged block.
    """

    start: int
    length: int
    content: str
    why: str


class LostRanges:
    """Collects lost ranges, and merges neighbours."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], list[tuple[int, int]]] = {}

    def add(self, start: int, end: int, why: str, content: str) -> None:
        """Add bytes [start, end) of the disk."""
        found = self._found.setdefault((content, why), [])
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], end)
        else:
            found.append((start, end))

    def list(self) -> tuple[Lost, ...]:
        """Return all lost ranges, ascending."""
        merged = [(low, high, *what) for what, found in self._found.items() for low, high in merge(found)]
        return tuple(Lost(low, high - low, content, why) for low, high, content, why in sorted(merged))


def merge(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return ranges (start, end) in ascending order, with those joined that touch."""
    joined: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if joined and low <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(high, joined[-1][1]))
        else:
            joined.append((low, high))
    return joined


class SalvagedFile:
    """
    One link's data file, as far as it can be proven (a `cluster_index.ClusterFile`).

    Each cluster of a table that is not proven has the entry UNKNOWN; `why` says what is wrong with the table.  Only
    `read` is safe to use from several threads.
    """

    def __init__(self, files: Files, entry: DiskEntry, parent: DiskEntry | None, cache: BlockCache) -> None:
        self.entry = entry
        self.why = ""
        self._parent = parent
        self._file: CheckedFile | None = None
        self._reader: qcow2.Reader | None = None
        self._accounts: bool | None = None
        data = entry.data
        try:
            listed = _listed(files, data)
            self._file = CheckedFile(files, data.file, data.size, listed, cache, whole=False)
            self._reader = self._read_head()
        except (
            Damaged,
            NotFound,
        ) as error:  # other errors (no permission, too many open files) say nothing about the file
            self.why = error.message

    @property
    def backing(self) -> str | None:
        """The name of the parent's data file in a head that its digest proves, or None."""
        return None if self._reader is None or self._accounts else self._reader.image.backing

    def allocated_tables(self) -> Mask:
        """Return a flag for each L2 table: True also for a table that is not proven."""
        if self._reader is not None:
            return self._reader.allocated_tables()
        cluster = self.entry.data.cluster_size
        return np.ones(max(1, -(-self.entry.size // (cluster * (cluster // 8)))), np.bool_)

    def allocated(self, first: int, count: int) -> tuple[Offsets, U64]:
        """Return the clusters (from `first`) with entries other than 0, and the entries; UNKNOWN if not proven."""
        if self._reader is None:
            return _unknown(0, count)
        try:
            return self._reader.allocated(first, count)
        except Damaged as error:
            self.why = error.message
        if self._accounted():
            return self._reader.allocated(first, count)
        per = self.entry.data.cluster_size // 8
        parts = [self._of_table(first, low, high) for low, high in windows(first, first + count, per)]
        return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])

    def _of_table(self, first: int, low: int, high: int) -> tuple[Offsets, U64]:
        assert self._reader is not None
        try:
            places, entries = self._reader.allocated(low, high - low)
        except Damaged:
            return _unknown(low - first, high - low)
        return places + (low - first), entries

    @staticmethod
    def kinds(entries: U64) -> npt.NDArray[np.uint8]:
        """Return the codes of entries; UNKNOWN has a code above all others."""
        codes = qcow2.Reader.kinds(entries)
        codes[entries == UNKNOWN] = _UNKNOWN_KIND
        return codes

    def read(self, offset: int, length: int, codec: qcow2.Codec | None, cluster: memoryview) -> tuple[str, str] | None:
        """
        Read a stored cluster into `cluster`; `codec` decodes a compressed one, None means uncompressed.

        Returns None if the content is proven; else what `cluster` was filled with (see `Lost.content`), and why.  Safe
        to use from several threads.
        """
        assert self._file is not None
        try:
            _fill(self._file.read_at(offset, length), codec, cluster)
        except Damaged as error:
            try:
                _fill(self._file.read_unchecked(offset, length), codec, cluster)
            except Damaged:
                cluster[:] = bytes(len(cluster))
                return ZEROES, error.message
            return None if codec is not None else (AS_STORED, error.message)
        return None

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def _read_head(self) -> qcow2.Reader | None:
        assert self._file is not None
        try:
            reader = qcow2.Reader(self._file.read_at, self.entry.data.size, self.entry.data.file)
            check_head(reader, self.entry, self.entry.data.file, self._parent)
        except Damaged as error:
            self.why = error.message
            return self._reader if self._accounted() else None
        return reader

    def _accounted(self) -> bool:
        """
        Read the head and all tables without digests, and accept them if they account for the whole file.

        They do if the head agrees with the manifest, each host cluster is referred to exactly as often as the
        refcounts say, and an incremental has as many zero clusters as its manifest counts.  Then no entry of stored
        data was lost, gained or changed.  (The counts of a merged point describe how the disk was read, not the file.)
        """
        if self._accounts is None:
            self._accounts = False
            assert self._file is not None
            try:
                reader = qcow2.Reader(self._file.read_unchecked, self.entry.data.size, self.entry.data.file)
                check_head(reader, self.entry, self.entry.data.file, self._parent)
                if self._counts_zeroes(reader):
                    qcow2.check(reader)
                    self._accounts = True
                    self._reader = reader
            except Damaged:
                pass
        return self._accounts

    def _counts_zeroes(self, reader: qcow2.Reader) -> bool:
        if self.entry.parent is None:
            return True
        if manifest.generation(self.entry.data.digests) or not self.entry.identity:
            return False
        zeroes = sum(int(np.count_nonzero(reader.kinds(table.entries) == qcow2.ZERO)) for table in reader.tables())
        counted = self.entry.bytes.zero + self.entry.bytes.found_zero
        return zeroes == -(-counted // self.entry.data.cluster_size)


class _Nothing(SalvagedFile):
    """Stands for all older links if it is not known what they are."""

    def __init__(self, entry: DiskEntry, why: str) -> None:
        self.entry = entry
        self.why = why
        self._file = self._reader = None
        self._accounts = False


def _unknown(start: int, count: int) -> tuple[Offsets, U64]:
    return np.arange(start, start + count), np.full(count, UNKNOWN)


def _fill(stored: bytes, codec: qcow2.Codec | None, cluster: memoryview) -> None:
    if codec is None:
        cluster[:] = stored
    else:
        codec.decode_into(memoryview(stored), cluster)


def _listed(files: Files, data: DataFile) -> bytes:
    """
    Return the digests of a data file's blocks, or nothing if neither the digest file nor the data file proves them.

    The manifest has the digest of the digest file, so digests that are recomputed from an undamaged data file count.
    """
    blocks = block_count(data.size)
    try:
        return checked_file.load(files, data.digests, data.digest, blocks)
    except (Damaged, NotFound):
        pass
    made = _made(files, data.file, data.size, blocks)
    stored = _stored(files, data.digests, blocks)
    return next((mix for mix in _mixes(made, stored) if digests.digest(mix).hex() == data.digest), b"")


def _made(files: Files, name: str, size: int, blocks: int) -> bytes:
    """Return the digests that the data file's blocks have now; zeroes for blocks that cannot be read."""
    made = bytearray(blocks * LENGTH)
    with closing(open_file(files, name)) as file:
        for number in range(min(blocks, block_count(file.size))):
            try:
                content = file.read_at(number * BLOCK, min(BLOCK, size - number * BLOCK))
            except OSError as error:
                require_answer(error)
                continue
            made[number * LENGTH : (number + 1) * LENGTH] = digests.digest(content)
    return bytes(made)


def _stored(files: Files, name: str, blocks: int) -> bytes | None:
    """Return the content of a digest file, or None if its length is wrong or it cannot be read."""
    try:
        with closing(open_file(files, name)) as file:
            return bytes(file.read_at(0, file.size)) if file.size == blocks * LENGTH else None
    except OSError as error:
        require_answer(error)
        return None
    except (Damaged, NotFound):
        return None


def _mixes(made: bytes, stored: bytes | None) -> Iterator[bytes]:
    """Yield lists that may be right: for each digest that differs, the recomputed one or the stored one."""
    yield made
    if stored is None:
        return
    rows, others = (np.frombuffer(listed, np.uint8).reshape(-1, LENGTH) for listed in (made, stored))
    differ = np.flatnonzero((rows != others).any(axis=1))
    if 1 << min(len(differ), 64) > _MOST_MIXES:
        return
    for chosen in itertools.product((False, True), repeat=len(differ)):
        mix = rows.copy()
        mix[differ[list(chosen)]] = others[differ[list(chosen)]]
        yield mix.tobytes()


@contextmanager
def open_salvaged(
    machine: Machine, point: str, disk: str, cached: int = checked_file.CACHED
) -> Iterator[tuple[Chain, list[SalvagedFile]]]:
    """
    Build a disk's chain as far as it can be known, and open all its files.

    Raises
    ------
    BackupError
        The point's own manifest cannot be read.
    """

    @contextmanager
    def built(contents: Contents) -> Iterator[tuple[Chain, list[SalvagedFile]]]:
        with closing(_Builder(machine.files, contents, disk, BlockCache(cached))) as builder:
            yield builder.build(point)

    with open_unchanged(f"the chain of point {point}", machine.contents, built) as (_, opened_files):
        yield opened_files


class _Builder:
    """Builds a disk's chain down to a full, from manifests or, if those are missing, from data files."""

    def __init__(self, folder: Files, contents: Contents, disk: str, cache: BlockCache) -> None:
        self._folder = folder
        self._contents = contents
        self._disk = disk
        self._cache = cache
        self._files: list[SalvagedFile] = []

    def build(self, point: str) -> tuple[Chain, list[SalvagedFile]]:
        """Return the chain of a point; if its end is not known, the last link stands for everything unknown."""
        links = [chains.first_link(self._contents.manifests, point, self._disk, self._contents.damaged)]
        while (wanted := links[-1].entry.parent) is not None:
            parent, why = self._by_manifest(links[-1], wanted)
            file = self._open(links[-1].entry, None if parent is None else parent.entry)
            if parent is None and wanted.point not in self._contents.manifests and file.backing is not None:
                parent = self._by_data_file(file.backing, links[-1].entry, wanted)
            if parent is None or any(parent.point == link.point for link in links):
                nothing = _Nothing(_stand_in(links[-1].entry), why)
                self._files.append(nothing)
                links.append(Link(wanted.point, 0, nothing.entry))
                break
            links.append(parent)
        else:
            self._open(links[-1].entry, None)
        return Chain(self._disk, tuple(links)), self._files

    def close(self) -> None:
        """Close all files."""
        for file in self._files:
            file.close()

    def _open(self, entry: DiskEntry, parent: DiskEntry | None) -> SalvagedFile:
        self._files.append(SalvagedFile(self._folder, entry, parent, self._cache))
        return self._files[-1]

    def _by_manifest(self, child: Link, wanted: Parent) -> tuple[Link | None, str]:
        """Return the parent; or None, and why the parent's manifest cannot be used."""
        manifests = self._contents.manifests
        if wanted.identity or wanted.point not in manifests:
            try:
                return chains.parent_link(manifests, child, self._disk, self._contents.damaged), ""
            except (Damaged, NotFound) as error:
                return None, error.message
        # The child is known only from its data file, which names no identity.
        found = manifests[wanted.point]
        entry = found.disk(self._disk)
        if entry is None or entry.data.cluster_size != child.entry.data.cluster_size:
            return None, f"point {child.point} does not continue point {wanted.point}"
        return Link(wanted.point, found.sequence, entry), ""

    def _by_data_file(self, name: str, child: DiskEntry, wanted: Parent) -> Link | None:
        entry = _by_data_file(self._folder, name, child, wanted)
        return None if entry is None else Link(wanted.point, 0, entry)


def _by_data_file(files: Files, name: str, child: DiskEntry, wanted: Parent) -> DiskEntry | None:
    """Return the entry of a point without a manifest, if a digest file agrees with its data file's head."""
    if manifest.point_of(name) != wanted.point:
        return None
    try:
        listing = files.listing()
        size = listing.stat(name).size
        others = sorted(listing, key=manifest.generation, reverse=True)
    except OSError:
        return None
    blocks = block_count(size)
    for listed in others:
        if manifest.point_of(listed) != wanted.point or not listed.startswith(f"{child.name}.") or listed == name:
            continue
        content = _stored(files, listed, blocks)
        if content is None:
            continue
        entry = _stand_in(
            child, DataFile(name, size, listed, digests.digest(content).hex(), child.data.cluster_size, "")
        )
        image = _head(files, entry.data)
        if image is not None:
            older = None if image.backing is None else manifest.point_of(image.backing)
            if image.cluster_size != child.data.cluster_size or (image.backing is not None and older is None):
                return None
            return _stand_in(child, entry.data, image.size, None if older is None else Parent(older, ""))
    return None


def _head(files: Files, data: DataFile) -> qcow2.Image | None:
    """Return what a data file's head says, if its first block agrees with the digest file."""
    try:
        listed = checked_file.load(files, data.digests, data.digest, block_count(data.size))
        with closing(CheckedFile(files, data.file, data.size, listed, BlockCache(1))) as file:
            head = file.read_at(0, min(qcow2.HEADER_BYTES, data.size))
            return qcow2.parse_header(head, data.size, data.file).image
    except (Damaged, NotFound):
        return None


def _stand_in(
    child: DiskEntry, data: DataFile | None = None, size: int | None = None, parent: Parent | None = None
) -> DiskEntry:
    """Return an entry of which only the data file, the size and the parent are known."""
    return DiskEntry(
        name=child.name,
        kind="full" if parent is None else "incremental",
        reason="",
        size=child.size if size is None else size,
        identity="",
        parent=parent,
        bitmap=BitmapRecord(None, None, None, claimed=False),
        data=child.data if data is None else data,
        bytes=ByteCounts(0, 0, 0, 0, 0),
        source=SourceRecord("", "", "", "", None, ()),
    )


def drop_unknown(
    chain: Chain, files: Sequence[SalvagedFile], first: int, found: tuple[npt.NDArray[np.int16], U64], lost: LostRanges
) -> None:
    """Add clusters whose holder is not known to the lost ranges, and set their holder to NOBODY."""
    holders, entries = found
    size = chain.cluster_size
    unknown = (holders != NOBODY) & (entries == UNKNOWN)
    if not unknown.any():
        return
    limits = chain.limits
    for number in sorted(set(holders[unknown].tolist())):
        lows, highs = edges(unknown & (holders == number))
        for low, high in zip(lows.tolist(), highs.tolist(), strict=True):
            lost.add((first + low) * size, min((first + high) * size, limits[number]), files[number].why, ZEROES)
    holders[unknown] = NOBODY


def loss(machine: str, lost: Sequence[tuple[str, Lost]]) -> Damaged | None:
    """Return the error that reports `lost` ranges of a machine's disks (disk name, range); None if none are lost."""
    if not lost:
        return None
    total = sum(part.length for _, part in lost)
    first = ", ".join(f"{disk} {part.start} to {part.start + part.length}" for disk, part in lost[:_SHOWN])
    rest = f" and {len(lost) - _SHOWN} more" if len(lost) > _SHOWN else ""
    return Damaged(
        f"{total} bytes of machine {machine} could not be proven: bytes of disk {first}{rest}",
        hint="check the file systems before use; an older point, or a copy of the repository, may hold these ranges",
    )


def located(error: Damaged, machine: Machine, point: str, disk: str) -> Damaged:
    """Return the error with the ranges of a point's disk that the damage puts in doubt, if these can be found."""
    if not isinstance(error, DamagedBlock) or error.ranges:
        return error
    try:
        with open_salvaged(machine, point, disk) as (chain, files):
            names = [file.entry.data.file for file in files]
            name = error.path.rpartition("/")[2]
            if name not in names:
                return error
            number = names.index(name)
            return with_ranges(error, _doubtful(chain, files, number, [(error.start, error.end)]))
    except NoAnswer:
        raise
    except BackupError:
        return error


def located_in_file(
    files: Files, entry: DiskEntry, parent: DiskEntry | None, errors: Sequence[BackupError]
) -> BackupError:
    """Return the first error of a data file, with the ranges of the disk that all its damaged blocks hold."""
    first = errors[0]
    blocks = sorted({(error.start, error.end) for error in errors if isinstance(error, DamagedBlock)})
    if not isinstance(first, DamagedBlock):
        return first
    chain = Chain(entry.name, (Link("", 0, entry),))
    try:
        with closing(SalvagedFile(files, entry, parent, BlockCache())) as file:
            ranges = _doubtful(chain, [file], 0, blocks)
    except NoAnswer:
        raise
    except BackupError:
        return first
    more = f" and {len(blocks) - 1} more places" if len(blocks) > 1 else ""
    return with_ranges(first, ranges, more)


def _doubtful(
    chain: Chain, files: Sequence[SalvagedFile], number: int, blocks: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Return the ranges of the disk that one file of the chain holds, or may hold, in these blocks."""
    index = Index(chain, files)
    size, limit = chain.cluster_size, chain.limits[number]
    damaged = np.zeros(block_count(files[number].entry.data.size) + 1, np.bool_)
    for low, high in blocks:
        damaged[low // BLOCK : -(-high // BLOCK)] = True
    found: list[tuple[int, int]] = []
    for start, end in windows(0, chain.size, _WINDOW * size):
        first = start // size
        holders, entries = index.resolve(first, -(-(end - start) // size))
        ours = holders == number
        stored = np.flatnonzero(ours & (entries != UNKNOWN))
        offsets, lengths = qcow2.spans(entries[stored], size)
        ours[stored] = damaged[offsets // BLOCK] | damaged[(offsets + lengths - np.uint64(1)) // BLOCK]
        lows, highs = edges(ours)
        pairs = zip(lows.tolist(), highs.tolist(), strict=True)
        found += [((first + low) * size, min((first + high) * size, limit)) for low, high in pairs]
    return merge(found)


def with_ranges(error: DamagedBlock, ranges: Sequence[tuple[int, int]], more: str = "") -> Damaged:
    """Return the same error, with a message that names ranges of the disk."""
    if not ranges:
        where = "; no range of the disk is stored there"
    else:
        some = ", ".join(f"{low} to {high}" for low, high in ranges[:_SHOWN])
        rest = f" and {len(ranges) - _SHOWN} more ranges" if len(ranges) > _SHOWN else ""
        where = f"; affected bytes of the disk: {some}{rest}"
    found = DamagedBlock(error.path, error.start, error.end, message=f"{error.message}{more}{where}", hint=error.hint)
    found.ranges = tuple(ranges)
    return found
