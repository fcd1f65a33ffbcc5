"""
An NBD server that answers as a test tells it to: incompletely, twice, out of order, never, or for ever.

It is written from the NBD protocol (doc/proto.md) and shares nothing with the client.  `test_peers.py` holds an honest
one against nbdinfo and nbdcopy.
"""

from __future__ import annotations

import socket
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

ALLOCATION = "base:allocation"
MULTI_CONN = 1 << 8
_HAS_FLAGS, _READ_ONLY, _SEND_FLUSH, _SEND_DF = 1, 2, 4, 1 << 7
_GO, _LIST_CONTEXTS, _SET_CONTEXTS, _STRUCTURED, _INFO, _ABORT = 7, 9, 10, 8, 6, 2
_ACK, _REP_INFO, _REP_CONTEXT, _UNSUPPORTED = 1, 3, 4, 1 << 31 | 1
_READ, _WRITE, _DISCONNECT, _FLUSH, _ZERO, _STATUS = 0, 1, 2, 3, 6, 7
_NONE, _DATA, _HOLE, _EXTENTS, _ERROR = 0, 1, 2, 5, 1 << 15 | 1


def pattern(offset: int, length: int) -> bytes:
    """Bytes of the disk, each 8 of them the number of their place."""
    first, last = offset // 8, -(-(offset + length) // 8)
    numbers = struct.pack(f">{last - first}Q", *range(first + 1, last + 1))
    return numbers[offset - first * 8 :][:length]


@dataclass(frozen=True)
class Asked:
    """One request, and the ways to answer it; `n` counts those of its connection from 0."""

    connection: socket.socket
    peer: Peer
    structured: bool
    contexts: Sequence[str]
    cookie: bytes
    offset: int
    length: int
    n: int

    def chunk(self, kind: int, body: bytes = b"", *, done: bool = True) -> None:
        head = struct.pack(">IHH8sI", 0x668E33EF, int(done), kind, self.cookie, len(body))
        self.connection.sendall(head + body)

    def data(self, offset: int, content: bytes, *, done: bool = True) -> None:
        self.chunk(_DATA, struct.pack(">Q", offset) + content, done=done)

    def hole(self, offset: int, length: int, *, done: bool = True) -> None:
        self.chunk(_HOLE, struct.pack(">QI", offset, length), done=done)

    def end(self) -> None:
        self.chunk(_NONE)

    def error(self, number: int = 5) -> None:
        self.chunk(_ERROR, struct.pack(">IH", number, 0))

    def simple(self, content: bytes = b"", number: int = 0) -> None:
        self.connection.sendall(struct.pack(">II8s", 0x67446698, number, self.cookie) + content)

    def whole(self) -> None:
        """Answer a read as it should be."""
        if self.structured:
            self.data(self.offset, self.peer.content(self.offset, self.length))
        else:
            self.simple(self.peer.content(self.offset, self.length))

    def extents(self, *extents: tuple[int, int], context: str = ALLOCATION, done: bool = True) -> None:
        number = self.contexts.index(context) + 1
        body = b"".join(struct.pack(">II", *extent) for extent in extents)
        self.chunk(_EXTENTS, struct.pack(">I", number) + body, done=done)

    def all_data(self) -> None:
        """Answer block status as it should be, of a disk that is data everywhere and clean."""
        for context in self.contexts:
            self.extents((self.length, 0), context=context, done=context == self.contexts[-1])


def silence(_asked: Asked | None = None) -> None:
    """Say nothing more, as long as the client stays."""
    raise Silent


class Silent(Exception):
    """The peer falls silent and keeps the connection."""


@dataclass
class Peer:
    """
    What the server has and how it answers.

    `blocks` are the smallest, preferred and largest block that it announces, and it refuses what does not keep to them;
    `sizes` are the export's sizes by connection, the last one for all further ones; `option` may answer an option
    itself (True: it did).  `refused` counts requests that did not keep to `blocks`.
    """

    size: int = 4 << 20
    contexts: Sequence[str] = (ALLOCATION,)
    flags: int = 0
    blocks: tuple[int, int, int] | None = None
    sizes: Sequence[int] = ()
    structured: bool = True
    content: Callable[[int, int], bytes] = pattern
    read: Callable[[Asked], None] = Asked.whole
    status: Callable[[Asked], None] = Asked.all_data
    option: Callable[[socket.socket, int], bool] = lambda _connection, _option: False
    write: Callable[[Asked], None] | None = None
    connections: int = 0
    refused: int = 0
    requests: list[tuple[int, int, int]] = field(default_factory=list)

    def serve(self, connection: socket.socket) -> None:
        """Talk to one client until it leaves."""
        number, self.connections = self.connections, self.connections + 1
        with connection, suppress(EOFError, OSError):
            try:
                self._talk(connection, number)
            except Silent:
                while connection.recv(1 << 16):
                    pass

    def _talk(self, connection: socket.socket, number: int) -> None:
        size = self.sizes[min(number, len(self.sizes) - 1)] if self.sizes else self.size
        connection.sendall(b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3))
        _take(connection, 4)
        structured, contexts = False, list[str]()
        while True:
            option, body = self._option(connection)
            if self.option(connection, option):
                continue
            if option == _STRUCTURED and self.structured:
                structured = True
                _reply(connection, option, _ACK)
            elif option in {_LIST_CONTEXTS, _SET_CONTEXTS} and structured:
                asked = _queries(body)
                if option == _LIST_CONTEXTS:
                    found = [name for name in self.contexts if any(name.startswith(query) for query in asked)]
                else:
                    found = contexts = [name for name in self.contexts if name in asked]
                for at, name in enumerate(found):
                    _reply(connection, option, _REP_CONTEXT, struct.pack(">I", at + 1) + name.encode())
                _reply(connection, option, _ACK)
            elif option in {_GO, _INFO}:
                if self.blocks is not None:
                    _reply(connection, option, _REP_INFO, struct.pack(">HIII", 3, *self.blocks))
                flags = self.flags | _HAS_FLAGS | (_SEND_DF if structured else 0)
                flags |= (1 << 6 | _SEND_FLUSH) if self.write is not None else _READ_ONLY
                _reply(connection, option, _REP_INFO, struct.pack(">HQH", 0, size, flags))
                _reply(connection, option, _ACK)
                if option == _GO:
                    break
            elif option == _ABORT:
                _reply(connection, option, _ACK)
                return
            else:
                _reply(connection, option, _UNSUPPORTED)
        self._transmit(connection, contexts, structured=structured)

    @staticmethod
    def _option(connection: socket.socket) -> tuple[int, bytes]:
        magic, option, length = struct.unpack(">QII", _take(connection, 16))
        assert magic == 0x49484156454F5054
        return option, _take(connection, length)

    def _transmit(self, connection: socket.socket, contexts: Sequence[str], *, structured: bool) -> None:
        count = dict.fromkeys((_READ, _STATUS, _WRITE, _ZERO, _FLUSH), 0)
        while True:
            magic, _, command, cookie, offset, length = struct.unpack(">IHH8sQI", _take(connection, 28))
            assert magic == 0x25609513
            if command == _DISCONNECT:
                return
            if command == _WRITE:
                _take(connection, length)
            self.requests.append((command, offset, length))
            asked = Asked(connection, self, structured, contexts, cookie, offset, length, count[command])
            count[command] += 1
            if command != _FLUSH and not self._fits(command, offset, length):
                self.refused += 1
                asked.error(22) if structured else asked.simple(number=22)
            elif command == _READ:
                self.read(asked)
            elif command == _STATUS:
                self.status(asked)
            elif self.write is not None:
                self.write(asked)

    def _fits(self, command: int, offset: int, length: int) -> bool:
        smallest, _, largest = self.blocks or (1, 0, 32 << 20)
        moves = command in {_READ, _WRITE}
        return not (offset % smallest or length % smallest or (moves and length > largest))


def _take(connection: socket.socket, count: int) -> bytes:
    found = bytearray()
    while len(found) < count:
        piece = connection.recv(count - len(found))
        if not piece:
            raise EOFError
        found += piece
    return bytes(found)


def _reply(connection: socket.socket, option: int, kind: int, body: bytes = b"") -> None:
    connection.sendall(struct.pack(">QIII", 0x3E889045565A9, option, kind, len(body)) + body)


def _queries(body: bytes) -> list[str]:
    [length] = struct.unpack_from(">I", body)
    at = 4 + length
    [count] = struct.unpack_from(">I", body, at)
    at += 4
    found = []
    for _ in range(count):
        [length] = struct.unpack_from(">I", body, at)
        found.append(body[at + 4 : at + 4 + length].decode())
        at += 4 + length
    return found


@contextmanager
def listening(peer: Peer) -> Iterator[str]:
    """Serve on a unix socket in threads of this process; yields the URI."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as server:
        address = str(Path(folder, "s"))
        server.bind(address)
        server.listen(64)
        talking: list[tuple[threading.Thread, socket.socket]] = []

        def accept() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    thread = threading.Thread(target=peer.serve, args=(connection,), daemon=True)
                    talking.append((thread, connection))
                    thread.start()

        accepting = threading.Thread(target=accept, daemon=True)
        accepting.start()
        try:
            yield f"nbd+unix:///?socket={address}"
        finally:
            server.shutdown(socket.SHUT_RDWR)
            accepting.join()
            for thread, connection in talking:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
                thread.join()
