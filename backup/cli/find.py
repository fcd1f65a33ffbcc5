"""
What a command line names: the configuration, the repository, machines and points.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from backup.cli import output
from backup.cli.context import options
from backup.config.settings import default
from backup.errors import BackupError, NotFound, UsageError
from backup.model.names import check_folder

if TYPE_CHECKING:
    from backup.config.settings import Config
    from backup.model.manifest import Manifest
    from backup.repository.machine import Machine
    from backup.repository.repository import Repository


def config() -> Config:
    """The configuration that is named, or lies where it is looked for; the defaults where there is none."""
    from backup.cli import settings

    if options.loaded is None:
        options.loaded = settings.find_config(options.config, os.environ, output.warning)
    return options.loaded


def config_or_default() -> Config:
    """For commands that need none: one that was named must be right, one that lies about may be wrong."""
    if options.config is not None:
        return config()
    try:
        return config()
    except UsageError:
        return default()


def require_format(*image_formats: str | None) -> None:
    """Refuse what is no format of an image; None is left to be found out."""
    for image_format in image_formats:
        if image_format not in (None, "raw", "qcow2"):
            raise UsageError(f"{image_format!r} is not a format", hint="raw or qcow2")


def repository(repo: Path | None) -> Repository:
    """The repository of --repo, or of the configuration."""
    from backup.repository.repository import Repository

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
    """
    The point that a MANIFEST names, by any of these.

        a path                      of a manifest, or of one of a point's data files or digest files
        MACHINE, MACHINE/latest     the machine's newest point
        MACHINE/2026-11-28          its newest point at the end of that day, local time
        MACHINE/PART                the point whose id is PART, or begins or ends with it
        PART                        the same of any machine in the repository

    Raises
    ------
    NotFound
        There is no such point.
    UsageError
        Several points fit.
    """
    from backup.repository.machine import Machine
    from backup.repository.manifests import read_manifest

    path = _manifest_path(text)
    if path is not None:
        return Machine(Path(os.path.realpath(path.parent))), read_manifest(path)
    name, slash, wanted = text.partition("/")
    if "/" in wanted or not name:
        raise NotFound(f"there is no manifest {text}", hint=_NAMES)
    from backup.repository import named_point

    opened = repository(repo)
    if not slash and name not in opened.machine_names():
        machine, wanted = _anywhere(opened, text)
    else:
        [machine] = machines(opened, [name])
    return machine, named_point.pick(machine.name, machine.contents(), wanted)


_NAMES = "give a manifest's path, MACHINE, MACHINE/POINT, MACHINE/2026-11-28 or a part of a point's id"


def _manifest_path(text: str) -> Path | None:
    """The manifest's path, where the text is a path."""
    from backup.model import manifest

    path = Path(text)
    if text.endswith(".json"):
        return path
    if os.path.isfile(path) or os.path.islink(path):
        of = manifest.point_of(path.name)
        if of is not None:
            return path.with_name(f"{of}.json")
        if "/" in text:
            raise UsageError(f"{text} is no manifest and no data file of a repository", hint=_NAMES)
    return None


def _anywhere(repository: Repository, text: str) -> tuple[Machine, str]:
    """The machine and the id of the only point in the repository whose id begins or ends with the text."""
    from backup.repository import named_point

    found = []
    for machine in machines(repository, None):
        try:
            names = os.listdir(machine.path) if machine.exists() else []
        except (OSError, BackupError):
            continue  # what is wrong there must not hide the others
        ids = {name.removesuffix(".json") for name in names if name.endswith(".json")}
        found += [(machine, point) for point in named_point.matching(ids, text)]
    if len(found) > 1:
        raise named_point.ambiguous(text, [f"{machine.name}/{point}" for machine, point in found])
    if not found:
        raise NotFound(
            f"the repository {repository.path} has no machine {text!r}, and no point whose id begins or ends so",
            hint=f"it has these machines: {', '.join(repository.machine_names()) or 'none'}",
        )
    return found[0]


def points(what: Sequence[str], repo: Path | None) -> list[tuple[Machine, list[str] | None]]:
    """Machines and points of them (None: all), of texts that name either."""
    if not what:
        return [(machine, None) for machine in machines(repository(repo), None)]
    found: list[tuple[Machine, list[str] | None]] = []
    for text in what:
        if "/" not in text and _manifest_path(text) is None and text in repository(repo).machine_names():
            found.append((machines(repository(repo), [text])[0], None))
        else:
            machine, manifest = point(text, repo)
            found.append((machine, [manifest.point]))
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
