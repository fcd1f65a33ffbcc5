"""
libvirt's records of a domain's bitmaps, which it calls checkpoints, during one run.

libvirt tells only of bitmaps that it has a record of, so that a run has it make the records that the run needs, and
removes them at the end.  libvirt validates each new record against a large schema, which takes longer than all other
requests: one record serves all disks wherever that is possible, and answers are kept until the domain may have changed.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence

from backup.errors import SourceError
from backup.model.disk import repository_of
from backup.runtime.ignoring import ignoring
from backup.sources.libvirt_domain import Domain, Refused

_log = logging.getLogger(__name__)


class Records:
    """The records of one domain."""

    def __init__(self, domain: Domain) -> None:
        self._domain = domain
        self._temporary: set[str] = set()
        """Names of the records that are removed at the end."""
        self._expected: dict[str, frozenset[str]] = {}
        self._going: dict[str, frozenset[str]] = {}
        self._gone: set[tuple[str, str]] = set()
        """Bitmaps and disks from which they were removed together with those of other disks."""
        self._names: list[str] | None = None
        self._sizes: dict[str, dict[str, tuple[str, int | None]]] = {}
        self._refused: set[tuple[str, frozenset[str]]] = set()

    def expect(self, target: str, names: Collection[str]) -> None:
        """Take note of the bitmaps that a disk may have."""
        self._expected[target] = frozenset(names)

    def expect_removal(self, target: str, names: Collection[str]) -> None:
        """Take note of the bitmaps that will be removed from a disk."""
        self._going[target] = frozenset(names)

    def ask_again(self, reads: Mapping[str, str | None] | None = None) -> None:
        """
        Drop what libvirt has told, since the domain may have changed.

        `reads` tells for each disk of a job that has just begun the bitmap by which the job reads the disk: libvirt has
        made sure that these are sound, at the instant itself.
        """
        reads = reads or {}
        self._names = None
        self._refused.clear()
        self._sizes = {
            name: disks
            for name, disks in self._sizes.items()
            if name in reads.values() and all(reads.get(disk) == name or disks[disk][1] is None for disk in disks)
        }

    def names(self) -> Sequence[str]:
        """Names of all records, of whichever program."""
        if self._names is None:
            self._names = self._domain.checkpoints()
        return self._names

    def possible(self, target: str) -> list[str]:
        """
        Names of the bitmaps that the disk may have: the expected ones, and those that libvirt has a record of.

        Records of other programs are among them only if a bitmap of another program is expected.
        """
        expected = self._expected.get(target, frozenset())
        foreign = any(repository_of(name) is None for name in expected)
        return sorted(expected.union(name for name in self.names() if foreign or repository_of(name) is not None))

    def dirty_bytes(self, name: str, target: str) -> int | None:
        """
        Return the dirty bytes of a bitmap that is sound; None if the bitmap is missing or inconsistent.

        If libvirt has no record of a bitmap of pybackup's, it gets one for the rest of the run.  Records of other
        programs are read, and never changed.
        """
        if target not in self._sizes_of(name) and (repository_of(name) is None or not self._record(name, target)):
            return None
        found = self._sizes_of(name).get(target)
        return found[1] if found is not None and found[0] == name else None

    def _sizes_of(self, name: str) -> dict[str, tuple[str, int | None]]:
        if name not in self._sizes:
            self._sizes[name] = self._domain.bitmap_sizes(name) if name in self.names() else {}
        return self._sizes[name]

    def _record(self, name: str, target: str) -> bool:
        """Record a bitmap of all disks that may have it or, if that fails, of this disk."""
        recorded = self._sizes_of(name)
        expecting = [disk for disk, names in self._expected.items() if name in names]
        for disks in (dict.fromkeys([*recorded, target, *expecting]), dict.fromkeys([*recorded, target])):
            attempt = (name, frozenset(disks))
            if attempt in self._refused:
                continue
            if self._domain.record(name, list(disks)):
                self._temporary.add(name)
                self._changed(name)
                return True
            self._refused.add(attempt)
        return False

    def _changed(self, name: str) -> None:
        self._names = None
        self._sizes.pop(name, None)

    def remove(self, name: str, target: str) -> None:
        """
        Remove a bitmap from one disk or, where that is expected of all disks of its record, from all of them.

        libvirt removes a checkpoint's bitmap from all disks of its record; otherwise the record must name the disk
        alone.  If libvirt fails, the record stays, so that the next run finds the bitmap.
        """
        if (name, target) in self._gone:
            return
        recorded = self._domain.recorded(name) if name in self.names() else []
        others = [disk for disk in recorded if disk != target]
        self._temporary.discard(name)
        self._changed(name)
        all_go = target in recorded and all(name in self._going.get(disk, ()) for disk in recorded)
        if all_go and self._domain.delete(name):
            self._gone.update((name, disk) for disk in recorded)
            return
        self._remove_from(name, target)
        if others:
            self._domain.record(name, others, checked=False)
            self._temporary.add(name)

    def _remove_from(self, name: str, target: str) -> None:
        self._domain.record(name, [target], checked=False)
        if not self._domain.delete(name):
            self._domain.forget(name)

    def delete(self, name: str) -> None:
        """Remove a record, and the bitmap from all disks of the record that have it."""
        self._changed(name)
        if not self._domain.delete(name):
            for target in self._domain.recorded(name):
                self._remove_from(name, target)

    def forget_at_the_end(self, name: str) -> None:
        """Have `forget` remove this record, too."""
        self._temporary.add(name)

    def forget(self) -> None:
        """Remove the records that this run made; the bitmaps stay."""
        if not self._temporary:
            return
        with ignoring(_log, "removing libvirt's records of checkpoints", SourceError):
            for name in self._temporary.intersection(self._domain.checkpoints()):
                with ignoring(_log, f"removing libvirt's record of {name}", Refused):  # the others can go
                    self._domain.forget(name)
            self._temporary.clear()
