"""The command clean."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from backup.cli import find, json_output, output, places
from backup.cli.context import options
from backup.cli.find import Named
from backup.cli.parameters import AgentSocket, DomainName, LibvirtUri, Qmp, Repo
from backup.errors import WARNINGS_EXIT_CODE, UsageError

if TYPE_CHECKING:
    from backup.operations.clean import Outcome, Place
    from backup.sources.base import Host, Owner
    from backup.sources.running import Running


def clean(
    libvirt: LibvirtUri = None,
    domain: DomainName = None,
    qmp: Qmp = None,
    image: Annotated[
        list[str] | None,
        typer.Option("--image", metavar="FILE", help="Image that no machine has open.  Repeat it for more."),
    ] = None,
    bitmaps: Annotated[
        bool,
        typer.Option(
            "--bitmaps",
            help="Select all bitmaps of the repository, also those that the next backup would continue.",
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

    With --qmp alone, or with --libvirt and --domain, clean up after a run that was interrupted: remove its jobs,
    exports, nodes and bitmaps, and thaw the guest.

    With --image, --bitmaps or --repository, list pybackup's dirty bitmaps; with --yes, remove the selected ones.
    """
    wanted = CleanOptions(
        libvirt=libvirt,
        domain=domain,
        qmp=find.path_of(qmp),
        images=tuple(map(Path, image or ())),
        agent=find.path_of(agent),
        repo=places.named(repo),
        bitmaps=bitmaps,
        repositories=tuple(repository or ()),
        yes=yes,
    )
    if wanted.of_bitmaps:
        raise typer.Exit(_clean_bitmaps(wanted))
    _clean_machine(wanted)


@dataclass(frozen=True, slots=True)
class CleanOptions:
    """
    The options of `clean`, which do not contradict each other.

    `bitmaps` selects the bitmaps of --repo or of the configured repository.  `repositories` selects the
    bitmaps of repositories by their short ids; these repositories need not exist any more.
    """

    libvirt: str | None
    domain: str | None
    qmp: Path | None
    images: tuple[Path, ...]
    agent: Path | None
    repo: Named
    bitmaps: bool
    repositories: tuple[str, ...]
    yes: bool

    def __post_init__(self) -> None:
        if [self.libvirt is None, self.qmp is None, not self.images].count(True) != 2:
            raise UsageError(
                "clean needs one of --libvirt, --qmp and --image",
                hint="give --libvirt URI --domain NAME, --qmp SOCKET, or --image FILE (repeatable)",
            )
        if (self.libvirt is None) != (self.domain is None):
            raise UsageError("--libvirt and --domain go together", hint="--libvirt qemu:///system --domain web1")
        if self.libvirt is not None:
            from backup.cli import requests

            requests.check_uri(self.libvirt)
        for short_id in self.repositories:
            if not re.fullmatch("[0-9a-f]{8}", short_id):
                raise UsageError(
                    f"--repository {short_id!r} is not the short id of a repository",
                    hint="give the eight hex digits in the middle of a bitmap's name, FAMILY.REPOSITORY.POINT",
                )
        if self.yes and not self.of_bitmaps:
            raise UsageError("--yes without bitmaps to remove", hint="select bitmaps with --bitmaps or --repository ID")

    @property
    def of_bitmaps(self) -> bool:
        """Whether the command lists or removes bitmaps; otherwise it cleans up after an interrupted run."""
        return bool(self.bitmaps or self.repositories or self.images)


@contextmanager
def _domain(wanted: CleanOptions) -> Iterator[Host]:
    """Connect to the domain."""
    from backup.sources.base import Freeze
    from backup.sources.choose import Specification, choose

    assert wanted.libvirt is not None
    scratch, freeze = find.config_or_default().scratch, Freeze(wanted=True)  # so that a guest that is frozen is thawed
    host, _ = choose(Specification(libvirt=wanted.libvirt, domain=wanted.domain or "", scratch=scratch, freeze=freeze))
    with host:
        yield host


@contextmanager
def _running(wanted: CleanOptions) -> Iterator[Running]:
    """Connect to the running machine."""
    from backup.cli import requests
    from backup.sources.base import Freeze
    from backup.sources.running import Running

    assert wanted.qmp is not None
    agent = wanted.agent or requests.agent_of(wanted.qmp, find.config_or_default())
    with Running(wanted.qmp, [], freeze=Freeze(agent)) as host:
        yield host


# After an interrupted run


def _clean_machine(wanted: CleanOptions) -> None:
    """Remove what an interrupted run left in a running machine."""
    from backup.operations import clean as cleaning

    repository = find.repository(wanted.repo)
    owner = repository.ownership(None)
    with _domain(wanted) if wanted.libvirt is not None else _running(wanted) as host:
        removed = list(host.recover(owner))
        if wanted.libvirt is not None:
            removed += cleaning.remove_superseded(host, repository, owner)
    if options.json:
        json_output.write(CleanDocument(removed))
    elif not options.quiet:
        for what in removed or ["nothing: QEMU had no leftovers of this repository"]:
            output.line(f"removed {what}")


@dataclass(frozen=True, slots=True)
class CleanDocument:
    """What was removed from a running machine, as texts."""

    removed: Sequence[str]


# Bitmaps


def _clean_bitmaps(wanted: CleanOptions) -> int:
    """List or remove bitmaps, and return the exit code."""
    from backup.operations import clean as cleaning

    owners = _selected_owners(wanted)
    if wanted.images:
        images: list[Place] = [cleaning.ImagePlace(path) for path in wanted.images]
        return _list_or_remove(wanted, owners, images, [])
    if wanted.libvirt is not None:
        with _domain(wanted) as domain:
            removed = [what for owner in owners for what in domain.recover(owner)] if wanted.yes else []
            places, unread = cleaning.disk_places(domain.discover(), _started(wanted, owners))
            for text in unread:
                output.warning(text)
            return max(_list_or_remove(wanted, owners, places, removed), WARNINGS_EXIT_CODE if unread else 0)
    with _running(wanted) as host:
        removed = [what for owner in owners for what in host.recover(owner)] if wanted.yes else []
        return _list_or_remove(wanted, owners, cleaning.places_of(host.monitor, host.blocks()), removed)


def _selected_owners(wanted: CleanOptions) -> list[Owner]:
    """Return the repositories whose bitmaps are selected."""
    from backup.operations.clean import GoneOwner

    owners: list[Owner] = [GoneOwner(short_id) for short_id in wanted.repositories]
    named = wanted.repo.location is not None or find.config_or_default().repository is not None
    if wanted.bitmaps and named:
        owners.insert(0, find.repository(wanted.repo).ownership(None))
    return owners


def _started(wanted: CleanOptions, owners: Sequence[Owner]) -> Mapping[str, Collection[str]]:
    """Return the bitmaps that the repository's points started, by the paths of the disks' images."""
    from backup.operations import clean as cleaning

    named = any(owner.short_id not in wanted.repositories for owner in owners)
    return cleaning.started_bitmaps(find.repository(wanted.repo)) if named else {}


def _list_or_remove(
    wanted: CleanOptions, owners: Sequence[Owner], places: Sequence[Place], removed: Sequence[str]
) -> int:
    """List the bitmaps of the places, and with --yes remove those of the owners; return the exit code."""
    from backup.operations import clean as cleaning

    outcomes = cleaning.select(cleaning.find(places), {owner.short_id for owner in owners})
    if wanted.yes and owners:
        for owner in owners:
            owner.require_alone()
        outcomes = cleaning.remove(outcomes)
    _show_bitmaps(wanted, outcomes, removed)
    if wanted.yes and not owners:
        raise UsageError(
            "no repository is named whose bitmaps could be removed", hint="give --repo REPO, or --repository ID"
        )
    return WARNINGS_EXIT_CODE if any(outcome.problem for outcome in outcomes) else 0


def _show_bitmaps(wanted: CleanOptions, outcomes: Sequence[Outcome], removed: Sequence[str]) -> None:
    for outcome in outcomes:
        if outcome.problem is not None:
            output.warning(f"{outcome.bitmap.place.text}: {outcome.bitmap.name} was not removed: {outcome.problem}")
    if options.json:
        json_output.write(BitmapsDocument(removed, [BitmapDocument.of(outcome) for outcome in outcomes]))
        return
    if options.quiet:
        return
    for what in removed:
        output.line(f"removed {what}")
    for outcome in outcomes:
        output.line(f"{outcome.bitmap.place.text}: {outcome.bitmap.name}: {_state(outcome)}")
    output.note(_advice(wanted, outcomes), to_stderr=False)


def _state(outcome: Outcome) -> str:
    if outcome.removed:
        return "removed"
    if outcome.problem is not None:
        return "not removed"
    return "selected" if outcome.selected else f"not selected, of repository {outcome.bitmap.repository}"


def _advice(wanted: CleanOptions, outcomes: Sequence[Outcome]) -> str:
    if not outcomes:
        return "there is no bitmap with a name of pybackup's form, FAMILY.REPOSITORY.POINT"
    if any(outcome.removed for outcome in outcomes):
        return "the next backup of each of these disks reads the whole disk"
    if any(outcome.selected for outcome in outcomes) and not wanted.yes:
        return "nothing was removed; --yes removes the selected bitmaps, and the next backup reads the whole disk"
    return "nothing was removed; --bitmaps selects the bitmaps of the repository, --repository ID those of another one"


@dataclass(frozen=True, slots=True)
class BitmapDocument:
    """A bitmap: the node or image that holds it, and what became of it."""

    place: str
    name: str
    repository: str
    selected: bool
    removed: bool
    problem: str | None

    @classmethod
    def of(cls, outcome: Outcome) -> BitmapDocument:
        """Return the document of a bitmap."""
        return cls(
            place=outcome.bitmap.place.text,
            name=outcome.bitmap.name,
            repository=outcome.bitmap.repository,
            selected=outcome.selected,
            removed=outcome.removed,
            problem=outcome.problem,
        )


@dataclass(frozen=True, slots=True)
class BitmapsDocument:
    """The bitmaps that were found, and what else was removed from a running machine, as texts."""

    removed: Sequence[str]
    bitmaps: Sequence[BitmapDocument]
