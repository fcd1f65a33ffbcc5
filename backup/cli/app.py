"""
The commands: parse, call, show, exit code.  The only user of typer; `main` is the only place that catches errors.

Modules that cost time to import (numpy, libnbd, rich) are imported by the command that needs them: a cron job over a
hundred idle disks is a hundred starts.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.exceptions import TyperException

import backup
from backup.cli import process, render
from backup.errors import WARNINGS_EXIT_CODE, BackupError, Damaged, Failed, Interrupted, NotFound, UsageError

if TYPE_CHECKING:
    from backup.cli.requests import Options
    from backup.config import Config
    from backup.create import Report, Request
    from backup.manifest import Manifest
    from backup.repository import Machine, Repository
    from backup.sources import Source
    from backup.verify import Verified

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
# readable=False: whoever opens a path says best why it cannot, with the right exit code.
Repo = Annotated[Path | None, typer.Option("--repo", metavar="DIR", readable=False, help="The repository's folder.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]
Image = Annotated[
    Path | None, typer.Option("--image", metavar="FILE", readable=False, help="An image that no machine has open.")
]
ImageFormat = Annotated[
    str | None,
    typer.Option("--image-format", metavar="qcow2|raw", help="The image's format; else its first bytes tell."),
]
Nbd = Annotated[str | None, typer.Option("--nbd", metavar="URI", help="An export of any NBD server.")]
Since = Annotated[
    str | None,
    typer.Option("--since", metavar="POINT", help="With --nbd: the point that the server's bitmap starts from."),
]
MachineName = Annotated[str | None, typer.Option("--machine", metavar="NAME", help="The machine, for a source.")]
DiskName = Annotated[str | None, typer.Option("--disk", metavar="NAME", help="The disk, for a source.")]
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
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what a run would do; change nothing.")]
NoFallback = Annotated[bool, typer.Option("--no-fallback", help="Fail with 14 rather than take a full instead.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pybackup {backup.__version__}")
        raise typer.Exit


@app.callback()
def _global(
    config: Annotated[Path | None, typer.Option("--config", metavar="FILE", help="The configuration.")] = None,
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
    _options.config, _options.verbose, _options.quiet, _options.debug = config, verbose, quiet, debug
    if verbose or debug:
        import logging

        logging.basicConfig(level=logging.INFO, format="pybackup: %(message)s")


@app.command()
def full(
    machines: MachineNames = None,
    image: Image = None,
    image_format: ImageFormat = None,
    nbd: Nbd = None,
    machine: MachineName = None,
    disk: DiskName = None,
    repo: Repo = None,
    bitmap: BitmapName = None,
    compression: CompressionText = None,
    limit: Limit = None,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Back up everything, and begin a chain."""
    from backup.cli.requests import Options

    options = Options(
        wanted="full",
        machines=tuple(machines or ()),
        image=image,
        image_format=image_format,
        nbd=nbd,
        since=None,
        machine=machine,
        disk=disk,
        bitmap=bitmap,
        compression=compression,
        limit=limit,
        fallback=True,
        dry_run=dry_run,
    )
    _back_up(options, repo, json)


@app.command()
def incremental(
    machines: MachineNames = None,
    image: Image = None,
    image_format: ImageFormat = None,
    nbd: Nbd = None,
    since: Since = None,
    machine: MachineName = None,
    disk: DiskName = None,
    repo: Repo = None,
    bitmap: BitmapName = None,
    compression: CompressionText = None,
    limit: Limit = None,
    no_fallback: NoFallback = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Back up what changed since the newest point; everything where that cannot be known."""
    from backup.cli.requests import Options

    options = Options(
        wanted="incremental",
        machines=tuple(machines or ()),
        image=image,
        image_format=image_format,
        nbd=nbd,
        since=since,
        machine=machine,
        disk=disk,
        bitmap=bitmap,
        compression=compression,
        limit=limit,
        fallback=not no_fallback,
        dry_run=dry_run,
    )
    _back_up(options, repo, json)


def _back_up(given: Options, repo: Path | None, json: bool) -> None:
    from backup.cli import requests, settings
    from backup.repository import Repository

    _options.json = json
    config = _config()
    _check_format(given.image_format)
    made = requests.make_requests(given, config)
    path = settings.repository_path(repo, config)
    modes = settings.modes(config)

    def open_repository() -> Repository:
        return (Repository.open_or_imagine if given.dry_run else Repository.open_or_create)(path, modes)

    outcomes = []
    unshown: Exception | None = None
    for request in made:
        outcome = _back_up_one(open_repository, request)
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


def _exit_code(outcomes: Sequence[Report | BackupError]) -> int:
    codes = {outcome.exit_code for outcome in outcomes if isinstance(outcome, BackupError)}
    if codes:
        return codes.pop() if len(codes) == 1 else 1
    warned = any(outcome.warnings for outcome in outcomes if not isinstance(outcome, BackupError))
    return WARNINGS_EXIT_CODE if warned else 0


@app.command("map")
def map_(
    image: Image = None,
    image_format: ImageFormat = None,
    nbd: Nbd = None,
    bitmap: Annotated[str | None, typer.Option("--bitmap", metavar="EXACT-NAME", help="The bitmap to show.")] = None,
    totals: Annotated[bool, typer.Option("--totals", help="Sums only.")] = False,
    json: Json = False,
) -> None:
    """Show a source as the planner sees it: dirty or clean, data, zero or hole.  Bytes."""
    from backup import mapping

    _options.json = json
    if (image is None) == (nbd is None):
        raise UsageError("map needs one source", hint="give --image FILE or --nbd URI")
    _check_format(image_format)
    with _source(image, image_format, nbd, bitmap) as export:
        if totals:
            sums = mapping.map_totals(export, bitmap)
            render.document(asdict(sums)) if json else render.map_sums(sums)
        elif json:
            render.map_objects(mapping.read_map(export, bitmap))
        else:
            render.map_table(mapping.read_map(export, bitmap), bitmap)


def _source(image: Path | None, image_format: str | None, nbd: str | None, bitmap: str | None) -> Any:
    from backup.sources import ImageSource, NbdSource

    source: Source = ImageSource(image, image_format) if image is not None else NbdSource(nbd or "", bitmap)
    sight = source.look()
    if image is not None and bitmap is not None:
        found = sight.bitmap(bitmap)
        if found is None:
            where = (
                " (a file below it has; writes to the image itself are not in that)"
                if bitmap in sight.lower_bitmaps
                else ""
            )
            names = ", ".join(shown.name for shown in sight.bitmaps) or "none"
            raise _no_bitmap(image, bitmap, where, names)
        if not found.recording:
            render.warning(f"bitmap {bitmap} is disabled: writes since then are not in it")
    return source.opened(sight, [bitmap] if bitmap else [], 1)


def _no_bitmap(image: Path, bitmap: str, where: str, names: str) -> BackupError:
    from backup.errors import SourceError

    return SourceError(f"{image} has no dirty bitmap {bitmap!r}{where}", hint=f"it has: {names}")


@app.command("list")
def list_(machines: MachineNames = None, repo: Repo = None, json: Json = False) -> None:
    """List the points that there are."""
    _options.json = json
    found: list[tuple[Manifest, Path]] = []
    damaged = False
    for machine in _machines(_repository(repo), machines):
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
    manifest: Annotated[str, typer.Argument(metavar="MANIFEST", help="A path, MACHINE/POINT or MACHINE/latest.")],
    repo: Repo = None,
    json: Json = False,
) -> None:
    """Show a point: its disks, where they came from, and their chains."""
    from backup import chain as chains

    _options.json = json
    machine, found = _find_point(manifest, repo)
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
    manifest: Annotated[str, typer.Argument(metavar="MANIFEST", help="A path, MACHINE/POINT or MACHINE/latest.")],
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
    machine, found = _find_point(manifest, repo)
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
    json: Json = False,
) -> None:
    """Re-read backups and find every changed byte: 12 for damage, 10 for something missing."""
    from backup import verify as verifying
    from backup.cli import settings

    _options.json = json
    workers = settings.workers(_config_or_default())
    found: list[Verified] = []
    with render.progress(wanted=not _options.quiet) as progress:
        for machine, points in _what_to_verify(what or [], repo):
            progress.begin(machine.name, verifying.stored_bytes(machine, points))
            found.append(
                verifying.verify_machine(machine, deep=deep, workers=workers, progress=progress.advance, points=points)
            )
    problems = [problem for result in found for problem in result.problems]
    sums = {name: sum(getattr(result, name) for result in found) for name in ("points", "files", "bytes")}
    if json:
        objects = [
            {"machine": p.machine, "point": p.point, "disk": p.disk, **render.error_object(p.error)} for p in problems
        ]
        render.document({**sums, "deep": deep, "problems": objects})
    elif not _options.quiet:
        render.line(
            f"verified {render.verified_text(sums)}: {len(problems) or 'no'} problem{'s' if len(problems) != 1 else ''}"
        )
    for problem in problems:
        render.problem(problem)
    raise typer.Exit(verifying.exit_code(problems))


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
    sys.exit(code)


def _run(arguments: Sequence[str]) -> int:
    try:
        result = typer.main.get_command(app).main(args=list(arguments), prog_name="pybackup", standalone_mode=False)
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
