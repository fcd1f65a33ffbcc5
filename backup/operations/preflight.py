"""
What is asked for, and what becomes of it: a request's disks, each looked at and held against its newest point.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from backup.errors import BackupError, Damaged, NotFound, SourceError, UsageError
from backup.model import chain as chains
from backup.model.chain import Chain
from backup.model.disk import DiskState, own_bitmaps
from backup.model.manifest import DiskEntry, Manifest, SourceRecord
from backup.operations.request import Names, Request
from backup.planning import decision as decide
from backup.planning.decision import Decision, Refusal
from backup.repository import data_file
from backup.repository.machine import Contents, Machine
from backup.repository.repository import machine_with
from backup.repository.verified import known_damage, recall
from backup.sources.base import DiskRequest


def recognised(request: Request, contents: Contents) -> tuple[Request, list[str]]:
    """
    The request with the names that the machine's disks have already; and what the user may want to know of that.

    Call it when the host is connected.

    Raises
    ------
    UsageError
        Two of its disks are one and the same.
    """
    if request.names is Names.CONFIGURED or not contents.manifests:
        return request, []
    disks: list[DiskRequest] = []
    notes = []
    paths: dict[str, str] = {}
    for disk in request.disks:
        given = request.names is Names.GIVEN
        if given and disk.path is None and chains.newest_manifest(contents.manifests.values(), disk.name):
            # Nodes can mean other images after a restart: the backup says so, where the user names the disk.
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
                f"two disks are named {name}: {path} is known as that one",
                hint=f"see `pybackup list {request.machine} --long` for the disks of the machine",
            )
        if name != disk.name and given:
            notes.append(f"{path} is disk {name} of machine {request.machine} already and keeps that name")
        disks.append(replace(disk, name=name))
    return replace(request, disks=tuple(disks)), notes


def known_name(manifests: Mapping[str, Manifest], name: str, path: str, *, given: bool) -> str:
    """
    What a disk that is read from `path` is called in the machine's points; `name` where they don't know the path.

    Where they know it by several names, a `given` one of those holds, else the one that was used last.
    """
    newest: dict[str, DiskEntry] = {}
    for manifest in sorted(manifests.values(), key=lambda manifest: manifest.sequence):
        for entry in manifest.disks:
            newest.pop(entry.name, None)
            newest[entry.name] = entry
    same = [entry.name for entry in newest.values() if is_same_source(entry.source, path)]
    return name if not same or (given and name in same) else same[-1]


def is_same_source(recorded: SourceRecord, path: str) -> bool:
    """Whether a point was read from this path; a link counts by its own name and by the file that it leads to now."""
    if recorded.path == path:
        return True
    return not recorded.of_server and os.path.realpath(recorded.path) == os.path.realpath(path)


@dataclass(frozen=True, slots=True)
class Considered:
    """
    A disk as it was seen, and what its backup can be.

    `last` is the chain of its newest point, what is wrong with that, or None where it has no point.
    """

    state: DiskState
    last: Chain | BackupError | None
    decision: Decision


def consider(
    machine: Machine,
    contents: Contents,
    request: Request,
    disk: DiskRequest,
    short_id: str,
    *,
    refusal: Refusal | None = None,
) -> Considered:
    """
    Look at a disk and decide what its backup can be; `short_id` is of the repository.

    `refusal`: why a new bitmap could not be started a moment ago.

    Raises
    ------
    SourceError
        It cannot be looked at, or is no longer what it was.
    UsageError, NotFound
        What was said of it cannot be.
    """
    newest = chains.newest_manifest(contents.manifests.values(), disk.name)
    _check_claim(disk, newest, contents)
    if newest is None:
        _check_first_format(disk)
    else:
        _check_format(disk, newest)
    state = disk.source.inspect()
    if state.plaintext and not (request.allow_plaintext or disk.allow_plaintext):
        raise UsageError(
            f"disk {disk.name} is encrypted (LUKS), and QEMU would decrypt it: the backup would hold plaintext",
            hint="allow this where the repository and the scratch folder are protected otherwise: --allow-plaintext "
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
    return Considered(state, last, decision)


def _origins(machine: Machine, contents: Contents, disk: str, bitmaps: Iterable[str]) -> dict[str, str]:
    """Whose points this repository's bitmaps start from, in the words of `decide`; only of points that there are."""
    found = {name.rpartition(".")[2]: None for name in bitmaps}
    origins = {point: _origin(machine, contents, disk, point) for point in found}
    return {point: whose for point, whose in origins.items() if whose is not None}


def _origin(machine: Machine, contents: Contents, disk: str, point: str) -> str | None:
    """Whose point it is, in the words of `decide`; None: there is no such point."""
    manifest = contents.manifests.get(point)
    if manifest is None:
        other = machine_with(machine.storage, sorted(machine.storage.machines()), point)
        return None if other is None else f"machine {other}"
    if manifest.disk(disk) is not None:
        return decide.ITSELF
    return f"disk {' or '.join(entry.name for entry in manifest.disks)} of this machine"


def _last_chain(machine: Machine, contents: Contents, point: str, disk: str) -> Chain | BackupError:
    """
    The chain of the disk's newest point, its files looked at; or what is wrong with it, as far as that shows, or a
    verify has found it.

    Raises
    ------
    Failed
        This process may not open the files, or not so many: that says nothing about them.
    """
    try:
        chain = chains.build(contents.manifests, point, disk, contents.damaged)
    except BackupError as error:
        return error
    try:
        with data_file.peeked_files(machine.files, chain):
            return known_damage(recall(machine), [link.entry.data for link in chain.links]) or chain
    except (Damaged, NotFound) as error:
        return error


def _other_disk(disk: DiskRequest, newest: Manifest, state: DiskState) -> str | None:
    """
    The other disk that the image in state was at the newest point.

    Names of nodes may mean other images after a restart of the machine, and disks of a configuration can be exchanged.
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
        newest_point = "it has none at all" if newest is None else f"its newest is {newest.point}"
        raise NotFound(
            f"disk {disk.name} has no point {since}: {newest_point}", hint="without --since everything is read"
        )
    raise UsageError(
        f"--since {since} is not the newest point of disk {disk.name}, which is {newest.point}",
        hint="a chain grows only at its end; without --since everything is read",
    )


def _check_first_format(disk: DiskRequest) -> None:
    """
    Refuse to begin a chain with the bytes of a container, such as a vmdk, that holds the disk.

    Later a raw disk may begin with what its guest likes.
    """
    found = disk.source.foreign_format()
    if found is not None:
        raise UsageError(
            f"the image of disk {disk.name} looks like a {found}, and pybackup reads qcow2 and raw images",
            hint=f"serve the disk that is in it, qemu-nbd -r -t -f {found} IMAGE, and name that with --nbd; or say "
            "that the bytes of the file are the disk: --image-format raw (`format: raw`)",
        )


def _check_format(disk: DiskRequest, newest: Manifest) -> None:
    """
    Refuse a raw image that has become a qcow2, and a qcow2 that has lost its header.

    A guest can write a qcow2 header, with any backing file of the host, into its raw disk; so this is asked before QEMU
    opens the image and the files that its header names.
    """
    entry = newest.disk(disk.name)
    assert entry is not None
    guessed = disk.source.guessed_format()
    if entry.source.of_server or guessed is None or guessed == entry.source.format:
        return
    if guessed == "raw":
        raise SourceError(
            f"the image of disk {disk.name} was a qcow2 at point {newest.point} and has no qcow2 header now",
            hint="it is damaged, or was converted: then say --image-format raw (`format:` in the configuration)",
        )
    raise UsageError(
        f"the image of disk {disk.name} was raw at point {newest.point} and begins with a qcow2 header now",
        hint="say --image-format raw, or qcow2 if it was converted (`format:` in the configuration)",
    )


def _check_path(disk: DiskRequest, state: DiskState, contents: Contents) -> None:
    """A machine's name that was taken from the image's must not bring two machines into one folder."""
    newest = chains.newest_manifest(contents.manifests.values(), disk.name)
    newest = newest or chains.newest_manifest(contents.manifests.values())
    if newest is None:
        return
    recorded = [entry.source for entry in newest.disks if entry.name == disk.name or not newest.disk(disk.name)]
    if not any(is_same_source(source, state.path) for source in recorded):
        raise UsageError(
            f"machine {newest.machine} was backed up from {recorded[0].path}, and this is {state.path}",
            hint=f"name the machine: --machine {newest.machine} if it is the same one, another name if it is not",
        )
