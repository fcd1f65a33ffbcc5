"""
Sizes, rates, durations and shares: reading what users write, and showing values to users.

All units are binary, as in qemu-img: "64K", "64KiB" and "65536" are the same number of bytes.
"""

from __future__ import annotations

import re

from backup.errors import UsageError

KiB = 1 << 10
MiB = 1 << 20

_PREFIXES = "KMGTPE"
_SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_DURATION = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?(s|min|h|d|w)", re.ASCII)
_SHARE = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,9})?) ?%", re.ASCII)
_SIZE = re.compile(r"([0-9]{1,20}(?:\.[0-9]{1,20})?) ?(?:([KMGTPE])(?:i?B)?|B)?", re.IGNORECASE | re.ASCII)


def parse_size(text: str) -> int:
    """
    Read a size in bytes: "4096", "64K", "64KiB", "64 kib", "1.5G".

    K is 1024, as in qemu-img.  "KB" is 1024 bytes too, because cluster and request sizes are powers of two.
    A fraction is accepted where the result is a whole number of bytes.

    Raises
    ------
    UsageError
        The text is not a size: it is a rate ("50M/s"), has a sign or an unknown unit, or is a fraction of a byte.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{text!r} is not a size", hint="write a size as 4096, 64K, 64KiB or 1.5G (K is 1024)")
    number, prefix = match.groups()
    whole, _, part = number.partition(".")
    unit = 1 << 10 * (_PREFIXES.index(prefix.upper()) + 1) if prefix else 1
    scale: int = 10 ** len(part)
    size, rest = divmod(int(whole + part) * unit, scale)
    if rest:
        raise UsageError(f"{text!r} is not a whole number of bytes", hint="write a size as 4096, 64K, 64KiB or 1.5G")
    return size


def counted(number: int, noun: str) -> str:
    """Show a number of things: "1 point", "2 points".  The plural is the noun with an s."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def show_size(size: int) -> str:
    """
    Show a number of bytes for a reader: "512 B", "64 KiB", "1.5 GiB".

    The number is rounded to one decimal, which is left out where it is zero.  Do not use this where a size must be
    exact.
    """
    if abs(size) < KiB:
        return f"{size} B"
    exponent = 1
    # Rounding would show 1023.95 KiB as "1024 KiB"; such a size is shown in the next unit instead.
    while exponent < len(_PREFIXES) and _tenths(size, exponent) >= 10240:
        exponent += 1
    whole, tenth = divmod(_tenths(size, exponent), 10)
    number = f"{whole}.{tenth}" if tenth else f"{whole}"
    return f"{'-' if size < 0 else ''}{number} {_PREFIXES[exponent - 1]}iB"


def _tenths(size: int, exponent: int) -> int:
    """Return |size| in tenths of 1024**exponent, rounded half up.  Floats would be inexact beyond 2**53 bytes."""
    unit = 1 << 10 * exponent
    return (abs(size) * 20 + unit) // (2 * unit)


def show_rate(size: int, seconds: float) -> str:
    """Show the rate of `size` bytes in `seconds`: "1.2 GiB/s", or "-" if no time passed."""
    return f"{show_size(round(size / seconds))}/s" if seconds > 0 else "-"


def show_duration(seconds: float) -> str:
    """Show a duration: "0.25 s", "4.2 s", "1 min 05 s", "2 h 03 min"."""
    if seconds < 9.95:
        return f"{seconds:.2f} s" if seconds < 0.995 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(whole / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def parse_duration(text: str) -> float:
    """
    Read a duration in seconds: "90s", "45min", "26h", "30d", "2w".

    A lone "m" is refused: some tools read it as months and others as minutes.

    Raises
    ------
    UsageError
        The number or the unit is missing.
    """
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise UsageError(
            f"{text!r} is not a duration", hint="write a number and the unit s, min, h, d or w, as in 26h or 30d"
        )
    number, unit = match.groups()
    return float(number) * _SECONDS[unit]


def parse_count(option: str, text: str, least: int, most: int) -> int:
    """
    Read a whole number from `least` to `most`; `option` is named in the error.

    Raises
    ------
    UsageError
        The text is not such a number.
    """
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(most)) and least <= int(text) <= most):
        raise UsageError(f"{option} {text!r} is not a count", hint=f"give a whole number from {least} to {most}")
    return int(text)


def parse_share(text: str) -> float:
    """
    Read a share as a fraction of 1, above 0 and at most 1: "5%" is 0.05.

    Raises
    ------
    UsageError
        The text is not a number with a percent sign, or the share is 0 or above 100%.
    """
    match = _SHARE.fullmatch(text.strip())
    share = float(match[1]) / 100 if match else 0.0
    if not 0 < share <= 1:
        raise UsageError(f"{text!r} is not a percentage", hint="write a percentage above 0% and up to 100%, as in 5%")
    return share


def show_age(seconds: float) -> str:
    """Show an age in its largest whole unit: "0 min", "59 min", "31 h", "12 d"."""
    if seconds < 3600:
        return f"{int(seconds // 60)} min"
    return f"{int(seconds // 3600)} h" if seconds < 48 * 3600 else f"{int(seconds // 86400)} d"
