"""Manifests and repositories as a faulty disk or a hostile hand would make them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from backup.model import digests
from backup.model.manifest import (
    BitmapRecord,
    ByteCounts,
    DataFile,
    DiskEntry,
    Manifest,
    Parent,
    SourceRecord,
    machine_file_name,
)
from backup.repository.data_file_writer import DataFileMaker

KIB, MIB = 1 << 10, 1 << 20
TIME = "2026-11-22T01:00:00Z"


def point_id(number):
    return f"20261122T010000Z-{number:08x}"


def entry(number, parent=None, size=4 * MIB, name="vda", cluster=64 * KIB):
    point = point_id(number)
    return DiskEntry(
        name=name,
        kind="full" if parent is None else "incremental",
        reason="r",
        size=size,
        identity=f"{number:032x}",
        parent=None if parent is None else Parent(point_id(parent), f"{parent:032x}"),
        bitmap=BitmapRecord(None, None, None, False),
        data=DataFile(f"{name}.{point}.qcow2", 1, f"{name}.{point}.b3", "0" * 64, cluster, "zstd:1"),
        bytes=ByteCounts(0, 0, 0, 0, 0),
        source=SourceRecord("image", "/x", "qcow2", "crash", None, ()),
    )


def manifest(number, *disks, sequence=None):
    return Manifest(point_id(number), sequence or number, "m", "0" * 32, TIME, TIME, "pybackup 0", disks)


def signed(document):
    """A document with a valid digest: what a hostile writer would make."""
    return signed_bytes((json.dumps({**document, "digest": "0" * 64}, indent=2) + "\n").encode())


def signed_bytes(content):
    """A manifest whose bytes were changed, with a valid digest."""
    at = content.rindex(b',\n  "digest"')
    head, tail = content[:at], content[at:]
    old = re.search(b"[0-9a-f]{64}", tail)[0]
    return head + tail.replace(old, digests.digest(head).hex().encode())


def rewrite(path: Path, change: Callable[[Any], object]) -> None:
    """Change a manifest's document in place and give it a valid digest."""
    document = json.loads(path.read_bytes())
    change(document)
    del document["digest"]
    path.write_bytes(signed(document))


def add_machine_files(manifest_path: Path, **contents: bytes) -> None:
    """Give a point files of its machine by their roles, as a backup of a domain does."""

    def change(document: Any) -> None:
        document["version"] = 3
        for role, content in contents.items():
            name = machine_file_name(role, document["point"])
            (manifest_path.parent / name).write_bytes(content)
            described = {"role": role, "file": name, "size": len(content), "digest": digests.digest(content).hex()}
            document["machine_files"].append(described)

    rewrite(manifest_path, change)


def bless(manifest_path: Path, disk: int = 0) -> None:
    """Make digest file and manifest agree with a data file that was changed: only its own structure can betray it."""

    def change(document: Any) -> None:
        data = document["disks"][disk]["data"]
        content = (manifest_path.parent / data["file"]).read_bytes()
        listed = b"".join(
            digests.digest(content[at : at + digests.BLOCK]) for at in range(0, len(content), digests.BLOCK)
        )
        (manifest_path.parent / data["digests"]).write_bytes(listed)
        data["size"], data["digest"] = len(content), digests.digest(listed).hex()

    rewrite(manifest_path, change)


@contextmanager
def replaced(path: Path, content: bytes) -> Iterator[None]:
    """Let a file have other content for a while."""
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


def flipped(content: bytes, at: int, bit: int) -> bytes:
    """Content with one bit changed."""
    changed = bytearray(content)
    changed[at] ^= 1 << bit
    return bytes(changed)


def store(folder, number, parent, size, clusters):
    """Publish a point that holds these clusters (number: bytes), without a source, which would cost a second."""
    link = entry(number, None if parent is None else number - 1, size)
    maker = DataFileMaker(
        folder.files,
        f"vda.{point_id(number)}",
        size=size,
        cluster_size=64 * KIB,
        backing=None if parent is None else parent.data.file,
        level=1,
        written=[],
    )
    with maker:
        for cluster, data in clusters.items():
            maker.write(np.array([cluster]), memoryview(data))
        link = replace(link, data=maker.finish("zstd:1"))
    folder.publish(manifest(number, link))
    return link
