"""
A guest is frozen for the transaction alone, and thawed however the run ends.

The agent is a fake (tests/agents.py), which says at any time whether "its" file systems are frozen.
"""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path

import pytest
from agents import FREEZE, STATUS, SYNC, THAW, FakeAgent
from lab import call_pybackup
from live import Machine, Nights, Step, kinds, private_tmp, remove_empty_folders, stopped_at

from backup.qmp.agent import Agent
from backup.qmp.monitor import Monitor
from backup.sources.freezing import Freezing

AGENT = "backup.qmp.agent"
IN_THE_FREEZE = [Step("transaction", "before"), Step("transaction", "after")]


@pytest.fixture
def nights(tmp_path: Path):
    with Machine.of(tmp_path, "a", "b") as machine, private_tmp(machine.place):
        machine.start().write("a", 0, 200_000, 0x11)
        found = Nights.of(machine)
        found.full()
        machine.write("b", 100_000, 1000, 0x22)
        found.options = ("--freeze", "--agent", machine.place / "agent")
        yield found


def agent_of(nights: Nights, manner: str = "", **given) -> FakeAgent:
    return FakeAgent(nights.machine.place / "agent", manner, **given)


def consistency(nights: Nights) -> set[str]:
    return {disk["source"]["consistency"] for disk in nights.newest["disks"]}


@pytest.fixture
def impatient(monkeypatch):
    """Do not wait ten seconds for an agent."""
    monkeypatch.setattr(Agent.__init__, "__defaults__", (0.5,))


def require_thawed_by_the_next_run(nights: Nights, agent: FakeAgent) -> None:
    remove_empty_folders()
    assert agent.frozen
    nights.require_making_up("--no-fallback")
    assert not agent.frozen


def watched(monkeypatch, agent: FakeAgent) -> list[tuple[str, bool]]:
    """QMP commands of the runs from now on, twice each: whether the guest was frozen before and after it."""
    seen: list[tuple[str, bool]] = []
    execute = Monitor.command

    def command(self, name, arguments=None):
        seen.append((name, agent.frozen))
        found = execute(self, name, arguments)
        seen.append((name, agent.frozen))
        return found

    monkeypatch.setattr(Monitor, "command", command)
    return seen


@pytest.mark.parametrize("wanted", ["full", "incremental"])
def test_the_guest_is_frozen_at_the_transaction_and_at_nothing_else(nights, monkeypatch, wanted):
    with agent_of(nights) as agent:
        seen = watched(monkeypatch, agent)
        done = nights.backup(wanted)
        assert not agent.frozen
    assert done.rc == 0, done
    assert [name for name, frozen in seen if frozen] == ["transaction", "transaction"]
    assert consistency(nights) == {"filesystem"}
    assert agent.heard.count(FREEZE) == 1
    nights.require_sound()


def test_a_run_that_is_not_asked_to_freeze_does_not(nights):
    nights.options = ()
    with agent_of(nights) as agent:
        nights.require_incremental()
    assert agent.heard == []
    assert consistency(nights) == {"crash"}


def test_a_dry_run_asks_the_agent_and_freezes_nothing(nights):
    with agent_of(nights) as agent:
        done = nights.backup("incremental", "--dry-run")
        assert (done.rc, done.stderr) == (0, ""), done
        assert agent.heard == [STATUS]
    done = nights.backup("incremental", "--dry-run")
    assert (done.rc, "was not frozen" in done.stderr) == (3, True), done


# Left frozen


def test_clean_thaws_a_guest_whose_agent_it_is_told_or_finds_in_the_configuration(nights, tmp_path):
    config = tmp_path / "c.yaml"
    disks = "disks: {a: {node: a}}"
    config.write_text(f"machines: {{m: {{qmp: {nights.machine.qmp}, agent: {nights.machine.place}/agent, {disks}}}}}")
    for options in ([], ["--agent", nights.machine.place / "agent"]):
        with agent_of(nights, frozen=True) as agent:
            given = ["clean", "--qmp", nights.machine.qmp, "--repo", nights.repository, *options]
            done = call_pybackup(given if options else ["--config", config, *given])
            assert (done.rc, done.stdout) == (0, "removed a freeze of the guest's file systems\n"), done
            assert not agent.frozen


@pytest.mark.parametrize("asked", [True, False], ids=["--freeze", "no freeze"])
def test_a_guest_that_was_left_frozen_is_thawed_before_anything_else(nights, monkeypatch, asked):
    """Also when this run is to freeze nothing: it only has to know the agent."""
    with agent_of(nights, frozen=True) as agent:
        seen = watched(monkeypatch, agent)
        nights.options = nights.options if asked else nights.options[1:]
        done = nights.backup("incremental", "--no-fallback")
        assert (done.rc, kinds(done)) == (0, {"incremental"}), done
        assert not agent.frozen
    assert [name for name, frozen in seen if frozen] == ["transaction", "transaction"] * asked
    assert consistency(nights) == {"filesystem" if asked else "crash"}
    nights.require_sound()


@pytest.mark.parametrize("step", IN_THE_FREEZE, ids=str)
def test_a_run_that_is_killed_in_the_freeze_is_made_up_for_by_the_next(nights, step):
    with agent_of(nights) as agent:
        with stopped_at(step, nights.arguments("incremental")) as run:
            assert agent.frozen
            run.kill()
            run.wait(30)
        require_thawed_by_the_next_run(nights, agent)


# Thawed on every path


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
@pytest.mark.parametrize(
    "step",
    [
        *IN_THE_FREEZE,
        Step("Agent.freeze", "after", module=AGENT),
        Step("Agent.__exit__", "before", 2, module=AGENT),
        Step("Freezing.end", "before", module="backup.sources.freezing"),
    ],
    ids=str,
)
def test_a_run_that_is_asked_to_stop_in_the_freeze_thaws(nights, step, number):
    """Also where the signal comes as the function begins that thaws, or the one that frees the agent's socket."""
    points = nights.points()
    with agent_of(nights) as agent:
        with stopped_at(step, nights.arguments("incremental")) as run:
            assert agent.frozen
            run.send_signal(number)
            run.send_signal(signal.SIGCONT)
            assert run.wait(60) == 128 + number
        assert not agent.frozen
        assert nights.points() == points
        nights.require_nothing_left()
        done = nights.backup("incremental", "--no-fallback")
        assert (done.rc, kinds(done)) == (0, {"incremental"}), done
        nights.require_sound()


@pytest.mark.parametrize(
    "step",
    [
        Step("Agent.__enter__", "before", 3, module=AGENT),
        Step("Agent.__enter__", "after", 3, module=AGENT),
        Step("Agent.thaw", "before", module=AGENT),
        Step("Agent.thaw", "after", module=AGENT),
    ],
    ids=str,
)
def test_a_run_that_is_asked_to_stop_while_it_thaws_thaws_all_the_same(nights, step):
    points = nights.points()
    with agent_of(nights) as agent:
        with stopped_at(step, nights.arguments("incremental")) as run:
            assert agent.frozen == (str(step) != "after Agent.thaw 1")
            run.send_signal(signal.SIGTERM)
            run.send_signal(signal.SIGCONT)
            assert run.wait(60) == 143
        assert not agent.frozen
    assert nights.points() == points
    nights.require_nothing_left()


@pytest.mark.parametrize("step", IN_THE_FREEZE, ids=str)
def test_a_qemu_that_is_killed_in_the_freeze_is_thawed_all_the_same(nights, step):
    """Its guest is gone; but a connection that breaks looks the same, and there the guest is not."""
    with agent_of(nights) as agent:
        with stopped_at(step, nights.arguments("incremental")) as run:
            nights.machine.kill()
            run.send_signal(signal.SIGCONT)
            assert run.wait(60) == 13
        assert not agent.frozen


def test_a_transaction_that_qemu_refuses_thaws(nights):
    """A disk that is resized between the look and the transaction: refused, thawed, and tried again."""
    with agent_of(nights) as agent:
        with stopped_at(Step("blockdev-add", "before"), nights.arguments("incremental")) as run:
            nights.machine.resize("b", 5 << 20)
            run.send_signal(signal.SIGCONT)
            assert run.wait(60) == 0
        assert not agent.frozen
        assert [command for command in agent.heard if command in {FREEZE, THAW}] == [FREEZE, THAW] * 2


# An agent that does not do it


def require_crash_consistent(nights: Nights, agent: FakeAgent | None, *said: str) -> None:
    """A point all the same, exit 3, with the reason; and the guest is not frozen."""
    done = nights.backup("incremental", "--no-fallback")
    assert (done.rc, kinds(done)) == (3, {"incremental"}), done
    assert any(all(text in warning for text in said) for warning in done.machine["warnings"]), done
    assert consistency(nights) == {"crash"}
    assert agent is None or not agent.frozen
    nights.require_sound()


def test_no_agents_socket_is_a_warning(nights):
    require_crash_consistent(nights, None, "not frozen", "No such file")


@pytest.mark.usefixtures("impatient")
def test_an_agent_that_never_answers_is_a_warning(nights):
    with agent_of(nights, "silent", on=SYNC) as agent:
        require_crash_consistent(nights, agent, "not frozen", "did not answer")


@pytest.mark.parametrize("manner", ["late", "dies", "refuses", "garbage"])
def test_an_agent_that_does_not_freeze_as_it_should_is_a_warning_and_the_guest_is_thawed(nights, monkeypatch, manner):
    if manner == "late":  # long enough that on a loaded machine the other answers are in time
        monkeypatch.setattr(Agent.__init__, "__defaults__", (3.0,))
    with agent_of(nights, manner) as agent:
        require_crash_consistent(nights, agent, "not frozen", FREEZE)


def test_a_thaw_that_fails_once_is_tried_again(nights):
    with agent_of(nights, "dies", on=THAW) as agent:
        done_before_it_dies = agent._answer

        def dies_once(asked):
            answer = done_before_it_dies(asked)
            if answer is None:
                agent.manner, agent.frozen = "", True
            return answer

        agent._answer = dies_once
        done = nights.backup("incremental", "--no-fallback")
        assert not agent.frozen
    assert (done.rc, kinds(done)) == (0, {"incremental"}), done
    assert agent.heard.count(THAW) == 2


@pytest.mark.parametrize("required", [False, True])
def test_a_guest_that_another_program_thaws_too_early_is_not_called_frozen(nights, monkeypatch, required):
    with agent_of(nights) as agent:
        execute = Monitor.command

        def thaw_and_command(self, name, arguments=None):
            agent.frozen = agent.frozen and name != "transaction"
            return execute(self, name, arguments)

        monkeypatch.setattr(Monitor, "command", thaw_and_command)
        if required:
            monkeypatch.setattr(Freezing, "__init__", requiring(Freezing.__init__))
        done = nights.backup("incremental")
    if required:
        assert (done.rc, "were thawed too early" in done.stderr) == (13, True), done
        return
    assert (done.rc, "is only crash-consistent: another program" in done.stderr) == (3, True), done
    assert consistency(nights) == {"crash"}


def requiring(make):
    def made(self, freeze, *words):
        make(self, replace(freeze, required=True), *words)

    return made


def test_a_thaw_that_fails_always_is_said_loudly(nights):
    with agent_of(nights, "refuses", on=THAW) as agent:
        done = nights.backup("incremental", "--no-fallback")
        assert agent.frozen
    assert done.rc == 3, done
    assert any("frozen" in warning and THAW in warning for warning in done.machine["warnings"]), done
    assert STATUS in agent.heard


def test_a_run_that_fails_and_cannot_thaw_says_both(nights, monkeypatch):
    """Nobody looks at a guest that stands still for a reason that was not told."""
    execute = Monitor.command

    def command(self, name, arguments=None):
        if name == "transaction":
            nights.machine.kill()
        return execute(self, name, arguments)

    monkeypatch.setattr(Monitor, "command", command)
    with agent_of(nights, "refuses", on=THAW) as agent:
        done = nights.backup("incremental")
        assert agent.frozen
    assert done.rc == 13, done
    assert "transaction" in done.stderr
    assert "frozen" in done.stderr
