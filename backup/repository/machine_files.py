"""
The small files of a machine: its definition, its firmware's variables, the state of its TPM (FORMAT.md).

They are written before the point's manifest, and removed after it, as the data files are.  They are small, so that each
is read and verified as a whole.
"""

from __future__ import annotations

from backup.errors import Damaged
from backup.model.digests import digest
from backup.model.manifest import MachineFile, machine_file_name
from backup.storage.base import Files
from backup.storage.refusals import explained, opening

_FROM_COPY = "bring the file back from a copy of the repository; the disks of the point are not affected"


def store(files: Files, role: str, point: str, content: bytes) -> MachineFile:
    """
    Write a machine's file, durable, and describe it for the manifest.

    Raises
    ------
    Failed
        The file cannot be written.
    """
    name = machine_file_name(role, point)
    with explained(files.path(name)):
        files.write(name, content)
    return MachineFile(role, name, len(content), digest(content).hex())


def load(files: Files, described: MachineFile) -> bytes:
    """
    Read a machine's file, and verify it against the manifest.

    Raises
    ------
    NotFound
        The file is missing.
    Damaged
        Its length or its digest differs, or it cannot be read.
    Failed
        This process may not read it.
    """
    path = files.path(described.file)
    with opening(path):
        content = files.read(described.file, described.size)
    if len(content) != described.size or digest(content).hex() != described.digest:
        raise Damaged(f"{path} is not the file that the manifest describes", hint=_FROM_COPY)
    return content
