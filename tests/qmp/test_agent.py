"""
The guest agent's client, against QEMU's agent (which may not freeze: it would be this machine) and against a fake.

An answer is never taken for that of another question, and nothing that an agent does makes the client wait for ever.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from pathlib import Path

import pytest
from agents import FREEZE, STATUS, SYNC, THAW, FakeAgent, qemu_ga

from backup.errors import Failed
from backup.qmp.agent import Agent, AgentError

SHORT = 0.3
"""Seconds to wait for an answer that never comes."""


@pytest.fixture
def address(tmp_path: Path) -> Path:
    return tmp_path / "agent.sock"


def require_two_lines(error: AgentError, *parts: str) -> None:
    assert isinstance(error, Failed)
    assert error.exit_code == 1
    for part in parts:
        assert part in error.message
    assert "\n" not in error.message + error.hint
    assert error.hint


# QEMU's own agent


def test_the_real_agent_says_that_nothing_is_frozen(tmp_path):
    with qemu_ga(tmp_path) as address:
        for _ in range(2):
            with Agent(address) as agent:
                assert agent.frozen() is False
                assert agent.frozen() is False


def test_a_socket_whose_path_is_longer_than_an_address(tmp_path):
    with qemu_ga(tmp_path) as address:
        deep = tmp_path / ("d" * 60) / ("e" * 60)
        deep.mkdir(parents=True)
        with Agent(address.rename(deep / "qga")) as agent:
            assert agent.frozen() is False
    with pytest.raises(AgentError) as caught, Agent(tmp_path / ("n" * 120)):
        pass
    require_two_lines(caught.value, "107 bytes")


def test_the_real_agents_refusal_is_shown_with_its_class_and_words(tmp_path):
    with qemu_ga(tmp_path) as address, Agent(address) as agent:
        for command, ask in ((FREEZE, agent.freeze), (THAW, agent.thaw)):
            with pytest.raises(AgentError) as caught:
                ask()
            require_two_lines(caught.value, str(address), command, "CommandNotFound", "disabled")
        assert agent.frozen() is False


def test_the_real_agent_answers_a_new_client_after_one_that_left_half_a_question(tmp_path):
    with qemu_ga(tmp_path) as address:
        with socket.socket(socket.AF_UNIX) as hasty:
            hasty.connect(str(address))
            hasty.sendall(b'{"execute": "guest-fsfreeze-st')
        with Agent(address) as agent:
            assert agent.frozen() is False


def test_the_real_agent_serves_one_client_and_the_second_is_told(tmp_path):
    with qemu_ga(tmp_path) as address, Agent(address) as first:
        with pytest.raises(AgentError) as caught, Agent(address, SHORT):
            pass
        require_two_lines(caught.value, str(address), f"within {SHORT} s")
        assert "one client at a time" in caught.value.hint
        assert first.frozen() is False


# A fake one


def test_a_guest_is_frozen_and_thawed(address):
    with FakeAgent(address) as fake, Agent(address) as agent:
        assert agent.frozen() is False
        assert agent.freeze() == 3
        assert fake.frozen
        assert agent.frozen() is True
        assert agent.thaw() == 3
        assert not fake.frozen
        assert agent.thaw() == 0
    assert fake.heard == [STATUS, FREEZE, STATUS, THAW, THAW]


def test_a_guest_that_a_killed_run_left_frozen_is_seen_and_thawed(address):
    with FakeAgent(address, frozen=True) as fake:
        with Agent(address) as agent:
            assert agent.frozen() is True
            assert agent.thaw() == 3
        assert not fake.frozen


def test_nothing_is_asked_of_an_agent_that_does_not_answer_the_sync(address):
    """A freeze that is sent to a guest without an agent would be found, and done, by one that starts an hour later."""
    with FakeAgent(address, "silent", on=SYNC) as fake:
        began = time.monotonic()
        with pytest.raises(AgentError) as caught, Agent(address, SHORT):
            pass
        assert SHORT <= time.monotonic() - began < 10
    require_two_lines(caught.value, str(address), "did not answer", f"within {SHORT} s")
    assert "qemu-guest-agent runs in the guest" in caught.value.hint
    assert fake.heard == []


@pytest.mark.parametrize("fresh", [True, False], ids=["by a new connection", "by the same connection"])
def test_a_late_answer_to_freeze_is_not_taken_for_that_of_thaw(address, fresh):
    with FakeAgent(address, "late") as fake, Agent(address, SHORT) as agent:
        with pytest.raises(AgentError) as caught:
            agent.freeze()
        require_two_lines(caught.value, FREEZE, "did not answer")
        assert "may be frozen" in caught.value.hint
        assert fake.frozen
        if fresh:
            agent.__exit__(None, None, None)
            agent = Agent(address).__enter__()
        assert agent.thaw() == 3
        assert agent.thaw() == 0
        assert agent.frozen() is False
        assert not fake.frozen
        agent.__exit__(None, None, None)


def test_a_late_answer_to_the_sync_of_an_earlier_client_is_dropped(address):
    with FakeAgent(address, frozen=True) as fake:
        fake.kept = b'return": 9}\n\xff{"return": 42}\n{"return": "thawed"}\n{"error": {}}\n\xff{"ret'
        with Agent(address) as agent:
            assert agent.frozen() is True


def test_any_question_can_be_asked_again_after_its_answer_came_late(address):
    with FakeAgent(address, "late", on=STATUS) as fake, Agent(address, SHORT) as agent:
        with pytest.raises(AgentError, match="did not answer"):
            agent.frozen()
        fake.frozen = True
        fake.manner = ""
        assert agent.frozen() is True


@pytest.mark.parametrize("on", [SYNC, STATUS, FREEZE, THAW])
def test_a_connection_that_breaks_within_an_answer_is_an_error(address, on):
    with FakeAgent(address, "dies", on=on) as fake:
        with pytest.raises(AgentError) as caught:
            ask(address, on)
        require_two_lines(caught.value, str(address), on, "lost")
        fake.manner = ""
        with Agent(address) as agent:
            agent.thaw()
        assert not fake.frozen


def test_an_agent_that_dies_while_it_freezes_may_leave_the_guest_frozen_and_the_hint_says_so(address):
    for on in (FREEZE, THAW):
        with FakeAgent(address, "dies", on=on), pytest.raises(AgentError) as caught:
            ask(address, on)
        assert "may be frozen" in caught.value.hint


@pytest.mark.parametrize("on", [STATUS, FREEZE, THAW])
def test_a_refusal_is_shown_and_the_connection_stays_whole(address, on):
    with FakeAgent(address, "refuses", on=on) as fake, Agent(address) as agent:
        with pytest.raises(AgentError) as caught:
            {STATUS: agent.frozen, FREEZE: agent.freeze, THAW: agent.thaw}[on]()
        require_two_lines(caught.value, on, f"CommandNotFound: {on} has been disabled")
        fake.manner = ""
        assert agent.frozen() is False


@pytest.mark.parametrize("manner", ["garbage", "endless", "odd"])
@pytest.mark.parametrize("on", [STATUS, FREEZE, THAW])
def test_an_answer_that_makes_no_sense_is_an_error_that_shows_little_of_it(address, manner, on):
    with FakeAgent(address, manner, on=on):
        began = time.monotonic()
        with pytest.raises(AgentError) as caught:
            ask(address, on, timeout=60)
        assert time.monotonic() - began < 30, "it did not wait for more of it"
    require_two_lines(caught.value, on, {"garbage": "HTTP/1.1", "endless": "xxx", "odd": "['frozen']"}[manner])
    assert len(caught.value.message) < 700


@pytest.mark.parametrize(
    "said",
    [b'{"return": true}', b'{"return": -1}', b'{"return": 1.5}', b"[1]", b"[" * 60_000, b'{"error": 1}', b"\xfe"],
)
def test_a_number_of_file_systems_is_a_number(address, said):
    def answer(asked):
        return said + b"\n" if asked["execute"] == FREEZE else FakeAgent._done(fake, asked)

    with FakeAgent(address) as fake:
        fake._done = answer
        with pytest.raises(AgentError) as caught:
            ask(address, FREEZE)
        require_two_lines(caught.value, FREEZE)


def ask(address: Path, command: str, timeout: float = 10.0) -> None:
    with Agent(address, timeout) as agent:
        {SYNC: agent.frozen, STATUS: agent.frozen, FREEZE: agent.freeze, THAW: agent.thaw}[command]()


# No agent at all


def test_no_socket_no_listener_and_no_socket_at_all_are_errors(address, tmp_path):
    for why in ("No such file", "Connection refused"):
        with pytest.raises(AgentError) as caught, Agent(address):
            pass
        require_two_lines(caught.value, str(address), why)
        if why == "No such file":
            with socket.socket(socket.AF_UNIX) as nobody:
                nobody.bind(str(address))
    with pytest.raises(AgentError) as caught, Agent(tmp_path / ("x" * 200)):
        pass
    require_two_lines(caught.value, "too long")


def test_a_socket_whose_queue_is_full_is_busy(address):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(address))
        listener.listen(0)
        waiting = [socket.socket(socket.AF_UNIX) for _ in range(3)]
        for each in waiting:
            each.setblocking(False)
            each.connect_ex(str(address))
        with pytest.raises(AgentError) as caught, Agent(address):
            pass
        for each in waiting:
            each.close()
    require_two_lines(caught.value, "busy")


def test_an_agent_that_does_not_read_is_an_error(address):
    """Sending has the deadline too."""
    with FakeAgent(address) as fake, Agent(address, SHORT) as agent:
        stuck = threading.Event()
        fake._answer = lambda asked: stuck.wait() and None
        agent._socket.sendall(b"{}\n")
        fill(agent._socket)
        with pytest.raises(AgentError) as caught:
            agent.freeze()
        stuck.set()
    require_two_lines(caught.value, "did not answer")


def fill(connection: socket.socket) -> None:
    """Send until no more fits, with the reader stuck."""
    connection.settimeout(SHORT)
    with contextlib.suppress(TimeoutError):
        while True:
            connection.send(b" " * 4096)
