"""
Verify: re-read what the repository holds and find every changed byte.

For each data file: its digest file against the manifest, every block against its digest, the head against the manifest
and its parent's, the tables and all refcounts; with `deep` also every cluster decompressed.  For each point: its chain,
down to the full.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from backup import chain as chains
from backup import qcow2
from backup.chain import Chain
from backup.datafile import OpenDataFile, check_head
from backup.digests import BlockCache
from backup.errors import BackupError, NotFound
from backup.manifest import DiskEntry, Manifest
from backup.repository import Contents, Machine

_IN_FLIGHT = 4
"""Blocks for each worker between being asked for and being done: bounds the memory."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Something damaged or missing: where, and the error that says what."""

    machine: str
    point: str | None
    disk: str | None
    error: BackupError


@dataclass(frozen=True, slots=True)
class Verified:
    """What was verified: points, data files, bytes read; and what is wrong."""

    points: int
    files: int
    bytes: int
    problems: tuple[Problem, ...]


def exit_code(problems: Sequence[Problem]) -> int:
    """The worst: damaged (12) before missing (10) before the rest."""
    codes = {problem.error.exit_code for problem in problems}
    return next((code for code in (12, 10) if code in codes), next(iter(codes), 0))


def stored_bytes(machine: Machine, points: Sequence[str] | None) -> int:
    """About how many bytes will be read: all data files, or those of the points named and their chains."""
    contents = machine.contents()
    manifests = contents.manifests
    wanted = [manifests[point] for point in points if point in manifests] if points is not None else manifests.values()
    sizes = {}
    for manifest, disk, result in _chains(contents, wanted):
        links = (
            [(manifest.point, disk)]
            if isinstance(result, BackupError)
            else [(link.point, link.entry) for link in result.links]
        )
        sizes.update({(point, entry.name): entry.data.size for point, entry in links})
    return sum(sizes.values())


def verify_machine(
    machine: Machine, *, deep: bool, workers: int, progress: Callable[[int], None], points: Sequence[str] | None = None
) -> Verified:
    """
    Verify a machine's points and their chains, or only the points named.

    `progress` is called with the bytes read so far, in this thread.
    """
    contents = machine.contents()
    problems = [
        Problem(machine.name, None, None, error) for name, error in contents.damaged.items() if _concerns(name, points)
    ]
    problems += [
        Problem(machine.name, point, None, NotFound("its manifest vanished", hint="see `pybackup list`"))
        for point in points or ()
        if point not in contents.manifests and f"{point}.json" not in contents.damaged
    ]
    wanted = [contents.manifests[point] for point in sorted(contents.manifests) if points is None or point in points]
    # By entry, not by file name: of two entries that name one file, neither may be skipped.
    files: dict[tuple[str, str], tuple[Manifest, DiskEntry, DiskEntry | None]] = {}
    for manifest, disk, result in _chains(contents, wanted):
        if isinstance(result, BackupError):
            problems.append(Problem(machine.name, manifest.point, disk.name, result))
            files.setdefault((manifest.point, disk.name), (manifest, disk, None))
        else:
            files.update(_chain_files(contents.manifests, result))
    reader = _Reader(machine.path, deep=deep, workers=workers, progress=progress)
    for manifest, disk, parent in files.values():
        error = reader.check(disk, parent)
        if error is not None:
            problems.append(Problem(machine.name, manifest.point, disk.name, error))
    return Verified(len(wanted), len(files), reader.done, tuple(problems))


def _concerns(name: str, points: Sequence[str] | None) -> bool:
    return points is None or name.removesuffix(".json") in points


def _chains(
    contents: Contents, wanted: Iterable[Manifest]
) -> Iterator[tuple[Manifest, DiskEntry, Chain | BackupError]]:
    for manifest in wanted:
        for disk in manifest.disks:
            try:
                yield manifest, disk, chains.build(contents.manifests, manifest.point, disk.name, contents.damaged)
            except BackupError as error:
                yield manifest, disk, error


def _chain_files(
    manifests: Mapping[str, Manifest], chain: Chain
) -> Iterator[tuple[tuple[str, str], tuple[Manifest, DiskEntry, DiskEntry | None]]]:
    parents = [*(link.entry for link in chain.links[1:]), None]
    for link, parent in zip(chain.links, parents, strict=True):
        yield (link.point, link.entry.name), (manifests[link.point], link.entry, parent)


class _Reader:
    """Checks data files one after another, the blocks of each in several threads."""

    def __init__(self, folder: Path, *, deep: bool, workers: int, progress: Callable[[int], None]) -> None:
        self._folder = folder
        self._deep = deep
        self._workers = workers
        self._progress = progress
        self.done = 0

    def check(self, entry: DiskEntry, parent: DiskEntry | None) -> BackupError | None:
        """Check one data file; the first thing wrong with it, or None."""
        try:
            with closing(OpenDataFile(self._folder, entry, BlockCache())) as opened:
                check_head(opened.reader, entry, entry.data.file, parent)
                self._check_blocks(opened)
                codec = qcow2.Codec(entry.data.cluster_size, None) if self._deep else None
                qcow2.check(opened.reader, codec)
        except BackupError as error:
            return error
        return None

    def _check_blocks(self, opened: OpenDataFile) -> None:
        room = threading.Semaphore(self._workers * _IN_FLIGHT)

        def one(number: int) -> int:
            try:
                return len(opened.file.check_block(number))
            finally:
                room.release()

        with ThreadPoolExecutor(self._workers) as pool:
            pending = []
            try:
                for number in range(opened.file.blocks):
                    room.acquire()
                    pending.append(pool.submit(one, number))
                    while pending and pending[0].done():
                        self._count(pending.pop(0).result())
                for future in pending:
                    self._count(future.result())
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _count(self, length: int) -> None:
        self.done += length
        self._progress(self.done)
