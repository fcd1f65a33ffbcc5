"""
Restore a machine beside its disks: a definition that libvirt accepts, and the files that it needs.

The definition comes from a repository that may be someone else's.  It is parsed with care, no path in it is opened, and
the names of the files are made from the machine's name.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from backup.engine.targets import open_target, refuse_existing
from backup.errors import BackupError, Damaged, Failed, NotFound, UsageError
from backup.model.manifest import DEFINITION, NVRAM, SUFFIXES, TPM, Manifest
from backup.model.names import check_name
from backup.operations.restore_targets import Place, Placed
from backup.qemu.images import RAW
from backup.repository import machine_files
from backup.repository.machine import Machine
from backup.sources.libvirt_definition import BadDefinition, Definition, RestoredDisk, read, rewrite
from backup.sources.libvirt_state import tpm_file

_CLUSTER = 64 << 10
_BY_HAND = "the disks are restored; describe the machine to libvirt by hand, or restore another point"


@dataclass(frozen=True, slots=True)
class RestoredMachine:
    """
    The files that were written, by role, and what the user should know.

    `problems` are the files of the point that are damaged or missing; the disks and the other files are restored.
    """

    targets: Mapping[str, str]
    notes: tuple[str, ...]
    problems: tuple[BackupError, ...]


@dataclass(frozen=True, slots=True)
class Defined:
    """A domain that libvirt has now: its name, and what the user should know."""

    name: str
    notes: Sequence[str]


NO_MACHINE = RestoredMachine({}, (), ())
"""Of a point without files of the machine, or of single disks."""


@dataclass(frozen=True, slots=True)
class MachineRestore:
    """
    A machine that will be restored into a folder.

    `contents` are its small files by role, as far as they can be read, and `targets` their paths in the folder.  `name`
    is the name of a new machine; None: the machine keeps its name.
    """

    contents: Mapping[str, bytes]
    targets: Mapping[str, str]
    problems: tuple[BackupError, ...]
    name: str | None

    def require_definable(self, uri: str) -> None:
        """
        Make sure that libvirt can be reached, and has no domain that the definition would change.

        Raises
        ------
        BackupError
            It has one, or the definition is damaged.
        """
        from backup.sources.libvirt_domain import Domain  # noqa: PLC0415 - libvirt-python is optional

        if DEFINITION not in self.contents:
            raise self.problems[0]
        try:
            defined = read(self._definition())
        except BadDefinition as error:
            raise _bad(error) from None
        name = self.name or defined.name
        with Domain.connected(uri, "") as daemon:
            if name in daemon.names():
                raise UsageError(
                    f"libvirt has a domain {name} already, which is left as it is",
                    hint="give the restored machine another name: --name NEW",
                )
            same = daemon.name_of(defined.uuid) if self.name is None and defined.uuid is not None else None
            if same is not None:
                raise UsageError(
                    f"libvirt's domain {same} has the UUID of the machine (was it renamed?) and is left as it is",
                    hint="give the restored machine a name and a UUID of its own: --name NEW",
                )

    def write(self, point: Manifest, places: Sequence[Place], *, force: bool) -> RestoredMachine:
        """
        Write the files; the definition comes last, and names the restored disks.

        Raises
        ------
        BackupError
            A file cannot be written.
        """
        written: dict[str, str] = {}
        notes: list[str] = []
        problems = list(self.problems)
        for role in (NVRAM, TPM):
            if role in self.contents:
                written[role] = _write(self.targets[role], self.contents[role], force=force)
        if DEFINITION in self.contents:
            try:
                rewritten = rewrite(
                    self._definition(), _restored(point, places), nvram=_absolute(written.get(NVRAM)), name=self.name
                )
            except BadDefinition as error:
                problems.append(_bad(error))
            else:
                written[DEFINITION] = _write(self.targets[DEFINITION], rewritten.text.encode(), force=force)
                notes += rewritten.notes
        return RestoredMachine(written, tuple(notes), tuple(problems))

    def define(self, uri: str, written: RestoredMachine) -> Defined:
        """
        Have libvirt define the machine that was written, and put the state of its TPM in place.

        Raises
        ------
        BackupError
            libvirt does not accept the definition, or has got a domain of that name meanwhile.
        """
        from backup.sources.libvirt_domain import Domain, Refused  # noqa: PLC0415 - as above

        if DEFINITION not in written.targets:
            raise written.problems[-1]
        self.require_definable(uri)
        path = written.targets[DEFINITION]
        definition = Path(path).read_text("utf-8")
        try:
            with Domain.connected(uri, "") as daemon:
                uuid = daemon.define(definition)
        except Refused as error:
            raise Failed(
                f"the machine is restored, and libvirt refuses its definition: {error.text}",
                hint=f"change {path} as this host needs it, and run: virsh define {path}",
            ) from None
        defined = read(definition)
        return Defined(defined.name, tuple(self._tpm_notes(defined, uuid, uri, written)))

    def _tpm_notes(self, defined: Definition, uuid: str, uri: str, written: RestoredMachine) -> Sequence[str]:
        if TPM not in written.targets or defined.tpm is None:
            return by_hand(written)
        named = defined.tpm.source is not None or defined.tpm.in_file  # in the definition, which is not trusted
        path = None if named else tpm_file(defined.tpm, uuid, uri)
        if path is None:
            return by_hand(written)
        try:
            _put_in_place(path, self.contents[TPM])
        except OSError as error:
            command = f"install -D -m 600 {written.targets[TPM]} {path}"
            why = f"{path} cannot be written ({error.strerror})"
            return [f"the state of the TPM is not in place yet: {why}; before the first start, run as root: {command}"]
        return [f"the state of the TPM is in place: {path}"]

    def _definition(self) -> str:
        try:
            return self.contents[DEFINITION].decode("utf-8")
        except UnicodeDecodeError:
            raise BadDefinition("it is not UTF-8") from None


def prepare(
    machine: Machine, point: Manifest, placed: Placed, *, name: str | None, whole: bool, force: bool
) -> MachineRestore | None:
    """
    Read the small files of a point whose disks are all restored (`whole`) into a folder; None: there is nothing to do.

    Raises
    ------
    UsageError
        A target exists without --force, or the name cannot be a machine's.
    """
    if name is not None:
        check_name("machine", name)
    if placed.folder is None or not whole or not point.machine_files:
        return None
    contents: dict[str, bytes] = {}
    targets: dict[str, str] = {}
    problems: list[BackupError] = []
    for file in point.machine_files:
        targets[file.role] = os.path.join(placed.folder, f"{name or machine.name}.{SUFFIXES[file.role]}")
        refuse_existing(Path(targets[file.role]), force=force)
        try:
            contents[file.role] = machine_files.load(machine.files, file)
        except BackupError as error:
            problems.append(error)
    return MachineRestore(contents, targets, tuple(problems), name)


def by_hand(written: RestoredMachine) -> Sequence[str]:
    """Return notes of what is left to the user if the machine was not defined here."""
    if TPM not in written.targets:
        return []
    return [f"the state of the TPM is in {written.targets[TPM]}; docs/libvirt.md says where swtpm expects it"]


def nothing_to_define(point: Manifest) -> BackupError:
    """Return the error for a point of which no machine can be defined."""
    if point.machine_file(DEFINITION) is None:
        return NotFound(
            f"point {point.point} of machine {point.machine} holds no definition of a machine",
            hint="only backups with --libvirt keep one; restore the disks without --define and --name",
        )
    return UsageError(
        "a machine is restored as a whole, into a folder",
        hint="name a folder (a new one with a slash at its end), without --disk; or omit --define and --name",
    )


def _restored(point: Manifest, places: Sequence[Place]) -> dict[str, RestoredDisk]:
    sources = {disk.name: disk.source.path for disk in point.disks}
    return {
        place.disk: RestoredDisk(os.path.abspath(place.target), place.format, sources[place.disk]) for place in places
    }


def _put_in_place(path: Path, state: bytes) -> None:
    """Write the state of a TPM to a file that is not there yet; at the start, libvirt gives it to swtpm's user."""
    for folder, mode in ((path.parents[2], 0o711), (path.parents[1], 0o711), (path.parent, 0o700)):
        if not folder.is_dir():
            folder.mkdir()
            folder.chmod(mode)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "wb") as file:
            file.write(state)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        path.unlink()
        raise


def _absolute(path: str | None) -> str | None:
    return None if path is None else os.path.abspath(path)


def _write(path: str, content: bytes, *, force: bool) -> str:
    with open_target(path, len(content), RAW, cluster_size=_CLUSTER, force=force) as target:
        target.write(0, content)
    return path


def _bad(error: BadDefinition) -> Damaged:
    return Damaged(f"the machine's definition in the point cannot be used: {error}", hint=_BY_HAND)
