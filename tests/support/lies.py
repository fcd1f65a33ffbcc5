"""
Lies: changes of a disk that its bitmap does not know of, as no name can show them (trap 47), and damage to a chain.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lab import Night, run, write


def lie(image: Path, name: str, *commands: str) -> None:
    """Write behind the bitmap's back: it is removed, and one of exactly its name is added when all is written."""
    run("qemu-img", "bitmap", "-f", "qcow2", "--remove", image, name)
    write(image, *commands)
    run("qemu-img", "bitmap", "-f", "qcow2", "--add", image, name)


def lie_to(night: Night, *commands: str) -> None:
    """The same to the bitmap that continues a night's newest point."""
    lie(night.image, night.own_bitmap, *commands)


def configured(folder: Path, **settings: object) -> list[str | Path]:
    """Options that name a configuration with these settings."""
    path = folder / "settings.yaml"
    path.write_text("".join(f"{key}: {value}\n" for key, value in settings.items()))
    return ["--config", path]


def data_file(repository: Path, manifest: Any) -> Path:
    """The data file of a point's only disk."""
    [disk] = manifest["disks"]
    return repository / manifest["machine"] / str(disk["data"]["file"])


def flip(path: Path, offset: int) -> None:
    """Change one byte of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        [byte] = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 0x55]))


def stored_at(path: Path, start: int) -> int:
    """
    Where a data file holds the cluster that begins at byte `start` of the disk, as qemu-img sees it; of a compressed
    one, which qemu-img does not tell, as the tables say (qcow2.txt, "Cluster mapping").
    """
    extents = json.loads(run("qemu-img", "map", "--output=json", "-f", "qcow2", path))
    held = next(extent for extent in extents if extent["start"] <= start < extent["start"] + extent["length"])
    assert held["depth"] == 0
    if "offset" in held:
        return int(held["offset"]) + start - int(held["start"])
    content = path.read_bytes()
    cluster = 1 << int.from_bytes(content[20:24], "big")
    l1 = int.from_bytes(content[40:48], "big")
    number, slot = divmod(start // cluster, cluster // 8)
    table = int.from_bytes(content[l1 + 8 * number :][:8], "big") & ((1 << 56) - 512)
    entry = int.from_bytes(content[table + 8 * slot :][:8], "big")
    assert entry >> 62 & 1, "it is compressed"
    return entry & ((1 << (62 - (cluster.bit_length() - 1 - 8))) - 1)
