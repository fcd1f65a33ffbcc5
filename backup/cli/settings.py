"""
What the configuration and its options say to every command; cheap to import, unlike what a backup needs.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path

from backup.config import reader as configuration
from backup.config import settings
from backup.config.settings import Config
from backup.errors import UsageError
from backup.runtime import timeouts
from backup.storage.folder import Modes

_PLACES = (Path("config.yaml"), Path("/etc/pybackup/config.yaml"))


def find_config(given: Path | None, environment: Mapping[str, str], warn: Callable[[str], None]) -> Config:
    """
    Load `--config`, else $PYBACKUP_CONFIG, else ./config.yaml, else /etc/pybackup/config.yaml, else the defaults.

    A file that another user may have written is used, with a warning.  Its `timeout` holds from now on.

    Raises
    ------
    UsageError
        The file is missing (where it was named) or wrong.
    """

    def load(path: Path) -> Config:
        def check(status: os.stat_result) -> None:
            # A warning, as long as a configuration cannot name programs to run.
            if (why := distrust(status, os.geteuid())) is not None:
                warn(f"the configuration {path} {why}; correct that with chown or chmod, or use another with --config")

        return configuration.load(path, check)

    config = _found(given, environment, load)
    timeouts.set_limit(config.timeout)
    return config


def _found(given: Path | None, environment: Mapping[str, str], load: Callable[[Path], Config]) -> Config:
    named = given or (Path(environment["PYBACKUP_CONFIG"]) if environment.get("PYBACKUP_CONFIG") else None)
    if named is not None:
        return load(named)
    found = next((place for place in _PLACES if os.path.exists(place)), None)
    return settings.default() if found is None else load(found)


def distrust(status: os.stat_result, user: int) -> str | None:
    """Say who else than `user` and root may have written a configuration; None: nobody else."""
    if status.st_uid not in (0, user):
        return f"belongs to another user (uid {status.st_uid})"
    if status.st_mode & stat.S_IWOTH:
        return "may be written by every user"
    if status.st_mode & stat.S_IWGRP:
        return f"may be written by its group (gid {status.st_gid})"
    return None


def repository_path(given: Path | None, config: Config) -> Path:
    """
    The repository's folder.

    Raises
    ------
    UsageError
        Neither --repo nor the configuration names one.
    """
    path = given or config.repository
    if path is None:
        raise UsageError("no repository is named", hint="give --repo DIR, or `repository:` in the configuration")
    return path


def expected_disks(config: Config, repository: Path) -> dict[str, tuple[str, ...]]:
    """The machines and disks that a configuration says are in a repository; none where it names another."""
    if config.repository is not None and config.repository.resolve() != repository.resolve():
        return {}
    return {machine.name: tuple(disk.name for disk in machine.disks) for machine in config.machines}


def modes(config: Config) -> Modes:
    """Permissions of what is made."""
    return Modes(0o640, 0o750) if config.group_read else Modes()


def limit(option: str | None, config: Config) -> int | None:
    """
    Bytes a second of --limit, else of the configuration; None: as fast as possible.

    Raises
    ------
    UsageError
        The option is no size that makes sense.
    """
    return config.limit if option is None else settings.parse_limit(option)


def workers(config: Config) -> int:
    """Threads that compress, hash and decompress."""
    return config.workers or len(os.sched_getaffinity(0))
