"""The threads of a verify: they read data files block by block and compare each block with its digest."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field

from backup.errors import BackupError, DamagedBlock
from backup.model.digests import block_count
from backup.model.manifest import DiskEntry
from backup.repository import checked_file
from backup.repository.checked_file import BlockCache, CheckedFile
from backup.runtime.pace import Pace
from backup.runtime.threads import in_threads
from backup.storage.base import Files
from backup.storage.refusals import NoAnswer

_WHOLE_BLOCKS = 4
"""
Files with at most this many blocks are checked by one thread, which reads each block once.  A chain may have a thousand
such files.
"""


@dataclass(slots=True, eq=False)
class Check:
    """
    The check of one data file: its extent and its result.

    Attributes
    ----------
    blocks : list of int or None
        The numbers of the blocks to read.  None: all blocks, and the structure.
    skipped : bool
        Whether the file was left out because it is not due.
    done : bool
        Whether everything that was to be read was read.
    left : int
        Number of units that are not finished.
    wrong : dict
        The first fault of each part of the file, by the number of the part: blocks in order, then the structure.
    """

    point: str
    entry: DiskEntry
    parent: DiskEntry | None
    blocks: list[int] | None = None
    skipped: bool = False
    done: bool = False
    left: int = 0
    wrong: dict[int, BackupError] = field(default_factory=dict)

    @property
    def is_unread(self) -> bool:
        """Whether nothing of the file is read: it is left out, already known to be wrong, or not in the sample."""
        return self.skipped or self.blocks == []

    @property
    def is_proven(self) -> bool:
        """Whether the whole file was read and compared with its parent, without a fault."""
        whole = self.blocks is None and (self.parent is not None or self.entry.parent is None)
        return whole and self.done and not self.wrong


_Unit = tuple[Check, CheckedFile | None, int]
"""
A unit of work: the check of a small file with None; or, for a large file, the open file and the number of a block.  The
number after the last block means the structure.
"""


class _Stopped(BaseException):
    """Ends a long check in a thread after the run was stopped."""


class _Cache(BlockCache):
    """
    Blocks of one file.  Reports to `read` how many bytes were read from the disk; raises after the run was stopped.
    """

    def __init__(self, stop: threading.Event, read: Callable[[int], None]) -> None:
        super().__init__(_WHOLE_BLOCKS)
        self._stop = stop
        self._read = read

    def get(self, key: tuple[int, int], load: Callable[[], bytes]) -> bytes:
        def loaded() -> bytes:
            block = load()
            self._read(len(block))
            return block

        if self._stop.is_set():
            raise _Stopped
        return super().get(key, loaded)


class CheckRun:
    """
    Checks data files in several threads: a small file in one thread, and each block of a large file in any free thread.

    So all threads are busy with any number of files.  The structure of a large file is checked while its blocks are
    read.
    """

    def __init__(
        self, files: Files, checks: Sequence[Check], *, deep: bool, progress: Callable[[int], None], pace: Pace
    ) -> None:
        self._files = files
        self._deep = deep
        self._progress = progress
        self._pace = pace
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._open: set[CheckedFile] = set()
        self._units = self._each_unit(checks)
        self.done = 0

    def run(self, workers: int) -> None:
        """Check all files; raise the first error that is not the fault of a file."""
        try:
            in_threads(self._units, lambda unit: self._do(*unit), workers, self._show, self._stop)
        finally:
            for file in self._open:
                file.close()
        self._show()

    def _show(self) -> None:
        self._progress(self.done)

    def _each_unit(self, checks: Sequence[Check]) -> Iterator[_Unit]:
        for check in checks:
            blocks = block_count(check.entry.data.size)
            if check.blocks is None and blocks <= _WHOLE_BLOCKS:
                check.left = 1
                yield check, None, 0
                continue
            if check.is_unread:
                continue
            try:
                file = self._opened(check.entry)
            except NoAnswer:
                raise
            except BackupError as error:
                check.wrong[0] = error
                continue
            self._open.add(file)
            numbers = range(blocks) if check.blocks is None else check.blocks
            check.left = len(numbers) + (check.blocks is None)
            if check.blocks is None:
                yield check, file, blocks  # first, since it takes the longest
            for number in numbers:
                yield check, file, number

    def _opened(self, entry: DiskEntry) -> CheckedFile:
        return checked_file.open_checked(self._files, entry.data, _Cache(self._stop, self._keep_pace), once=True)

    def _do(self, check: Check, file: CheckedFile | None, number: int) -> None:
        read = 0
        try:
            if file is None:
                read = self._whole(check)
            elif number == file.blocks:
                self._structure(check, file)
            else:
                read = len(file.check_block(number))
                self._keep_pace(read)
        except NoAnswer:
            raise
        except BackupError as error:
            with self._lock:
                check.wrong[number] = error
        with self._lock:
            self.done += read
            check.left -= 1
            check.done = not check.left
            if file is not None and check.done:
                self._open.discard(file)
                file.close()

    def _keep_pace(self, read: int) -> None:
        """Wait as long as the rate limit requires after so many bytes were read."""
        if not self._pace.keep(read, self._stop):
            raise _Stopped

    def _whole(self, check: Check) -> int:
        """Check a small file; return its size in bytes."""
        with closing(self._opened(check.entry)) as file:
            for number in range(file.blocks):
                try:
                    file.block(number)
                except DamagedBlock as error:
                    with self._lock:
                        check.wrong[number] = error
            if not check.wrong:
                self._structure(check, file)
            return file.size

    def _structure(self, check: Check, file: CheckedFile) -> None:
        """Check the header, tables and refcounts of a file, and with `deep` its frames."""
        from backup.repository.data_file import check_structure  # noqa: PLC0415 - numpy is slow to import

        check_structure(file, check.entry, check.parent, deep=self._deep)
