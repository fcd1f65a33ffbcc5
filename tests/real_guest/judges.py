"""
What is held against a restored disk: e2fsck and dumpe2fs of its file system, and the numbers that the guest wrote.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from guest import MARKER, SLOTS
from lab import CLUSTER, run

TOTAL = r"Free (blocks|inodes) count wrong \(\d+, counted=\d+\)\.\nFix\? yes\n"


def ring_of(disk: Path) -> list[int]:
    """The ring's numbers in rising order; each of its blocks must be full of one number."""
    with disk.open("rb") as file:
        blocks = [file.read(CLUSTER) for _ in range(SLOTS)]
    return sorted(_number_of(block, slot) for slot, block in enumerate(blocks))


def _number_of(block: bytes, slot: int) -> int:
    line = block.partition(b"\n")[0] + b"\n"
    assert block == (line * CLUSTER)[:CLUSTER], f"block {slot} of the ring is torn: {block[:20]!r} ... {block[-20:]!r}"
    return int(line)


def marker_of(disk: Path) -> int:
    """The number that lies beyond the file system."""
    with disk.open("rb") as file:
        file.seek(MARKER)
        return int(file.read(CLUSTER).partition(b"\n")[0])


def journal_is_clean(disk: Path) -> bool:
    """Whether the file system could be mounted without replaying its journal."""
    said = run("env", "LC_ALL=C", "dumpe2fs", "-h", disk)
    [features] = re.findall("^Filesystem features:(.*)$", said, re.MULTILINE)
    return "needs_recovery" not in features.split()


def require_sound(disk: Path) -> None:
    """e2fsck finds nothing to mend."""
    done = _e2fsck("-f", "-n", disk)
    assert done.returncode == 0, done.stdout + done.stderr


def require_sound_after_replay(disk: Path) -> None:
    """
    e2fsck replays the journal of a copy, as a mount would, and finds nothing else to mend but two totals.

    The totals of free blocks and inodes in the superblock are not kept up to date while a file system is mounted; each
    mount, and e2fsck, adds them up from its groups.
    """
    copy = disk.with_suffix(".replayed")
    shutil.copyfile(disk, copy)
    done = _e2fsck("-f", "-y", copy)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    assert "? yes" not in re.sub(TOTAL, "", done.stdout), done.stdout
    require_sound(copy)
    copy.unlink()


def _e2fsck(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    english = {**os.environ, "LC_ALL": "C"}
    return subprocess.run(["e2fsck", *arguments], check=False, capture_output=True, text=True, env=english)
