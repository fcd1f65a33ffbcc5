"""
What the configuration and its options say to every command; cheap to import, unlike what a backup needs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from backup import config as configuration
from backup.config import Config
from backup.errors import UsageError
from backup.repository import Modes

_PLACES = (Path("config.yaml"), Path("/etc/pybackup/config.yaml"))


def find_config(given: Path | None, environment: Mapping[str, str]) -> Config:
    """
    Load `--config`, else $PYBACKUP_CONFIG, else ./config.yaml, else /etc/pybackup/config.yaml, else the defaults.

    Raises
    ------
    UsageError
        The file is missing (where it was named) or wrong.
    """
    named = given or (Path(environment["PYBACKUP_CONFIG"]) if environment.get("PYBACKUP_CONFIG") else None)
    if named is not None:
        return configuration.load(named)
    found = next((place for place in _PLACES if os.path.exists(place)), None)
    return configuration.default() if found is None else configuration.load(found)


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
    return config.limit if option is None else configuration.parse_limit(option)


def workers(config: Config) -> int:
    """Threads that compress, hash and decompress."""
    return config.workers or len(os.sched_getaffinity(0))
