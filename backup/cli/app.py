"""
The commands: parse, call, show, exit code.  The only user of typer; `main` is the only place that catches errors.

Modules that cost time to import (numpy, libnbd, rich) are imported by the command that needs them: a cron job over a
hundred idle disks is a hundred starts.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.exceptions import TyperException

import backup
from backup.cli import process, render
from backup.errors import (
    WARNINGS_EXIT_CODE,
    BackupError,
    BitmapUnusable,
    Damaged,
    Failed,
    Interrupted,
    NotFound,
    UsageError,
)

if TYPE_CHECKING:
    from backup.audit import Audit
    from backup.config import Config
    from backup.consider import Request
    from backup.create import Report
    from backup.manifest import Manifest
    from backup.prune import Report as PruneReport
    from backup.repository import Machine, Repository
    from backup.serve import Served
    from backup.verify import Choice, Verified

app = typer.Typer(
    name="pybackup",
    help="Incremental backups of QEMU/KVM disks, by dirty bitmaps, into chains of plain qcow2 files.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@dataclass(slots=True)
class _Global:
    """The options before the command."""

    config: Path | None = None
    verbose: bool = False
    quiet: bool = False
    debug: bool = False
    json: bool = False
    """The command was asked for JSON: then errors are a document too."""


_options = _Global()

MachineNames = Annotated[list[str] | None, typer.Argument(metavar="[MACHINE]...", show_default=False)]
# Texts and flags only, also where a path is meant: see _unconverted.
Repo = Annotated[str | None, typer.Option("--repo", metavar="DIR", help="The repository's folder.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]
Image = Annotated[str | None, typer.Option("--image", metavar="FILE", help="An image that no machine has open.")]
ImageFormat = Annotated[
    str | None,
    typer.Option("--image-format", metavar="qcow2|raw", help="The image's format; else its first bytes tell."),
]
Nbd = Annotated[str | None, typer.Option("--nbd", metavar="URI", help="An export of any NBD server.")]
Since = Annotated[
    str | None,
    typer.Option("--since", metavar="POINT", help="With --nbd: the point that the server's bitmap starts from."),
]
Qmp = Annotated[str | None, typer.Option("--qmp", metavar="SOCKET", help="The QMP socket of a running machine's QEMU.")]
Nodes = Annotated[
    list[str] | None,
    typer.Option("--node", metavar="NODE", help="With --qmp: a disk, by its node, device id or image; again for more."),
]
Scratch = Annotated[
    str | None, typer.Option("--scratch", metavar="DIR", help="With --qmp: where QEMU keeps what the guest overwrites.")
]
FreezeFlag = Annotated[
    bool, typer.Option("--freeze", help="With --qmp: have the guest agent freeze the file systems for the instant.")
]
AgentSocket = Annotated[str | None, typer.Option("--agent", metavar="SOCKET", help="The guest agent's socket.")]
MachineName = Annotated[str | None, typer.Option("--machine", metavar="NAME", help="The machine, for a source.")]
DiskNames = Annotated[
    list[str] | None, typer.Option("--disk", metavar="NAME", help="The disk, for a source; in the order of --node.")
]
BitmapName = Annotated[
    str | None,
    typer.Option("--bitmap", metavar="NAME", help="Family of the bitmaps to keep; with --nbd, the server's bitmap."),
]
CompressionText = Annotated[
    str | None, typer.Option("--compression", metavar="none|zstd[:LEVEL]", help="How clusters are stored.")
]
Limit = Annotated[
    str | None, typer.Option("--limit", metavar="SIZE", help="Read at most so many bytes a second, such as 50M.")
]
Filesystem = Annotated[
    str | None, typer.Option("--filesystem", metavar="DEVICE", help="Where there are several: /dev/sda1, /dev/vg/lv.")
]
PointDisk = Annotated[str | None, typer.Option("--disk", metavar="NAME", help="The disk, where there are several.")]

DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what a run would do; change nothing.")]
NoFallback = Annotated[
    bool, typer.Option("--no-fallback", help="Fail with 14 rather than read everything (a rescan or a full) instead.")
]


Manifest_ = Annotated[str, typer.Argument(metavar="MANIFEST", help="A path, MACHINE/POINT or MACHINE/latest.")]


def _keep(what: str) -> Any:
    return typer.Option(f"--keep-{what}", metavar="N", help=_KEEPS[what])


_KEEPS = {
    "last": "Keep the newest N points.",
    "hourly": "Keep the newest point of each of the last N hours that have one.",
    "daily": "The same of days.",
    "weekly": "The same of weeks.",
    "monthly": "The same of months.",
    "yearly": "The same of years.",
}


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pybackup {backup.__version__}")
        raise typer.Exit


@app.callback()
def _global(
    config: Annotated[str | None, typer.Option("--config", metavar="FILE", help="The configuration.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Say more.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Say nothing but warnings and errors.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    del version
    if verbose and quiet:
        raise UsageError("--verbose together with --quiet", hint="choose one")
    _options.config = _path(config)
    _options.verbose, _options.quiet, _options.debug = verbose, quiet, debug
    if verbose or debug:
        import logging

        logging.basicConfig(level=logging.INFO, format="pybackup: %(message)s")


@app.command()
def full(
    machines: MachineNames = None,
    image: Image = None,
    image_format: ImageFormat = None,
    nbd: Nbd = None,
    qmp: Qmp = None,
    node: Nodes = None,
    scratch: Scratch = None,
    freeze: FreezeFlag = False,
    agent: AgentSocket = None,
    machine: MachineName = None,
    disk: DiskNames = None,
    repo: Repo = None,
    bitmap: BitmapName = None,
    compression: CompressionText = None,
    limit: Limit = None,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Back up everything, and begin a chain."""
    _back_up("full", **locals())


@app.command()
def incremental(
    machines: MachineNames = None,
    image: Image = None,
    image_format: ImageFormat = None,
    nbd: Nbd = None,
    since: Since = None,
    qmp: Qmp = None,
    node: Nodes = None,
    scratch: Scratch = None,
    freeze: FreezeFlag = False,
    agent: AgentSocket = None,
    machine: MachineName = None,
    disk: DiskNames = None,
    repo: Repo = None,
    bitmap: BitmapName = None,
    compression: CompressionText = None,
    limit: Limit = None,
    no_fallback: NoFallback = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Back up what changed since the newest point; everything where that cannot be known."""
    _back_up("incremental", **locals())


@app.command()
def rescan(
    machines: MachineNames = None,
    image: Image = None,
    image_format: ImageFormat = None,
    nbd: Nbd = None,
    qmp: Qmp = None,
    node: Nodes = None,
    scratch: Scratch = None,
    freeze: FreezeFlag = False,
    agent: AgentSocket = None,
    machine: MachineName = None,
    disk: DiskNames = None,
    repo: Repo = None,
    bitmap: BitmapName = None,
    compression: CompressionText = None,
    limit: Limit = None,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Back up what differs from the newest point, by reading everything and comparing."""
    _back_up("rescan", **locals())


def _back_up(wanted: str, *, repo: str | None, json: bool, **options: Any) -> None:
    from backup.cli import requests, settings
    from backup.repository import Repository

    _options.json = json
    config = _config()
    given = requests.Options.of(wanted, **options)
    _check_format(given.image_format)
    made = requests.make_requests(given, config)
    path = settings.repository_path(_path(repo), config)
    modes = settings.modes(config)

    def open_repository() -> Repository:
        return (Repository.open_or_imagine if given.dry_run else Repository.open_or_create)(path, modes)

    outcomes = []
    unshown: Exception | None = None
    for request in made:
        outcome = _back_up_one(open_repository, request)
        if not isinstance(outcome, BackupError) and not given.dry_run:
            outcome = _prune_after(outcome, path, config)
        outcomes.append((request, outcome))
        try:
            _show_outcome(request, outcome, json, several=len(made) > 1)
        except (Failed, BrokenPipeError) as error:
            unshown = error  # the other machines are backed up all the same
    if unshown is not None:
        raise unshown
    if json:
        render.document(
            [
                render.failure_object(request.machine, outcome)
                if isinstance(outcome, BackupError)
                else render.report_object(outcome)
                for request, outcome in outcomes
            ]
        )
    raise typer.Exit(_exit_code([outcome for _, outcome in outcomes]))


def _back_up_one(open_repository: Callable[[], Repository], request: Request) -> Report | BackupError:
    """Back up one machine.  Whatever happens to it, a bug included, must not keep the others from their backups."""
    from backup.create import create

    try:
        with render.progress(wanted=not _options.quiet) as progress:
            return create(open_repository, request, progress)
    except Exception as error:  # noqa: BLE001 - shown, and in the exit code
        return _explained(error)


def _prune_after(report: Report, repository: Path, config: Config) -> Report:
    """Prune a machine that was just backed up, where the configuration wants it; what fails is the backup's warning."""
    from dataclasses import replace

    wanted = config.retention_of(report.machine)
    if wanted is None or not wanted.after_backup:
        return report
    try:
        from backup.cli import pruning

        pruned = pruning.prune_one(repository, report.machine, wanted, config, render.Quiet())
    except Exception as error:  # noqa: BLE001 - the point is made, and whatever keeps it from being thinned is shown
        return replace(report, warnings=(*report.warnings, f"not pruned: {_explained(error).message}"))
    if not pruned.removed:
        return report
    return replace(report, notes=(*report.notes, render.prune_line(pruned, dry_run=False)))


def _show_outcome(request: Request, outcome: Report | BackupError, json: bool, *, several: bool) -> None:
    if isinstance(outcome, BackupError):
        _show_error(outcome, of=request.machine if several else None)
        return
    for warning in outcome.warnings:
        render.warning(f"{outcome.machine}: {warning}")
    if _options.quiet:
        return
    if not json:
        for text in render.report_lines(outcome, dry_run=request.dry_run):
            render.line(text)
    for note in outcome.notes:
        render.note(note, to_stderr=json)
    render.flush()


def _exit_code(outcomes: Sequence[Report | PruneReport | BackupError]) -> int:
    codes = {outcome.exit_code for outcome in outcomes if isinstance(outcome, BackupError)}
    if codes:
        return codes.pop() if len(codes) == 1 else 1
    warned = any(outcome.warnings for outcome in outcomes if not isinstance(outcome, BackupError))
    return WARNINGS_EXIT_CODE if warned else 0


@app.command()
def audit(
    machines: MachineNames = None,
    image: Image = None,
    image_format: ImageFormat = None,
    nbd: Nbd = None,
    since: Since = None,
    qmp: Qmp = None,
    node: Nodes = None,
    scratch: Scratch = None,
    machine: MachineName = None,
    disk: DiskNames = None,
    repo: Repo = None,
    bitmap: BitmapName = None,
    limit: Limit = None,
    json: Json = False,
) -> None:
    """Read disks whole and hold them against their newest points and what changed since: 12 where those lie."""
    _audit(**locals())


def _audit(*, repo: str | None, json: bool, **options: Any) -> None:
    from backup.cli import requests

    _options.json = json
    config = _config()
    given = requests.Options.of("audit", **options)
    _check_format(given.image_format)
    made = requests.make_requests(given, config)
    repository = _repository(_path(repo))
    outcomes = []
    for request in made:
        outcome = _audit_one(repository, request)
        outcomes.append((request, outcome))
        _show_audit(request, outcome, json, several=len(made) > 1)
    if json:
        render.document(
            [
                render.audit_failure_object(request.machine, outcome)
                if isinstance(outcome, BackupError)
                else render.audit_object(outcome)
                for request, outcome in outcomes
            ]
        )
    raise typer.Exit(_audit_code([outcome for _, outcome in outcomes]))


def _audit_one(repository: Repository, request: Request) -> Audit | BackupError:
    """Audit one machine.  Whatever happens to it must not keep the others from their audits."""
    from backup.audit import audit as take

    try:
        with render.progress(wanted=not _options.quiet) as progress:
            return take(repository, request, progress)
    except Exception as error:  # noqa: BLE001 - shown, and in the exit code
        return _explained(error)


def _show_audit(request: Request, outcome: Audit | BackupError, json: bool, *, several: bool) -> None:
    if isinstance(outcome, BackupError):
        _show_error(outcome, of=request.machine if several else None)
        return
    for warning in outcome.warnings:
        render.warning(f"{outcome.machine}: {warning}")
    if not json and not _options.quiet:
        for text in render.audit_lines(outcome):
            render.line(text)
        render.flush()
    render.audit_problems(outcome)


def _audit_code(outcomes: Sequence[Audit | BackupError]) -> int:
    """The worst: a lie, or a damaged chain; then errors as of backups; then what nobody can tell."""
    from backup.audit import LIES, UNKNOWN

    failed = {outcome.exit_code for outcome in outcomes if isinstance(outcome, BackupError)}
    audits = [outcome for outcome in outcomes if not isinstance(outcome, BackupError)]
    verdicts = {disk.verdict for found in audits for disk in found.disks}
    if LIES in verdicts or Damaged.exit_code in failed:
        return Damaged.exit_code
    if UNKNOWN in verdicts:
        failed.add(BitmapUnusable.exit_code)
    if failed:
        return failed.pop() if len(failed) == 1 else 1
    return WARNINGS_EXIT_CODE if any(found.warnings for found in audits) else 0


@app.command("map")
def map_(
    image: Image = None,
    image_format: ImageFormat = None,
    nbd: Nbd = None,
    qmp: Qmp = None,
    node: Annotated[str | None, typer.Option("--node", metavar="NODE", help="With --qmp: the disk.")] = None,
    scratch: Scratch = None,
    bitmap: Annotated[str | None, typer.Option("--bitmap", metavar="EXACT-NAME", help="The bitmap to show.")] = None,
    totals: Annotated[bool, typer.Option("--totals", help="Sums only.")] = False,
    json: Json = False,
) -> None:
    """Show a source as the planner sees it: dirty or clean, data, zero or hole.  Bytes."""
    from backup import mapping
    from backup.cli import requests

    _options.json = json
    _check_format(image_format)
    place = requests.Place(_path(image), image_format, nbd, _path(qmp), node, _path(scratch))
    with requests.open_disk(place, bitmap, _config_or_default(), render.warning) as export:
        if totals:
            sums = mapping.map_totals(export, bitmap)
            render.document(asdict(sums)) if json else render.map_sums(sums)
        elif json:
            render.map_objects(mapping.read_map(export, bitmap))
        else:
            render.map_table(mapping.read_map(export, bitmap), bitmap)


@app.command("list")
def list_(machines: MachineNames = None, repo: Repo = None, json: Json = False) -> None:
    """List the points that there are."""
    _options.json = json
    found: list[tuple[Manifest, Path]] = []
    damaged = False
    for machine in _machines(_repository(_path(repo)), machines):
        contents = machine.contents()
        for error in contents.damaged.values():
            damaged = True
            render.warning(error.message)
        ordered = sorted(contents.manifests.values(), key=lambda manifest: manifest.sequence)
        found.extend((manifest, machine.path / f"{manifest.point}.json") for manifest in ordered)
    if json:
        render.document([render.point_object(manifest, path) for manifest, path in found])
    elif found:
        render.points_table([manifest for manifest, _ in found])
    raise typer.Exit(WARNINGS_EXIT_CODE if damaged else 0)


@app.command()
def show(
    manifest: Manifest_,
    repo: Repo = None,
    json: Json = False,
) -> None:
    """Show a point: its disks, where they came from, and their chains."""
    from backup import chain as chains

    _options.json = json
    machine, found = _find_point(manifest, _path(repo))
    contents = machine.contents()
    links: dict[str, list[str] | BackupError] = {}
    for disk in found.disks:
        try:
            chain = chains.build(contents.manifests, found.point, disk.name, contents.damaged)
            links[disk.name] = [link.point for link in chain.links]
        except BackupError as error:
            links[disk.name] = error
    path = machine.path / f"{found.point}.json"
    if json:
        shown = {
            name: render.error_object(link) if isinstance(link, BackupError) else link for name, link in links.items()
        }
        render.document({**asdict(found), "manifest": str(path), "chains": shown})
    else:
        render.manifest_text(found, path, links)


@app.command()
def restore(
    manifest: Manifest_,
    target: Annotated[str, typer.Argument(metavar="TARGET", help="A file, a block device, an NBD URI, or a folder.")],
    disk: Annotated[str | None, typer.Option("--disk", metavar="NAME", help="Only this disk of the point.")] = None,
    format_: Annotated[str, typer.Option("--format", metavar="raw|qcow2", help="Of the file that is made.")] = "raw",
    force: Annotated[bool, typer.Option("--force", help="Replace what TARGET holds.")] = False,
    repo: Repo = None,
    json: Json = False,
) -> None:
    """Bring a point's disk back, checking every digest on the way."""
    from backup import restore as restoring
    from backup.cli import settings

    _options.json = json
    _check_format(format_)
    machine, found = _find_point(manifest, _path(repo))
    workers = settings.workers(_config_or_default())
    done = []
    for name, path in restoring.targets(machine, found, target, disk, format_):
        began = time.monotonic()
        with render.progress(wanted=not _options.quiet) as progress:
            restored = restoring.restore_disk(
                machine, found.point, name, path, image_format=format_, force=force, workers=workers, progress=progress
            )
        seconds = time.monotonic() - began
        done.append({"name": name, "target": path, **asdict(restored), "seconds": round(seconds, 3)})
        if not json and not _options.quiet:
            render.line(render.restored_line(f"{found.machine}/{name}", path, restored.size, seconds))
    if json:
        render.document({"machine": found.machine, "point": found.point, "error": None, "disks": done})


@app.command()
def verify(
    what: Annotated[list[str] | None, typer.Argument(metavar="[MANIFEST | MACHINE]...", show_default=False)] = None,
    repo: Repo = None,
    deep: Annotated[bool, typer.Option("--deep", help="Decompress every cluster as well.")] = False,
    older_than: Annotated[
        str | None, typer.Option("--older-than", metavar="30d", help="Not the files found sound since then.")
    ] = None,
    sample: Annotated[
        str | None, typer.Option("--sample", metavar="5%", help="Only a random share of the 4 MiB blocks.")
    ] = None,
    json: Json = False,
) -> None:
    """Re-read backups and find every changed byte: 12 for damage, 10 for something missing."""
    from backup import verify as verifying
    from backup.cli import settings

    _options.json = json
    workers = settings.workers(_config_or_default())
    choice = _choice(older_than, sample, deep=deep)
    found: list[Verified] = []
    with render.progress(wanted=not _options.quiet) as progress:
        for machine, points in _what_to_verify(what or [], _path(repo)):
            progress.begin(machine.name, verifying.stored_bytes(machine, points, choice, deep=deep))
            found.append(
                verifying.verify_machine(
                    machine, deep=deep, workers=workers, progress=progress.advance, points=points, choice=choice
                )
            )
    problems = [problem for result in found for problem in result.problems]
    names = ("points", "files", "bytes", "skipped", "sampled")
    sums = {name: sum(getattr(result, name) for result in found) for name in names}
    if json:
        render.document({**sums, "deep": deep, "problems": render.problem_objects(problems)})
    elif not _options.quiet:
        render.line(
            f"verified {render.verified_text(sums)}: {len(problems) or 'no'} problem{'s' if len(problems) != 1 else ''}"
        )
    for why in sorted({result.forgotten for result in found if result.forgotten is not None}):
        if not _options.quiet:
            render.note(f"what was found is not remembered: {why}", to_stderr=True)
    for problem in problems:
        render.problem(problem)
    raise typer.Exit(verifying.exit_code(problems))


def _choice(older_than: str | None, sample: str | None, *, deep: bool) -> Choice:
    from backup.units import parse_duration, parse_share
    from backup.verify import Choice

    if deep and sample is not None:
        raise UsageError("--deep together with --sample", hint="a sample is of blocks, whose clusters cross their ends")
    since = None
    if older_than is not None:
        try:
            since = datetime.now(UTC) - timedelta(seconds=parse_duration(older_than))
        except OverflowError:
            since = datetime.min.replace(tzinfo=UTC)  # before Christ: all that was ever verified is newer
    return Choice(since, 1.0 if sample is None else parse_share(sample))


@app.command("copy")
def copy_(
    what: Annotated[str, typer.Argument(metavar="MACHINE[/POINT]", help="A machine, or a point and its chain.")],
    other: Annotated[str, typer.Argument(metavar="OTHER-REPOSITORY", help="A new folder, or an earlier copy.")],
    repo: Repo = None,
    json: Json = False,
) -> None:
    """Copy points to a second place: only what is missing there, every digest checked on the way."""
    from backup import replicate
    from backup.cli import settings
    from backup.repository import Repository
    from backup.verify import exit_code

    _options.json = json
    [(machine, points)] = _what_to_verify([what], _path(repo))
    config = _config_or_default()
    source = Repository.open(machine.path.parent)
    contents = machine.contents()
    if not contents.manifests and not contents.damaged:
        raise NotFound(f"machine {machine.name} has no point", hint="see: pybackup list")
    second = replicate.open_second(Path(other), source, settings.modes(config)).machine(machine.name)
    began = time.monotonic()
    with render.progress(wanted=not _options.quiet) as progress:
        done = replicate.replicate(
            machine,
            second,
            points[0] if points else None,
            workers=settings.workers(config),
            begin=functools.partial(progress.begin, machine.name),
            advance=progress.advance,
        )
    if json:
        render.document(render.replicated_object(machine.name, other, done))
    elif not _options.quiet:
        render.line(render.replicated_line(machine.name, other, done, time.monotonic() - began))
    for problem in done.problems:
        render.problem(problem)
    raise typer.Exit(exit_code(done.problems))


@app.command()
def serve(
    manifest: Manifest_,
    disk: PointDisk = None,
    socket: Annotated[str | None, typer.Option("--socket", metavar="PATH", help="A Unix socket to listen on.")] = None,
    port: Annotated[str | None, typer.Option("--port", metavar="N", help="A TCP port; anyone there can read.")] = None,
    bind: Annotated[
        str | None, typer.Option("--bind", metavar="ADDRESS", help="With --port: instead of 127.0.0.1.")
    ] = None,
    writable: Annotated[bool, typer.Option("--writable", help="Let clients write; it is thrown away.")] = False,
    repo: Repo = None,
    json: Json = False,
) -> None:
    """Serve a point's disk over NBD, at once, until Ctrl-C; nothing is copied."""
    from backup import serve as serving

    _options.json = json
    where = serving.address(_path(socket), port, bind)
    machine, found = _find_point(manifest, _path(repo))
    name = serving.choose_disk(found, disk)
    with serving.serving(machine, found.point, name, where, writable=writable) as served:
        try:
            _show_served(found, name, served, writable, json)
            served.server.wait()
        except Interrupted:
            return  # that is how it is meant to end


def _show_served(point: Manifest, disk: str, served: Served, writable: bool, json: bool) -> None:
    if not served.protected:
        render.warning("the repository's file system has no locks: nothing keeps prune from what is served")
    if json:
        render.document(render.served_object(point, disk, served, writable))
    elif not _options.quiet:
        for text in render.served_lines(point, disk, served, writable):
            render.line(text)
    render.flush()


@app.command()
def files(
    manifest: Manifest_,
    path: Annotated[str, typer.Argument(metavar="[PATH]", help="A folder of the guest.", show_default=False)] = "/",
    disk: PointDisk = None,
    filesystem: Filesystem = None,
    repo: Repo = None,
    json: Json = False,
) -> None:
    """List a folder of the guest's file system at a point (needs libguestfs)."""
    from backup import guestfiles
    from backup.serve import choose_disk

    _options.json = json
    guestfiles.absolute(path)
    machine, found = _find_point(manifest, _path(repo))
    with guestfiles.opened(machine, found.point, choose_disk(found, disk), filesystem) as guest:
        entries = guest.list(path)
    _warn(guest.unmounted)
    if json:
        render.document([asdict(entry) for entry in entries])
    else:
        render.files_table(entries)
    raise typer.Exit(WARNINGS_EXIT_CODE if guest.unmounted else 0)


@app.command()
def get(
    manifest: Manifest_,
    path: Annotated[str, typer.Argument(metavar="PATH", help="A file or a folder of the guest.")],
    dest: Annotated[str, typer.Argument(metavar="DEST", help="A new name, or a folder to put it in.")],
    disk: PointDisk = None,
    filesystem: Filesystem = None,
    repo: Repo = None,
    json: Json = False,
) -> None:
    """Bring a file or folder of the guest back from a point (needs libguestfs)."""
    from backup import guestfiles
    from backup.serve import choose_disk

    _options.json = json
    machine, found = _find_point(manifest, _path(repo))
    target = guestfiles.target_of(path, Path(dest))
    guestfiles.require_new(target)
    with guestfiles.opened(machine, found.point, choose_disk(found, disk), filesystem) as guest:
        fetched = guest.get(path, target)
    warnings = [*guest.unmounted, *(f"left out, being no file, folder or link: {name}" for name in fetched.left_out)]
    _warn(warnings)
    if json:
        render.document({"path": path, "target": str(target), "error": None, **asdict(fetched)})
    elif not _options.quiet:
        render.line(render.fetched_line(path, target, fetched))
    raise typer.Exit(WARNINGS_EXIT_CODE if warnings else 0)


def _warn(texts: Sequence[str]) -> None:
    for text in texts:
        render.warning(text)


@app.command()
def status(
    machines: MachineNames = None,
    max_age: Annotated[
        str | None, typer.Option("--max-age", metavar="26h", help="Exit with 1 where a newest point is older.")
    ] = None,
    repo: Repo = None,
    json: Json = False,
) -> None:
    """Tell for each disk how old its newest point is, and what to do: 1 too old, 12 damaged, 10 nothing there."""
    from backup import status as states
    from backup.cli import settings
    from backup.units import parse_duration

    _options.json = json
    limits = states.Limits(datetime.now(UTC), None if max_age is None else parse_duration(max_age))
    config = _config() if repo is None else _config_or_default()
    repository = _repository(_path(repo))
    expected = settings.expected_disks(config, repository.path)
    names = machines or sorted({*repository.machine_names(), *expected})
    found = []
    for name in dict.fromkeys(names):
        machine = repository.machine(name) if name in expected else _machines(repository, [name])[0]
        found += states.look(machine, expected.get(name), limits)
    if not found:
        raise NotFound(f"the repository {repository.path} has no machine", hint="pybackup full makes a first point")
    code = states.exit_code(found)
    if json:
        render.document(render.status_object(found, code, states.summary(found), limits.max_age))
    elif not _options.quiet:
        render.line(render.plain(states.summary(found)))
        render.status_table(found, limits.now)
    if code and (json or _options.quiet):
        render.warning(states.summary(found))
    raise typer.Exit(code)


@app.command()
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
    json: Json = False,
) -> None:
    """Remove the points that no --keep option names; those that stay take over what they need of them."""
    from backup.cli import pruning, settings

    _options.json = json
    counts = {
        "last": keep_last,
        "hourly": keep_hourly,
        "daily": keep_daily,
        "weekly": keep_weekly,
        "monthly": keep_monthly,
        "yearly": keep_yearly,
    }
    config = _config() if repo is None else _config_or_default()
    given = pruning.Keep.of(counts, keep_within, batch)
    path = settings.repository_path(_path(repo), config)
    chosen = [(name, given.retention(config, name)) for name in _names(path, machines)]
    outcomes: list[PruneReport | BackupError] = []
    objects = []
    for name, wanted in chosen:
        try:
            with render.progress(wanted=not _options.quiet) as progress:
                outcome = pruning.prune_one(path, name, wanted, config, progress, dry_run=dry_run)
        except Exception as error:  # noqa: BLE001 - the other machines are pruned all the same
            failed = _explained(error)
            _show_error(failed, of=name if len(chosen) > 1 else None)
            outcomes.append(failed)
            objects.append(render.unpruned_object(name, failed, dry_run=dry_run))
            continue
        outcomes.append(outcome)
        objects.append(render.pruned_object(outcome, dry_run=dry_run))
        _show_pruned(outcome, dry_run=dry_run, json=json)
    if json:
        render.document(objects)
    raise typer.Exit(_exit_code(outcomes))


def _names(repository: Path, machines: Sequence[str] | None) -> list[str]:
    from backup.repository import Repository

    return [machine.name for machine in _machines(Repository.open(repository), machines)]


def _show_pruned(report: PruneReport, *, dry_run: bool, json: bool) -> None:
    for warning in report.warnings:
        render.warning(f"{report.machine}: {warning}")
    if json or _options.quiet:
        return
    if dry_run or _options.verbose:
        render.prune_table(report)
    render.line(render.prune_line(report, dry_run=dry_run))


@app.command()
def pin(manifest: Manifest_, repo: Repo = None) -> None:
    """Protect a point: no prune removes it."""
    _set_pin(manifest, repo, pinned=True)


@app.command()
def unpin(manifest: Manifest_, repo: Repo = None) -> None:
    """Let prune remove a point again."""
    _set_pin(manifest, repo, pinned=False)


def _set_pin(manifest: str, repo: str | None, *, pinned: bool) -> None:
    from backup import prune as pruning

    machine, found = _find_point(manifest, _path(repo))
    changed = pruning.set_pin(machine, found.point, pinned=pinned)
    if not _options.quiet:
        state = "pinned" if pinned else "not pinned"
        render.line(f"point {found.point} of machine {found.machine} is {state}{'' if changed else ' already'}")


@app.command()
def clean(
    qmp: Annotated[str, typer.Option("--qmp", metavar="SOCKET", help="The QMP socket of the machine's QEMU.")],
    agent: AgentSocket = None,
    repo: Repo = None,
    json: Json = False,
) -> None:
    """Remove what runs that were cut off left in a running QEMU: jobs, exports, nodes, bitmaps of no point."""
    from backup.sources.base import Freeze
    from backup.sources.running import Running

    _options.json = json
    repository = _repository(_path(repo))
    with Running(Path(qmp), [], freeze=Freeze(_path(agent))) as host:
        removed = list(host.recover(repository.ownership(None)))
    if json:
        render.document({"removed": removed})
    elif not _options.quiet:
        for what in removed or ["nothing: there was nothing of this repository's"]:
            render.line(f"removed {what}")


@app.command("check-config")
def check_config() -> None:
    """Check the configuration and say what it names."""
    config = _config()
    if config.path is None:
        raise UsageError(
            "there is no configuration", hint="write one like config.example.yaml and name it with --config"
        )
    disks = sum(len(machine.disks) for machine in config.machines)
    if not _options.quiet:
        render.line(
            f"{render.plain(config.path)}: {len(config.machines)} machine{'s' * (len(config.machines) != 1)}, "
            f"{disks} disk{'s' * (disks != 1)}, repository {render.plain(config.repository or 'not named')}"
        )


def _config() -> Config:
    from backup.cli import settings

    return settings.find_config(_options.config, os.environ)


def _config_or_default() -> Config:
    """For commands that need none: one that was named must be right, one that lies about may be wrong."""
    from backup import config as configuration

    if _options.config is not None:
        return _config()
    try:
        return _config()
    except UsageError:
        return configuration.default()


def _check_format(image_format: str | None) -> None:
    if image_format not in (None, "raw", "qcow2"):
        raise UsageError(f"{image_format!r} is not a format", hint="raw or qcow2")


def _repository(repo: Path | None) -> Repository:
    from backup.repository import Repository

    if repo is not None:
        return Repository.open(repo)
    from backup.cli import settings

    return Repository.open(settings.repository_path(None, _config()))


def _machines(repository: Repository, names: Sequence[str] | None) -> list[Machine]:
    found = []
    for name in names or repository.machine_names():
        machine = repository.machine(name)
        if not machine.exists():
            raise NotFound(
                f"the repository {repository.path} has no machine {name!r}",
                hint=f"it has: {', '.join(repository.machine_names()) or 'none'}",
            )
        found.append(machine)
    return found


def _find_point(text: str, repo: Path | None) -> tuple[Machine, Manifest]:
    """A manifest's path (an existing path wins), or MACHINE/POINT, MACHINE/latest."""
    from backup import chain as chains
    from backup.repository import Machine, read_manifest

    path = Path(text)
    if path.is_file() or path.is_symlink() or text.endswith(".json"):
        return Machine(path.absolute().parent), read_manifest(path)
    name, slash, point = text.rpartition("/")
    if not slash or "/" in name:
        raise NotFound(f"there is no manifest {text}", hint="give a manifest's path, MACHINE/POINT or MACHINE/latest")
    [machine] = _machines(_repository(repo), [name])
    contents = machine.contents()
    damaged = contents.damaged.get(f"{point}.json")
    if damaged is not None:
        raise damaged
    if point == "latest" and contents.damaged:
        # The damaged one may have the highest sequence; an older point must not pass for the latest.
        raise Damaged(
            f"machine {name} has a manifest that cannot be read, which may be its latest point: "
            + next(iter(contents.damaged.values())).message,
            hint=f"name a point: pybackup list {name}",
        )
    found = chains.newest_manifest(contents.manifests.values()) if point == "latest" else contents.manifests.get(point)
    if found is None:
        raise NotFound(f"machine {name} has no point {point}", hint=f"see: pybackup list {name}")
    return machine, found


def _what_to_verify(what: Sequence[str], repo: Path | None) -> list[tuple[Machine, list[str] | None]]:
    if not what:
        return [(machine, None) for machine in _machines(_repository(repo), None)]
    found: list[tuple[Machine, list[str] | None]] = []
    for text in what:
        if "/" in text or text.endswith(".json"):
            machine, manifest = _find_point(text, repo)
            found.append((machine, [manifest.point]))
        else:
            found.append((_machines(_repository(repo), [text])[0], None))
    return found


def main() -> NoReturn:
    """Run the command line; every end of the program goes through here."""
    process.prepare()
    try:
        code = _run(sys.argv[1:])
        render.flush()
    except BrokenPipeError:
        code = 1  # the reader has gone (pybackup list | head): not our error, and nothing can be said any more
    except Failed as error:
        code = error.exit_code
        _show_error(error)
    process.end(code)


def _run(arguments: Sequence[str]) -> int:
    try:
        command = _unconverted(typer.main.get_command(app))
        result = command.main(args=list(arguments), prog_name="pybackup", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except BrokenPipeError:
        raise
    except TyperException as error:
        _options.json = _options.json or "--json" in arguments  # the command did not come to say it
        return _fail(UsageError(" ".join(error.format_message().split()), hint="see: pybackup --help"))
    except Interrupted as stopped:
        return _fail(stopped)
    except typer.Abort:
        return _fail(Interrupted(signal.SIGINT))
    except Exception as error:  # noqa: BLE001 - shown, and in the exit code
        return _fail(_explained(error))


def _unconverted(command: Any) -> Any:
    """
    A command, and those below it, whose parameters are taken as the parser found them: texts, lists of them, flags.

    typer would have pydantic convert each, also one that was not given; its import takes longer than typer's own.
    """
    command.parse_args = functools.partial(_parse, command, command.parse_args)
    for each in getattr(command, "commands", {}).values():
        _unconverted(each)
    return command


def _parse(command: Any, parse: Callable[[Any, list[str]], Any], context: Any, arguments: list[str]) -> Any:
    for parameter in command.get_params(context):  # with --help, which the context brings
        parameter.process_value = functools.partial(_as_found, parameter, parameter.process_value)
    return parse(context, arguments)


def _as_found(parameter: Any, convert: Callable[[Any, Any], Any], context: Any, value: Any) -> Any:
    """A parameter's value; the error of a missing one, and what is done about flags, are typer's own matter."""
    if isinstance(value, bool) or (parameter.required and not value):
        return convert(context, value)
    found = list(value) if isinstance(value, tuple) else value
    return found if parameter.callback is None else parameter.callback(context, parameter, found)


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


def _explained(error: Exception) -> BackupError:
    """What ends a command or a machine's backup, as an error of two lines."""
    if isinstance(error, BackupError):
        return error
    if isinstance(error, MemoryError):
        found = Failed("there is not enough memory", hint="lower connections, requests or request_size")
    else:
        found = Failed(
            f"a bug in pybackup: {type(error).__name__}: {error}",
            hint="run again with --debug before the command, and report it",
        )
    found.__cause__ = error
    return found


def _fail(error: BackupError | Interrupted) -> int:
    _show_error(error)
    if _options.json:
        render.document({"error": render.error_object(error)})
    return error.exit_code


def _show_error(error: BackupError | Interrupted, of: str | None = None) -> None:
    if _options.debug:
        import traceback

        traceback.print_exception(error)
    render.error(error, of)
