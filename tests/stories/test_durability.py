"""What must last before what (FORMAT.md, "Order of writing"): no file gets its final name before its bytes last."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field

import pytest
from lab import Night, call_pybackup, write


@dataclass
class Journal:
    """What was made to last (by inode), and which inode got which name, in order."""

    events: list[tuple[str, object]] = field(default_factory=list)

    def synced(self, start=0, end=None):
        return {inode for kind, inode in self.events[start:end] if kind == "fsync"}

    def last_sync(self, inode, end):
        return max((at for at, event in enumerate(self.events[:end]) if event == ("fsync", inode)), default=-1)

    def naming(self, path):
        """When the file that has this path now got it."""
        return max(at for at, event in enumerate(self.events) if event == ("name", (str(path), inode_of(path))))


def inode_of(path):
    return os.stat(path).st_ino


@pytest.fixture
def journal(monkeypatch):
    kept = Journal()
    fsync, rename = os.fsync, os.rename

    def noted_fsync(fd):
        fsync(fd)
        kept.events.append(("fsync", os.fstat(fd).st_ino))

    def noted_rename(source, target, **options):
        inode = os.lstat(source).st_ino
        rename(source, target, **options)
        kept.events.append(("name", (str(target), inode)))

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", noted_rename)
    return kept


def require_published_in_order(journal, folder, point):
    manifest = folder / f"{point}.json"
    named = journal.naming(manifest)
    before = journal.synced(end=named)
    assert inode_of(manifest) in before
    for disk in json.loads(manifest.read_bytes())["disks"]:
        for kind in ("file", "digests"):
            path = folder / disk["data"][kind]
            assert inode_of(path) in before, path.name
            # Its name lasts too: the folder was fsynced after the file was there under it, and before the manifest was.
            named_itself = max(
                (at for at, event in enumerate(journal.events) if event == ("name", (str(path), inode_of(path)))),
                default=journal.last_sync(inode_of(path), named),
            )
            assert named_itself < journal.last_sync(inode_of(folder), named), path.name
    assert inode_of(folder) in journal.synced(start=named + 1)
    assert inode_of(folder.parent) in journal.synced()


@pytest.mark.parametrize("wanted", ["full", "incremental", "rescan"])
@pytest.mark.parametrize("compression", ["none", "zstd:1"])
def test_every_file_of_a_point_lasts_before_its_manifest_has_its_name(tmp_path, journal, wanted, compression):
    night = Night.of(tmp_path)
    if wanted != "full":
        night.full("--compression", compression)
        write(night.image, "write -P 5 1M 100k")
    journal.events.clear()
    done = night.backup(wanted, "--bitmap", "b1", "--compression", compression)
    assert done.rc in {0, 3}, done
    require_published_in_order(journal, night.repository / "disk", night.newest["point"])


def test_every_file_of_a_copy_lasts_before_its_manifest_has_its_name(tmp_path, journal):
    night = Night.with_incremental(tmp_path)
    journal.events.clear()
    second = tmp_path / "second"
    assert call_pybackup(["copy", "disk", second, "--repo", night.repository]).rc == 0
    for path in (second / "disk").glob("*.json"):
        require_published_in_order(journal, second / "disk", path.stem)


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
@pytest.mark.parametrize("force", [False, True])
def test_a_restored_file_lasts_before_it_has_its_name(tmp_path, journal, image_format, force):
    night = Night.with_incremental(tmp_path)
    target = tmp_path / f"restored.{image_format}"
    if force:
        target.write_bytes(b"former")
    options = ["--format", image_format, *(["--force"] if force else [])]
    journal.events.clear()
    assert call_pybackup(["restore", "disk/latest", target, "--repo", night.repository, *options]).rc == 0
    named = journal.naming(target)
    assert inode_of(target) in journal.synced(end=named)
    assert inode_of(tmp_path) in journal.synced(start=named + 1)


def test_what_verify_remembers_lasts_before_it_has_its_name(tmp_path, journal):
    night = Night.with_incremental(tmp_path)
    journal.events.clear()
    assert call_pybackup(["verify", "--repo", night.repository]).rc == 0
    folder = night.repository / "disk"
    named = journal.naming(folder / "verified")
    assert inode_of(folder / "verified") in journal.synced(end=named)
    assert inode_of(folder) in journal.synced(start=named + 1)
