"""
Bech32, the text form of age's keys: a human-readable part, the digit 1, and 32 characters for five bits each.

The last six characters are a checksum (BIP 173).  age sets no limit on the length.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_ALPHABET = "qpzry9x8gf2tvdw0s3jn54khce6mua7l"
_GENERATOR = (0x3B6A57B2, 0x26508E6D, 0x1EA119FA, 0x3D4233DD, 0x2A1462B3)
_CHECKSUM = 6


def encode(prefix: str, data: bytes) -> str:
    """Return data with a human-readable part in lower case."""
    values = _regrouped(data, 8, 5)
    total = _polymod([*_expanded(prefix), *values, *[0] * _CHECKSUM]) ^ 1
    checksum = [total >> 5 * (_CHECKSUM - 1 - place) & 31 for place in range(_CHECKSUM)]
    return f"{prefix}1{''.join(_ALPHABET[value] for value in (*values, *checksum))}"


def decode(text: str) -> tuple[str, bytes]:
    """
    Return the human-readable part, in lower case, and the data.

    Raises
    ------
    ValueError
        The text is not Bech32.  The message does not repeat the text, which may be a secret.
    """
    if text not in {text.lower(), text.upper()}:
        raise ValueError("upper and lower case are mixed")
    prefix, one, characters = text.lower().rpartition("1")
    if not one or not prefix or len(characters) < _CHECKSUM or not set(characters) <= set(_ALPHABET):
        raise ValueError("it has the wrong form")
    values = [_ALPHABET.index(character) for character in characters]
    if _polymod([*_expanded(prefix), *values]) != 1:
        raise ValueError("its checksum is wrong: a character was changed or is missing")
    values = values[:-_CHECKSUM]
    data = bytes(_regrouped(values, 5, 8)[: len(values) * 5 // 8])
    if _regrouped(data, 8, 5) != values:
        raise ValueError("it has the wrong length")
    return prefix, data


def _expanded(prefix: str) -> list[int]:
    codes = [ord(character) for character in prefix]
    return [*(code >> 5 for code in codes), 0, *(code & 31 for code in codes)]


def _polymod(values: Iterable[int]) -> int:
    total = 1
    for value in values:
        top = total >> 25
        total = (total & 0x1FFFFFF) << 5 ^ value
        for bit, factor in enumerate(_GENERATOR):
            total ^= factor if top >> bit & 1 else 0
    return total


def _regrouped(values: Sequence[int], before: int, after: int) -> list[int]:
    """Cut a sequence of numbers of `before` bits into numbers of `after` bits; the last one is filled with zeroes."""
    bits = "".join(f"{value:0{before}b}" for value in values)
    bits += "0" * (-len(bits) % after)
    return [int(bits[at : at + after], 2) for at in range(0, len(bits), after)]
