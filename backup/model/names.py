"""
The names that machines, disks and bitmaps may have, and which texts name a folder.

A machine's name is a folder in the repository and a disk's name begins its data files' names, so neither may hold a
slash, begin with a dot, or be long.  A bitmap family's name is followed by a dot, the repository and the point that the
bitmap starts from, so it may hold no dot.
"""

from __future__ import annotations

import re
from typing import Literal

from backup.errors import UsageError

Kind = Literal["machine", "disk", "bitmap", "place"]

_PASSWORD = re.compile(r"(://[^/?#@\s]*?):[^/?#\s]*@")

MAX_LENGTH = 64
"""Longest name, in characters.  A data file's name has 32 more, a bitmap's 35: far below what file systems allow."""

RECOVERY = "RECOVERY.txt"
"""The file in a repository that explains how to get a disk back without pybackup."""
MARKER = "pybackup.json"
"""The file that marks a repository, beside the machines' folders (FORMAT.md)."""

SEALED = ".age"
"""Suffix of every sealed file in a sealed repository."""

_PATTERNS = {
    "machine": re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*"),
    "disk": re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*"),
    "bitmap": re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*"),
    "place": re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*"),
}
_RULES = {
    "machine": "letters, digits, '.', '_' and '-', not beginning with '.' or '-'",
    "disk": "letters, digits, '.', '_' and '-', not beginning with '.' or '-'",
    "bitmap": "letters, digits, '_' and '-' (no dot: pybackup adds one and the point's id), not beginning with '-'",
    "place": "letters, digits, '.', '_' and '-', not beginning with '.' or '-'",
}


def check_name(kind: Kind, text: str) -> str:
    """
    Return `text` if it may name a `kind` ("machine", "disk", "bitmap" for a bitmap family, "place" for a second place).

    Raises
    ------
    UsageError
        The name is empty, too long, or has a character that names may not have.
    """
    problem = name_problem(kind, text)
    if problem is not None:
        raise UsageError(f"{text!r} cannot name a {kind}: {problem}", hint=f"a {kind}'s name has {_RULES[kind]}")
    return text


def name_problem(kind: Kind, text: str) -> str | None:
    """Return what is wrong with the name of a `kind`, or None."""
    if not text:
        return "it is empty"
    if len(text) > MAX_LENGTH:
        return f"it has {len(text)} characters, more than {MAX_LENGTH}"
    if not _PATTERNS[kind].fullmatch(text):
        return f"allowed are {_RULES[kind]}"
    # Some file systems ignore the case of letters.
    if kind == "machine" and text.lower() in {MARKER.lower(), RECOVERY.lower()}:
        return "a file of the repository has that name"
    return None


def folder_problem(text: str) -> str | None:
    """
    Return why a text cannot name a repository's folder, or None.

    As for scp and rsync, a colon before the first slash means another host or another kind of storage.  Only
    s3:// is known of these: `copy web1 user@host:/srv` must not make a local folder of that name.
    """
    if not text:
        return "it is empty"
    if ":" in text.partition("/")[0]:
        return "it names a remote place or a URL, and pybackup writes to folders and to buckets (s3://) only"
    return None


def check_folder(text: str) -> str:
    """
    Return `text` if it may name a repository's folder.

    Raises
    ------
    UsageError
        The text looks like a remote place.
    """
    problem = folder_problem(text)
    if problem is not None:
        raise UsageError(f"{text!r} cannot be a repository: {problem}", hint=FOLDER_HINT)
    return text


FOLDER_HINT = "mount the remote place and name its folder; a folder whose name has a colon is written ./NAME"


def without_password(text: str) -> str:
    """Return a URI, or a text with URIs, without passwords (`user:password@`), so that it can be shown and stored."""
    return _PASSWORD.sub(r"\1@", text)
