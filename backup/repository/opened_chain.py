"""
Open what a reader needs, and start again if a prune has changed the files meanwhile.

A reader takes no lock of a machine.  It reads the manifests, opens the files that they name, and reads the manifests a
second time.  If the manifests are unchanged, the opened files belong together, and a failure is real.  If the manifests
have changed, a prune has replaced or removed files in between, and the reader starts again.

Every command that reads a chain goes through this module, with one number of attempts and one error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TypeVar

from backup.errors import BackupError, Failed
from backup.model import chain as chains
from backup.model.chain import Chain
from backup.repository.machine import ATTEMPTS, Contents, Machine

_Facts = TypeVar("_Facts")
_Opened = TypeVar("_Opened")
_Result = TypeVar("_Result")


@contextmanager
def open_unchanged(
    what: str, read: Callable[[], _Facts], open_files: Callable[[_Facts], AbstractContextManager[_Opened]]
) -> Iterator[tuple[_Facts, _Opened]]:
    """
    Open files for what `read` returns, and make sure that `read` returns the same afterwards.

    Parameters
    ----------
    what : str
        The thing that is opened, for the error message.
    read : callable
        Reads the manifests; two results are equal if no prune has changed anything in between.
    open_files : callable
        Opens the files; they stay open until the block ends.

    Raises
    ------
    BackupError
        `read` or `open_files` failed, and no prune was the cause.
    KeptChanging
        Each attempt met another change.
    """
    facts = read()
    for _ in range(ATTEMPTS):
        with ExitStack() as stack:
            try:
                opened = stack.enter_context(open_files(facts))
            except BackupError:
                later = read()
                if later == facts:
                    raise
            else:
                later = read()
                if later == facts:
                    yield facts, opened
                    return
            facts = later
    raise KeptChanging(what)


@contextmanager
def open_chain(
    machine: Machine, point: str, disk: str, open_files: Callable[[Chain], AbstractContextManager[_Opened]]
) -> Iterator[tuple[Chain, _Opened]]:
    """
    Build the chain of a point's disk and open its files with `open_files`, as `open_unchanged`.

    Raises
    ------
    BackupError
        The chain is broken, or `open_files` failed.
    """

    def read() -> Chain:
        contents = machine.contents()
        return chains.build(contents.manifests, point, disk, contents.damaged)

    with open_unchanged(f"the chain of point {point}", read, open_files) as opened:
        yield opened


def examine(
    machine: Machine, look: Callable[[Contents], _Result], *, doubtful: Callable[[_Result], bool] = lambda _: False
) -> _Result:
    """
    Return what `look` finds in a machine's contents, without the machine's lock.

    If `look` fails or its result is `doubtful`, and a prune has changed the manifests meanwhile, `look` is called again
    with the new contents: damage counts only if nothing has changed.

    Raises
    ------
    BackupError
        `look` failed, and no prune was the cause.
    KeptChanging
        Each attempt met another change.
    """
    contents = machine.contents()
    for _ in range(ATTEMPTS):
        try:
            result = look(contents)
        except BackupError:
            later = machine.contents()
            if later == contents:
                raise
        else:
            if not doubtful(result):
                return result
            later = machine.contents()
            if later == contents:
                return result
        contents = later
    raise KeptChanging(f"machine {machine.name}")


class KeptChanging(Failed):
    """At each attempt of a reader, a prune changed the files that the reader opened."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what} changed {ATTEMPTS} times while it was read",
            hint="run the command again when no prune of this machine is running",
        )
