"""Repositories and machines in folders, by path."""

from __future__ import annotations

from pathlib import Path

from backup.repository.machine import Machine
from backup.repository.repository import Repository
from backup.storage.base import Files
from backup.storage.folder import FolderStorage, Modes


def create_repository(path: Path, modes: Modes = Modes(), identity: str | None = None) -> Repository:
    return Repository.create(FolderStorage(path, modes), identity)


def repository_at(path: Path) -> Repository:
    return Repository.open(FolderStorage(path))


def machine_at(path: Path) -> Machine:
    return Machine(FolderStorage(path.parent), path.name)


def files_at(path: Path, mode: int = 0o600) -> Files:
    return FolderStorage(path.parent, Modes(mode)).files(path.name)


def folder_of(machine: Machine) -> Path:
    folder = machine.files.local_folder()
    assert folder is not None
    return folder
