"""The command restore."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from backup.cli import find, json_output, output, places
from backup.cli.context import options, show_error
from backup.cli.output import plain
from backup.cli.parameters import IdentityFile, PointName, Repo, WriteLimit
from backup.errors import BackupError, Damaged, NotFound, UsageError, merged_exit_code
from backup.units import show_duration, show_rate, show_size

if TYPE_CHECKING:
    from backup.model.manifest import Manifest
    from backup.operations.restore_machine import MachineRestore, RestoredMachine
    from backup.operations.restore_targets import Place
    from backup.repository.machine import Machine
    from backup.repository.salvage import Lost

_SYSTEM = "qemu:///system"
_STDOUT = 1
"""The descriptor of standard output; sys.stdout would buffer the data once more."""


def restore(
    manifest: PointName,
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="File, folder, block device or NBD URI to write to, or - for standard output.  A folder gets "
            "DISK.raw or DISK.qcow2 for each disk.",
        ),
    ],
    disk: Annotated[
        str | None, typer.Option("--disk", metavar="NAME", help="Disk to restore.  Default: all disks of the point.")
    ] = None,
    format_: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="raw|qcow2",
            help="Format to write.  Default: qcow2 if TARGET ends in .qcow2, else raw.",
        ),
    ] = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Overwrite an existing TARGET.  Always needed for devices and NBD exports."),
    ] = False,
    salvage: Annotated[
        bool,
        typer.Option(
            "--salvage",
            help="Restore what is intact of a damaged chain, write zeroes for the rest, and list those ranges.  Exit "
            "code 12: something is lost.",
        ),
    ] = False,
    define: Annotated[
        bool,
        typer.Option("--define", help="Have libvirt define the machine, of a point that was made with --libvirt."),
    ] = False,
    name: Annotated[
        str | None,
        typer.Option(
            "--name",
            metavar="NEW",
            help="Restore the machine as a new one of this name, with a UUID and MAC addresses of its own.",
        ),
    ] = None,
    libvirt: Annotated[
        str, typer.Option("--libvirt", metavar="URI", help="With --define: URI of the local libvirt.")
    ] = _SYSTEM,
    repo: Repo = None,
    identity: IdentityFile = None,
    limit: WriteLimit = None,
) -> None:
    """
    Restore the disks of a point, and its machine.

    Every block is checked against its digest before it is written.  A file appears under its name only when it is
    complete.  Of a point that was made with --libvirt, a folder also gets the machine's definition MACHINE.xml, which
    `virsh define` takes, and the firmware's variables.
    """
    from backup.cli import settings
    from backup.operations import restore_machine, restore_space, restore_targets
    from backup.operations.restore_machine import NO_MACHINE
    from backup.repository import salvage as salvaging

    find.require_format(format_)
    machine, point = find.point(manifest, places.named(repo, identity))
    config = find.config_or_default()
    # The `limit` of the configuration is for nightly reads; a restore is waited for.
    workers, bytes_a_second = settings.workers(config), None if limit is None else settings.limit(limit, config)
    placed = restore_targets.place(machine, point, target, disk, format_, force=force)
    whole = restore_machine.prepare(machine, point, placed, name=name, whole=disk is None, force=force)
    _require_possible(whole, point, libvirt if define else None, name)
    for text in placed.warnings:
        output.warning(text)
    if target == restore_targets.STDOUT:
        _stream(machine, point, placed.places[0], workers, bytes_a_second, salvage=salvage)
        return
    restore_space.require(machine, point, placed.places)
    with restore_targets.made(placed.folder, for_machine=whole is not None):
        disks = [
            _restored(machine, point, place, workers, bytes_a_second, force=force, salvage=salvage)
            for place in placed.places
        ]
        files = NO_MACHINE if whole is None else whole.write(point, placed.places, force=force)
    loss = salvaging.loss(point.machine, [(document.name, lost) for document in disks for lost in document.lost])
    errors = [*([] if loss is None else [loss]), *files.problems]
    defined = None
    if whole is not None and define:
        try:
            defined = whole.define(libvirt, files)
        except BackupError as error:
            errors += [error] if error not in errors else []
    notes = [*files.notes, *(restore_machine.by_hand(files) if defined is None else defined.notes)]
    name_defined = None if defined is None else defined.name
    if not options.json and not options.quiet:
        _show_machine(point.machine, files, notes, name_defined)
    for shown in errors:
        show_error(shown)
    if options.json:
        json_output.write(
            RestoreDocument(
                point.machine,
                point.point,
                placed.warnings,
                errors[0] if errors else None,
                disks,
                [FileDocument(*pair) for pair in files.targets.items()],
                notes,
                name_defined,
            )
        )
    worst = (Damaged.exit_code, NotFound.exit_code)
    raise typer.Exit(merged_exit_code((error.exit_code for error in errors), worst=worst, warned=bool(placed.warnings)))


def _restored(
    machine: Machine, point: Manifest, place: Place, workers: int, limit: int | None, *, force: bool, salvage: bool
) -> DiskDocument:
    """Restore a disk, and show its lines."""
    from backup.operations.restore import restore_disk

    began = time.monotonic()
    with output.progress(wanted=not options.quiet) as progress:
        restored = restore_disk(
            machine,
            point.point,
            place.disk,
            place.target,
            image_format=place.format,
            force=force,
            workers=workers,
            progress=progress,
            limit=limit,
            salvaging=salvage,
        )
    seconds = round(time.monotonic() - began, 3)
    document = DiskDocument(place.disk, place.target, restored.size, restored.data_bytes, restored.lost, seconds)
    if not options.json and not options.quiet:
        for text in _disk_lines(point.machine, document):
            output.line(text)
    return document


def _require_possible(whole: MachineRestore | None, point: Manifest, uri: str | None, name: str | None) -> None:
    """
    Make sure that the machine can get its new name, and be defined with the libvirt at `uri`, if these were asked for.

    Raises
    ------
    BackupError
        It cannot; nothing was written.
    """
    from backup.cli.requests import check_uri
    from backup.operations import restore_machine

    if whole is None and (uri is not None or name is not None):
        raise restore_machine.nothing_to_define(point)
    if whole is not None and uri is not None:
        check_uri(uri)
        whole.require_definable(uri)


def _stream(machine: Machine, point: Manifest, place: Place, workers: int, limit: int | None, *, salvage: bool) -> None:
    """Write a disk to standard output, and all messages to standard error."""
    from backup.engine import streamer

    if os.isatty(_STDOUT):
        raise UsageError(
            "standard output is a terminal", hint="send the disk to a file or a program: > FILE, | PROGRAM"
        )
    for given, option in ((options.json, "--json"), (salvage, "--salvage"), (place.format != "raw", "--format qcow2")):
        if given:
            raise UsageError(
                f"{option} together with -", hint="standard output takes the raw disk and nothing else; name a file"
            )
    began = time.monotonic()
    with output.progress(wanted=not options.quiet) as progress:
        streamed = streamer.stream(
            machine, point.point, place.disk, _STDOUT, workers=workers, progress=progress, limit=limit
        )
    if not options.quiet:
        seconds = time.monotonic() - began
        text = _restored_line(f"{point.machine}/{place.disk}", "standard output", streamed.size, seconds)
        output.note(text, to_stderr=True)


# Text


def _show_machine(machine: str, restored: RestoredMachine, notes: Sequence[str], defined: str | None) -> None:
    for role, target in restored.targets.items():
        output.line(f"{machine}: {role} restored to {plain(target)}")
    for text in notes:
        output.note(text, to_stderr=False)
    if defined is not None:
        output.line(f"{machine}: defined as domain {plain(defined)}")


def _restored_line(name: str, target: str, size: int, seconds: float) -> str:
    return (
        f"{name}: restored {show_size(size)} to {plain(target)} in {show_duration(seconds)}, {show_rate(size, seconds)}"
    )


def _disk_lines(machine: str, disk: DiskDocument) -> Iterator[str]:
    """Yield a line for the disk, and one for each range that could not be salvaged: start, length and reason."""
    yield _restored_line(f"{machine}/{disk.name}", disk.target, disk.size, disk.seconds)
    for lost in disk.lost:
        yield f"{lost.start:>16}  {lost.length:>16}  not proven, {lost.content}: {plain(lost.why)}"


# JSON


@dataclass(frozen=True, slots=True)
class DiskDocument:
    """A restored disk: its bytes, those of them that were written as data, and the ranges that are lost."""

    name: str
    target: str
    size: int
    data_bytes: int
    lost: Sequence[Lost]
    seconds: float


@dataclass(frozen=True, slots=True)
class FileDocument:
    """A restored file of the machine: its role, and where it is."""

    role: str
    target: str


@dataclass(frozen=True, slots=True)
class RestoreDocument:
    """A restored point; `error` says that parts of its disks are lost (--salvage), or what the machine lacks."""

    machine: str
    point: str
    warnings: Sequence[str]
    error: BackupError | None
    disks: Sequence[DiskDocument]
    machine_files: Sequence[FileDocument]
    notes: Sequence[str]
    defined: str | None
