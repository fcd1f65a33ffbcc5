"""The compression of clusters, as users write it and manifests store it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from backup.errors import UsageError

MIN_LEVEL, MAX_LEVEL = -7, 19
"""Lowest and highest level of zstd.  Negative levels are the fast ones; the program zstd has 20 and more as --ultra."""


@dataclass(frozen=True, slots=True)
class Compression:
    """The compression of clusters: zstd at a level, or none (`level` is None)."""

    level: int | None

    @classmethod
    def parse(cls, text: str) -> Compression:
        """
        Read "none", "zstd" (level 1) or "zstd:LEVEL".

        Raises
        ------
        UsageError
            Another word, or a level outside -7..19.
        """
        if text == "none":
            return cls(None)
        match = re.fullmatch(r"zstd(?::(-?[0-9]{1,3}))?", text, re.ASCII)
        level = int(match[1] or 1) if match else None
        if level is None or not MIN_LEVEL <= level <= MAX_LEVEL:
            raise UsageError(
                f"{text!r} is not a compression",
                hint=f"write none, zstd, or zstd:LEVEL with a level from {MIN_LEVEL} to {MAX_LEVEL}",
            )
        return cls(level)

    def __str__(self) -> str:
        return "none" if self.level is None else f"zstd:{self.level}"
