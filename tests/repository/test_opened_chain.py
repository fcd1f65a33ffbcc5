"""
A reader that a prune overtakes starts again: one rule, one number of attempts and one error for every reader.

For each reader, a whole prune runs before each of the reader's opens in turn.  What the reader returns must be right.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
from histories import History, assert_same
from places import folder_of, repository_at

from backup.cli.output import Quiet
from backup.engine import streamer
from backup.errors import BackupError, Damaged, NotFound
from backup.guest import files
from backup.operations import copy, prune, remove, restore, restore_space, serve, status, verify
from backup.operations.prune import Request
from backup.planning.retention import Batch, Policy
from backup.qcow2 import Codec
from backup.repository import chain_reader, data_file
from backup.repository.machine import ATTEMPTS
from backup.repository.opened_chain import KeptChanging, examine, open_chain, open_unchanged
from backup.storage.folder import FolderStorage

NEWEST = Request(Policy(last=1), Batch(1), workers=1)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> History:
    """A full and three incrementals."""
    history = History.of(tmp_path_factory.mktemp("built"), "overtaken", 4096)
    for number in range(4):
        history.point("vda", full=number == 0, size=30 * 4096 + 1000 * number)
    return history


def newest(history: History) -> str:
    return max(history.contents)[0]


# Readers: each returns nothing and asserts that what it read is right


def restored(history: History, *, salvaging: bool = False) -> None:
    target = folder_of(history.machine).parent.parent / "target.raw"
    done = restore.restore_disk(
        history.machine,
        newest(history),
        "vda",
        str(target),
        image_format="raw",
        force=True,
        workers=1,
        progress=Quiet(),
        salvaging=salvaging,
    )
    assert not done.lost
    assert_same(target.read_bytes(), history.contents[newest(history), "vda"], "restored")


def streamed(history: History) -> None:
    path = folder_of(history.machine).parent.parent / "stream.raw"
    with path.open("wb") as file:
        streamer.stream(history.machine, newest(history), "vda", file.fileno(), workers=1, progress=Quiet())
    assert_same(path.read_bytes(), history.contents[newest(history), "vda"], "streamed")


def salvaged(history: History) -> None:
    restored(history, salvaging=True)


def held_chain(history: History) -> None:
    """As `serve` and `files` do before QEMU opens the chain."""
    opened = open_chain(
        history.machine, newest(history), "vda", lambda chain: data_file.hold(history.machine.files, chain)
    )
    with opened as (chain, protected):
        assert protected
        with chain_reader.checked(history.machine.files, chain, chain.size) as content:
            clusters = np.arange(-(-chain.size // 4096))
            room = memoryview(bytearray(len(clusters) * 4096))
            content.read(clusters, room, Codec(4096, None))
            assert_same(bytes(room[: chain.size]), history.contents[newest(history), "vda"], "held")


def copied(history: History) -> None:
    source = repository_at(folder_of(history.machine).parent)
    path = folder_of(history.machine).parent.parent / "second"
    place = FolderStorage(path)
    second = copy.open_second(place, source) if path.exists() else copy.make_second(place, source)
    done = copy.replicate(
        history.machine, second.machine("m"), None, workers=1, begin=lambda _: None, advance=lambda _: None
    )
    gone = {problem.point for problem in done.problems if problem.error.exit_code == NotFound.exit_code}
    assert {problem.point for problem in done.problems} == gone
    assert not gone & set(history.manifests())
    there = verify.verify_machine(second.machine("m"), deep=True, workers=1, progress=lambda _: None)
    assert there.problems == ()


def verified(history: History) -> None:
    done = verify.verify_machine(history.machine, deep=True, workers=1, progress=lambda _: None)
    assert done.problems == ()


def measured(history: History) -> None:
    manifest = history.manifests()[newest(history)]
    assert 0 < restore_space._data_bytes(history.machine, manifest, "vda") <= manifest.disks[0].size


def shown(history: History) -> None:
    limits = status.Limits(history.started, None)
    found = status.look(history.machine, None, limits)
    assert [each.code for each in found] == [0], found


def rehearsed(history: History) -> None:
    prune.prune(history.machine, Request(Policy(last=2), Batch(1), dry_run=True), Quiet())


def removal_planned(history: History) -> None:
    assert remove.plan(history.machine, newest(history), workers=1).removed == (newest(history),)


READERS = [
    restored,
    salvaged,
    streamed,
    held_chain,
    copied,
    verified,
    measured,
    shown,
    rehearsed,
    removal_planned,
]


@contextmanager
def before_open(number: int, action: Callable[[], object], monkeypatch) -> Iterator[Callable[[], int]]:
    """Act before the nth open of a file of the repository, or the last look at a name; yields the opens counted."""
    opens, real = 0, os.open

    def counting(path, *arguments, **keywords):
        nonlocal opens
        if str(path).endswith((".json", ".qcow2", ".b3")):
            opens += 1
            if opens == number:
                patched.undo()
                action()
        return real(path, *arguments, **keywords)

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", counting)
        yield lambda: opens


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)
def test_a_prune_before_any_open_of_a_reader_does_not_show(built, tmp_path, monkeypatch, reader):
    with before_open(0, lambda: None, monkeypatch) as count:
        reader(built.copied(tmp_path / "undisturbed"))
        opens = count()
    assert opens > 4
    pruned = 0
    for number in range(1, opens + 1):
        history = built.copied(tmp_path / "here")

        def overtake(history=history):
            nonlocal pruned
            pruned += prune.prune(history.machine, NEWEST, Quiet()).removed

        with before_open(number, overtake, monkeypatch):
            reader(history)
    assert pruned > 0


@pytest.mark.parametrize("salvaging", [False, True], ids=["restore", "salvage"])
def test_a_chain_that_changes_at_each_attempt_ends_a_reader_with_1(built, tmp_path, monkeypatch, salvaging):
    """A salvage once called that damage, with exit code 12."""
    history = built.copied(tmp_path / "here")
    read = type(history.machine).contents
    points = sorted(history.manifests())
    looks = 0

    def changing(machine, **how):
        nonlocal looks
        looks += 1
        contents = read(machine, **how)
        manifest = contents.manifests[points[-1]]
        changed = {**contents.manifests, points[-1]: manifest.with_disk(other_identity(manifest.disks[0], looks))}
        return type(contents)(changed, contents.damaged)

    monkeypatch.setattr(type(history.machine), "contents", changing)
    with pytest.raises(KeptChanging, match=f"the chain of point {points[-1]} changed {ATTEMPTS} times") as stopped:
        restored(history, salvaging=salvaging)
    assert stopped.value.exit_code == 1
    assert looks == ATTEMPTS + 1


def other_identity(entry, number: int):
    from dataclasses import replace

    return replace(entry, identity=f"{number:032x}")


def test_serve_and_files_open_the_chain_by_the_same_rule(built, tmp_path, monkeypatch):
    history = built.copied(tmp_path / "here")
    changes = iter(range(ATTEMPTS + 5))
    monkeypatch.setattr("backup.model.chain.build", lambda *_: next(changes))
    monkeypatch.setattr(data_file, "hold", lambda *_: nullcontext(True))
    monkeypatch.setattr(serve, "_start", lambda *_, **__: None)
    with pytest.raises(KeptChanging), serve.serving(history.machine, newest(history), "vda", None, writable=False):
        pass
    changes = iter(range(ATTEMPTS + 5))
    with pytest.raises(KeptChanging), files.open_files(history.machine, newest(history), "vda", None):
        pass


# The rule by itself


class Facts:
    """What the manifests say, as it changes with each read, and what opening did for it."""

    def __init__(self, *reads: int) -> None:
        self.reads = list(reads)
        self.opened: list[int] = []
        self.closed: list[int] = []

    def read(self) -> int:
        return self.reads.pop(0) if len(self.reads) > 1 else self.reads[0]

    @contextmanager
    def open(self, facts: int, failing: tuple[int, ...] = ()) -> Iterator[str]:
        self.opened.append(facts)
        if facts in failing:
            raise Damaged(f"{facts} is damaged", hint="")
        try:
            yield f"files of {facts}"
        finally:
            self.closed.append(facts)


def test_what_did_not_change_is_opened_once_and_closed_at_the_end():
    facts = Facts(1)
    with open_unchanged("it", facts.read, facts.open) as found:
        assert found == (1, "files of 1")
        assert facts.closed == []
    assert (facts.opened, facts.closed) == ([1], [1])


def test_what_changed_is_closed_and_opened_again():
    facts = Facts(1, 2, 3, 3)
    with open_unchanged("it", facts.read, facts.open) as found:
        assert found == (3, "files of 3")
        assert facts.closed == [1, 2]


def test_a_failure_counts_only_where_nothing_changed():
    facts = Facts(1, 2)
    with open_unchanged("it", facts.read, lambda number: facts.open(number, failing=(1,))) as found:
        assert found == (2, "files of 2")
    with (
        pytest.raises(Damaged, match="2 is damaged"),
        open_unchanged("it", Facts(1, 2).read, lambda number: facts.open(number, failing=(1, 2))),
    ):
        pass


def test_a_failure_of_the_block_is_the_blocks():
    facts = Facts(1)
    with pytest.raises(Damaged, match="in the block"), open_unchanged("it", facts.read, facts.open):
        raise Damaged("in the block", hint="")
    assert (facts.opened, facts.closed) == ([1], [1])


class Looks:
    """A machine whose contents change with each look, up to a number."""

    name = "m"

    def __init__(self, changes: int) -> None:
        self.left = changes

    def contents(self) -> int:
        self.left = max(0, self.left - 1)
        return self.left


@pytest.mark.parametrize("outcome", ["fails", "is doubtful"])
def test_a_look_that_fails_or_is_doubtful_is_taken_again_until_nothing_changes(outcome):
    asked: list[int] = []

    def look(contents: int) -> str:
        asked.append(contents)
        if outcome == "fails":
            raise Damaged(f"{contents}", hint="")
        return f"{contents}"

    if outcome == "fails":
        with pytest.raises(Damaged, match=r"^0$"):
            examine(Looks(3), look)
    else:
        assert examine(Looks(3), look, doubtful=bool) == "0"
    assert asked == [2, 1, 0]
    asked.clear()
    with pytest.raises(KeptChanging, match=f"machine m changed {ATTEMPTS} times"):
        examine(Looks(10 * ATTEMPTS), look, doubtful=bool)
    assert len(asked) == ATTEMPTS


def test_a_look_that_is_sure_is_taken_once():
    assert examine(Looks(3), lambda contents: contents) == 2
    with pytest.raises(BackupError):
        examine(Looks(1), lambda _: (_ for _ in ()).throw(NotFound("gone", hint="")))
