"""
What a command line names: the configuration, the repository, machines and points.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from backup.cli import output
from backup.cli.context import options
from backup.errors import BackupError, NotFound, UsageError
from backup.model.location import SCHEME, Location
from backup.model.names import SEALED

if TYPE_CHECKING:
    from backup.config.settings import Config
    from backup.model.manifest import Manifest
    from backup.repository.machine import Machine
    from backup.repository.repository import Repository
    from backup.storage.base import Storage

_FORMATS = ("raw", "qcow2")
_POINT_HINT = (
    "give MACHINE, MACHINE/POINT, MACHINE/2026-11-28, the beginning or end of a point's id, or the path of a manifest"
)


# The configuration and the repository


def config() -> Config:
    """Return the configuration that is named or found, or the defaults if there is none; the file is read only once."""
    from backup.cli import settings

    if options.loaded is None:
        options.loaded = settings.find_config(options.config, os.environ, output.warning)
    return options.loaded


def config_or_default() -> Config:
    """
    Return the configuration for a command that works without one.

    A faulty configuration is an error if it was named with --config; otherwise the defaults are used.
    """
    if options.config is not None:
        return config()
    try:
        return config()
    except UsageError:
        from backup.config.settings import default

        return default()


@dataclass(frozen=True, slots=True)
class Named:
    """
    The repository that a command line names.

    Attributes
    ----------
    location : Path or Bucket or None
        None: the repository of the configuration.
    identity : str or None
        The file of --identity, which opens a sealed repository.
    """

    location: Location | None = None
    identity: str | None = None


def repository(named: Named, modes_of: Config | None = None) -> Repository:
    """
    Open the repository that the command line names, or that of the configuration.

    A command that makes files there gives the configuration `modes_of`, which says who may read them.
    """
    if named.location is not None:
        return open_at(named.location, modes_of, named.identity)
    from backup.cli import settings

    return open_at(settings.repository_location(None, config()), modes_of, named.identity)


def open_at(location: Location, modes_of: Config | None = None, identity: str | None = None) -> Repository:
    """Open the repository at a location with the identity file of --identity; `modes_of` as for `repository`."""
    from backup.cli.identity import identities
    from backup.repository.repository import Repository

    return Repository.open(_storage(location, modes_of), identities(identity))


def _storage(location: Location, modes_of: Config | None) -> Storage:
    from backup.storage.choose import storage_at

    return storage_at(location, group_read=modes_of is not None and modes_of.group_read)


# Machines and points


def machines(repository: Repository, names: Sequence[str] | None) -> list[Machine]:
    """
    Return the machines of the repository that have these names; without names, all of them.

    Raises
    ------
    NotFound
        The repository has no machine of one of the names.
    """
    if not names:
        # Folders that are no machine's (a link, for example) are included: each command reports them beside the others.
        return [repository.machine(name) for name in repository.machine_names()]
    named = []
    for name in names:
        machine = repository.machine(name)
        if not machine.exists():
            raise NotFound(
                f"the repository {repository.location} has no machine {name!r}", hint=_machines_hint(repository)
            )
        named.append(machine)
    return named


def point(text: str, named: Named, modes_of: Config | None = None) -> tuple[Machine, Manifest]:
    """
    Find the point that a MANIFEST names, in one of these ways.

        a path                      of a manifest, or of a data file or digest file of the point
        MACHINE, MACHINE/latest     the machine's newest point
        MACHINE/2026-11-28          the machine's newest point at the end of that day, local time
        MACHINE/PART                the machine's only point whose id is PART, or begins or ends with PART
        PART                        the same, of any machine in the repository

    Raises
    ------
    NotFound
        There is no such point.
    UsageError
        Several points match.
    """
    return _point(text, named, modes_of, lambda: repository(named, modes_of))


def _point(
    text: str, named: Named, modes_of: Config | None, named_repository: Callable[[], Repository]
) -> tuple[Machine, Manifest]:
    from backup.repository.machine import Machine
    from backup.repository.manifests import read_manifest

    path = _manifest_path(text)
    if path is not None:
        folder = Path(os.path.realpath(path.parent))
        if path.suffix == SEALED:
            machine = open_at(folder.parent, modes_of, named.identity).machine(folder.name)
        else:
            machine = Machine(_storage(folder.parent, modes_of), folder.name)
        return machine, read_manifest(machine.files, path.name.removesuffix(SEALED))
    name, slash, wanted = text.partition("/")
    if "/" in wanted or not name:
        raise NotFound(f"there is no manifest {text}", hint=_POINT_HINT)
    from backup.repository import named_point

    opened = named_repository()
    if not slash and name not in opened.machine_names():
        machine, wanted = _in_any_machine(opened, text)
    else:
        [machine] = machines(opened, [name])
    return machine, named_point.pick(machine.name, machine.contents(), wanted)


def repository_of(text: str, named: Named) -> Repository:
    """Return the repository in which `points` finds a text: of a manifest's path, that in which the manifest lies."""
    path = _manifest_path(text)
    if path is None:
        return repository(named)
    return open_at(Path(os.path.realpath(path.parent)).parent, None, named.identity)


def points(
    names: Sequence[str], named: Named, modes_of: Config | None = None
) -> list[tuple[Machine, list[str] | None]]:
    """Find what the names mean: machines, each with the ids of the named points, or with None for all its points."""
    if not names:
        return [(machine, None) for machine in machines(repository(named, modes_of), None)]
    opened = functools.cache(lambda: repository(named, modes_of))  # each opening of a bucket costs a request
    selected: list[tuple[Machine, list[str] | None]] = []
    for text in names:
        if "/" not in text and _manifest_path(text) is None and text in opened().machine_names():
            selected.append((machines(opened(), [text])[0], None))
        else:
            machine, manifest = _point(text, named, modes_of, opened)
            selected.append((machine, [manifest.point]))
    return selected


def _manifest_path(text: str) -> Path | None:
    """Return the path of a point's manifest if the text is the path of one of the point's files, else None."""
    from backup.model import manifest

    path = Path(text)
    if text.startswith(SCHEME):
        raise UsageError(
            f"{text!r} is in a bucket, and a point is expected", hint="give MACHINE/POINT --repo s3://BUCKET/PREFIX"
        )
    plain = text.removesuffix(SEALED)
    if plain.endswith(".json"):
        return path
    if os.path.isfile(path) or os.path.islink(path):
        point_id = manifest.point_of(Path(plain).name)
        if point_id is not None:
            return path.with_name(f"{point_id}.json{text[len(plain) :]}")
        if "/" in text:
            raise UsageError(f"{text} is neither a manifest nor a data file of a repository", hint=_POINT_HINT)
    return None


def _in_any_machine(repository: Repository, text: str) -> tuple[Machine, str]:
    """Return machine and id of the only point in the repository whose id begins or ends with the text."""
    from backup.repository import named_point

    matches = []
    for machine in machines(repository, None):
        try:
            names = list(machine.listing())
        except BackupError:
            continue  # the other machines can be searched all the same
        ids = {name.removesuffix(".json") for name in names if name.endswith(".json")}
        matches += [(machine, point_id) for point_id in named_point.matching(ids, text)]
    if len(matches) > 1:
        raise named_point.ambiguous(text, [f"{machine.name}/{point_id}" for machine, point_id in matches])
    if not matches:
        raise NotFound(
            f"the repository {repository.location} has no machine {text!r}, "
            "and no point whose id begins or ends with it",
            hint=_machines_hint(repository),
        )
    return matches[0]


def _machines_hint(repository: Repository) -> str:
    return f"the repository has these machines: {', '.join(repository.machine_names()) or 'none'}"


# Conversion of option texts


def path_of(text: str | None) -> Path | None:
    """Return the path that an option names, or None if it was not given."""
    return None if text is None else Path(text)


def require_format(*image_formats: str | None) -> None:
    """Refuse the name of an image format that pybackup does not read; None stands for detection."""
    for image_format in image_formats:
        if image_format is not None and image_format not in _FORMATS:
            raise UsageError(f"{image_format!r} is not an image format", hint=f"write {' or '.join(_FORMATS)}")
