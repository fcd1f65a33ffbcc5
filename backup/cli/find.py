"""
What a command line names: the configuration, the repository, machines and points.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from backup.cli import render
from backup.cli.state import options
from backup.errors import Damaged, NotFound, UsageError
from backup.names import check_folder

if TYPE_CHECKING:
    from backup.config import Config
    from backup.manifest import Manifest
    from backup.repository import Machine, Repository


def config() -> Config:
    """The configuration that is named, or lies where it is looked for; the defaults where there is none."""
    from backup.cli import settings

    if options.loaded is None:
        options.loaded = settings.find_config(options.config, os.environ, render.warning)
    return options.loaded


def config_or_default() -> Config:
    """For commands that need none: one that was named must be right, one that lies about may be wrong."""
    from backup import config as configuration

    if options.config is not None:
        return config()
    try:
        return config()
    except UsageError:
        return configuration.default()


def require_format(*image_formats: str | None) -> None:
    """Refuse what is no format of an image; None is left to be found out."""
    for image_format in image_formats:
        if image_format not in (None, "raw", "qcow2"):
            raise UsageError(f"{image_format!r} is not a format", hint="raw or qcow2")


def repository(repo: Path | None) -> Repository:
    """The repository of --repo, or of the configuration."""
    from backup.repository import Repository

    if repo is not None:
        return Repository.open(repo)
    from backup.cli import settings

    return Repository.open(settings.repository_path(None, config()))


def machines(repository: Repository, names: Sequence[str] | None) -> list[Machine]:
    """The machines of these names, each of which must be there; all that are, where none is named."""
    if not names:
        # Also one whose folder is no machine's (a link): what is wrong there must not hide the others.
        return [repository.machine(name) for name in repository.machine_names()]
    found = []
    for name in names:
        machine = repository.machine(name)
        if not machine.exists():
            raise NotFound(
                f"the repository {repository.path} has no machine {name!r}",
                hint=f"it has: {', '.join(repository.machine_names()) or 'none'}",
            )
        found.append(machine)
    return found


def point(text: str, repo: Path | None) -> tuple[Machine, Manifest]:
    """A manifest's path (an existing path wins), or MACHINE/POINT, MACHINE/latest."""
    from backup import chain as chains
    from backup.repository import Machine, read_manifest

    path = Path(text)
    if os.path.isfile(path) or os.path.islink(path) or text.endswith(".json"):
        return Machine(Path(os.path.realpath(path.parent))), read_manifest(path)
    name, slash, point = text.rpartition("/")
    if not slash or "/" in name:
        raise NotFound(f"there is no manifest {text}", hint="give a manifest's path, MACHINE/POINT or MACHINE/latest")
    [machine] = machines(repository(repo), [name])
    contents = machine.contents()
    damaged = contents.damaged.get(f"{point}.json")
    if damaged is not None:
        raise damaged
    if point == "latest" and contents.damaged:
        # The damaged one may have the highest sequence; an older point must not pass for the latest.
        raise Damaged(
            f"machine {name} has a manifest that cannot be read, which may be its latest point: "
            + next(iter(contents.damaged.values())).message,
            hint=f"name a point: `pybackup list {name}`",
        )
    found = chains.newest_manifest(contents.manifests.values()) if point == "latest" else contents.manifests.get(point)
    if found is None:
        raise NotFound(f"machine {name} has no point {point}", hint=f"see: `pybackup list {name}`")
    return machine, found


def points(what: Sequence[str], repo: Path | None) -> list[tuple[Machine, list[str] | None]]:
    """Machines and points of them (None: all), of texts that name either."""
    if not what:
        return [(machine, None) for machine in machines(repository(repo), None)]
    found: list[tuple[Machine, list[str] | None]] = []
    for text in what:
        if "/" in text or text.endswith(".json"):
            machine, manifest = point(text, repo)
            found.append((machine, [manifest.point]))
        else:
            found.append((machines(repository(repo), [text])[0], None))
    return found


def path_of(text: str | None) -> Path | None:
    """A path, where one was given."""
    return None if text is None else Path(text)


def folder_of(text: str | None) -> Path | None:
    """
    A repository's folder, where one was given.

    Raises
    ------
    UsageError
        The text looks remote.
    """
    return None if text is None else Path(check_folder(text))
