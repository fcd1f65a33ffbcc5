"""Read manifests from a machine's folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

from backup.errors import BackupError, Damaged, Failed, NotFound
from backup.model import documents
from backup.model import manifest as manifests
from backup.model.manifest import DiskEntry, Manifest
from backup.runtime.shortage import NOT_DAMAGE
from backup.storage.base import Files


def read_manifest(files: Files, name: str) -> Manifest:
    """Read one manifest, with the entries of the data files that have their names now; otherwise as `read_raw`."""
    return as_stored(files, read_raw(files, name))


def as_stored(files: Files, manifest: Manifest) -> Manifest:
    """A manifest with each disk's entry as the data file that has the name now is."""
    for disk in manifest.disks:
        if disk.replaces is not None:
            stored = replace(disk, replaces=None) if is_exchanged(files, disk) else disk.restored()
            manifest = manifest.with_disk(stored)
    return manifest


def is_exchanged(files: Files, disk: DiskEntry) -> bool:
    """
    Has the rewritten data file taken the former one's name?  Its backing file, which is never the former's, tells.

    Of a file that cannot be read it is said by whether the rewritten one still waits; readers find what is wrong.
    """
    from backup import qcow2  # noqa: PLC0415 - brings numpy, which a list of points need not import

    name = disk.data.file
    backing = None if disk.parent is None else manifests.data_name(disk.name, disk.parent.point)
    try:
        with closing(files.open(name)) as file:
            head = bytes(file.read_at(0, qcow2.HEADER_BYTES))
            return qcow2.parse_header(head, file.size, files.path(name)).image.backing == backing
    except (BackupError, OSError):
        return not files.has(name + manifests.NEW)


def exchanged_files(manifest: Manifest) -> Iterator[str]:
    """Names of the files of a point that are being exchanged."""
    for disk in manifest.disks:
        if disk.replaces is not None:
            yield disk.data.file
            yield disk.data.file + manifests.NEW
            yield disk.data.digests
            yield disk.replaces.data.digests


def read_raw(files: Files, name: str) -> Manifest:
    """
    Read one manifest as it is; its name must be its point's id.

    Raises
    ------
    NotFound, Damaged, Failed
        It is missing, damaged, or of a newer program.
    """
    return read_manifest_whole(files, name)[0]


def read_manifest_whole(files: Files, name: str) -> tuple[Manifest, bytes]:
    """Read one manifest (see `read_raw`), and its bytes."""
    path = files.path(name)
    try:
        content = files.read(name, documents.MAX_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound(
            f"there is no manifest {path}", hint="see `pybackup list` for the points that there are"
        ) from None
    except OSError as error:
        if error.errno in NOT_DAMAGE:
            raise Failed(
                f"manifest {path} cannot be read: {error.strerror}", hint="run as the repository's owner"
            ) from None
        raise Damaged(
            f"manifest {path} cannot be read: {error.strerror}",
            hint="a manifest is a plain file, no link, folder or pipe; bring it back from a copy of the repository",
        ) from None
    found = manifests.decode(content, path)
    if name != f"{found.point}.json":
        raise Damaged(
            f"manifest {path} describes point {found.point}",
            hint=f"a manifest is named for its point; rename it to {found.point}.json if it was renamed by hand",
        )
    return found, content
