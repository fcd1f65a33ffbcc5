"""
Which repository a command line names: a folder, a bucket, or a second place of the configuration by its name.

A text that begins with s3:// is a bucket.  A text without a slash is the name of a place in `copies`, if there is such
a place and no folder of that name; with both, the text is refused.  Every other text is a folder.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from backup.cli import find
from backup.cli.find import Named
from backup.errors import UsageError
from backup.model import location as locations
from backup.model.location import FIRST_IN_FOLDER, SCHEME, Location

if TYPE_CHECKING:
    from backup.age.keys import Recipient
    from backup.config.settings import Config, CopyConfig
    from backup.operations.copies import Target
    from backup.repository.repository import Repository


@dataclass(frozen=True, slots=True)
class Place:
    """
    A repository that a command line names.

    Attributes
    ----------
    location : Path or Bucket
        A bucket has the endpoint, region and profile of the place of the configuration that names it, too.
    configured : CopyConfig or None
        The second place of the configuration that has this location; None: there is none.
    """

    location: Location
    configured: CopyConfig | None = None


def place(text: str) -> Place:
    """
    Return the place that a text names.

    Raises
    ------
    UsageError
        The text names no place, or two; or it may name one of the configuration, and the configuration is faulty.
    """
    is_bucket, is_folder = text.startswith(SCHEME), os.path.isdir(text)
    may_be_name = "/" not in text and text not in {"", ".", ".."}
    config = find.config() if is_bucket or (may_be_name and not is_folder) else find.config_or_default()
    named = config.copy_called(text) if may_be_name else None
    if named is not None and is_folder:
        raise UsageError(
            f"{text!r} is the name of a place in the configuration and of a folder here",
            hint=f"write ./{text} for the folder, and {named.to} for the place",
        )
    if named is not None:
        return Place(named.to, named)
    location = locations.parse(text)
    configured = _configured(location, config)
    return Place(location if configured is None or isinstance(location, Path) else configured.to, configured)


def _configured(location: Location, config: Config) -> CopyConfig | None:
    def resolved(location: Location) -> Location:
        return Path(os.path.realpath(location)) if isinstance(location, Path) else location

    wanted = resolved(location)
    return next((known for known in config.copies if locations.is_same(resolved(known.to), wanted)), None)


def called(name: str, config: Config) -> Place:
    """
    Return the place of the configuration that has a name.

    Raises
    ------
    UsageError
        There is no such place.
    """
    found = config.copy_called(name)
    if found is None:
        known = ", ".join(copy.name for copy in config.copies) or "none"
        raise UsageError(f"the configuration has no place {name!r} among its copies", hint=f"its places are: {known}")
    return Place(found.to, found)


def named(repo: str | None, identity: str | None = None) -> Named:
    """Return the repository that --repo names, and the file of --identity; without --repo, the configured one."""
    return Named(None if repo is None else place(repo).location, identity)


def first_of(repo: str) -> Path:
    """
    Return the folder that a text names, as the repository that backups are made to.

    Raises
    ------
    UsageError
        The text names a bucket, or a second place of the configuration.
    """
    named = place(repo)
    if isinstance(named.location, Path) and named.configured is None:
        return named.location
    what = "a bucket" if named.configured is None else f"the second place {named.configured.name}"
    raise UsageError(f"{repo!r} is {what}: {FIRST_IN_FOLDER}", hint="name the folder of the first repository")


def recipients(place: Place, given: Sequence[str] | None) -> tuple[Recipient, ...]:
    """
    Return the recipients of a second place: those of --recipient, or else those of the configuration.

    Raises
    ------
    UsageError
        A text is neither a recipient nor a file of recipients; or --recipient and the configuration differ.
    """
    from backup.age import key_files

    configured = key_files.recipients(place.configured.recipients) if place.configured is not None else ()
    named = key_files.recipients(given or ())
    if named and configured and set(named) != set(configured):
        assert place.configured is not None
        raise UsageError(
            f"--recipient names other keys than copies.{place.configured.name}.recipients in the configuration",
            hint="name the keys in one of the two places only",
        )
    return named or configured


def open_second(place: Place, config: Config, source: Repository) -> Repository:
    """
    Open a second place as the target of copies of a repository.

    Raises
    ------
    BackupError
        See `backup.operations.copy.open_second`.
    """
    from backup.cli import settings
    from backup.operations import copy

    return copy.open_second(settings.storage(place.location, config), source, recipients(place, None))


def target(shown: str, place: Place, config: Config, limit: str | None = None) -> Target:
    """Return a place as a target of copies; `limit` is the text of --limit."""
    from backup.cli import settings
    from backup.operations.copies import Target

    own = place.configured
    bytes_a_second = settings.limit(limit, config)
    if limit is None and own is not None and own.limit is not None:
        bytes_a_second = own.limit
    wants = (lambda _: True) if own is None else own.wants
    return Target(shown, functools.partial(open_second, place, config), wants, bytes_a_second)


def after_backup(first: Path, config: Config) -> list[Target]:
    """Return the places to which machines are copied after their backups to the configured repository."""
    if config.repository is None or os.path.realpath(first) != os.path.realpath(config.repository):
        return []
    return [target(copy.name, Place(copy.to, copy), config) for copy in config.copies if copy.after_backup]
