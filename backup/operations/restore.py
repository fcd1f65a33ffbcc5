"""
Restore a disk of a point: each cluster from the newest point that holds it, every block checked against its digest.

    windows of the disk -> holder of each cluster -> work by file, in the file's order -> check, decode, write
                        -> zeroes, unless the target is known to be empty

The work follows the order of the clusters in the data files, so that each block of a file is read and hashed about
once, however many points the chain has; the target is written at any offset.
"""

from __future__ import annotations

from collections.abc import Callable

from backup.engine.restorer import Restored, RestoreRun, SalvageRun, write_out
from backup.engine.targets import Target, open_target
from backup.errors import Damaged
from backup.model.chain import Chain
from backup.repository import data_file, salvage
from backup.repository.machine import Machine
from backup.repository.opened_chain import open_chain
from backup.runtime.pace import Pace
from backup.runtime.progress import Progress


def restore_disk(
    machine: Machine,
    point: str,
    disk: str,
    target: str,
    *,
    image_format: str,
    force: bool,
    workers: int,
    progress: Progress,
    limit: int | None = None,
    salvaging: bool = False,
) -> Restored:
    """
    Restore one disk of a point to a target (see `targets.open_target`), and write at most `limit` bytes a second.

    With `salvaging`, ranges that cannot be proven become zeroes, and are listed (see `repository.salvage`).

    Raises
    ------
    Damaged, NotFound
        The chain or a data file is damaged.  A target that is a file does not appear under its name.
    BackupError
        The target is refused or cannot be written.
    """

    def write(chain: Chain, run: Callable[[Target, Pace], RestoreRun]) -> Restored:
        progress.begin(disk, chain.size)
        with open_target(target, chain.size, image_format, cluster_size=chain.cluster_size, force=force) as sink:
            return write_out(run(sink, Pace(limit)), workers)

    if salvaging:
        with salvage.open_salvaged(machine, point, disk) as (chain, salvaged):
            return write(chain, lambda sink, pace: SalvageRun(chain, salvaged, sink, progress, pace))
    try:
        opened = open_chain(machine, point, disk, lambda chain: data_file.open_files(machine.files, chain))
        with opened as (chain, files):
            return write(chain, lambda sink, pace: RestoreRun(chain, files, sink, progress, pace))
    except Damaged as error:
        raise salvage.located(error, machine, point, disk) from None
