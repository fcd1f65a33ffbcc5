"""Backups, audits and spot checks of disks that lie in memory: operations need neither NBD nor QEMU."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from memory_source import MemoryHost, MemorySource
from places import create_repository, repository_at

from backup.cli.output import Quiet
from backup.model.chain import build
from backup.operations.audit import LIES, TRUE, Audit, audit
from backup.operations.backup import create
from backup.operations.disk_copy import DiskReport
from backup.operations.request import Request
from backup.planning.decision import FULL, INCREMENTAL, RESCAN
from backup.qcow2 import Codec
from backup.repository import chain_reader

KIB, MIB = 1 << 10, 1 << 20
CLUSTER = 64 * KIB


class Machine:
    """A machine with one disk of 2 MiB in memory, and the repository that holds its points."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "repository"
        create_repository(self.folder)
        self.disk = MemorySource(2 * MIB)
        self.host = MemoryHost([self.disk])
        self.warnings: tuple[str, ...] = ()

    def request(self, wanted: str, spot_check: int = 64) -> Request:
        return Request("machine", self.host, self.host.requests(), wanted, "b1", spot_check=spot_check)

    def back_up(self, wanted: str, spot_check: int = 64) -> DiskReport:
        """Take a backup; its point must hold exactly what the disk holds."""
        report = create(partial(repository_at, self.folder), self.request(wanted, spot_check), Quiet())
        self.warnings = report.warnings
        assert self.stored() == bytes(self.disk.content)
        return report.disks[0]

    def audit(self) -> Audit:
        return audit(repository_at(self.folder), self.request(INCREMENTAL), Quiet())

    def stored(self) -> bytes:
        """What the newest point holds of the disk, read through its chain."""
        machine = repository_at(self.folder).machine("machine")
        manifests = machine.contents().manifests
        newest = max(manifests.values(), key=lambda manifest: manifest.sequence)
        chain = build(manifests, newest.point, "vd0")
        room = bytearray(chain.size)
        with chain_reader.checked(machine.files, chain, chain.size) as content:
            clusters = np.arange(chain.size // chain.cluster_size)
            content.read(clusters, memoryview(room), Codec(chain.cluster_size, None))
        return bytes(room)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    made = Machine(tmp_path)
    made.disk.write(64 * KIB, b"\x11" * MIB)
    made.back_up(FULL)
    return made


def test_an_incremental_stores_what_the_bitmap_calls_dirty(machine):
    machine.disk.write(300 * KIB, b"\x22" * 4096)
    machine.disk.write(MIB, bytes(CLUSTER))
    report = machine.back_up(INCREMENTAL)
    assert (report.kind, report.rescan, machine.warnings) == ("incremental", False, ())
    assert (report.dirty_bytes, report.data_bytes, report.zero_bytes) == (4096 + CLUSTER, CLUSTER, CLUSTER)
    [bitmap] = machine.disk.bitmaps
    assert bitmap.startswith("b1.")


def test_a_rescan_stores_what_differs(machine):
    machine.disk.write(300 * KIB, b"\x22" * 4096)
    report = machine.back_up(RESCAN)
    assert (report.kind, report.rescan, report.dirty_bytes) == ("incremental", True, CLUSTER)


def test_a_spot_check_finds_a_write_that_the_bitmap_missed(machine):
    machine.disk.write(300 * KIB, b"\x22" * 512, seen=False)
    report = machine.back_up(INCREMENTAL)
    assert report.rescan
    assert f"the first at byte {300 * KIB}" in report.reason
    assert len(machine.warnings) == 1


def test_an_audit_is_true_of_an_honest_bitmap_and_finds_a_lie(machine):
    machine.disk.write(300 * KIB, b"\x22" * 512)
    [honest] = machine.audit().disks
    assert (honest.verdict, honest.dirty_bytes, honest.differing_bytes) == (TRUE, 512, 0)
    machine.disk.write(700 * KIB, b"\x33" * 512, seen=False)
    [lie] = machine.audit().disks
    assert (lie.verdict, lie.differences) == (LIES, ((700 * KIB, 700 * KIB + 512),))


def test_the_disks_limits_are_kept(machine):
    """The lanes of a disk in memory fail on a read that is too large, not aligned, or one too many."""
    disk = machine.host.opened[-1]
    assert (disk.max_request, disk.max_in_flight) == (128 * KIB, 3)
    machine.disk.write(0, b"\x44" * 2 * MIB)
    assert machine.back_up(INCREMENTAL).data_bytes == 2 * MIB
