"""
The header of an age file: the file's key, encrypted for each recipient (a *stanza* each), and a MAC over all of it.

    age-encryption.org/v1
    -> X25519 SHARE             a public key that was made for this stanza only
    WRAPPED KEY
    --- MAC

A nonce of 16 bytes and the payload follow (`payload`).  Specification: https://age-encryption.org/v1.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import os
from collections.abc import Sequence
from dataclasses import dataclass

from backup.age import primitives
from backup.age.keys import Identity, Recipient
from backup.errors import UsageError

_INTRO = b"age-encryption.org/v1\n"
_STANZA, _MAC = b"-> ", b"---"
_X25519, _LABEL = b"X25519", b"age-encryption.org/v1/X25519"
_COLUMNS = 64
_FILE_KEY = 16
_NONCE = bytes(12)
"""Each wrapping key wraps one file key, so that no nonce is used twice."""
FEW_BYTES, MOST_BYTES = 1 << 10, 64 << 10
"""Lengths in which a header of nine recipients fits, and the longest that is read: each stanza costs a reader time."""


class BadHeader(ValueError):
    """The header is damaged, or that of no age file."""


class Cut(BadHeader):
    """The content ends within the header."""


class NoKey(ValueError):
    """None of the identities opens the file."""


@dataclass(frozen=True, slots=True)
class Stanza:
    """A recipient's part of the header: the words of its first line, of which the first is its kind, and its body."""

    words: tuple[bytes, ...]
    body: bytes


@dataclass(frozen=True, slots=True)
class Header:
    """A header that was read: its stanzas, the bytes that its MAC authenticates, the MAC, and its length in bytes."""

    stanzas: tuple[Stanza, ...]
    signed: bytes
    mac: bytes
    length: int


def new_file_key() -> bytes:
    """Make the key of a new file."""
    return os.urandom(_FILE_KEY)


def write(file_key: bytes, recipients: Sequence[Recipient]) -> bytes:
    """Return a header that gives a file's key to each of the recipients."""
    lines = b"".join([_INTRO, *(_stanza(file_key, recipient) for recipient in recipients), _MAC])
    return lines + _mac_words(primitives.mac(_mac_key(file_key), lines))


def length_for(recipients: int) -> int:
    """Return the length (bytes) of a header that `write` makes for this number of recipients."""
    stanza = len(_stanza_lines(bytes(primitives.KEY), bytes(_FILE_KEY + primitives.TAG)))
    return len(_INTRO) + recipients * stanza + len(_MAC + _mac_words(bytes(primitives.KEY)))


def _stanza(file_key: bytes, recipient: Recipient) -> bytes:
    ephemeral = os.urandom(primitives.KEY)
    share = primitives.public_key(ephemeral)
    secret = primitives.shared_secret(ephemeral, recipient.public)
    if secret is None:
        raise UsageError(
            f"the recipient {recipient} cannot be sealed to", hint="it is no key of a key pair; name another"
        )
    wrapped = bytearray(_FILE_KEY + primitives.TAG)
    _wrapping(secret, share, recipient).encrypt_into(_NONCE, file_key, None, wrapped)
    return _stanza_lines(share, bytes(wrapped))


def _stanza_lines(share: bytes, wrapped: bytes) -> bytes:
    return b"%s%s %s\n%s\n" % (_STANZA, _X25519, _encoded(share), _encoded(wrapped))


def _wrapping(secret: bytes, share: bytes, recipient: Recipient) -> primitives.Cipher:
    return primitives.cipher(primitives.derived(secret, share + recipient.public, _LABEL))


def _mac_words(mac: bytes) -> bytes:
    return b" %s\n" % _encoded(mac)


def _mac_key(file_key: bytes) -> bytes:
    return primitives.derived(file_key, b"", b"header")


def parse(content: bytes) -> Header:
    """
    Read a header from the first bytes of a file.

    Raises
    ------
    Cut
        The content is too short.
    BadHeader
        It is not the header of an age file.
    """
    if not content.startswith(_INTRO[: len(content)]):
        raise BadHeader("it is not an age file of version 1")
    lines = _Lines(content)
    lines.next()
    stanzas = []
    while True:
        start, line = lines.at, lines.next()
        if line.startswith(_STANZA):
            words = tuple(line.removeprefix(_STANZA).split(b" "))
            if not all(word and all(33 <= byte <= 126 for byte in word) for word in words):
                raise BadHeader("a stanza has no words")
            stanzas.append(Stanza(words, _body(lines)))
        elif line.startswith(_MAC + b" ") and stanzas:
            mac = _decoded(line.removeprefix(_MAC + b" "), primitives.KEY)
            return Header(tuple(stanzas), content[: start + len(_MAC)], mac, lines.at)
        else:
            raise BadHeader("it has a line that is none of a header")


class _Lines:
    """The lines of a header, one after the other; `at` is where the next one begins."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self.at = 0

    def next(self) -> bytes:
        """Return the next line without its end."""
        end = self._content.find(b"\n", self.at, MOST_BYTES)
        if end < 0:
            if len(self._content) >= MOST_BYTES:
                raise BadHeader(f"its header is longer than {MOST_BYTES} bytes")
            raise Cut("it ends within its header")
        line = self._content[self.at : end]
        self.at = end + 1
        return line


def _body(lines: _Lines) -> bytes:
    text = b""
    while True:
        line = lines.next()
        if len(line) > _COLUMNS:
            raise BadHeader("a line of a stanza is too long")
        text += line
        if len(line) < _COLUMNS:
            return _decoded(text)


def file_key(header: Header, identities: Sequence[Identity]) -> bytes:
    """
    Return the file's key, by the first stanza that one of the identities opens.

    Stanzas of other kinds are skipped: other recipients' stanzas, and those that age's implementations add at random,
    so that no reader comes to rely on their absence.

    Raises
    ------
    NoKey
        None of the identities opens a stanza.
    BadHeader
        A stanza or the MAC is wrong.
    """
    known = [(identity, identity.recipient) for identity in identities]
    for stanza in header.stanzas:
        if stanza.words[0] == b"scrypt" and len(header.stanzas) > 1:
            raise BadHeader("it has a passphrase and other recipients")
    for share, wrapped in [_x25519(stanza) for stanza in header.stanzas if stanza.words[0] == _X25519]:
        for identity, recipient in known:
            key = _unwrapped(share, wrapped, identity, recipient)
            if key is not None:
                _check_mac(header, key)
                return key
    raise NoKey("none of the identities opens it")


def _x25519(stanza: Stanza) -> tuple[bytes, bytes]:
    """Return the share and the wrapped key of a stanza of the kind X25519."""
    if len(stanza.words) != 2 or len(stanza.body) != _FILE_KEY + primitives.TAG:
        raise BadHeader("an X25519 stanza has the wrong form")
    return _decoded(stanza.words[1], primitives.KEY), stanza.body


def _unwrapped(share: bytes, wrapped: bytes, identity: Identity, recipient: Recipient) -> bytes | None:
    secret = primitives.shared_secret(identity.private, share)
    if secret is None:
        raise BadHeader("an X25519 stanza has no public key")
    key = bytearray(_FILE_KEY)
    return bytes(key) if primitives.opens(_wrapping(secret, share, recipient), _NONCE, wrapped, key) else None


def _check_mac(header: Header, key: bytes) -> None:
    if not hmac.compare_digest(primitives.mac(_mac_key(key), header.signed), header.mac):
        raise BadHeader("its header was changed")


def _encoded(data: bytes) -> bytes:
    return base64.b64encode(data).rstrip(b"=")


def _decoded(text: bytes, length: int | None = None) -> bytes:
    """Decode base64 without padding; each content has only one form."""
    try:
        data = base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)
    except binascii.Error:
        raise BadHeader("its base64 is wrong") from None
    if _encoded(data) != text or length not in {None, len(data)}:
        raise BadHeader("its base64 is wrong")
    return data
