"""The peer on a QMP socket: every answer is checked, and an odd one ends in an error, never in a bug."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from lab import PEAK_KIB, call_pybackup

from backup.errors import SourceError
from backup.qmp.answers import Refused
from backup.qmp.instant import query_block_graph
from backup.qmp.leftovers import ScratchPlace
from backup.qmp.monitor import Event, Monitor, MonitorLost, NotListening
from backup.qmp.scratch import _lost_copy

GREETING = {"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 22}, "package": ""}, "capabilities": []}}
NODE = {
    "node-name": "virtio0",
    "drv": "qcow2",
    "ro": False,
    "file": "/tmp/x.qcow2",
    "image": {"virtual-size": 1 << 20, "actual-size": 4096},
    "dirty-bitmaps": [
        {"name": "b", "granularity": 65536, "count": 0, "recording": True, "persistent": True, "busy": False}
    ],
}
DEVICE = {"device": "virtio0", "qdev": "/machine/peripheral/a", "inserted": {"node-name": "virtio0"}}
EDGE = {"parent": 2, "child": 1, "name": "root", "perm": ["write"], "shared-perm": []}
GRAPH = {
    "nodes": [
        {"id": 1, "type": "block-driver", "name": "virtio0"},
        {"id": 2, "type": "block-backend", "name": "virtio0"},
    ],
    "edges": [EDGE],
}
SOUND: dict[str, Any] = {
    "qmp_capabilities": {},
    "query-named-block-nodes": [NODE],
    "query-block": [DEVICE],
    "x-debug-query-block-graph": GRAPH,
    "query-block-exports": [{"id": "e", "node-name": "virtio0"}],
    "query-status": {"status": "running"},
    "query-jobs": [{"id": "j", "status": "running"}],
    "query-fdsets": [{"fdset-id": 0, "fds": [{"fd": 3, "opaque": "x"}]}],
}


class Peer:
    """A program on a QMP socket that answers each command with `answers[command]`, or as `reply` says."""

    def __init__(self, folder: Path, answers: dict[str, Any], greeting: Any = GREETING) -> None:
        self.path = folder / "qmp"
        self.answers = SOUND | answers
        self.greeting = greeting
        self.reply: Callable[[socket.socket, str, Any], None] = self._reply
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen(5)
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        if self._listener.fileno() >= 0:
            self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError, ValueError):
                send(connection, self.greeting)
                self._talk(connection)

    def _talk(self, connection: socket.socket) -> None:
        text = ""
        while part := connection.recv(65536):
            text += part.decode()
            while text:
                try:
                    command, end = json.JSONDecoder().raw_decode(text)
                except ValueError:
                    break
                text = text[end:].lstrip()
                self.reply(connection, command["execute"], command.get("id"))

    def _reply(self, connection: socket.socket, command: str, number: Any) -> None:
        if command in self.answers:
            send(connection, {"return": self.answers[command], "id": number})
        else:
            send(connection, {"error": {"class": "CommandNotFound", "desc": "unknown"}, "id": number})


def send(connection: socket.socket, message: Any) -> None:
    data = message if isinstance(message, bytes) else json.dumps(message).encode()
    connection.sendall(data + b"\r\n")


@contextmanager
def peer(greeting: Any = GREETING, **answers: Any) -> Iterator[Peer]:
    # The paths of pytest's folders are long.
    with tempfile.TemporaryDirectory(prefix="peer-", dir="/tmp") as folder:
        found = Peer(Path(folder), {name.replace("_", "-"): value for name, value in answers.items()}, greeting)
        try:
            yield found
        finally:
            found.close()


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy of a JSON value with another value (or, for `...`, nothing) at a place in it."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    if new is ... and len(path) == 1:
        del copy[path[0]]
    else:
        copy[path[0]] = changed(copy[path[0]], path[1:], new)
    return copy


def test_a_sound_peer_is_understood():
    with peer() as found, Monitor(found.path) as monitor:
        blocks = query_block_graph(monitor)
        assert monitor.version == "7.2.22"
    assert [(device.names[0], device.writes) for device, _ in blocks.disks()] == [("a", True)]


ODD = [None, 7, -1, 1 << 63, 1e308, "x", "nul\0", "\ud800", "x" * 100_000, True, [], {}, [[]], [None], ...]
PLACES = [
    (command, path)
    for command, paths in {
        "query-named-block-nodes": [
            (),
            (0,),
            (0, "node-name"),
            (0, "drv"),
            (0, "ro"),
            (0, "file"),
            (0, "image"),
            (0, "image", "virtual-size"),
            (0, "image", "actual-size"),
            (0, "dirty-bitmaps"),
            *((0, "dirty-bitmaps", 0, key) for key in NODE["dirty-bitmaps"][0]),
        ],
        "query-block": [(), (0,), (0, "device"), (0, "qdev"), (0, "inserted"), (0, "inserted", "node-name")],
        "x-debug-query-block-graph": [
            (),
            ("nodes",),
            ("nodes", 0, "id"),
            ("nodes", 0, "type"),
            ("nodes", 0, "name"),
            ("edges",),
            ("edges", 0, "parent"),
            ("edges", 0, "child"),
            ("edges", 0, "name"),
            ("edges", 0, "perm"),
            ("edges", 0, "perm", 0),
            ("edges", 0, "shared-perm"),
        ],
        "query-block-exports": [(), (0,), (0, "id"), (0, "node-name")],
        "query-jobs": [(), (0,), (0, "id"), (0, "status")],
        "query-fdsets": [(), (0,), (0, "fdset-id"), (0, "fds"), (0, "fds", 0), (0, "fds", 0, "opaque")],
        "query-status": [(), ("status",)],
    }.items()
    for path in paths
]


def refusal(monitor: Monitor, command: str) -> str | None:
    """Ask, and use the answer where it is part of the block graph; what is said against it."""
    try:
        monitor.command(command)
        if command.startswith(("query-block", "query-named", "x-debug")):
            query_block_graph(monitor)
    except SourceError as error:
        return error.message
    return None


def test_no_value_in_any_answer_ends_in_anything_but_an_error_of_the_source():
    refused = 0
    with peer() as found, Monitor(found.path) as monitor:
        for command, path in PLACES:
            for odd in ODD:
                if odd is ... and not path:
                    continue
                found.answers[command] = changed(SOUND[command], path, odd)
                complaint = refusal(monitor, command)
                assert complaint is None or "does not have the form of QEMU's" in complaint, (command, path, odd)
                assert complaint is None or len(complaint) < 300, (command, path)
                refused += complaint is not None
            found.answers[command] = SOUND[command]
    assert refused > len(PLACES) * 8


@pytest.mark.parametrize(
    ("command", "path", "odd"),
    [
        ("query-named-block-nodes", (0, "dirty-bitmaps", 0, "recording"), 1),
        ("query-named-block-nodes", (0, "dirty-bitmaps", 0, "busy"), None),
        ("query-named-block-nodes", (0, "ro"), "false"),
        ("query-named-block-nodes", (0, "file"), "nul\0"),
        ("query-named-block-nodes", (0, "file"), "\ud800"),
        ("query-named-block-nodes", (0, "file"), "x" * 100_000),
        ("query-named-block-nodes", (0, "image", "virtual-size"), True),
        ("query-named-block-nodes", (0, "image", "virtual-size"), 1 << 63),
        ("query-named-block-nodes", (0, "dirty-bitmaps", 0, "count"), -1),
        ("query-block", (0, "device"), ...),
        ("x-debug-query-block-graph", ("edges", 0, "perm"), "write"),
        ("query-fdsets", (0, "fdset-id"), "0"),
        ("query-jobs", (0, "id"), 5),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_by_its_place(command, path, odd):
    with peer() as found, Monitor(found.path) as monitor:
        found.answers[command] = changed(SOUND[command], path, odd)
        with pytest.raises(SourceError, match=re.escape(str(path[-1]))):
            monitor.command(command)


@pytest.mark.parametrize(
    "version",
    [None, 5, [], {}, {"qemu": 5}, {"qemu": {"major": 7, "minor": 2}}]
    + [{"qemu": {"major": 7, "minor": 2, "micro": odd}} for odd in ("22", None, [], -1, 1.5, True)],
)
def test_a_greeting_that_is_none_of_qemus_is_refused_when_it_comes(version):
    greeting = {"QMP": {"version": version, "capabilities": []}}
    with peer(greeting) as found, pytest.raises(SourceError) as caught:
        Monitor(found.path)
    assert "belong to a QEMU" in caught.value.hint


@pytest.mark.parametrize(
    "line",
    [
        b"\xff\xfe{}",
        b"[1,2]",
        b"[" * 200_000,
        b'{"QMP":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        b'{"QMP": ' + b"9" * 5000 + b"}",
        b"x" * (7 << 20),
    ],
)
@pytest.mark.parametrize("when", ["greeting", "answer"])
def test_lines_that_are_no_answer_at_all(line, when):
    def reply(connection: socket.socket, command: str, number: Any) -> None:
        send(connection, {"return": {}, "id": number} if command == "qmp_capabilities" else line)

    with peer(line if when == "greeting" else GREETING) as found:
        found.reply = reply
        with pytest.raises(SourceError) as caught, Monitor(found.path) as monitor:
            monitor.command("query-block")
        assert len(caught.value.message) < 1000


def test_the_words_of_an_error_are_cut():
    def reply(connection: socket.socket, command: str, number: Any) -> None:
        said = {"error": {"class": "GenericError", "desc": "B" * 5_000_000}, "id": number}
        send(connection, {"return": {}, "id": number} if command == "qmp_capabilities" else said)

    with peer() as found:
        found.reply = reply
        with Monitor(found.path) as monitor, pytest.raises(Refused) as caught:
            monitor.command("query-block")
        assert len(caught.value.message) < 1000


def test_events_without_end_are_not_kept_and_the_loss_of_some_is_an_error():
    event = json.dumps({"event": "X", "data": {"a": "A" * 1000}, "timestamp": {"seconds": 1, "microseconds": 1}})

    def reply(connection: socket.socket, command: str, number: Any) -> None:
        if command == "query-block":
            for _ in range(100):
                connection.sendall((event + "\r\n").encode() * 100)
        send(connection, {"return": SOUND[command], "id": number})

    with peer() as found:
        found.reply = reply
        with Monitor(found.path) as monitor:
            assert monitor.events() == []
            monitor.command("query-block")
            assert sum(len(str(event)) for event in monitor._events) < 10 << 20
            with pytest.raises(MonitorLost, match="faster than they can be read"):
                monitor.events()


@pytest.mark.parametrize(
    "kept", ["", "x", "p {}", "p [1]", 'p ["a"]', 'p ["/a\\u0000", "/b"]', "p " + "[" * 60_000, "p 9" + "9" * 5000]
)
def test_what_a_peer_keeps_beside_a_descriptor_is_ours_or_nothing(kept):
    assert ScratchPlace.of(kept) is None


@pytest.mark.parametrize("node", [None, 5, [], "", "own", "owns", "ownsx", "owns\u0661", "owns" + "9" * 5000, "other0"])
def test_an_event_of_a_node_that_is_none_of_ours_says_nothing_of_our_scratch_files(node):
    assert _lost_copy(Event("QUORUM_REPORT_BAD", {"node-name": node, "error": "e"}), "own") is None


def test_an_events_words_are_cut():
    lost = _lost_copy(Event("QUORUM_REPORT_BAD", {"node-name": "owns12", "type": ["t"], "error": "e" * 10_000}), "own")
    assert lost is not None
    assert (lost.number, lost.access, len(lost.error)) == (12, "['t']", 300)


def test_a_huge_answer_takes_little_memory(tmp_path):
    """The worst JSON text of the longest line that is read; the whole process is measured."""
    code = (
        "import sys; from pathlib import Path; from backup.errors import SourceError\n"
        "from backup.qmp.monitor import Monitor\n"
        "with Monitor(Path(sys.argv[1])) as monitor:\n"
        "    try: monitor.command('query-block')\n"
        "    except SourceError as error: print(error.message)\n"
        f"print({PEAK_KIB})\n"
    )

    def reply(connection: socket.socket, command: str, number: Any) -> None:
        if command == "qmp_capabilities":
            send(connection, {"return": {}, "id": number})
        else:
            worst = b"{}," * (((6 << 20) - 100) // 3)
            send(connection, b'{"id": "%s", "return": [%s{}]}' % (number.encode(), worst))

    with peer() as found:
        found.reply = reply
        done = subprocess.run([sys.executable, "-c", code, found.path], check=True, capture_output=True, text=True)
    said, peak = done.stdout.splitlines()
    assert "does not have the form of QEMU's" in said
    assert int(peak) < 300 << 10


def test_the_command_line_shows_two_lines_and_no_bug():
    with peer(query_named_block_nodes=[{}, {"node-name": "\x1b[2J"}, {"device": 5}]) as found:
        done = call_pybackup(["map", "--qmp", found.path, "--node", "virtio0"])
    assert (done.rc, len(done.stderr.splitlines())) == (13, 2), done
    assert "a bug" not in done.stderr


# Where the socket is


def test_a_socket_that_is_not_there_or_that_nothing_listens_on_any_more_means_that_the_machine_is_off(tmp_path):
    with peer() as found:
        path = found.path
        with Monitor(path):
            pass
        found.close()
        with pytest.raises(NotListening):
            Monitor(path)
    with pytest.raises(NotListening):
        Monitor(tmp_path / "none")


@pytest.mark.parametrize("relative", [False, True])
def test_a_socket_whose_path_is_longer_than_an_address(monkeypatch, relative):
    with peer() as found:
        deep = found.path.parent / ("d" * 60) / ("e" * 60)
        deep.mkdir(parents=True)
        path = found.path.rename(deep / "q")
        if relative:
            monkeypatch.chdir(deep.parent.parent.parent)
            path = path.relative_to(deep.parent.parent.parent)
            assert len(str(path)) > 107
        with Monitor(path) as monitor:
            assert monitor.version == "7.2.22"


def test_a_name_that_no_address_has_room_for_is_an_error_that_says_so():
    with tempfile.TemporaryDirectory(prefix="peer-", dir="/tmp") as folder, pytest.raises(SourceError) as caught:
        Monitor(Path(folder) / ("n" * 120))
    assert "107 bytes" in caught.value.message
    assert "shorter name" in caught.value.hint
