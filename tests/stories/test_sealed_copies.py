"""Sealed second places from the first copy to the restore; the host that copies has no identity."""

from __future__ import annotations

from pathlib import Path

import pytest
from lab import Night
from places import repository_at

from backup.age.keys import Identities, Identity
from backup.repository.repository import Repository
from backup.storage.folder import FolderStorage

pytest.importorskip("cryptography", reason="the extra `seal` is missing: pip install 'pybackup[seal]'")

OURS = Identity.new()
NAMED = Identities((OURS,), "key.txt")


def sealed_copy_of(night: Night, place: Path) -> Repository:
    return Repository.create(FolderStorage(place), repository_at(night.repository).id, [OURS.recipient])


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_no_backup_is_made_to_a_sealed_place(tmp_path, options):
    night = Night.of(tmp_path)
    night.full()
    sealed_copy_of(night, tmp_path / "sealed")
    before = night.state()
    for wanted in ("full", "incremental"):
        done = Night(night.image, tmp_path / "sealed").backup(wanted, "--bitmap", "b1", *options)
        assert done.rc == 2
        assert "is sealed, and takes only copies of points" in done.stdout + done.stderr
    assert night.state() == before
    assert sorted(path.name for path in (tmp_path / "sealed").iterdir()) == ["RECOVERY.txt", "pybackup.json"]
    night.require_incremental()
