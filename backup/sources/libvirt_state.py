"""
The small files of a domain that each point keeps: its definition, its firmware's variables, the state of its TPM.

Files are read through no link and without waiting for a pipe.  What cannot be kept never fails the backup of the disks:
it becomes a warning or a note.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from backup.model.libvirt_uri import is_session
from backup.model.manifest import DEFINITION, MAX_MACHINE_FILE, NVRAM, TPM
from backup.sources.base import MachineState
from backup.sources.libvirt_definition import BadDefinition, Definition, Nvram, Tpm, read
from backup.units import show_size

_ATTEMPTS = 20
"""How often a file that changes is read until two reads return the same."""
_SYSTEM_TPM = Path("/var/lib/libvirt/swtpm")
"""Where the daemon of the system has swtpm keep the states of TPMs."""
_TPM_FILES = {"1.2": "tpm1.2/tpm-00.permall", "2.0": "tpm2/tpm2-00.permall"}
"""The file of a TPM's state in the domain's folder, by the TPM's version."""


class _NotKept(Exception):
    """A file is not kept; the message says why."""


def machine_state(definition: str, uri: str, *, on: bool) -> MachineState:
    """
    Read the small files of a domain that is `on` or off; `uri` is libvirt's.

    QEMU writes the firmware's variables whenever the guest sets one.  So the file is read until two reads agree.
    """
    content = definition.encode()
    try:
        _require_size(DEFINITION, len(content))
        defined = read(definition)
    except (_NotKept, BadDefinition) as error:
        return MachineState({}, (f"the domain's definition is in no point: {error}",))
    files, warnings, notes = {DEFINITION: content}, [], []
    if defined.nvram is not None and defined.nvram.path is not None and (on or os.path.lexists(defined.nvram.path)):
        try:
            files[NVRAM] = _variables(defined.nvram, on=on)
        except _NotKept as error:
            warnings.append(f"the firmware's variables (NVRAM) are not in the point: {error}")
    elif defined.nvram is not None:
        notes.append("the firmware's variables (NVRAM) are not in the point: the domain has no local file of them yet")
    if defined.tpm is not None:
        try:
            files[TPM] = _tpm_state(defined, defined.tpm, uri, on=on)
        except _NotKept as error:
            notes.append(f"the state of the TPM is not in the point: {error}")
    return MachineState(files, tuple(warnings), tuple(notes))


def _variables(nvram: Nvram, *, on: bool) -> bytes:
    if on and nvram.format != "raw":
        raise _NotKept(f"{nvram.path} is a {nvram.format}, parts of which QEMU keeps in memory while the domain is on")
    return _content(NVRAM, nvram.path or "")


def _tpm_state(defined: Definition, tpm: Tpm, uri: str, *, on: bool) -> bytes:
    if tpm.backend != "emulator":
        raise _NotKept(f"it is not emulated (backend {tpm.backend})")
    if on:
        raise _NotKept("swtpm can change it at any time while the domain is on; back the domain up while it is off")
    if tpm.version not in _TPM_FILES or (tpm.source is None and defined.uuid is None):
        raise _NotKept(f"pybackup does not know the file of a TPM of version {tpm.version}")
    folder = Path(tpm.source) if tpm.source is not None else _tpm_folder(uri) / (defined.uuid or "")
    return _content(TPM, os.fspath(folder / _TPM_FILES[tpm.version]))


def _tpm_folder(uri: str) -> Path:
    if not is_session(uri):
        return _SYSTEM_TPM
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "libvirt/qemu/swtpm"


def _content(role: str, path: str) -> bytes:
    """Read a plain file, until two reads return the same."""
    try:
        before = _read(role, path)
        for _ in range(_ATTEMPTS):
            after = _read(role, path)
            if after == before:
                return after
            before = after
    except OSError as error:
        why = "it is a link" if error.errno == errno.ELOOP else error.strerror
        raise _NotKept(f"{path} cannot be read: {why}") from None
    raise _NotKept(f"{path} kept changing while it was read")


def _read(role: str, path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, "rb", buffering=0) as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise _NotKept(f"{path} is not a plain file")
        size = status.st_size
        _require_size(role, size)
        content = bytearray()
        while len(content) <= size and (part := file.read(size + 1 - len(content))):
            content += part
    return bytes(content)


def _require_size(role: str, size: int) -> None:
    if not 0 < size <= MAX_MACHINE_FILE[role]:
        raise _NotKept(f"it has {size} bytes, and from 1 to {show_size(MAX_MACHINE_FILE[role])} are kept")
