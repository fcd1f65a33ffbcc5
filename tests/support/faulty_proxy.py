"""
A proxy of TCP between a client and an S3 server that injects faults: it cuts, hangs, answers by itself, or is slow.

A request's first lines decide, by the rule that the test sets; every connection carries one request, so that each can
be judged.
"""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Request:
    """The number of a request from 1 on, its method and its path with the query."""

    number: int
    method: str
    path: str


@dataclass(frozen=True)
class Answer:
    """Answer by ourselves, with this status and S3's code."""

    status: int
    code: str = ""


@dataclass(frozen=True)
class Cut:
    """Close the connection after so many bytes of the request's body, or of the server's answer."""

    request: int | None = None
    answer: int | None = None


@dataclass(frozen=True)
class Hang:
    """Take the request, and never answer."""


@dataclass(frozen=True)
class Slow:
    """Pass on so many bytes a second."""

    rate: int


Fault = Answer | Cut | Hang | Slow | None
Rule = Callable[[Request], Fault]
_HEAD = re.compile(rb"(?P<method>[A-Z]+) (?P<path>\S+) HTTP/1.1\r\n")


class FaultyProxy:
    """The proxy; `rule` may be replaced at any time, and `seen` lists the requests."""

    def __init__(self, server: str) -> None:
        parts = urlsplit(server)
        self._server = (parts.hostname, parts.port)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self.rule: Rule = lambda _: None
        self.seen: list[Request] = []
        self._stopped = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._stopped.set()
        self._listening.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                threading.Thread(target=self._serve, args=[client], daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            head, body = _read_head(client)
            match = _HEAD.match(head)
            if match is None:
                return
            request = Request(len(self.seen) + 1, match["method"].decode(), match["path"].decode())
            self.seen.append(request)
            self._answer(client, head, body, self.rule(request))

    def _answer(self, client: socket.socket, head: bytes, body: bytes, fault: Fault) -> None:
        if isinstance(fault, Hang):
            self._stopped.wait(60)
            return
        if isinstance(fault, Answer):
            for _ in _read_body(client, head, body, None):
                pass
            content = f"<?xml version='1.0'?><Error><Code>{fault.code}</Code></Error>".encode() if fault.code else b""
            client.sendall(
                f"HTTP/1.1 {fault.status} Fault\r\nContent-Length: {len(content)}\r\nConnection: close\r\n\r\n".encode()
            )
            client.sendall(content)
            return
        with socket.create_connection(self._server) as server:
            server.sendall(re.sub(rb"\r\n(?i:connection): [^\r]*", b"", head)[:-2] + b"Connection: close\r\n\r\n")
            cut = fault.request if isinstance(fault, Cut) else None
            for piece in _read_body(client, head, body, cut, fault.rate if isinstance(fault, Slow) else None):
                server.sendall(piece)
            if cut is not None:
                return
            left = fault.answer if isinstance(fault, Cut) and fault.answer is not None else None
            first = True
            while piece := server.recv(1 << 16):
                if first:
                    piece = _closing(piece)
                    first = False
                if left is not None:
                    piece, left = piece[:left], left - len(piece)
                if isinstance(fault, Slow):
                    time.sleep(len(piece) / fault.rate)
                client.sendall(piece)
                if left is not None and left <= 0:
                    return


def _closing(head: bytes) -> bytes:
    """Add to an answer that the connection ends with it."""
    line, _, rest = head.partition(b"\r\n")
    return line + b"\r\nConnection: close\r\n" + re.sub(rb"(?i:connection): [^\r]*\r\n", b"", rest, count=1)


def _read_head(client: socket.socket) -> tuple[bytes, bytes]:
    content = b""
    while b"\r\n\r\n" not in content:
        piece = client.recv(1 << 16)
        if not piece:
            return b"", b""
        content += piece
    head, _, body = content.partition(b"\r\n\r\n")
    return head + b"\r\n\r\n", body


def _read_body(
    client: socket.socket, head: bytes, body: bytes, cut: int | None, rate: int | None = None
) -> Iterator[bytes]:
    length = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
    left = int(length[1]) if length else 0
    if cut is not None:
        left = min(left, cut)
    while left > 0:
        piece = (body or client.recv(1 << 16))[:left]
        body = b""
        if not piece:
            return
        left -= len(piece)
        if rate is not None:
            time.sleep(len(piece) / rate)
        yield piece
