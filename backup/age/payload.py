"""
The payload of an age file: chunks of 64 KiB, each encrypted by itself, so that any of them can be read alone.

Chunk number N is sealed with the nonce N (11 bytes) and a flag (1 byte), which is 1 for the last chunk only.  So a file
that was cut at the end of a chunk does not pass for a whole one.  Only an empty file has an empty chunk.

A block of 4 MiB of a data file is exactly 64 chunks: one range of 4195328 bytes of the sealed file.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from backup.age import header as headers
from backup.age import primitives
from backup.age.header import Header
from backup.age.keys import Identity, Recipient
from backup.age.primitives import TAG, Buffer

CHUNK = 64 << 10
"""Length of a chunk before it is sealed (bytes)."""
SEALED_CHUNK = CHUNK + TAG
_NONCE = 16
_LAST, _NOT_LAST = b"\1", b"\0"


class BadPayload(ValueError):
    """The payload is damaged, cut off, or not the one of its header."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the chunks of a file lie: the length of the file's head (header and nonce), and of the plain content."""

    head: int
    size: int

    @classmethod
    def of_sealed(cls, head: int, sealed: int) -> Layout:
        """
        Return the layout of a sealed file of this length.

        Raises
        ------
        BadPayload
            No sealed file has this length.
        """
        chunks, rest = divmod(sealed - head, SEALED_CHUNK)
        if sealed < head + TAG or 0 < rest < TAG or (rest == TAG and chunks):
            raise BadPayload("it was cut off")
        return cls(head, sealed - head - (chunks + (rest > 0)) * TAG)

    @property
    def chunks(self) -> int:
        """The number of chunks."""
        return max(1, -(-self.size // CHUNK))

    @property
    def sealed(self) -> int:
        """The length of the sealed file."""
        return self.head + self.size + self.chunks * TAG

    def span(self, offset: int, length: int) -> tuple[int, int, int]:
        """
        Return the first chunk that covers a range of the plain content, and the range of the sealed file to read.

        The range must begin within the content, or the content must be empty.
        """
        end = min(offset + length, self.size)
        first, behind = offset // CHUNK, max(1, -(-end // CHUNK))
        start = self.head + first * SEALED_CHUNK
        return first, start, min(self.head + behind * SEALED_CHUNK, self.sealed) - start


def longest_span(length: int) -> int:
    """Return the most bytes of a sealed file that a range of the plain content takes, wherever the range begins."""
    return (-(-length // CHUNK) + 1) * SEALED_CHUNK


class Sealer:
    """
    Seals one new file: `head` comes first, then what `seal` returns.

    Parameters
    ----------
    size : int
        Length of the content in bytes.
    """

    def __init__(self, recipients: tuple[Recipient, ...], size: int) -> None:
        key, nonce = headers.new_file_key(), os.urandom(_NONCE)
        self.head = headers.write(key, recipients) + nonce
        self.layout = Layout(len(self.head), size)
        self._cipher = _payload_cipher(key, nonce)
        self._room = bytearray()

    def seal(self, first: int, data: Buffer) -> memoryview:
        """
        Seal chunks from number `first` on; `data` ends with a chunk or with the content.

        The next call overwrites the returned memory: to clear new memory takes as long as half of the sealing.
        """
        view, count = memoryview(data), max(1, -(-len(data) // CHUNK))
        length = len(view) + count * TAG
        if len(self._room) < length:
            self._room = bytearray(length)
        into = memoryview(self._room)[:length]
        for at in range(count):
            chunk = view[at * CHUNK : (at + 1) * CHUNK]
            start = at * SEALED_CHUNK
            nonce = _chunk_nonce(self.layout, first + at)
            self._cipher.encrypt_into(nonce, chunk, None, into[start : start + len(chunk) + TAG])
        return into


class Opener:
    """
    Opens the chunks of one file in any order.  Safe to use from several threads.

    Raises
    ------
    NoKey, BadHeader, BadPayload
        None of the identities opens the file, or the file is damaged.
    """

    def __init__(self, head: Head, identities: tuple[Identity, ...], sealed: int) -> None:
        self.layout = Layout.of_sealed(head.length, sealed)
        self._cipher = _payload_cipher(headers.file_key(head.header, identities), head.nonce)

    def open(self, first: int, sealed: Buffer, room: bytearray | None = None) -> memoryview:
        """
        Open chunks from number `first` on, into the memory `room` if it is given and is not shorter than `sealed`.

        Raises
        ------
        BadPayload
            A chunk is not what was sealed.
        """
        view = memoryview(sealed)
        count = -(-len(view) // SEALED_CHUNK)
        length = max(0, len(view) - count * TAG)
        into = memoryview(bytearray(length) if room is None or len(room) < length else room)[:length]
        for at in range(count):
            chunk = view[at * SEALED_CHUNK : (at + 1) * SEALED_CHUNK]
            target = into[at * CHUNK : at * CHUNK + len(chunk) - TAG]
            if len(chunk) < TAG or not primitives.opens(
                self._cipher, _chunk_nonce(self.layout, first + at), chunk, target
            ):
                raise BadPayload(f"it is damaged at byte {self.layout.head + (first + at) * SEALED_CHUNK}")
        return into


@dataclass(frozen=True, slots=True)
class Head:
    """What comes before the payload: the header, and the nonce of the payload's key."""

    header: Header
    nonce: bytes

    @property
    def length(self) -> int:
        """The length in bytes."""
        return self.header.length + _NONCE

    @classmethod
    def parse(cls, content: bytes) -> Head:
        """
        Read a head from the first bytes of a file.

        Raises
        ------
        Cut
            The content is too short.
        BadHeader
            It is not the head of an age file.
        """
        header = headers.parse(content)
        nonce = content[header.length : header.length + _NONCE]
        if len(nonce) < _NONCE:
            raise headers.Cut("it ends within its head")
        return cls(header, nonce)


def head_length(recipients: int) -> int:
    """Return the length (bytes) of the head of a file that a `Sealer` makes for this number of recipients."""
    return headers.length_for(recipients) + _NONCE


def _payload_cipher(key: bytes, nonce: bytes) -> primitives.Cipher:
    return primitives.cipher(primitives.derived(key, nonce, b"payload"))


def _chunk_nonce(layout: Layout, number: int) -> bytes:
    return number.to_bytes(11, "big") + (_LAST if number == layout.chunks - 1 else _NOT_LAST)
