"""
Verify: re-read what the repository holds and find every changed byte.

For each data file: its digest file against the manifest, every block against its digest, the head against the manifest
and its parent's, the tables and all refcounts; with `deep` also every cluster decompressed.  For each point: its chain,
down to the full.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from backup import chain as chains
from backup import qcow2
from backup.chain import Chain
from backup.datafile import OpenDataFile, check_head
from backup.digests import BlockCache, block_count
from backup.errors import BackupError, NotFound
from backup.manifest import DiskEntry, Manifest
from backup.repository import Contents, Machine

_WHOLE_BLOCKS = 4
"""
A file of up to so many blocks is checked by one thread, which reads each block once; a chain may have a thousand such.
"""
_TICK = 0.1
"""Seconds between looks at progress and signals."""


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
    checks = [_Check(manifest.point, disk, parent) for manifest, disk, parent in files.values()]
    run = _Run(machine.path, checks, deep=deep, progress=progress)
    run.run(workers)
    problems += [
        Problem(machine.name, check.point, check.entry.name, check.wrong[min(check.wrong)])
        for check in checks
        if check.wrong
    ]
    return Verified(len(wanted), len(files), run.done, tuple(problems))


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


@dataclass(slots=True, eq=False)
class _Check:
    """
    One data file: what is to be checked, and what was found.

    Attributes
    ----------
    left : int
        Units that are not done.
    wrong : dict
        The first thing wrong with each part of it, by the part's number: blocks in order, then the structure.
    """

    point: str
    entry: DiskEntry
    parent: DiskEntry | None
    left: int = 0
    wrong: dict[int, BackupError] = field(default_factory=dict)


_Unit = tuple[_Check, OpenDataFile | None, int]
"""A check; of a large file, the open file and the number of one block, or of blocks: the structure."""


class _Stopped(BaseException):
    """Ends a long check in a worker when the others have ended."""


class _Cache(BlockCache):
    """Blocks of one file; gives none when the run was stopped."""

    def __init__(self, stop: threading.Event) -> None:
        super().__init__(_WHOLE_BLOCKS)
        self._stop = stop

    def get(self, key: tuple[int, int], load: Callable[[], bytes]) -> bytes:
        if self._stop.is_set():
            raise _Stopped
        return super().get(key, load)


class _Run:
    """
    Checks data files in several threads: small ones whole, of large ones each block by whichever thread is free.

    Any number of files keeps all threads busy, and a large one's structure is checked while its blocks are read.
    """

    def __init__(self, folder: Path, checks: Sequence[_Check], *, deep: bool, progress: Callable[[int], None]) -> None:
        self._folder = folder
        self._deep = deep
        self._progress = progress
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        self._open: set[OpenDataFile] = set()
        self._units = self._each_unit(checks)
        self.done = 0

    def run(self, workers: int) -> None:
        """Check them all; the first error that is no file's fault is raised here."""
        threads = [threading.Thread(target=self._work) for _ in range(workers)]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():
                    thread.join(_TICK)
                    self._progress(self.done)
        finally:
            self._stop.set()
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
            for file in self._open:
                file.close()
        if self._error is not None:
            raise self._error

    def _each_unit(self, checks: Sequence[_Check]) -> Iterator[_Unit]:
        for check in checks:
            blocks = block_count(check.entry.data.size)
            if blocks <= _WHOLE_BLOCKS:
                yield check, None, 0
                continue
            try:
                file = OpenDataFile(self._folder, check.entry, _Cache(self._stop))
            except BackupError as error:
                check.wrong[0] = error
                continue
            self._open.add(file)
            check.left = blocks + 1
            yield check, file, blocks  # first, as it takes longest
            for number in range(blocks):
                yield check, file, number

    def _work(self) -> None:
        try:
            while not self._stop.is_set():
                with self._lock:
                    unit = next(self._units, None)
                if unit is None:
                    return
                self._do(*unit)
        except _Stopped:
            pass
        except BaseException as error:  # noqa: BLE001 - carried to the calling thread, which raises it
            with self._lock:
                self._error = self._error or error
            self._stop.set()

    def _do(self, check: _Check, file: OpenDataFile | None, number: int) -> None:
        read = 0
        try:
            if file is None:
                read = self._whole(check)
            elif number == file.file.blocks:
                self._structure(check, file)
            elif not check.wrong:
                read = len(file.file.check_block(number))
        except BackupError as error:
            with self._lock:
                check.wrong[number] = error
        with self._lock:
            self.done += read
            check.left -= 1
            if file is not None and not check.left:
                self._open.discard(file)
                file.close()

    def _whole(self, check: _Check) -> int:
        """Check a small file; its bytes."""
        with closing(OpenDataFile(self._folder, check.entry, _Cache(self._stop))) as file:
            for number in range(file.file.blocks):
                file.file.block(number)
            self._structure(check, file)
            return file.file.size

    def _structure(self, check: _Check, file: OpenDataFile) -> None:
        """Check a file's head, tables and refcounts, and with `deep` its frames."""
        check_head(file.reader, check.entry, check.entry.data.file, check.parent)
        codec = qcow2.Codec(check.entry.data.cluster_size, None) if self._deep else None
        qcow2.check(file.reader, codec)
