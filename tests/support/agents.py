"""
Guest agents without a guest: QEMU's own, with everything forbidden that would touch this machine, and a fake.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

SYNC = "guest-sync-delimited"
STATUS, FREEZE, THAW = "guest-fsfreeze-status", "guest-fsfreeze-freeze", "guest-fsfreeze-thaw"
HARMLESS = {SYNC, "guest-sync", "guest-ping", "guest-info", STATUS}


@contextmanager
def qemu_ga(folder: Path) -> Iterator[Path]:
    """The real agent on a socket; it runs on this machine, so all commands but the harmless are forbidden."""
    listed = subprocess.run(["qemu-ga", "-b", "help"], check=True, capture_output=True, text=True).stdout.split()
    forbidden = [command for command in listed if command not in HARMLESS]
    assert {FREEZE, "guest-fsfreeze-freeze-list", THAW, "guest-shutdown", "guest-exec"} <= set(forbidden)
    address = folder / "ga.sock"
    command: list[str | Path] = ["qemu-ga", "-m", "unix-listen", "-p", address, "-t", folder, "-f", folder / "ga.pid"]
    with subprocess.Popen([*command, "-b", ",".join(forbidden)], stderr=subprocess.DEVNULL) as agent:
        try:
            deadline = time.monotonic() + 20
            while not address.exists():
                assert agent.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.01)
            yield address
        finally:
            agent.kill()


@dataclass
class FakeAgent:
    """
    An agent on a socket that serves one client after the other and does to `on` what its `manner` says.

    Manners: "silent" (never answers it), "late" (does it, and answers together with the next question), "dies" (does
    it and hangs up within the answer), "refuses", "garbage" (no JSON), "endless" (no end of line), "odd" (JSON of
    another shape).  `heard` has every command but syncs.
    """

    path: Path
    manner: str = ""
    on: str = FREEZE
    frozen: bool = False
    heard: list[str] = field(default_factory=list)
    kept: bytes = b""
    """Sent before the next answer."""

    def __enter__(self) -> Self:
        self.path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen(1)
        self._client = self._listener
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for each in (self._listener, self._client):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        self._thread.join(20)
        assert not self._thread.is_alive()
        self._listener.close()
        self.path.unlink()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self._client, _ = self._listener.accept()
                with self._client as client, client.makefile("rb") as lines, contextlib.suppress(ConnectionError):
                    while line := lines.readline():
                        asked = json.loads(line.rpartition(b"\xff")[2])
                        answer = self._answer(asked)
                        if answer is None:
                            break
                        client.sendall(answer)

    def _answer(self, asked: dict[str, Any]) -> bytes | None:
        """What is sent; None hangs up."""
        command = asked["execute"]
        kept, self.kept = self.kept, b""
        if command != SYNC:
            self.heard.append(command)
        manner = self.manner if command == self.on else ""
        match manner:
            case "silent":
                return kept
            case "refuses":
                return kept + _line({"error": {"class": "CommandNotFound", "desc": f"{command} has been disabled"}})
            case "garbage":
                return kept + b"HTTP/1.1 400 Bad Request\n"
            case "endless":
                return kept + b"x" * (1 << 20)
            case "odd":
                return kept + _line({"return": ["frozen"]})
        done = self._done(asked)
        if manner == "late":
            self.kept = done
            return kept
        if manner == "dies":
            self._client.sendall(kept + done[:5])
            return None
        return kept + done

    def _done(self, asked: dict[str, Any]) -> bytes:
        match asked["execute"]:
            case "guest-sync-delimited":
                return b"\xff" + _line({"return": asked["arguments"]["id"]})
            case "guest-fsfreeze-status":
                return _line({"return": "frozen" if self.frozen else "thawed"})
            case "guest-fsfreeze-freeze":
                self.frozen = True
                return _line({"return": 3})
            case "guest-fsfreeze-thaw":
                was, self.frozen = self.frozen, False
                return _line({"return": 3 if was else 0})
        return _line({"error": {"class": "CommandNotFound", "desc": "no such command"}})


def _line(answer: object) -> bytes:
    return json.dumps(answer).encode() + b"\n"
