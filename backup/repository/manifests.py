"""Read manifests, also while prune replaces the data files that they describe."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

from backup.errors import BackupError, Damaged, Failed, NotFound
from backup.model import documents
from backup.model import manifest as manifests
from backup.model.manifest import DiskEntry, Manifest
from backup.runtime.shortage import NOT_DAMAGE
from backup.storage.base import Files, Unavailable
from backup.storage.refusals import NoAnswer, require_answer


def read_manifest(files: Files, name: str) -> Manifest:
    """Read one manifest, as `read_raw`, with the entries of the data files that have their names now."""
    return as_stored(files, read_raw(files, name))


def as_stored(files: Files, manifest: Manifest) -> Manifest:
    """Return a manifest in which each disk's entry describes the data file that has the name now."""
    for disk in manifest.disks:
        if disk.replaces is not None:
            stored = replace(disk, replaces=None) if is_exchanged(files, disk) else disk.restored()
            manifest = manifest.with_disk(stored)
    return manifest


def is_exchanged(files: Files, disk: DiskEntry) -> bool:
    """
    Tell whether the rewritten data file has replaced the previous one.

    The two files name different backing files in their headers, so the header shows which of them has the name.  If the
    file cannot be read, a missing pending file (.new) means that the replacement is done; readers then find the fault.
    """
    from backup import qcow2  # noqa: PLC0415 - brings numpy, which a list of points need not import

    name = disk.data.file
    backing = None if disk.parent is None else manifests.data_name(disk.name, disk.parent.point)
    try:
        with closing(files.open(name)) as file:
            head = bytes(file.read_at(0, qcow2.HEADER_BYTES))
            return qcow2.parse_header(head, file.size, files.path(name)).image.backing == backing
    except (NoAnswer, Unavailable):
        raise
    except (BackupError, OSError):
        return not files.has(name + manifests.NEW)


def exchanged_files(manifest: Manifest) -> Iterator[str]:
    """Yield the names of a point's files that are being replaced."""
    for disk in manifest.disks:
        if disk.replaces is not None:
            yield disk.data.file
            yield disk.data.file + manifests.NEW
            yield disk.data.digests
            yield disk.replaces.data.digests


def read_raw(files: Files, name: str) -> Manifest:
    """
    Read one manifest as it is stored; its name must be its point's id.

    Raises
    ------
    NotFound, Damaged, Failed
        The manifest is missing, damaged, or written by a newer program.
    """
    return read_manifest_whole(files, name)[0]


def read_manifest_whole(files: Files, name: str) -> tuple[Manifest, bytes]:
    """Read one manifest, as `read_raw`, and return its bytes as well."""
    path = files.path(name)
    try:
        content = files.read(name, documents.MAX_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound(f"there is no manifest {path}", hint="`pybackup list` shows the points") from None
    except OSError as error:
        require_answer(error)
        if error.errno in NOT_DAMAGE:
            raise Failed(
                f"manifest {path} cannot be read: {error.strerror}", hint="run as the repository's owner"
            ) from None
        raise Damaged(
            f"manifest {path} cannot be read: {error.strerror}",
            hint="a manifest is a plain file, not a link, folder or pipe; bring it back from a copy of the repository",
        ) from None
    manifest = manifests.decode(content, path)
    if name != f"{manifest.point}.json":
        raise Damaged(
            f"manifest {path} describes point {manifest.point}",
            hint=f"a manifest is named for its point; rename it to {manifest.point}.json if it was renamed by hand",
        )
    return manifest, content
