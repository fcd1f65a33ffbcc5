"""
A point back to a disk: the newest holder of each cluster, every block held against its digest, zeroes included.

    windows of the disk -> who holds what -> work by file, in the file's order -> check, decode, write
                        -> zeroes, where the target is not known to be empty

Work is taken in the order in which it lies in the data files, so that each block of a file is read and hashed about
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
    Restore one disk of a point to what `target` names (see `targets.open_target`), writing no more than `limit` bytes a
    second.  With `salvaging`, what cannot be proven is zeroes, and listed (see `salvage`).

    Raises
    ------
    Damaged, NotFound
        The chain or a data file is not what was written; a file did not appear under its name.
    BackupError
        The target is refused or cannot be written.
    """

    def write(chain: Chain, run: Callable[[Target, Pace], RestoreRun]) -> Restored:
        progress.begin(disk, chain.size)
        with open_target(target, chain.size, image_format, cluster_size=chain.cluster_size, force=force) as sink:
            return write_out(run(sink, Pace(limit)), workers)

    if salvaging:
        with salvage.opened(machine, point, disk) as (chain, salvaged):
            return write(chain, lambda sink, pace: SalvageRun(chain, salvaged, sink, progress, pace))
    try:
        with open_chain(machine, point, disk, lambda chain: data_file.opened(machine.files, chain)) as (chain, files):
            return write(chain, lambda sink, pace: RestoreRun(chain, files, sink, progress, pace))
    except Damaged as error:
        raise salvage.located(error, machine, point, disk) from None
