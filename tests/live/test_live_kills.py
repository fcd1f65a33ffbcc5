"""
A backup of a running machine that is killed at any step loses nothing, whatever becomes of the machine.

The run stands still at a step (SIGSTOP), the guest writes, the run is killed.  The machine goes on, is restarted, or is
killed too; the guest writes again; the next run must succeed, find and remove all that the killed one left in QEMU and
on disk, and every published point must restore to what both disks held at its instant.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path

import pytest
from lab import MIB, call_pybackup, make_image
from live import Machine, Nights, Step, commands_of, own_folders, private_tmp, remove_empty_folders, stopped_at

DATA, REPOSITORY = "backup.repository.data_file_writer", "backup.repository.machine"

BEFORE_PUBLISHING = [
    ("add-fd", 2),
    ("blockdev-add", 2),
    ("transaction", 1),
    ("getfd", 1),
    ("nbd-server-start", 1),
    ("block-export-add", 2),
]
AFTER_PUBLISHING = [
    ("block-export-del", 2),
    ("nbd-server-stop", 1),
    ("job-cancel", 2),
    ("blockdev-del", 2),
    ("closefd", 1),  # asked for once to learn that there is nothing to close
    ("remove-fd", 2),
    ("block-dirty-bitmap-remove", 2),
]
"""Each command that changes something in QEMU, and how often an incremental of two disks sends it."""

COMMANDS = [
    Step(name, "after", nth, published)
    for commands, published in ((BEFORE_PUBLISHING, False), (AFTER_PUBLISHING, True))
    for name, times in commands
    for nth in range(1, times + 1)
]
"""Before a command QEMU is as after the one before it."""
COPYING = Step("PartFile.put", "after", module=DATA)
UNPUBLISHED = Step("Machine.publish", "before", module=REPOSITORY)
PUBLISHED = Step("Machine.publish", "after", published=True, module=REPOSITORY)
OTHERS = [Step("query-named-block-nodes", "before"), Step("transaction", "before"), COPYING, UNPUBLISHED, PUBLISHED]
REPRESENTATIVE = [
    Step("blockdev-add", "after", 2),
    Step("transaction", "after"),
    COPYING,
    PUBLISHED,
    Step("job-cancel", "after", published=True),
    Step("block-dirty-bitmap-remove", "after", published=True),
]


@pytest.fixture
def nights(tmp_path: Path):
    """Two disks with a full, and writes after it: something to lose."""
    with Machine.of(tmp_path, "a", "b") as machine, private_tmp(machine.place):
        machine.start()
        machine.write("a", 0, 200_000, 0x11)
        machine.write("b", MIB, 300_000, 0x12)
        found = Nights.of(machine)
        found.full()
        machine.write("a", 2 * MIB, 70_000, 0x21)
        machine.write("b", 100_000, 1000, 0x22)
        machine.zero("b", MIB, 100_000)
        yield found


def struck(nights: Nights, step: Step, *, sure: bool = True) -> None:
    """An incremental that is killed at the step (`sure` when it comes once), after the guest wrote meanwhile."""
    machine, points, held = nights.machine, nights.points(), nights.machine.held()
    with stopped_at(step, nights.arguments("incremental", "--no-fallback")) as run:
        machine.write("a", 2 * MIB - 30_000, 60_000, 0x31)
        machine.write("b", 0, 5, 0x32)
        machine.zero("a", 3 * MIB, 70_000)
        run.send_signal(signal.SIGKILL)
        assert run.wait(30) == -signal.SIGKILL
    new = nights.points() - points
    assert len(new) == step.published or not sure
    nights.references.update(dict.fromkeys(new, held))


def goes_on(nights: Nights) -> None:
    nights.machine.write("a", 3 * MIB, 512, 0x41)
    nights.machine.write("b", 3 * MIB, 512, 0x42)


@pytest.mark.parametrize("step", COMMANDS + OTHERS, ids=str)
def test_a_run_that_is_killed_at_any_step_of_a_machine_that_goes_on_is_made_up_for(nights, step):
    struck(nights, step)
    goes_on(nights)
    nights.require_making_up("--no-fallback")
    nights.require_own_bitmap_alone()


@pytest.mark.parametrize("step", REPRESENTATIVE, ids=str)
def test_a_run_is_killed_and_then_the_machine_is_restarted(nights, step):
    struck(nights, step)
    nights.machine.restart()
    goes_on(nights)
    nights.require_making_up("--no-fallback")
    nights.require_own_bitmap_alone()


@pytest.mark.parametrize("step", REPRESENTATIVE, ids=str)
def test_a_run_is_killed_and_then_the_machine_is_killed(nights, step):
    """No bitmap is to be trusted then: of those that came from the image QEMU says so, those made since are gone."""
    nights.machine.restart()
    struck(nights, step)
    nights.machine.crash()
    goes_on(nights)
    remove_empty_folders()
    nights.require_rescans("is inconsistent", "is missing")
    nights.require_restored()
    nights.require_own_bitmap_alone()


def test_a_folder_in_tmp_that_a_killed_run_and_a_killed_qemu_left_goes_with_a_later_run(nights):
    """Not while QEMU listens there: its own recovery looks for it."""
    struck(nights, COPYING)
    [left] = own_folders()
    os.utime(left, (0, 0))  # one that was just made may be about to be used
    image = make_image(nights.machine.folder / "other.tmp", MIB)
    another = ["full", "--image", image, "--machine", "n", "--repo", nights.repository]
    assert call_pybackup(another).rc == 0
    assert own_folders() == [left]
    nights.machine.crash()
    assert call_pybackup(another).rc == 0
    assert own_folders() == []
    nights.require_rescans("is missing")


def test_four_runs_that_are_killed_one_after_the_other(nights):
    for step in (Step("transaction", "after"), COPYING, PUBLISHED, Step("block-export-add", "after", 2)):
        struck(nights, step)
        goes_on(nights)
    nights.require_making_up("--no-fallback")
    nights.require_own_bitmap_alone()


@pytest.mark.parametrize(("name", "times"), AFTER_PUBLISHING)
def test_a_run_that_is_killed_while_it_removes_what_a_killed_one_left(nights, name, times):
    """What tidies up at a run's end does so at the next one's start, before anything is published."""
    struck(nights, COPYING)
    struck(nights, Step(name, "after"))
    goes_on(nights)
    struck(nights, Step(name, "after", times), sure=False)
    goes_on(nights)
    nights.require_making_up("--no-fallback")
    nights.require_own_bitmap_alone()


def test_a_first_full_that_is_killed_is_made_again(tmp_path):
    with Machine.of(tmp_path, "a", "b") as machine, private_tmp(machine.place):
        machine.start().write("a", 0, 200_000, 0x11)
        nights = Nights.of(machine)
        for step in (Step("transaction", "after"), COPYING):
            with stopped_at(step, nights.arguments("full")) as run:
                machine.write("a", 100_000, 200_000, 0x12)
                run.kill()
                run.wait(30)
        assert nights.backup("full").rc == 0
        machine.write("b", 0, 1000, 0x13)
        nights.require_making_up("--no-fallback")
        nights.require_own_bitmap_alone()


def test_a_killed_run_is_made_up_for_by_a_full_too(nights):
    struck(nights, Step("block-export-add", "after", 2))
    goes_on(nights)
    done = nights.backup("full")
    assert done.rc == 0, done
    remove_empty_folders()
    nights.require_own_bitmap_alone()
    goes_on(nights)
    nights.require_incremental()


def test_every_command_that_changes_something_is_among_the_steps(nights, tmp_path):
    arguments = nights.arguments("incremental", "--no-fallback")
    sent = commands_of(arguments, nights.machine.place / "commands")
    counted = Counter(name for name in sent if not name.startswith(("query-", "x-debug-query-")))
    assert counted == dict(BEFORE_PUBLISHING + AFTER_PUBLISHING)


ASKED = [
    Step("blockdev-add", "after", 1),
    Step("transaction", "before"),
    Step("transaction", "after"),
    Step("nbd-server-start", "after"),
    COPYING,
    UNPUBLISHED,
    PUBLISHED,
    Step("job-cancel", "before", published=True),
    Step("block-dirty-bitmap-remove", "after", published=True),
]


@pytest.mark.parametrize(
    ("step", "number"),
    [(step, signal.SIGTERM) for step in ASKED] + [(step, signal.SIGINT) for step in ASKED[2::4]],
    ids=lambda value: value.name if isinstance(value, signal.Signals) else str(value),
)
def test_a_signal_that_asks_leaves_nothing_behind(nights, step, number):
    """Also not until the next run; there is the whole point or nothing of it."""
    machine, points, held = nights.machine, nights.points(), nights.machine.held()
    with stopped_at(step, nights.arguments("incremental", "--no-fallback")) as run:
        run.send_signal(number)
        run.send_signal(signal.SIGCONT)
        assert run.wait(60) == 128 + number
    new = nights.points() - points
    assert len(new) <= step.published
    nights.references.update(dict.fromkeys(new, held))
    nights.require_nothing_left()
    if not new:
        nights.require_own_bitmap_alone()
    machine.write("a", 0, 512, 0x51)
    nights.require_making_up("--no-fallback")
    nights.require_own_bitmap_alone()
