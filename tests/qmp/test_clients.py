"""
Our connections to QEMU's NBD server: none begins when the end has begun, and none is left when the server is stopped.
"""

from __future__ import annotations

import os
import socket
import tempfile
import threading
from pathlib import Path

import pytest

from backup.errors import SourceError
from backup.qmp.clients import Clients


class NoMonitor:
    """Stands for a monitor: notes the descriptors that it is passed."""

    def __init__(self) -> None:
        self.passed: list[str] = []

    def pass_fd(self, fd: int, name: str, arguments: dict[str, str]) -> None:
        os.fstat(fd)
        self.passed.append(arguments["fdname"])


@pytest.fixture
def listener():
    with tempfile.TemporaryDirectory(dir="/tmp") as folder, socket.socket(socket.AF_UNIX) as found:
        found.bind(f"{folder}/nbd")
        found.listen(8)
        found.settimeout(20)
        yield found


def clients_of(listener: socket.socket, *, stay: bool = False) -> tuple[Clients, NoMonitor]:
    monitor = NoMonitor()
    clients = Clients(monitor, "own-", listener.getsockname())
    clients.stay = stay
    return clients, monitor


def accepted(listener: socket.socket) -> socket.socket:
    connection, _ = listener.accept()
    connection.settimeout(20)
    return connection


def test_a_connection_is_ended_though_its_descriptor_is_still_open(listener):
    """An error under way keeps the NBD handle, and with it the descriptor."""
    clients, _ = clients_of(listener)
    fd = clients.dial()
    with accepted(listener) as server:
        clients.leave()
        assert server.recv(1) == b""
    os.close(fd)


def test_a_client_that_must_stay_is_ended_only_when_the_exports_are_gone(listener):
    clients, monitor = clients_of(listener, stay=True)
    fds = [clients.dial(), clients.dial()]
    assert monitor.passed == ["own-k0", "own-k1"]
    with accepted(listener) as first, accepted(listener) as second:
        clients.leave()
        for server in (first, second):
            server.setblocking(False)
            with pytest.raises(BlockingIOError):
                server.recv(1)
            server.settimeout(20)
        first.shutdown(socket.SHUT_RDWR)
        clients.hung_up()
        second.setblocking(False)
        with pytest.raises(BlockingIOError):
            second.recv(1)
        second.settimeout(20)
        clients.close()
        assert second.recv(1) == b""
    for fd in fds:
        os.close(fd)


@pytest.mark.parametrize("stay", [True, False])
def test_no_connection_begins_when_the_end_has_begun(listener, stay):
    clients, monitor = clients_of(listener, stay=stay)
    clients.leave()
    with pytest.raises(SourceError):
        clients.dial()
    assert monitor.passed == []


def test_what_a_server_sent_before_it_hung_up_is_read_to_the_end(listener):
    """It waits for room in the socket, and sees only then that its client is gone."""
    clients, _ = clients_of(listener, stay=True)
    fd = clients.dial()
    with accepted(listener) as server:

        def send() -> None:
            server.sendall(bytes(4 << 20))
            server.shutdown(socket.SHUT_RDWR)

        sending = threading.Thread(target=send)
        sending.start()
        clients.hung_up()
        sending.join(20)
        assert not sending.is_alive()
    clients.close()
    os.close(fd)


def test_a_server_that_is_not_there_is_an_error_of_two_lines(tmp_path: Path):
    clients = Clients(NoMonitor(), "own-", str(tmp_path / "none"))
    with pytest.raises(SourceError) as caught:
        clients.dial()
    assert caught.value.hint
