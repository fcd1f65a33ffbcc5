"""
Before a backup or an audit: recognise a request's disks, inspect each, and decide what its backup can be.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from backup.errors import BackupError, Damaged, NotFound, SourceError, UsageError
from backup.model import chain as chains
from backup.model.chain import Chain
from backup.model.disk import DiskState, bitmap_name, own_bitmaps
from backup.model.manifest import DiskEntry, Manifest, SourceRecord
from backup.operations.request import Names, Request
from backup.planning import decision as decide
from backup.planning.decision import Decision, Refusal
from backup.repository.machine import Contents, Machine
from backup.repository.repository import machine_with
from backup.repository.verified import known_damage, recall
from backup.sources.base import Capture, DiskRequest, Source


def recognised(request: Request, contents: Contents) -> tuple[Request, list[str]]:
    """
    Give the request's disks the names by which the machine's points know them; return notes for the user as well.

    The host must be connected.

    Raises
    ------
    UsageError
        Two of the disks are the same one.
    """
    if request.names is Names.CONFIGURED or not contents.manifests:
        return request, []
    disks: list[DiskRequest] = []
    notes = []
    paths: dict[str, str] = {}
    for disk in request.disks:
        given = request.names is Names.GIVEN
        if given and disk.path is None and chains.newest_manifest(contents.manifests.values(), disk.name):
            # A node can mean another image after a restart: a backup of a disk that the user has named warns of that.
            disks.append(disk)
            continue
        path = disk.path or disk.source.inspect().path
        name = known_name(contents.manifests, disk.name, path, given=given)
        if paths.setdefault(path, disk.name) != disk.name:
            raise UsageError(
                f"{paths[path]} and {disk.name} are the same disk, {path}", hint="name each disk of the machine once"
            )
        if any(other.name == name for other in disks):
            raise UsageError(
                f"two disks are named {name}: the machine's points know {path} by that name",
                hint=f"see `pybackup list {request.machine}` for the disks of the machine",
            )
        if name != disk.name and given:
            notes.append(f"{path} is already disk {name} of machine {request.machine} and keeps that name")
        disks.append(replace(disk, name=name))
    return replace(request, disks=tuple(disks)), notes


def known_name(manifests: Mapping[str, Manifest], name: str, path: str, *, given: bool) -> str:
    """
    Return the name by which the machine's points know the disk at `path`; `name` if they do not know the path.

    If the points know the disk by several names, the newest one is returned, unless `name` is one of them and the user
    has `given` it.
    """
    newest: dict[str, DiskEntry] = {}
    for manifest in sorted(manifests.values(), key=lambda manifest: manifest.sequence):
        for entry in manifest.disks:
            newest.pop(entry.name, None)
            newest[entry.name] = entry
    same = [entry.name for entry in newest.values() if is_same_source(entry.source, path)]
    return name if not same or (given and name in same) else same[-1]


def is_same_source(recorded: SourceRecord, path: str) -> bool:
    """Tell whether a point was read from this path; a link and the file to which it leads now are the same."""
    if recorded.path == path:
        return True
    return not recorded.of_server and os.path.realpath(recorded.path) == os.path.realpath(path)


@dataclass(frozen=True, slots=True)
class Preflight:
    """
    The state of a disk, and what its backup can be.

    `last` is the chain of the disk's newest point, or what is wrong with that chain; None: the disk has no point.
    """

    state: DiskState
    last: Chain | BackupError | None
    decision: Decision


@dataclass(frozen=True, slots=True)
class DecidedDisk:
    """
    One disk of a run: the request, the disk's state, and the decision.

    `started` is the bitmap that records from the new point on; None: none is started.  `granularity` (bytes) is that of
    `started`, known after the instant.  `why_none` says why no bitmap is started, where one was wanted and the disk's
    bitmaps are pybackup's.  `warned`: the reason lasts, and an earlier point has warned of it.  `refused`: the reason
    appeared only in the attempt to add the bitmap.
    """

    request: DiskRequest
    state: DiskState
    decision: Decision
    started: str | None
    why_none: str | None
    warned: bool
    refused: bool
    granularity: int | None = None

    @property
    def name(self) -> str:
        """The disk's name in the machine's points."""
        return self.request.name

    @property
    def source(self) -> Source:
        """What the disk is read from."""
        return self.request.source

    @property
    def capture(self) -> Capture:
        """What the disk must offer at the instant."""
        return Capture(self.state, self.decision.read, self.started)


def preflight(
    machine: Machine,
    contents: Contents,
    request: Request,
    disk: DiskRequest,
    short_id: str,
    *,
    refusal: Refusal | None = None,
) -> Preflight:
    """
    Inspect a disk and decide what its backup can be; `short_id` is the repository's.

    Call `expect_bitmaps` for all disks of the machine first.

    `refusal` says why an earlier attempt of this run could not start a new bitmap.

    Raises
    ------
    SourceError
        The disk cannot be inspected, or has lost its qcow2 header.
    UsageError, NotFound
        The point of --since, the format or the name does not fit the disk, or plaintext of the disk is not allowed.
    """
    newest = chains.newest_manifest(contents.manifests.values(), disk.name)
    _check_claim(disk, newest, contents)
    if newest is None:
        _check_first_format(disk)
    else:
        _check_format(disk, newest)
    state = replace(disk.source.inspect(), trusts_data_file=request.trust_data_file or disk.trust_data_file)
    if state.plaintext and not (request.allow_plaintext or disk.allow_plaintext):
        raise UsageError(
            f"disk {disk.name} is encrypted (LUKS), and QEMU would decrypt it: the backup would contain plaintext",
            hint="if the repository and the scratch folder are protected in another way, allow it: --allow-plaintext "
            "(`allow_plaintext: true`)",
        )
    if request.named_by_path:
        _check_path(disk, state, contents)
    last = None if newest is None else _last_chain(machine, contents, newest.point, disk.name)
    decision = decide.decide(
        request.wanted,
        state,
        last,
        bitmap_family=request.bitmap_family,
        short_id=short_id,
        max_chain=request.max_chain,
        claim=disk.claim,
        unusable=request.unusable,
        was=None if newest is None else _other_disk(disk, newest, state),
        refusal=refusal,
        origins=_origins(
            machine,
            contents,
            disk.name,
            own_bitmaps((bitmap.name for bitmap in state.bitmaps), short_id, keep=None),
        ),
    )
    return Preflight(state, last, decision)


def expect_bitmaps(disk: DiskRequest, contents: Contents, bitmap_family: str | None, short_id: str) -> None:
    """
    Tell a disk's source which bitmaps of this repository the disk may have, as far as its points tell.

    That is the bitmap that began to record at the newest point.  If the newest point began none, because the image
    refused it, the bitmap of the point before was not removed either.
    """
    held = [manifest for manifest in contents.manifests.values() if manifest.disk(disk.name) is not None]
    newest = sorted(held, key=lambda manifest: manifest.sequence)[-2:]
    entries = [entry for manifest in newest if (entry := manifest.disk(disk.name)) is not None]
    names = [entry.bitmap.started for entry in entries if entry.bitmap.started is not None][-1:]
    if newest and bitmap_family:
        names.append(bitmap_name(bitmap_family, short_id, newest[-1].point))
    disk.source.expect_bitmaps(names)


def _origins(machine: Machine, contents: Contents, disk: str, bitmaps: Iterable[str]) -> dict[str, str]:
    """Return the points of these bitmaps that exist, and the disk or machine of each, as `decide` words it."""
    points = dict.fromkeys(name.rpartition(".")[2] for name in bitmaps)
    origins = {point: _origin(machine, contents, disk, point) for point in points}
    return {point: whose for point, whose in origins.items() if whose is not None}


def _origin(machine: Machine, contents: Contents, disk: str, point: str) -> str | None:
    """Return the disk or machine of a point, as `decide` words it; None if there is no such point."""
    manifest = contents.manifests.get(point)
    if manifest is None:
        other = machine_with(machine.storage, sorted(machine.storage.machines()), point)
        return None if other is None else f"machine {other}"
    if manifest.disk(disk) is not None:
        return decide.ITSELF
    return f"disk {' or '.join(entry.name for entry in manifest.disks)} of this machine"


def _last_chain(machine: Machine, contents: Contents, point: str, disk: str) -> Chain | BackupError:
    """
    Build the chain of the disk's newest point and open its files; return the chain, or what is wrong with it.

    Damage is what opening the files shows, and what an earlier verify has found.

    Raises
    ------
    Failed
        This process may not open the files, or not so many at once.  The files may be intact.
    """
    try:
        chain = chains.build(contents.manifests, point, disk, contents.damaged)
    except BackupError as error:
        return error
    from backup.repository import data_file  # noqa: PLC0415 - brings numpy, which other programs need not wait for

    try:
        with data_file.peeked_files(machine.files, chain):
            return known_damage(recall(machine), [link.entry.data for link in chain.links]) or chain
    except (Damaged, NotFound) as error:
        return error


def _other_disk(disk: DiskRequest, newest: Manifest, state: DiskState) -> str | None:
    """
    Return the name of the other disk that had this image at the newest point; None if there is no such disk.

    A node's name may mean another image after a restart of the machine, and a configuration may exchange disks.
    """
    paths = {entry.name: os.path.realpath(entry.source.path) for entry in newest.disks}
    now = os.path.realpath(state.path)
    if paths[disk.name] == now:
        return None
    return next((name for name, path in paths.items() if path == now), None)


def _check_claim(disk: DiskRequest, newest: Manifest | None, contents: Contents) -> None:
    since = disk.claim.since
    if since is None or (newest is not None and newest.point == since):
        return
    if newest is None or since not in contents.manifests:
        newest_point = "it has no point" if newest is None else f"its newest point is {newest.point}"
        raise NotFound(
            f"disk {disk.name} has no point {since}: {newest_point}", hint="without --since the whole disk is read"
        )
    raise UsageError(
        f"--since {since} is not the newest point of disk {disk.name}, which is {newest.point}",
        hint="a chain grows only at its end; without --since the whole disk is read",
    )


def _check_first_format(disk: DiskRequest) -> None:
    """
    Refuse to start a chain with the bytes of a container, such as a vmdk, that contains the disk.

    At later points a raw disk may begin with any bytes, since its guest writes them.
    """
    foreign = disk.source.foreign_format()
    if foreign is not None:
        raise UsageError(
            f"the image of disk {disk.name} looks like a {foreign}, and pybackup reads qcow2 and raw images",
            hint=f"serve the disk in it with qemu-nbd -r -t -f {foreign} IMAGE, and name the server with --nbd; or, if "
            "the bytes of the file are the disk, give --image-format raw (`format: raw`)",
        )


def _check_format(disk: DiskRequest, newest: Manifest) -> None:
    """
    Refuse a raw image that has become a qcow2, and a qcow2 that has lost its header.

    A guest can write a qcow2 header that names any file of the host as backing file into its raw disk.  So this check
    comes before QEMU opens the image and the files that the header names.
    """
    entry = newest.disk(disk.name)
    assert entry is not None
    guessed = disk.source.guessed_format()
    if entry.source.of_server or guessed is None or guessed == entry.source.format:
        return
    if guessed == "raw":
        raise SourceError(
            f"the image of disk {disk.name} was a qcow2 at point {newest.point} and has no qcow2 header now",
            hint="the image is damaged; if it was converted, give --image-format raw (`format:` in the configuration)",
        )
    raise UsageError(
        f"the image of disk {disk.name} was raw at point {newest.point} and begins with a qcow2 header now",
        hint="give --image-format raw, or qcow2 if the image was converted (`format:` in the configuration)",
    )


def _check_path(disk: DiskRequest, state: DiskState, contents: Contents) -> None:
    """Refuse to mix two machines in one folder, whose name was only derived from an image's name."""
    newest = chains.newest_manifest(contents.manifests.values(), disk.name)
    newest = newest or chains.newest_manifest(contents.manifests.values())
    if newest is None:
        return
    recorded = [entry.source for entry in newest.disks if entry.name == disk.name or not newest.disk(disk.name)]
    if not any(is_same_source(source, state.path) for source in recorded):
        raise UsageError(
            f"machine {newest.machine} was backed up from {recorded[0].path}, and this image is {state.path}",
            hint=f"name the machine: --machine {newest.machine} if it is the same machine, otherwise another name",
        )
