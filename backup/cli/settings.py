"""
Settings that many commands take from the configuration and their options.

This module is quick to import, unlike `requests`.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from backup.config import settings
from backup.config.settings import Config
from backup.errors import UsageError
from backup.model.location import Location
from backup.runtime import timeouts
from backup.storage.base import Storage
from backup.storage.choose import storage_at

_L = TypeVar("_L", bound=Location)
_PLACES = (Path("config.yaml"), Path("/etc/pybackup/config.yaml"))


def find_config(given: Path | None, environment: Mapping[str, str], warn: Callable[[str], None]) -> Config:
    """
    Load `--config`, else $PYBACKUP_CONFIG, else ./config.yaml, else /etc/pybackup/config.yaml, else the defaults.

    A file that another user may have written is used with a warning.  The `timeout` takes effect at once.

    Raises
    ------
    UsageError
        The file that was named is missing, or a file is faulty.
    """

    def load(path: Path) -> Config:
        def check(status: os.stat_result) -> None:
            # Only a warning: a configuration cannot name programs to run.
            if (why := distrust(status, os.geteuid())) is not None:
                warn(f"the configuration {path} {why}; change that with chown or chmod, or name another with --config")

        from backup.config import reader  # imports yaml, which a run without a configuration need not load

        return reader.load(path, check)

    config = _load_first(given, environment, load)
    timeouts.set_limit(config.timeout)
    return config


def _load_first(given: Path | None, environment: Mapping[str, str], load: Callable[[Path], Config]) -> Config:
    named = given or (Path(environment["PYBACKUP_CONFIG"]) if environment.get("PYBACKUP_CONFIG") else None)
    if named is not None:
        return load(named)
    path = next((place for place in _PLACES if os.path.exists(place)), None)
    return settings.default() if path is None else load(path)


def distrust(status: os.stat_result, user: int) -> str | None:
    """Say who may have written a configuration besides `user` and root; None if no other user may have."""
    if status.st_uid not in (0, user):
        return f"belongs to another user (uid {status.st_uid})"
    if status.st_mode & stat.S_IWOTH:
        return "may be written by every user"
    if status.st_mode & stat.S_IWGRP:
        return f"may be written by its group (gid {status.st_gid})"
    return None


def repository_location(given: _L | None, config: Config) -> _L | Path:
    """
    Return the location of the repository: the one that --repo names, or else the configured folder.

    Raises
    ------
    UsageError
        Neither --repo nor the configuration names one.
    """
    location = given or config.repository
    if location is None:
        raise UsageError("no repository is named", hint="give --repo REPO, or `repository:` in the configuration")
    return location


def expected_disks(
    config: Config, repository: Location | None, machines: Iterable[str]
) -> dict[str, tuple[str, ...] | None]:
    """
    Return each configured machine and its disks; nothing if the configuration names another repository.

    `machines` are those that the repository has.  None in place of disks: all disks that libvirt tells.
    """
    if repository is not None and (
        not isinstance(repository, Path)
        or (config.repository is not None and config.repository.resolve() != repository.resolve())
    ):
        return {}
    named = {machine.name: machine for machine in config.machines if machine.domains is None}
    known = {name: found for name in machines if (found := config.machine_of(name)) is not None}
    return {
        name: tuple(disk.name for disk in machine.disks) if machine.disks else None
        for name, machine in {**named, **known}.items()
    }


def storage(location: Location, config: Config) -> Storage:
    """Return the storage of a repository, with the permissions that the configuration asks for."""
    return storage_at(location, group_read=config.group_read)


def limit(option: str | None, config: Config) -> int | None:
    """
    Return the limit in bytes a second, of --limit or else of the configuration; None means no limit.

    Raises
    ------
    UsageError
        The option is not a size, or is out of bounds.
    """
    return config.limit if option is None else settings.parse_limit(option)


def workers(config: Config) -> int:
    """Return the number of threads that compress, hash and decompress."""
    return config.workers or len(os.sched_getaffinity(0))
