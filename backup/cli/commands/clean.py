"""The command clean."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from backup.cli import find, output, requests
from backup.cli.context import options
from backup.cli.find import folder_of, path_of
from backup.cli.parameters import (
    AgentSocket,
    Qmp,
    Repo,
)
from backup.errors import WARNINGS_EXIT_CODE, UsageError

if TYPE_CHECKING:
    from backup.operations.clean import Outcome, Place
    from backup.sources.base import Owner
    from backup.sources.running import Running


def clean(
    qmp: Qmp = None,
    image: Annotated[
        list[str] | None,
        typer.Option("--image", metavar="FILE", help="Image that no machine has open.  Repeat it for more."),
    ] = None,
    bitmaps: Annotated[
        bool,
        typer.Option(
            "--bitmaps", help="Select all bitmaps of the repository, also those that the next backup would continue."
        ),
    ] = False,
    repository: Annotated[
        list[str] | None,
        typer.Option(
            "--repository",
            metavar="ID",
            help="Select all bitmaps of the repository with this short id (eight hex digits).  Repeat it for more.",
        ),
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="Remove the selected bitmaps.  Without it, they are only listed.")
    ] = False,
    agent: AgentSocket = None,
    repo: Repo = None,
) -> None:
    """
    Remove what backups left in a running QEMU or in images.

    With --qmp alone, clean up after a run that was interrupted: remove its jobs, exports, nodes and bitmaps, and thaw
    the guest.

    With --image, --bitmaps or --repository, list pybackup's dirty bitmaps; with --yes, remove the selected ones.
    """
    wanted = Wanted(
        qmp=path_of(qmp),
        images=tuple(map(Path, image or ())),
        agent=path_of(agent),
        repo=folder_of(repo),
        bitmaps=bitmaps,
        gone=tuple(repository or ()),
        yes=yes,
    )
    raise typer.Exit(run(wanted))


@dataclass(frozen=True, slots=True)
class Wanted:
    """
    The options of `clean`.

    `bitmaps`: those of the repository at hand; `gone`: short ids of repositories that need not be there any more.
    """

    qmp: Path | None
    images: tuple[Path, ...]
    agent: Path | None
    repo: Path | None
    bitmaps: bool
    gone: tuple[str, ...]
    yes: bool

    def __post_init__(self) -> None:
        if (self.qmp is None) == (not self.images):
            raise UsageError("clean needs one kind of place", hint="give --qmp SOCKET, or --image FILE once or more")
        for short_id in self.gone:
            if not re.fullmatch("[0-9a-f]{8}", short_id):
                raise UsageError(
                    f"--repository {short_id!r} is no short id of a repository",
                    hint="give the eight hex digits in the middle of a bitmap's name, FAMILY.REPOSITORY.POINT",
                )
        if self.yes and not self.of_bitmaps:
            raise UsageError("--yes without bitmaps to remove", hint="it goes with --bitmaps and --repository ID")

    @property
    def of_bitmaps(self) -> bool:
        """Are bitmaps to be listed, and not only removed where a cut-off run left them?"""
        return bool(self.bitmaps or self.gone or self.images)


def run(wanted: Wanted) -> int:
    """
    Clean; returns the exit code.

    Raises
    ------
    UsageError, NotFound, Locked, SourceError
        Nothing was removed, or what was is told.
    """
    if wanted.of_bitmaps:
        return _bitmaps(wanted)
    repository = find.repository(wanted.repo)
    with _running(wanted) as host:
        removed = list(host.recover(repository.ownership(None)))
    if options.json:
        output.document({"removed": removed})
    elif not options.quiet:
        for what in removed or ["nothing: there was nothing of this repository's"]:
            output.line(f"removed {what}")
    return 0


@contextmanager
def _running(wanted: Wanted) -> Iterator[Running]:
    from backup.sources.base import Freeze
    from backup.sources.running import Running

    assert wanted.qmp is not None
    agent = wanted.agent or requests.agent_of(wanted.qmp, find.config_or_default())
    with Running(wanted.qmp, [], freeze=Freeze(agent)) as host:
        yield host


def _bitmaps(wanted: Wanted) -> int:
    from backup.operations import clean as cleaning

    owners = _owners(wanted)
    if wanted.images:
        places: list[Place] = [cleaning.ImagePlace(path) for path in wanted.images]
        return _listed_or_removed(wanted, owners, places, [])
    with _running(wanted) as host:
        removed = [what for owner in owners for what in host.recover(owner)] if wanted.yes else []
        return _listed_or_removed(wanted, owners, cleaning.places_of(host.monitor, host.blocks()), removed)


def _owners(wanted: Wanted) -> list[Owner]:
    """The repositories whose bitmaps are selected."""
    from backup.operations.clean import GoneOwner

    owners: list[Owner] = [GoneOwner(short_id) for short_id in wanted.gone]
    if wanted.bitmaps and _names_repository(wanted):
        owners.insert(0, find.repository(wanted.repo).ownership(None))
    return owners


def _names_repository(wanted: Wanted) -> bool:
    return wanted.repo is not None or find.config_or_default().repository is not None


def _listed_or_removed(wanted: Wanted, owners: Sequence[Owner], places: Sequence[Place], removed: list[str]) -> int:
    from backup.operations import clean as cleaning

    outcomes = cleaning.select(cleaning.find(places), {owner.short_id for owner in owners})
    if wanted.yes and owners:
        for owner in owners:
            owner.require_alone()
        outcomes = cleaning.remove(outcomes)
    _show(wanted, outcomes, removed)
    if wanted.yes and not owners:
        raise UsageError(
            "no repository is named whose bitmaps are to be removed", hint="give --repo DIR, or --repository ID"
        )
    return WARNINGS_EXIT_CODE if any(outcome.problem for outcome in outcomes) else 0


def _show(wanted: Wanted, outcomes: Sequence[Outcome], removed: Sequence[str]) -> None:
    for outcome in outcomes:
        if outcome.problem is not None:
            output.warning(f"{outcome.found.place.text}: {outcome.found.name} stays: {outcome.problem}")
    if options.json:
        output.document({"removed": list(removed), "bitmaps": [_object(outcome) for outcome in outcomes]})
        return
    if options.quiet:
        return
    for what in removed:
        output.line(f"removed {what}")
    for outcome in outcomes:
        output.line(f"{outcome.found.place.text}: {outcome.found.name}: {_state(outcome)}")
    output.note(_advice(wanted, outcomes), to_stderr=False)


def _state(outcome: Outcome) -> str:
    if outcome.removed:
        return "removed"
    if outcome.problem is not None:
        return "not removed"
    return "selected" if outcome.selected else f"stays, of repository {outcome.found.repository}"


def _advice(wanted: Wanted, outcomes: Sequence[Outcome]) -> str:
    if not outcomes:
        return "there is no bitmap with a name of pybackup's, FAMILY.REPOSITORY.POINT"
    if any(outcome.removed for outcome in outcomes):
        return "the next backup of each of these disks reads the whole disk"
    if any(outcome.selected for outcome in outcomes) and not wanted.yes:
        return "nothing was removed; --yes removes those that are selected, and the next backup reads the whole disk"
    return "nothing was removed; select those of the repository with --bitmaps, those of any other with --repository ID"


def _object(outcome: Outcome) -> dict[str, Any]:
    return {
        "place": outcome.found.place.text,
        "name": outcome.found.name,
        "repository": outcome.found.repository,
        "selected": outcome.selected,
        "removed": outcome.removed,
        "problem": outcome.problem,
    }
