"""
The keys of age: recipients, to which files are sealed, and identities, which open them.

A recipient (`age1...`) is a public key of X25519, and an identity (`AGE-SECRET-KEY-1...`) is the private key.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field

from backup.age import bech32, primitives
from backup.errors import UsageError

_RECIPIENT, _IDENTITY = "age", "age-secret-key-"
_OTHER_RECIPIENTS = {
    "ssh-": "an SSH key",
    "age1pq1": "a post-quantum recipient",
    "age1tag": "a recipient of a plugin",
    "age1yubikey1": "a recipient of a plugin",
}
_OTHER_IDENTITIES = {
    "-----BEGIN AGE": "encrypted itself",
    "age-encryption.org/": "encrypted itself",
    "-----BEGIN ": "no identity of age (an SSH key, perhaps)",
    "AGE-SECRET-KEY-PQ-": "a post-quantum identity",
    "AGE-PLUGIN-": "an identity of a plugin",
    "age1": "a recipient, which cannot open anything",
}
"""Other things that are found in place of a key, by how they begin."""
_SEAL_WITH = "name a recipient that `pybackup keygen` or `age-keygen` printed (age1...), or a file of such recipients"
_OPEN_WITH = (
    "name the file that `pybackup keygen` or `age-keygen` wrote, with a line AGE-SECRET-KEY-1...; decrypt it first "
    "(`age -d`) if it is encrypted itself"
)


@dataclass(frozen=True, slots=True)
class Recipient:
    """A public key, to which files are sealed."""

    public: bytes

    def __str__(self) -> str:
        return bech32.encode(_RECIPIENT, self.public)


@dataclass(frozen=True, slots=True)
class Identity:
    """A private key, which opens files."""

    private: bytes = field(repr=False)

    @property
    def recipient(self) -> Recipient:
        """The public key."""
        return Recipient(primitives.public_key(self.private))

    def secret(self) -> str:
        """Return the identity as text, which is for a file of mode 0600 only."""
        return bech32.encode(_IDENTITY, self.private).upper()

    @classmethod
    def new(cls) -> Identity:
        """Make a random identity."""
        return cls(os.urandom(primitives.KEY))


@dataclass(frozen=True, slots=True)
class Identities:
    """The identities in a file; `file` is its name for messages."""

    keys: tuple[Identity, ...] = ()
    file: str = ""


NO_IDENTITIES = Identities()


def recipient(text: str) -> Recipient:
    """
    Read a recipient.

    Raises
    ------
    UsageError
        The text is not a recipient of the kind X25519.
    """
    if text.lower().startswith(_IDENTITY):
        raise UsageError("a secret identity stands where a recipient must stand", hint=_SEAL_WITH)
    shown = text if len(text) <= 70 else f"{text[:60]}..."
    what = _kind(text, _OTHER_RECIPIENTS)
    if what is not None:
        raise UsageError(f"{shown!r} is {what}; pybackup seals to X25519 recipients of age only", hint=_SEAL_WITH)
    try:
        if text != text.lower():
            raise ValueError("it has upper-case letters")
        return Recipient(_key(text, _RECIPIENT))
    except ValueError as error:
        raise UsageError(f"{shown!r} is not a recipient of age: {error}", hint=_SEAL_WITH) from None


def is_file_name(text: str) -> bool:
    """Tell whether a text is no recipient of any kind, and so the name of a file of recipients."""
    return not text.lower().startswith((f"{_RECIPIENT}1", _IDENTITY)) and _kind(text, _OTHER_RECIPIENTS) is None


def recipients_in(content: str, file: str) -> tuple[Recipient, ...]:
    """
    Read the content of a file of recipients: one on each line, beside comments and empty lines.

    Raises
    ------
    UsageError
        A line is not a recipient, or there is none.
    """
    found = []
    for number, line in _lines(content):
        try:
            found.append(recipient(line))
        except UsageError as error:
            raise UsageError(f"{file}, line {number}: {error.message}", hint=error.hint) from None
    if not found:
        raise UsageError(f"{file} holds no recipient", hint=_SEAL_WITH)
    return tuple(found)


def identities_in(content: str, file: str) -> Identities:
    """
    Read the content of a file of identities: one on each line, beside comments and empty lines.

    Raises
    ------
    UsageError
        A line is not an identity, or there is none.  The message repeats nothing of the content.
    """
    found = []
    for number, line in _lines(content):
        what = _kind(line, _OTHER_IDENTITIES)
        if what is not None:
            raise UsageError(f"{file}, line {number}, is {what}, and not an X25519 identity of age", hint=_OPEN_WITH)
        try:
            if line != line.upper():
                raise ValueError("it does not begin with AGE-SECRET-KEY-1")
            found.append(Identity(_key(line, _IDENTITY)))
        except ValueError as error:
            raise UsageError(f"{file}, line {number}, is not an identity of age: {error}", hint=_OPEN_WITH) from None
    if not found:
        raise UsageError(f"{file} holds no identity", hint=_OPEN_WITH)
    return Identities(tuple(found), file)


def _lines(content: str) -> Iterator[tuple[int, str]]:
    """Yield the lines that hold a key, with their numbers from 1."""
    for number, line in enumerate(content.split("\n"), 1):
        line = line.removesuffix("\r")
        if line and not line.startswith("#"):
            yield number, line


def _kind(text: str, kinds: dict[str, str]) -> str | None:
    return next((what for start, what in kinds.items() if text.startswith(start)), None)


def _key(text: str, expected: str) -> bytes:
    prefix, key = bech32.decode(text)
    if prefix != expected:
        raise ValueError(f"it does not begin with {expected}1")
    if len(key) != primitives.KEY:
        raise ValueError("it has the wrong length")
    return key
