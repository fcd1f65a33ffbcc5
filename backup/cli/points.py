"""
The commands that look at the points of a repository: list, show, restore, verify, copy, status, prune, pin.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from backup.cli import find
from backup.cli import output as render
from backup.cli.context import common_code, explained, options, show_error
from backup.cli.find import folder_of
from backup.cli.parameters import (
    DryRun,
    Limit,
    MachineNames,
    Manifest_,
    Repo,
    WriteLimit,
)
from backup.errors import WARNINGS_EXIT_CODE, BackupError, Failed, NotFound, UsageError
from backup.model.names import check_folder

if TYPE_CHECKING:
    from backup.model.manifest import Manifest
    from backup.operations.prune import Report as PruneReport
    from backup.operations.remove import Removal
    from backup.operations.restore_targets import Place
    from backup.operations.verify import Choice, Verified
    from backup.repository.repository import Machine
    from backup.repository.salvage import Lost

_KEEPS = {
    "last": "Keep the newest N points.",
    "hourly": "Keep the newest point of each of the last N hours that have one.",
    "daily": "The same of days.",
    "weekly": "The same of weeks.",
    "monthly": "The same of months.",
    "yearly": "The same of years.",
}


def _keep(what: str) -> Any:
    return typer.Option(f"--keep-{what}", metavar="N", help=_KEEPS[what])


def list_(machines: MachineNames = None, repo: Repo = None) -> None:
    """List the points that there are."""
    from backup.repository.repository import Contents

    found: list[tuple[Manifest, Path]] = []
    damaged = False
    for machine in find.machines(find.repository(folder_of(repo)), machines):
        try:
            contents = machine.contents()
        except BackupError as unreadable:  # of this machine's folder; the others are shown all the same
            contents = Contents({}, {machine.path.name: unreadable})
        for error in contents.damaged.values():
            damaged = True
            render.warning(error.message)
        ordered = sorted(contents.manifests.values(), key=lambda manifest: manifest.sequence)
        found.extend((manifest, machine.path / f"{manifest.point}.json") for manifest in ordered)
    if options.json:
        render.document([render.point_object(manifest, path) for manifest, path in found])
    elif found:
        render.points_table([manifest for manifest, _ in found])
    raise typer.Exit(WARNINGS_EXIT_CODE if damaged else 0)


def show(
    manifest: Manifest_,
    repo: Repo = None,
) -> None:
    """Show a point.  Its disks, where they came from, and their chains."""
    from backup.model import chain as chains

    machine, found = find.point(manifest, folder_of(repo))
    contents = machine.contents()
    links: dict[str, list[str] | BackupError] = {}
    for disk in found.disks:
        try:
            chain = chains.build(contents.manifests, found.point, disk.name, contents.damaged)
            links[disk.name] = [link.point for link in chain.links]
        except BackupError as error:
            links[disk.name] = explained(error)
    path = machine.path / f"{found.point}.json"
    if options.json:
        shown = {
            name: render.error_object(link) if isinstance(link, BackupError) else link for name, link in links.items()
        }
        render.document({**asdict(found), "manifest": str(path), "chains": shown})
    else:
        render.manifest_text(found, path, links)


def restore(
    manifest: Manifest_,
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="A file, a folder, a block device, an NBD URI, or - .")
    ],
    disk: Annotated[str | None, typer.Option("--disk", metavar="NAME", help="Only this disk of the point.")] = None,
    format_: Annotated[
        str | None, typer.Option("--format", metavar="raw|qcow2", help="Else the name's end decides: .qcow2, or raw.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what TARGET holds.")] = False,
    salvage: Annotated[
        bool, typer.Option("--salvage", help="Of a damaged chain: write zeroes for what is lost, and list that.  12.")
    ] = False,
    repo: Repo = None,
    limit: WriteLimit = None,
) -> None:
    """Bring a point's disk back, checking every digest on the way."""
    from backup.cli import settings
    from backup.operations import restore as restoring
    from backup.operations import restore_space, restore_targets
    from backup.repository import salvage as salvaging

    find.require_format(format_)
    machine, found = find.point(manifest, folder_of(repo))
    config = find.config_or_default()
    # Not the configuration's limit: on the day of a restore everybody waits for it.
    workers, most = settings.workers(config), None if limit is None else settings.limit(limit, config)
    placed = restore_targets.place(machine, found, target, disk, format_, force=force)
    for text in placed.warnings:
        render.warning(text)
    if target == restore_targets.STDOUT:
        _stream(machine, found, placed.places[0], workers, most, salvage=salvage)
        return
    restore_space.require(machine, found, placed.places)
    done: list[dict[str, Any]] = []
    lost: list[tuple[str, Lost]] = []
    with restore_targets.made(placed.folder):
        for place in placed.places:
            began = time.monotonic()
            with render.progress(wanted=not options.quiet) as progress:
                restored = restoring.restore_disk(
                    machine,
                    found.point,
                    place.disk,
                    place.target,
                    image_format=place.format,
                    force=force,
                    workers=workers,
                    progress=progress,
                    limit=most,
                    salvaging=salvage,
                )
            seconds = round(time.monotonic() - began, 3)
            lost += [(place.disk, each) for each in restored.lost]
            done.append({"name": place.disk, "target": place.target, **asdict(restored), "seconds": seconds})
            if not options.json and not options.quiet:
                name = f"{found.machine}/{place.disk}"
                render.line(render.restored_line(name, place.target, restored.size, seconds))
                for text in render.lost_lines(restored.lost):
                    render.line(text)
    error = salvaging.loss(found.machine, lost)
    if error is not None:
        show_error(error)
    if options.json:
        told = None if error is None else render.error_object(error)
        document = {"machine": found.machine, "point": found.point, "warnings": list(placed.warnings), "error": told}
        render.document({**document, "disks": done})
    if error is not None:
        raise typer.Exit(error.exit_code)
    raise typer.Exit(WARNINGS_EXIT_CODE if placed.warnings else 0)


def _stream(machine: Machine, point: Manifest, place: Place, workers: int, limit: int | None, *, salvage: bool) -> None:
    """A disk to standard output, and all that is said about it to standard error."""
    from backup.engine import streamer as streaming

    output = 1  # sys.stdout would buffer once more
    if os.isatty(output):
        raise UsageError(
            "standard output is a terminal", hint="send the stream into a file or a program: > FILE, | PROGRAM"
        )
    for given, option in ((options.json, "--json"), (salvage, "--salvage"), (place.format != "raw", "--format qcow2")):
        if given:
            raise UsageError(f"{option} together with -", hint="standard output takes the raw stream and nothing else")
    began = time.monotonic()
    with render.progress(wanted=not options.quiet) as progress:
        done = streaming.stream(
            machine, point.point, place.disk, output, workers=workers, progress=progress, limit=limit
        )
    if not options.quiet:
        name, seconds = f"{point.machine}/{place.disk}", time.monotonic() - began
        render.note(render.restored_line(name, "standard output", done.size, seconds), to_stderr=True)


def verify(
    what: Annotated[
        list[str] | None,
        typer.Argument(metavar="MANIFEST|MACHINE", help="All machines, where none is named.", show_default=False),
    ] = None,
    repo: Repo = None,
    deep: Annotated[bool, typer.Option("--deep", help="Decompress every cluster as well.")] = False,
    older_than: Annotated[
        str | None, typer.Option("--older-than", metavar="30d", help="Not the files found sound since then.")
    ] = None,
    sample: Annotated[
        str | None, typer.Option("--sample", metavar="5%", help="Only a random share of the 4 MiB blocks.")
    ] = None,
    limit: Limit = None,
) -> None:
    """Re-read backups and find every changed byte.  12 for damage, 10 for something missing."""
    from backup.cli import settings
    from backup.operations import verify as verifying

    config = find.config_or_default()
    workers, most = settings.workers(config), settings.limit(limit, config)
    choice = _choice(older_than, sample, deep=deep)
    found: list[Verified] = []
    with render.progress(wanted=not options.quiet) as progress:
        for machine, points in find.points(what or [], folder_of(repo)):
            try:
                progress.begin(machine.name, verifying.stored_bytes(machine, points, choice, deep=deep))
                verified = verifying.verify_machine(
                    machine,
                    deep=deep,
                    workers=workers,
                    progress=progress.advance,
                    points=points,
                    choice=choice,
                    limit=most,
                )
            except BackupError as error:  # of this machine's folder; the others are verified all the same
                verified = verifying.unverified(machine, error)
            found.append(verified)
    problems = [problem for result in found for problem in result.problems]
    names = ("points", "files", "bytes", "skipped", "sampled")
    sums = {name: sum(getattr(result, name) for result in found) for name in names}
    if options.json:
        render.document({**sums, "deep": deep, "problems": render.problem_objects(problems)})
    elif not options.quiet:
        render.line(
            f"verified {render.verified_text(sums)}: {len(problems) or 'no'} problem{'s' if len(problems) != 1 else ''}"
        )
    for why in sorted({result.forgotten for result in found if result.forgotten is not None}):
        if not options.quiet:
            render.note(f"what was found is not remembered: {why}", to_stderr=True)
    for problem in problems:
        render.problem(problem)
    raise typer.Exit(verifying.exit_code(problems))


def _choice(older_than: str | None, sample: str | None, *, deep: bool) -> Choice:
    from backup.operations.verify import Choice
    from backup.units import parse_duration, parse_share

    if deep and sample is not None:
        raise UsageError("--deep together with --sample", hint="a sample is of blocks, whose clusters cross their ends")
    since = None
    if older_than is not None:
        try:
            since = datetime.now(UTC) - timedelta(seconds=parse_duration(older_than))
        except OverflowError:
            since = datetime.min.replace(tzinfo=UTC)  # before Christ: all that was ever verified is newer
    return Choice(since, 1.0 if sample is None else parse_share(sample))


def copy_(
    what: Annotated[str, typer.Argument(metavar="MACHINE[/POINT]", help="A machine, or a point and its chain.")],
    other: Annotated[str, typer.Argument(metavar="OTHER-REPOSITORY", help="A folder that `init --copy-of` made.")],
    repo: Repo = None,
    limit: Limit = None,
    dry_run: DryRun = False,
) -> None:
    """Copy points to a second place.  Only what is missing there, every digest checked on the way."""
    from backup.cli import settings
    from backup.operations import copy
    from backup.operations.verify import exit_code
    from backup.repository.repository import Repository

    [(machine, points)] = find.points([what], folder_of(repo))
    config = find.config_or_default()
    most = settings.limit(limit, config)
    source = Repository.open(machine.path.parent)
    contents = machine.contents()
    if not contents.manifests and not contents.damaged:
        raise NotFound(f"machine {machine.name} has no point", hint="see: `pybackup list`")
    place = copy.open_second(Path(check_folder(other)), source, settings.modes(config))
    if not dry_run:
        place.tidy()
    second, point = place.machine(machine.name), points[0] if points else None
    began = time.monotonic()
    if dry_run:
        done = copy.rehearse(machine, second, point)
    else:
        with render.progress(wanted=not options.quiet) as progress:
            done = copy.replicate(
                machine,
                second,
                point,
                workers=settings.workers(config),
                begin=functools.partial(progress.begin, machine.name),
                advance=progress.advance,
                limit=most,
            )
    if options.json:
        render.document(render.replicated_object(machine.name, other, done, dry_run=dry_run))
    elif not options.quiet:
        seconds = None if dry_run else time.monotonic() - began
        render.line(render.replicated_line(machine.name, other, done, seconds))
    for problem in done.problems:
        render.problem(problem)
    raise typer.Exit(exit_code(done.problems))


def status(
    machines: MachineNames = None,
    max_age: Annotated[
        str | None, typer.Option("--max-age", metavar="26h", help="Exit with 1 where a newest point is older.")
    ] = None,
    repo: Repo = None,
) -> None:
    """Tell how old each disk's newest point is, and what to do.  1 too old, 12 damaged, 10 nothing there."""
    from backup.cli import settings
    from backup.operations import status as states
    from backup.units import parse_duration

    limits = states.Limits(datetime.now(UTC), None if max_age is None else parse_duration(max_age))
    config = find.config() if repo is None else find.config_or_default()
    repository = find.repository(folder_of(repo))
    expected = settings.expected_disks(config, repository.path)
    known = {*repository.machine_names(), *expected}
    found = []
    for name in dict.fromkeys(machines or sorted(known)):
        machine = repository.machine(name) if name in known else find.machines(repository, [name])[0]
        found += states.look(machine, expected.get(name), limits, named=name in expected or not expected)
    if not found:
        raise NotFound(f"the repository {repository.path} has no machine", hint="`pybackup full` makes a first point")
    code = states.exit_code(found)
    if options.json:
        render.document(render.status_object(found, code, states.summary(found), limits.max_age))
    elif not options.quiet:
        render.line(render.plain(states.summary(found)))
        render.status_table(found, limits.now)
    if code and (options.json or options.quiet):
        render.warning(states.summary(found))
    raise typer.Exit(code)


def prune(
    machines: MachineNames = None,
    keep_last: Annotated[str | None, _keep("last")] = None,
    keep_hourly: Annotated[str | None, _keep("hourly")] = None,
    keep_daily: Annotated[str | None, _keep("daily")] = None,
    keep_weekly: Annotated[str | None, _keep("weekly")] = None,
    keep_monthly: Annotated[str | None, _keep("monthly")] = None,
    keep_yearly: Annotated[str | None, _keep("yearly")] = None,
    keep_within: Annotated[
        str | None,
        typer.Option(
            "--keep-within", metavar="D", help="Keep what is no older than D, such as 30d, before the newest."
        ),
    ] = None,
    batch: Annotated[
        str | None, typer.Option("--batch", metavar="N", help="Rewrite a full when N points can go at once (7).")
    ] = None,
    repo: Repo = None,
    dry_run: DryRun = False,
) -> None:
    """Remove the points that no --keep option names.  Those that stay take over what they need of them."""
    from backup.cli import pruning, settings

    counts = {
        "last": keep_last,
        "hourly": keep_hourly,
        "daily": keep_daily,
        "weekly": keep_weekly,
        "monthly": keep_monthly,
        "yearly": keep_yearly,
    }
    config = find.config() if repo is None else find.config_or_default()
    given = pruning.Keep.of(counts, keep_within, batch)
    path = settings.repository_path(folder_of(repo), config)
    chosen = [(name, given.retention(config, name)) for name in _names(path, machines)]
    outcomes: list[PruneReport | BackupError] = []
    objects = []
    for name, wanted in chosen:
        try:
            with render.progress(wanted=not options.quiet) as progress:
                outcome = pruning.prune_one(path, name, wanted, config, progress, dry_run=dry_run)
        except Exception as error:  # noqa: BLE001 - the other machines are pruned all the same
            failed = explained(error)
            show_error(failed, of=name if len(chosen) > 1 else None)
            outcomes.append(failed)
            objects.append(render.unpruned_object(name, failed, dry_run=dry_run))
            continue
        outcomes.append(outcome)
        objects.append(render.pruned_object(outcome, dry_run=dry_run))
        _show_pruned(outcome, dry_run=dry_run)
    if options.json:
        render.document(objects)
    raise typer.Exit(common_code(outcomes))


def _names(repository: Path, machines: Sequence[str] | None) -> list[str]:
    from backup.repository.repository import Repository

    return [machine.name for machine in find.machines(Repository.open(repository), machines)]


def _show_pruned(report: PruneReport, *, dry_run: bool) -> None:
    for warning in report.warnings:
        render.warning(f"{report.machine}: {warning}")
    if options.json or options.quiet:
        return
    if dry_run or options.verbose:
        render.prune_table(report)
    render.line(render.prune_line(report, dry_run=dry_run))


def remove(
    what: Annotated[str, typer.Argument(metavar="MACHINE[/POINT]", help="A machine, or a point by its whole id.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask; needed where there is no terminal.")] = False,
    repo: Repo = None,
    dry_run: DryRun = False,
) -> None:
    """Remove a point, or a machine with all its points.  The points that stay take over what they need."""
    from backup.cli import settings
    from backup.operations import remove as removing
    from backup.repository.repository import Repository

    name, slash, point = what.partition("/")
    if slash and (not point or point == "latest"):
        raise UsageError(f"{what} names no point", hint=f"name the point by its whole id; see: `pybackup list {name}`")
    if not yes and not dry_run and not sys.stdin.isatty():
        raise UsageError("remove asks before it removes, and there is no terminal", hint="give --yes, or --dry-run")
    config = find.config() if repo is None else find.config_or_default()
    path = settings.repository_path(folder_of(repo), config)
    [machine] = find.machines(Repository.open(path, settings.modes(config)), [name])
    workers = settings.workers(config)
    removal = removing.plan(machine, point or None, workers=workers)
    if not dry_run:
        if not yes:
            _require_confirmed(removal)
        with render.progress(wanted=not options.quiet) as progress:
            removal = removing.remove(machine, removal, workers=workers, progress=progress)
    if options.json:
        render.document({**asdict(removal), "dry_run": dry_run, "error": None})
    elif not options.quiet:
        for text in render.removal_lines(removal, "would remove" if dry_run else "removed"):
            render.line(text)


def _require_confirmed(removal: Removal) -> None:
    for text in render.removal_lines(removal, "this removes"):
        render.to_stderr(text)
    if not render.asked("Go on?"):
        raise Failed("not confirmed: nothing was removed", hint="answer y, or give --yes")


def pin(manifest: Manifest_, repo: Repo = None) -> None:
    """Protect a point: no prune removes it."""
    _set_pin(manifest, repo, pinned=True)


def unpin(manifest: Manifest_, repo: Repo = None) -> None:
    """Let prune remove a point again."""
    _set_pin(manifest, repo, pinned=False)


def _set_pin(manifest: str, repo: str | None, *, pinned: bool) -> None:
    from backup.operations import prune as pruning

    machine, found = find.point(manifest, folder_of(repo))
    changed = pruning.set_pin(machine, found.point, pinned=pinned)
    if options.json:
        render.document({"machine": found.machine, "point": found.point, "pinned": pinned, "changed": changed})
    elif not options.quiet:
        state = "pinned" if pinned else "not pinned"
        render.line(f"point {found.point} of machine {found.machine} is {state}{'' if changed else ' already'}")
