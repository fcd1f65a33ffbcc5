"""
One data file in another's place, whole at every instant: how prune puts a rewritten file under the former one's name.

    1  DISK.POINT.qcow2.new and its own digest file are written and fsynced, and the folder after them
    2  the manifest is renamed into place that lists both files (`DiskEntry.replaces`); fsync of the folder
    3  the new file takes the former one's name; fsync of the folder
    4  the manifest is renamed into place that lists the new file only; fsync of the folder
    5  the former digest file is removed; fsync of the folder

Between 2 and 4 readers tell by the file's backing name which entry holds (`repository.as_stored`); both chains are
whole, since the points that the former file builds on go only afterwards.  What a run leaves that was cut off, the next
one completes or takes back: the file that waits has the digests that its manifest lists, or it is no such file.  It
takes back as well what somebody has begun to use meanwhile.
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
    Let the data file that waits, `entry`'s, take the place of the one that its disk has; call it under the lock.

    `manifest` is the point's, and nobody uses its file (`Machine.unused`).  The one that waits and its digest file are
    fsynced already.

    Returns
    -------
    Manifest
        The point's manifest from now on.

    Raises
    ------
    Failed
        The disk is full or fails; `settle` completes the exchange or takes it back.
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
    Complete or take back the exchanges of a run that was cut off, and remove its other leftovers.

    Call it under the lock.  Returns the machine's manifests after it.

    Raises
    ------
    Failed
        The disk is full or fails; everything is as good as before.
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
    """Bring the file of an exchange that was cut off to its place, or leave the former one; the entry that holds."""
    name = disk.data.file
    if not is_exchanged(machine.files, disk) and not (_waits(machine, disk) and _take_place(machine, disk)):
        _log.info("%s: took back the exchange of %s, which was cut off", machine.name, name)
        return disk.restored()
    _log.info("%s: completed the exchange of %s, which was cut off", machine.name, name)
    return replace(disk, replaces=None)


def _take_place(machine: Machine, disk: DiskEntry) -> bool:
    """Let the file that waits take the former one's name, unless somebody uses that."""
    with machine.unused(disk.restored()) as why_not, explained(machine.files.location):
        if why_not is None:
            machine.files.take_name(disk.data.file + NEW, disk.data.file)
    return why_not is None


def _waits(machine: Machine, disk: DiskEntry) -> bool:
    """Is the file that is to take the place there, as its digests say?"""
    data = disk.data
    try:
        listed = checked_file.load(machine.files, data.digests, data.digest, digests.block_count(data.size))
        with closing(CheckedFile(machine.files, data.file + NEW, data.size, listed, BlockCache())) as file:
            for number in range(file.blocks):
                file.check_block(number)
    except (Damaged, NotFound):
        return False
    return True
