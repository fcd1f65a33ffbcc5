"""
The small files of a domain that each point keeps: its definition, its firmware's variables, the state of its TPM.

Files are read through no link and without waiting for a pipe.  What cannot be kept never fails the backup of the disks:
it becomes a warning or a note.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from pathlib import Path

from backup.model.libvirt_uri import has_usual_folders, is_session
from backup.model.manifest import DEFINITION, MAX_MACHINE_FILE, NVRAM, TPM
from backup.sources.base import MachineState
from backup.sources.libvirt_definition import BadDefinition, Definition, Nvram, Tpm, read
from backup.units import show_size

_PATIENCE, _PAUSE = 5.0, 0.05
"""How long a file that changes is read until two reads return the same, and the pause between two reads (seconds)."""
_SYSTEM_FOLDER = Path("/var/lib/libvirt/qemu")
"""Where the daemon of the system keeps what belongs to domains."""
_SYSTEM_TPM = Path("/var/lib/libvirt/swtpm")
"""Where the daemon of the system has swtpm keep the states of TPMs."""
_TPM_FILES = {"1.2": ("tpm1.2", "tpm-00.permall"), "2.0": ("tpm2", "tpm2-00.permall")}
"""The folder of a TPM's state in the domain's folder, and swtpm's file in there, by the TPM's version."""


class _NotKept(Exception):
    """A file is not kept; the message says why."""


def machine_state(definition: str, uri: str, *, running: str | None) -> MachineState:
    """
    Read the small files of a domain: its definition, and what the definition says that it has.

    Parameters
    ----------
    uri : str
        libvirt's.
    running : str or None
        The XML of the running domain, which names files that libvirt chose at the start; None: the domain is off.

    Notes
    -----
    QEMU writes the firmware's variables whenever the guest sets one, and UEFI writes many at its first start.  So the
    file is read until two reads agree.
    """
    content = definition.encode()
    try:
        _require_size(DEFINITION, len(content))
        defined = read(definition)
        nvram = defined.nvram if running is None else read(running).nvram
    except (_NotKept, BadDefinition) as error:
        return MachineState({}, (f"the domain's definition is in no point: {error}",))
    on = running is not None
    files, warnings, notes = {DEFINITION: content}, [], []
    path = None if nvram is None else _variables_path(nvram, defined.name, uri)
    if nvram is not None and path is not None and (on or os.path.lexists(path)):
        try:
            files[NVRAM] = _variables(path, nvram.format, on=on)
        except _NotKept as error:
            warnings.append(f"the firmware's variables (NVRAM) are not in the point: {error}")
    elif nvram is not None:
        missing = f"there is no {path} (libvirt makes the file at the first start)"
        why = "pybackup knows no local file of them" if path is None else missing
        notes.append(f"the firmware's variables (NVRAM) are not in the point: {why}")
    if defined.tpm is not None:
        try:
            files[TPM] = _tpm_state(defined, defined.tpm, uri, on=on)
        except _NotKept as error:
            notes.append(f"the state of the TPM is not in the point: {error}")
    return MachineState(files, tuple(warnings), tuple(notes))


def _variables_path(nvram: Nvram, name: str, uri: str) -> str | None:
    """Return the path of the variables' file, which may not be there yet; None: no local file is known."""
    if not nvram.unnamed:
        return nvram.path
    if not has_usual_folders(uri):
        return None
    folder = _session_folder() if is_session(uri) else _SYSTEM_FOLDER
    return os.fspath(folder / "nvram" / f"{name}_VARS.fd")


def _variables(path: str, image_format: str, *, on: bool) -> bytes:
    if on and image_format != "raw":
        raise _NotKept(f"{path} is a {image_format}, parts of which QEMU keeps in memory while the domain is on")
    return _content(NVRAM, path)


def _tpm_state(defined: Definition, tpm: Tpm, uri: str, *, on: bool) -> bytes:
    if tpm.backend != "emulator":
        raise _NotKept(f"it is not emulated (backend {tpm.backend})")
    if on:
        raise _NotKept("swtpm can change it at any time while the domain is on; back the domain up while it is off")
    path = tpm_file(tpm, defined.uuid, uri)
    if path is None:
        raise _NotKept(f"pybackup does not know where the state of this TPM (version {tpm.version}) is kept")
    return _content(TPM, os.fspath(path))


def tpm_file(tpm: Tpm, uuid: str | None, uri: str) -> Path | None:
    """
    Return the file in which swtpm keeps the state of a domain's TPM; None: the file is not known.

    Parameters
    ----------
    uuid : str or None
        The domain's.
    uri : str
        libvirt's.
    """
    if tpm.in_file or tpm.version not in _TPM_FILES:
        return None
    folder, name = _TPM_FILES[tpm.version]
    if tpm.source is not None:
        return Path(tpm.source) / name
    base = _session_folder() / "swtpm" if is_session(uri) else _SYSTEM_TPM
    return base / uuid / folder / name if uuid is not None and has_usual_folders(uri) else None


def _session_folder() -> Path:
    """Return where a user's own daemon keeps such files."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "libvirt/qemu"


def _content(role: str, path: str) -> bytes:
    """Read a plain file, until two reads return the same."""
    try:
        before = _read(role, path)
        deadline = time.monotonic() + _PATIENCE
        while (after := _read(role, path)) != before:
            if time.monotonic() > deadline:
                raise _NotKept(f"{path} kept changing while it was read")
            before = after
            time.sleep(_PAUSE)
    except OSError as error:
        why = "it is a link" if error.errno == errno.ELOOP else error.strerror
        raise _NotKept(f"{path} cannot be read: {why}") from None
    return after


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
