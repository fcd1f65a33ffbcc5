"""Sealed repositories: the marker, and what opening one needs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from backup.age.keys import Identities, Identity
from backup.errors import UsageError
from backup.model.names import MARKER, RECOVERY
from backup.repository.repository import MOST_RECIPIENTS, Repository
from backup.storage.folder import FolderStorage
from backup.storage.sealed import SealedStorage

pytest.importorskip("cryptography", reason="the extra `seal` is missing: tools/setup")

OURS, OTHER = Identity.new(), Identity.new()


def test_the_marker_says_to_whom_a_repository_is_sealed(tmp_path: Path):
    made = Repository.create(FolderStorage(tmp_path), None, [OURS.recipient, OTHER.recipient, OURS.recipient])
    assert json.loads((tmp_path / MARKER).read_bytes()) == {
        "format": "pybackup repository",
        "version": 2,
        "id": made.id,
        "sealed": True,
        "recipients": [str(OURS.recipient), str(OTHER.recipient)],
    }
    assert (tmp_path / RECOVERY).read_bytes().startswith(b"HOW TO GET")
    opened = Repository.open(FolderStorage(tmp_path))
    assert opened.sealed
    assert (opened.id, opened.recipients) == (made.id, (OURS.recipient, OTHER.recipient))
    assert isinstance(opened.storage, SealedStorage)
    assert opened.storage.is_same_place(FolderStorage(tmp_path))


def test_a_plain_repository_keeps_the_version_that_older_programs_read(tmp_path: Path):
    made = Repository.create(FolderStorage(tmp_path))
    assert json.loads((tmp_path / MARKER).read_bytes()) == {
        "format": "pybackup repository",
        "version": 1,
        "id": made.id,
    }
    opened = Repository.open(FolderStorage(tmp_path), Identities((OURS,), "key.txt"))
    assert not opened.sealed
    assert isinstance(opened.storage, FolderStorage)


def test_files_are_sealed_and_opened_by_the_identities(tmp_path: Path):
    host = Repository.create(FolderStorage(tmp_path), None, [OURS.recipient])
    with host.machine("web1").lock():
        host.machine("web1").files.publish("20261128T083932Z-5544665d.json", b"manifest")
    assert (tmp_path / "web1" / "20261128T083932Z-5544665d.json.age").exists()
    assert host.machine("web1").has_point("20261128T083932Z-5544665d")
    assert host.machine_names() == ["web1"]
    reader = Repository.open(FolderStorage(tmp_path), Identities((OURS,), "key.txt"))
    assert reader.machine("web1").files.read("20261128T083932Z-5544665d.json", 100) == b"manifest"


@pytest.mark.parametrize("identities", [Identities(), Identities((OTHER,), "wrong.txt")])
def test_points_that_no_identity_opens_are_not_damaged(tmp_path: Path, identities):
    """A missing or a wrong identity ends the command; a damaged manifest is one point's fault."""
    host = Repository.create(FolderStorage(tmp_path), None, [OURS.recipient])
    with host.machine("web1").lock():
        host.machine("web1").files.publish("20261128T083932Z-5544665d.json", b"manifest")
    with pytest.raises(UsageError, match=r"identity"):
        Repository.open(FolderStorage(tmp_path), identities).machine("web1").contents()
    (tmp_path / "web1" / "20261128T083932Z-5544665d.json.age").write_bytes(b"age-encryption.org/v1\n")
    found = Repository.open(FolderStorage(tmp_path), Identities((OURS,), "key.txt")).machine("web1").contents()
    assert [error.exit_code for error in found.damaged.values()] == [12]


def test_too_many_recipients_are_refused(tmp_path: Path):
    recipients = [Identity.new().recipient for _ in range(MOST_RECIPIENTS + 1)]
    with pytest.raises(UsageError, match="101 recipients are too many"):
        Repository.create(FolderStorage(tmp_path), None, recipients)
    Repository.create(FolderStorage(tmp_path / "b"), None, recipients[1:])
    files = Repository.open(FolderStorage(tmp_path / "b"), Identities((OURS,), "")).machine("m").files
    with files.lock():
        files.publish("a", b"x")
