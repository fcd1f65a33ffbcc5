"""Open a chain's data files, and look again where a prune changed the chain meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from backup.errors import Damaged, Failed, NotFound
from backup.model import chain as chains
from backup.model.chain import Chain
from backup.repository import data_file
from backup.repository.checked_file import CACHED
from backup.repository.data_file import OpenDataFile
from backup.repository.machine import Machine

_TRIES = 50
"""How often a chain is opened that a prune changes meanwhile; a step of one takes some fsyncs."""


@contextmanager
def opened_point(
    machine: Machine, point: str, disk: str, cached: Callable[[Chain], int] = lambda _: CACHED
) -> Iterator[tuple[Chain, list[OpenDataFile]]]:
    """
    Build a disk's chain and open all its files; `cached` says how many checked blocks are kept.

    All files are open before the manifests are read again: what changed meanwhile is tried again, so that damage counts
    only when it repeats.
    """
    failed: Chain | None = None
    for _ in range(_TRIES):
        chain = _chain(machine, point, disk)
        with ExitStack() as stack:
            try:
                files = stack.enter_context(data_file.opened(machine.path, chain, cached(chain)))
            except (Damaged, NotFound):
                if chain == failed:
                    raise
                failed = chain
                continue
            if _chain(machine, point, disk) == chain:
                yield chain, files
                return
    raise Failed(f"the chain of point {point} changed {_TRIES} times while it was opened", hint="run the command again")


def _chain(machine: Machine, point: str, disk: str) -> Chain:
    contents = machine.contents()
    return chains.build(contents.manifests, point, disk, contents.damaged)
