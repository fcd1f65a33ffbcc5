"""
An NBD server for a disk that no machine here could hold: any size, all data, every second cluster of 64 KiB dirty.

    simulated_disk.py SOCKET BYTES

Its block status is computed and its data are a pattern, about half of which zstd can shrink.  It speaks as much of the
protocol (NBD's doc/proto.md) as a client needs: fixed newstyle, structured replies, the contexts base:allocation and
qemu:dirty-bitmap:b, reads.  It prints a line when the first read comes: planning is over then.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
import threading
from typing import BinaryIO

CLUSTER = 65536
MOST_EXTENTS = 1 << 20
ALLOCATION, DIRTY = "base:allocation", "qemu:dirty-bitmap:b"
CONTEXTS = {ALLOCATION: 1, DIRTY: 2}

OPTION_MAGIC, REPLY_MAGIC = b"IHAVEOPT", 0x3E889045565A9
ABORT, INFO, GO, STRUCTURED, LIST_META, SET_META = 2, 6, 7, 8, 9, 10
ACK, REP_INFO, REP_META, UNSUPPORTED = 1, 3, 4, (1 << 31) + 1
TRANSMISSION_FLAGS = 1 | 2 | 1 << 8
"""Flags are given, the export is read-only, several connections see the same."""
READ, DISCONNECT, BLOCK_STATUS = 0, 2, 7
CHUNK_MAGIC, DONE, OFFSET_DATA, STATUS = 0x668E33EF, 1, 1, 5

PATTERN = memoryview((os.urandom(CLUSTER // 2) + bytes(CLUSTER // 2)) * 1024)
"""64 MiB, more than any request asks for."""
ALTERNATING = struct.pack(">4I", CLUSTER, 1, CLUSTER, 0) * (MOST_EXTENTS // 2)

first_read = threading.Lock()


def main() -> None:
    """Serve for ever, one thread per connection."""
    address, size = sys.argv[1], int(sys.argv[2])
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=serve, args=(connection, size), daemon=True).start()


def serve(connection: socket.socket, size: int) -> None:
    """Handshake and requests of one connection."""
    stream = connection.makefile("rb")
    try:
        connection.sendall(b"NBDMAGIC" + OPTION_MAGIC + struct.pack(">H", 3))  # fixed newstyle, no zeroes
        stream.read(4)
        contexts = negotiate(connection, stream, size)
        while contexts is not None and answer(connection, stream, contexts):
            pass
    except (ConnectionError, struct.error):
        pass  # the client is gone
    finally:
        connection.close()


def negotiate(connection: socket.socket, stream: BinaryIO, size: int) -> list[str] | None:
    """Options until the client goes on to requests; the contexts it chose, or None where it left."""
    contexts: list[str] = []
    while True:
        _, option, length = struct.unpack(">8sII", stream.read(16))
        data = stream.read(length)

        def reply(kind: int, content: bytes = b"", option: int = option) -> None:
            connection.sendall(struct.pack(">QIII", REPLY_MAGIC, option, kind, len(content)) + content)

        if option == STRUCTURED:
            reply(ACK)
        elif option in (LIST_META, SET_META):
            chosen = [name for name in CONTEXTS if option == LIST_META or name in queries(data)]
            for name in chosen:
                reply(REP_META, struct.pack(">I", CONTEXTS[name]) + name.encode())
            reply(ACK)
            contexts = chosen if option == SET_META else contexts
        elif option in (INFO, GO):
            reply(REP_INFO, struct.pack(">HQH", 0, size, TRANSMISSION_FLAGS))
            reply(ACK)
            if option == GO:
                return contexts
        elif option == ABORT:
            reply(ACK)
            return None
        else:
            reply(UNSUPPORTED)


def queries(data: bytes) -> list[str]:
    """Names of the contexts that a client asks for."""
    at = 4 + struct.unpack_from(">I", data)[0]
    (count,) = struct.unpack_from(">I", data, at)
    at, found = at + 4, []
    for _ in range(count):
        (length,) = struct.unpack_from(">I", data, at)
        found.append(data[at + 4 : at + 4 + length].decode())
        at += 4 + length
    return found


def answer(connection: socket.socket, stream: BinaryIO, contexts: list[str]) -> bool:
    """One request; False when the client leaves."""
    _, _, kind, cookie, offset, length = struct.unpack(">IHHQQI", stream.read(28))
    if kind == DISCONNECT:
        return False
    if kind == READ:
        if first_read.acquire(blocking=False):
            print("reading", flush=True)
        at = offset % CLUSTER
        send(connection, cookie, OFFSET_DATA, struct.pack(">Q", offset), PATTERN[at : at + length])
        return True
    assert kind == BLOCK_STATUS
    for name in contexts:
        last = name == contexts[-1]
        extents = struct.pack(">II", length, 0) if name == ALLOCATION else dirty_extents(offset, length)
        send(connection, cookie, STATUS, struct.pack(">I", CONTEXTS[name]), extents, last=last)
    return True


def dirty_extents(offset: int, length: int) -> bytes | memoryview:
    """Alternating extents from offset on: even clusters are dirty."""
    number, inside = divmod(offset, CLUSTER)
    first = b"" if not inside else struct.pack(">II", CLUSTER - inside, 1 - number % 2)
    number += bool(inside)
    count = min(-(-length // CLUSTER), MOST_EXTENTS - 2)
    skip = 8 * (number % 2)
    return first + ALTERNATING[skip : skip + 8 * count] if first else memoryview(ALTERNATING)[skip : skip + 8 * count]


def send(
    connection: socket.socket, cookie: int, kind: int, head: bytes, body: bytes | memoryview, *, last: bool = True
) -> None:
    """Send one chunk of a structured reply."""
    header = struct.pack(">IHHQI", CHUNK_MAGIC, DONE if last else 0, kind, cookie, len(head) + len(body))
    connection.sendall(header + head)
    connection.sendall(body)


if __name__ == "__main__":
    main()
