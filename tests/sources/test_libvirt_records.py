"""libvirt's records of bitmaps: which requests a run makes, against a model of libvirt's checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import pytest

from backup.errors import SourceError
from backup.sources.libvirt_domain import Domain
from backup.sources.libvirt_records import Records

OLD, NEW = "b1.0123abcd.20260101T000000Z-00000001", "b1.0123abcd.20260102T000000Z-00000002"
FOREIGN = "virtnbdbackup.0"
DISKS = ("vda", "vdb")


class Libvirt:
    """
    QEMU's sound bitmaps, libvirt's records of bitmaps by their disks, and the requests that were made.

    `stuck`: deleting a bitmap is refused.
    """

    def __init__(self, bitmaps: set[tuple[str, str]], records: dict[str, list[str]] | None = None) -> None:
        self.bitmaps = bitmaps
        self.records = records or {}
        self.requests: list[str] = []
        self.stuck = False

    def checkpoints(self) -> list[str]:
        return list(self.records)

    def bitmap_sizes(self, name: str) -> dict[str, tuple[str, int | None]]:
        self.requests.append(f"sizes {name}")
        return {disk: (name, 7 if (name, disk) in self.bitmaps else None) for disk in self.records[name]}

    def recorded(self, name: str) -> list[str]:
        return self.records[name]

    def record(self, name: str, disks: Sequence[str], *, checked: bool = True) -> bool:
        self.requests.append(f"record {name} {'+'.join(disks)}")
        if checked and any((name, disk) not in self.bitmaps for disk in disks):
            return False
        self.records[name] = list(disks)
        return True

    def forget(self, name: str) -> None:
        self.requests.append(f"forget {name}")
        del self.records[name]

    def delete(self, name: str) -> bool:
        self.requests.append(f"delete {name}")
        if self.stuck:
            raise SourceError("libvirt refuses", hint="none")
        going = {(name, disk) for disk in self.records[name]}
        if not going <= self.bitmaps:
            return False
        self.bitmaps -= going
        del self.records[name]
        return True


def both(*names: str) -> set[tuple[str, str]]:
    return {(name, disk) for name in names for disk in DISKS}


def records_of(model: Libvirt, *expected: str) -> Records:
    records = Records(cast("Domain", model))
    for disk in DISKS:
        records.expect(disk, expected)
    return records


def sound(records: Records) -> dict[str, list[str]]:
    return {
        disk: [name for name in records.possible(disk) if records.dirty_bytes(name, disk) is not None] for disk in DISKS
    }


def test_one_record_and_one_look_serve_all_disks() -> None:
    model = Libvirt(both(OLD))
    assert sound(records_of(model, OLD)) == {"vda": [OLD], "vdb": [OLD]}
    assert model.requests == [f"record {OLD} vda+vdb", f"sizes {OLD}"]


def test_a_disk_whose_bitmap_is_gone_does_not_cost_the_other_its_bitmap() -> None:
    model = Libvirt({(OLD, "vdb")})
    assert sound(records_of(model, OLD)) == {"vda": [], "vdb": [OLD]}


def test_bitmaps_that_the_job_reads_are_not_asked_for_again_and_others_are() -> None:
    model = Libvirt(both(OLD))
    records = records_of(model, OLD)
    sound(records)
    model.bitmaps |= both(NEW)
    model.records[NEW] = ["vda", "vdb"]
    model.requests.clear()
    records.ask_again({"vda": OLD, "vdb": OLD})
    assert sound(records) == {"vda": [OLD, NEW], "vdb": [OLD, NEW]}
    assert model.requests == [f"sizes {NEW}"]
    model.bitmaps -= {(OLD, "vdb")}
    records.ask_again({"vda": OLD, "vdb": None})
    assert sound(records) == {"vda": [OLD, NEW], "vdb": [NEW]}


def test_records_of_other_programs_cost_nothing_unless_one_is_asked_for() -> None:
    model = Libvirt(both(OLD, FOREIGN), {FOREIGN: ["vda", "vdb"]})
    assert sound(records_of(model, OLD)) == {"vda": [OLD], "vdb": [OLD]}
    assert f"sizes {FOREIGN}" not in model.requests
    model = Libvirt(both(FOREIGN), {FOREIGN: ["vda", "vdb"]})
    assert sound(records_of(model, FOREIGN)) == {"vda": [FOREIGN], "vdb": [FOREIGN]}


def test_bitmaps_of_all_disks_are_removed_at_once() -> None:
    model = Libvirt(both(OLD, NEW), {OLD: ["vda", "vdb"]})
    records = records_of(model)
    for disk in DISKS:
        records.expect_removal(disk, [OLD])
    records.remove(OLD, "vda")
    records.remove(OLD, "vdb")
    assert model.requests == [f"delete {OLD}"]
    assert model.bitmaps == both(NEW)


@pytest.mark.parametrize("told", [False, True])
def test_a_bitmap_is_removed_from_one_disk_only(*, told: bool) -> None:
    model = Libvirt(both(OLD), {OLD: ["vda", "vdb"]})
    records = records_of(model)
    if told:
        records.expect_removal("vda", [OLD])
    records.remove(OLD, "vda")
    assert model.bitmaps == {(OLD, "vdb")}
    assert model.records == {OLD: ["vdb"]}
    records.forget()
    assert model.records == {}
    assert model.bitmaps == {(OLD, "vdb")}


def test_a_bitmap_that_one_disk_lacks_is_removed_from_the_others() -> None:
    for remove in (lambda records: records.delete(OLD), lambda records: [records.remove(OLD, disk) for disk in DISKS]):
        model = Libvirt({(OLD, "vdb")}, {OLD: ["vda", "vdb"]})
        records = records_of(model)
        for disk in DISKS:
            records.expect_removal(disk, [OLD])
        remove(records)
        assert model.bitmaps == set()
        assert model.records == {}


def test_the_record_of_a_bitmap_that_cannot_be_removed_stays() -> None:
    model = Libvirt(both(OLD), {})
    records = records_of(model, OLD)
    sound(records)
    for disk in DISKS:
        records.expect_removal(disk, [OLD])
    model.stuck = True
    for disk in DISKS:
        with pytest.raises(SourceError):
            records.remove(OLD, disk)
    records.forget()
    assert model.records == {OLD: ["vda", "vdb"]}


def test_a_record_that_the_run_made_goes_at_its_end_and_the_bitmap_stays() -> None:
    model = Libvirt(both(OLD, FOREIGN), {FOREIGN: ["vda"]})
    records = records_of(model, OLD)
    sound(records)
    records.forget()
    assert model.records == {FOREIGN: ["vda"]}
    assert model.bitmaps == both(OLD, FOREIGN)
