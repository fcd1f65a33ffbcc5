"""
Replace a data file by a rewritten one, so that the chain is whole at every instant.

    1  DISK.POINT.qcow2.new and its own digest file are written; both are durable, and so are their names
    2  the manifest is published that lists both files (`DiskEntry.replaces`)
    3  the new file takes the name of the existing file
    4  the manifest is published that lists the new file only
    5  the digest file of the replaced file is removed

Each step is durable before the next.  Between steps 2 and 4, readers find out from the file's backing name which entry
is right (`manifests.as_stored`).  Both chains are whole, because the points that the replaced file builds on are
removed only afterwards.

If a run is killed, the next run completes the replacement, provided that the pending file matches all its digests and
no reader holds the existing file.  Otherwise the next run rolls the replacement back.
"""

from __future__ import annotations

import logging
from contextlib import closing
from dataclasses import replace

from backup.errors import Damaged, NotFound
from backup.model import digests
from backup.model.manifest import NEW, DiskEntry, Former, Manifest
from backup.repository import checked_file
from backup.repository.checked_file import BlockCache, CheckedFile
from backup.repository.machine import Contents, Machine
from backup.repository.manifests import is_exchanged
from backup.storage.refusals import explained

_log = logging.getLogger(__name__)


def exchange(machine: Machine, manifest: Manifest, entry: DiskEntry) -> Manifest:
    """
    Replace a disk's data file with the pending file that `entry` describes.  The caller holds the lock.

    `manifest` is the manifest of the point, and no reader uses the existing file (`Machine.unused`).  The pending file
    and its digest file are already durable.

    Returns
    -------
    Manifest
        The new manifest of the point.

    Raises
    ------
    Failed
        The storage is full or fails; `settle` completes the replacement or rolls it back.
    """
    former = manifest.disk(entry.name)
    assert former is not None
    replaces = Former(former.kind, former.reason, former.parent, former.data)
    done = manifest.with_disk(entry)
    files = machine.files
    with explained(files.location):
        files.barrier()
        machine.rewrite(manifest.with_disk(replace(entry, replaces=replaces)))
        files.take_name(entry.data.file + NEW, entry.data.file)
        machine.rewrite(done)
        files.remove(former.data.digests)
        files.barrier()
    return done


def settle(machine: Machine) -> Contents:
    """
    Complete or roll back the replacements of a run that was killed, and remove the other leftovers of the run.

    The caller holds the lock.

    Returns
    -------
    Contents
        The machine's manifests afterwards.

    Raises
    ------
    Failed
        The storage is full or fails; every point is as whole as before.
    """
    contents = machine.contents(raw=True)
    if contents.exchanged:
        for manifest in contents.manifests.values():
            _settle(machine, manifest)
        contents = machine.contents()
    for name in machine.remove_leftovers(contents):
        _log.info("%s: removed %s, which no manifest names", machine.name, name)
    return contents


def _settle(machine: Machine, manifest: Manifest) -> None:
    for disk in manifest.disks:
        if disk.replaces is not None:
            manifest = manifest.with_disk(_settled(machine, disk))
            machine.rewrite(manifest)


def _settled(machine: Machine, disk: DiskEntry) -> DiskEntry:
    """Complete the interrupted replacement of a disk's file, or roll it back; return the entry that is right."""
    name = disk.data.file
    if not is_exchanged(machine.files, disk) and not (_waits(machine, disk) and _take_place(machine, disk)):
        _log.info("%s: rolled back the interrupted replacement of %s", machine.name, name)
        return disk.restored()
    _log.info("%s: completed the interrupted replacement of %s", machine.name, name)
    return replace(disk, replaces=None)


def _take_place(machine: Machine, disk: DiskEntry) -> bool:
    """Let the pending file replace the existing one, unless a reader holds that; return whether it did."""
    with machine.unused(disk.restored()) as why_not, explained(machine.files.location):
        if why_not is None:
            machine.files.take_name(disk.data.file + NEW, disk.data.file)
    return why_not is None


def _waits(machine: Machine, disk: DiskEntry) -> bool:
    """Tell whether the pending file exists and matches all its digests."""
    data = disk.data
    try:
        listed = checked_file.load(machine.files, data.digests, data.digest, digests.block_count(data.size))
        with closing(CheckedFile(machine.files, data.file + NEW, data.size, listed, BlockCache())) as file:
            for number in range(file.blocks):
                file.check_block(number)
    except (Damaged, NotFound):
        return False
    return True
