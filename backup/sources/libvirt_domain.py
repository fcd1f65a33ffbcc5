"""
One domain of a local libvirt: every request that pybackup makes of libvirt.  The only user of libvirt-python.

Each request runs in a thread of its own, so that signals and the limit of all waits reach the caller while libvirt does
not answer.  When the daemon is restarted, the domain and its backup job go on: requests that may be repeated connect
again.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self, TypeVar

from backup.errors import BackupError, Locked, SourceError
from backup.model.names import without_password
from backup.qmp import answers
from backup.qmp.agent import AgentError
from backup.runtime import meanwhile
from backup.runtime.threads import Begun
from backup.runtime.timeouts import Wait
from backup.sources.libvirt_xml import DomainDocument, RunningJob, bitmap_sizes, checkpoint_xml, disk_sizes

_T = TypeVar("_T")
_INSTALL = "install the distribution's binding: apt-get install python3-libvirt (dnf install python3-libvirt), then "
_LOG = "see the log of libvirt (journalctl -u libvirtd -u virtqemud) and of the domain (/var/log/libvirt/qemu)"
_SOON = 0.003
"""Seconds within which libvirt answers most requests."""
_AGENT_SECONDS = 60.0
"""How long a guest may take to flush and freeze its file systems."""
_RECONNECT_SECONDS, _RECONNECT_PAUSE = 20.0, 0.25
"""How long a restart of the daemon may take, and the pause between two tries (seconds)."""
_GONE_SECONDS = 60.0
"""How long a cancelled job may take to end."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.002, 0.1
"""Between two looks whether a cancelled job has ended; each pause is twice as long as the one before (seconds)."""
NO_SUCH_DOMAIN, INVALID, TIMED_OUT, NO_JOB, BROKEN_BITMAP = 42, 55, 68, 104, 109
"""Codes of libvirt's errors (virErrorNumber); they never change."""
_BACKUP_JOB = 5
"""VIR_DOMAIN_BLOCK_JOB_TYPE_BACKUP"""
_PRESERVING = 11_010_000
"""The first libvirt that keeps a domain whose guest powers off for as long as a backup job runs (11.10.0)."""
_PRESERVE = 2
"""VIR_DOMAIN_BACKUP_BEGIN_PRESERVE_SHUTDOWN_DOMAIN, which an older binding does not know and passes on all the same."""
_PAUSED, _PAUSED_IO_ERROR = 3, 5
"""VIR_DOMAIN_PAUSED and VIR_DOMAIN_PAUSED_IOERROR"""
_CRASHED = 6
"""VIR_DOMAIN_CRASHED"""
_NO_SPACE = 2
"""VIR_DOMAIN_DISK_ERROR_NO_SPACE"""
_NO_BITMAP = "not found in backing chain"
"""In libvirt's message when a checkpoint is deleted whose bitmap is not there; the error has no code of its own."""
_NO_JOB_DATA = "backup job data missing"
"""In libvirt's message when it is asked for a job while it begins or ends one; the error has no code of its own."""


class Refused(SourceError):
    """libvirt answered with an error: its code, and its text."""

    def __init__(self, what: str, code: int, text: str) -> None:
        super().__init__(f"libvirt refuses to {what}: {text}", hint=_LOG)
        self.code = code
        self.text = text


class Disconnected(SourceError):
    """The connection to the daemon ended."""

    def __init__(self, uri: str, what: str) -> None:
        super().__init__(
            f"the connection to libvirt ({without_password(uri)}) ended while it was asked to {what}",
            hint="was the daemon stopped? start it, and run the command again: the next run removes what is left",
        )


def load_binding() -> Any:
    """
    Import libvirt-python.

    Raises
    ------
    BackupError
        It is missing, or made for another Python.
    """
    try:
        module = importlib.import_module("libvirt")
    except ImportError as error:
        raise BackupError(
            f"libvirt's Python binding (package python3-libvirt) cannot be imported by {sys.executable}: {error}",
            hint=_INSTALL + "tools/setup libvirt",
        ) from None
    module.registerErrorHandler(lambda _context, _error: None, None)  # else libvirt prints each error to stderr
    return module


def _monitor_binding() -> Any:
    """
    Import the call that passes commands and descriptors to QEMU's monitor.

    Raises
    ------
    SourceError
        It is missing.
    """
    try:
        return importlib.import_module("libvirt_qemu").qemuMonitorCommandWithFiles
    except (ImportError, AttributeError) as error:
        raise SourceError(
            f"libvirt's Python binding (package python3-libvirt) cannot use QEMU's monitor: {error}", hint=_INSTALL
        ) from None


def matching(uri: str, fits: Callable[[str], bool]) -> list[str]:
    """
    Return the names of all domains, on or off, that fit.

    Raises
    ------
    SourceError
        libvirt cannot be asked.
    """
    with Domain.connected(uri, "") as daemon:
        return sorted(name for name in daemon.names() if fits(name))


class Domain:
    """A domain by its name, inside a `with`."""

    def __init__(self, uri: str, name: str) -> None:
        self.uri = uri
        self.name = name
        self._libvirt: Any = None
        self._connection: Any = None
        self._domain: Any = None
        self._was_on = False

    @classmethod
    @contextmanager
    def connected(cls, uri: str, name: str) -> Iterator[Self]:
        """Connect, and find the domain (none where the name is empty); disconnect at the end."""
        domain = cls(uri, name)
        domain.connect()
        try:
            yield domain
        finally:
            domain.close()

    def connect(self) -> None:
        """
        Connect to the daemon and find the domain.

        Raises
        ------
        SourceError
            The daemon cannot be reached, or has no such domain.
        BackupError
            libvirt-python is missing.
        """
        self._libvirt = self._libvirt or load_binding()
        try:
            self._connection = self._answer("connect", lambda: self._libvirt.open(self.uri))
        except Refused as error:
            raise SourceError(
                f"libvirt cannot be reached at {without_password(self.uri)}: {error.text}",
                hint="does libvirtd or virtqemud run, and may this user connect? try: virsh -c URI list --all",
            ) from None
        if not self.name:
            return
        try:
            self._domain = self._answer("find the domain", lambda: self._connection.lookupByName(self.name))
        except Refused as error:
            self.close()
            if error.code != NO_SUCH_DOMAIN:
                raise
            raise SourceError(
                f"libvirt at {without_password(self.uri)} has no domain {self.name!r}",
                hint="see: virsh -c URI list --all; a transient domain is gone while it is off",
            ) from None

    def close(self) -> None:
        """Disconnect."""
        connection, self._connection, self._domain = self._connection, None, None
        if connection is not None:
            with self._ignored():
                self._answer("disconnect", connection.close)

    # What the domain is

    def names(self) -> list[str]:
        """Names of all domains of the daemon."""
        return self._answer("list the domains", lambda: [found.name() for found in self._connection.listAllDomains(0)])

    def is_on(self) -> bool:
        """Tell whether the domain has a running QEMU; that of a paused domain runs, too."""
        self._was_on = bool(self._ask("tell whether the domain runs", lambda domain: domain.isActive()))
        return self._was_on

    def document(self, *, on: bool) -> DomainDocument:
        """Read the running domain's XML, or what the domain will be at its next start."""
        flags = 0 if on else self._libvirt.VIR_DOMAIN_XML_INACTIVE
        return DomainDocument.parse(self._ask("show the domain", lambda domain: domain.XMLDesc(flags)))

    def definition(self) -> str:
        """
        Read the XML that defines the domain for its next start; of a transient domain, that it could be defined with.

        Passwords (of VNC and SPICE) are not in it: libvirt shows them only if it is asked to.
        """
        flags = self._libvirt.VIR_DOMAIN_XML_INACTIVE
        return str(self._ask("show the domain's definition", lambda domain: domain.XMLDesc(flags)))

    def running_xml(self) -> str:
        """Read the XML of the running domain, without passwords."""
        return str(self._ask("show the domain", lambda domain: domain.XMLDesc(0)))

    def number(self) -> int:
        """The running domain's id."""
        return int(self._ask("tell the domain's id", lambda domain: domain.ID()))

    def uuid(self) -> str:
        """The domain's UUID."""
        return str(self._ask("tell the domain's UUID", lambda domain: domain.UUIDString()))

    def sizes(self) -> dict[str, int]:
        """The sizes of a running domain's disks (bytes), as far as libvirt tells them all at once."""
        flags = self._libvirt.VIR_DOMAIN_STATS_BLOCK
        answers = self._ask("show the disks", lambda domain: domain.connect().domainListGetStats([domain], flags, 0))
        return disk_sizes(answers[0][1]) if answers else {}

    def size(self, target: str) -> tuple[int, int]:
        """The size of a running domain's disk, and the allocated part (bytes)."""
        capacity, allocation, _ = self._ask(f"show disk {target}", lambda domain: domain.blockInfo(target))
        return int(capacity), int(allocation)

    def is_saved(self) -> bool:
        """Tell whether the domain's memory is saved for its next start (virsh managedsave)."""
        return bool(self._ask("tell whether the domain is saved", lambda domain: domain.hasManagedSaveImage(0)))

    def qemu_version(self) -> str:
        """The version of the QEMU that libvirt starts."""
        version = int(self._ask("tell QEMU's version", lambda domain: domain.connect().getVersion()))
        return f"{version // 1_000_000}.{version // 1000 % 1000}.{version % 1000}"

    # What it may become

    def name_of(self, uuid: str) -> str | None:
        """Return the name of the daemon's domain of this UUID; None: it has none."""
        try:
            return str(self._answer("find a domain", lambda: self._connection.lookupByUUIDString(uuid)).name())
        except Refused as error:
            if error.code == NO_SUCH_DOMAIN:
                return None
            raise

    def define(self, definition: str) -> str:
        """
        Have libvirt define a domain; return the domain's UUID.

        Raises
        ------
        Refused
            libvirt does not accept the definition.
        """
        return str(self._answer("define the domain", lambda: self._connection.defineXML(definition).UUIDString()))

    # Jobs

    def job(self) -> RunningJob | None:
        """Return the backup job that libvirt runs for the domain, of whichever program; None: there is none."""
        try:
            text = self._ask("show the backup job", lambda domain: domain.backupGetXMLDesc(0))
        except Refused as error:
            if error.code == NO_JOB:
                return None
            raise
        return RunningJob.parse(text)

    def require_no_other_job(self) -> None:
        """
        Make sure that libvirt runs no other kind of job, for which a backup would wait half a minute and then fail.

        Raises
        ------
        Locked
            It runs one.
        """
        try:
            kind = self._ask("tell whether a job runs", lambda domain: domain.jobInfo())[0]
        except Refused as error:
            if _NO_JOB_DATA not in error.text:
                raise
            raise Locked(
                f"libvirt begins or ends a backup job of domain {self.name} just now",
                hint="run the command again in a moment",
            ) from None
        if kind != self._libvirt.VIR_DOMAIN_JOB_NONE:
            raise Locked(
                f"libvirt runs another job of domain {self.name} (a migration, a save, a dump or a backup)",
                hint=f"wait for its end, and run the command again; see: virsh domjobinfo {self.name}",
            )

    def begin_job(self, backup: str, checkpoint: str | None) -> None:
        """
        Begin a backup job and, at the same instant, a checkpoint.

        Raises
        ------
        Locked
            Another job came first.
        Refused
            libvirt refuses; it has undone what it began.
        """
        try:
            flags = self._begin_flags()
            self._answer("begin the backup", lambda: self._domain.backupBegin(backup, checkpoint, flags))
        except Refused as error:
            if error.code != TIMED_OUT:
                raise
            raise Locked(
                f"libvirt is busy with another job of domain {self.name}: {error.text}",
                hint="wait for its end, and run the command again",
            ) from None

    def _begin_flags(self) -> int:
        """
        Return what libvirt 11.10 can do: a guest that powers off is reset and paused, and ends with the job.

        In an older libvirt, such a guest ends the job.  The daemon's version counts: it refuses a flag that it does not
        know.
        """
        version = self._ask("tell libvirt's version", lambda domain: domain.connect().getLibVersion())
        return _PRESERVE if version >= _PRESERVING else 0

    def reads(self, target: str) -> bool:
        """Tell whether QEMU still saves what the guest overwrites on this disk."""
        found = self._ask(f"show the job of disk {target}", lambda domain: domain.blockJobInfo(target, 0))
        return bool(found) and found.get("type") == _BACKUP_JOB

    def end_job(self) -> None:
        """
        End the backup job, and wait until libvirt has removed its socket and its scratch files.

        Raises
        ------
        SourceError
            The job does not end.
        """
        try:
            self._ask("end the backup job", lambda domain: domain.abortJob())
        except Refused as error:
            if error.code != INVALID:  # there is no job any more
                raise
        deadline, pause = time.monotonic() + _GONE_SECONDS, _FIRST_PAUSE
        while self.job() is not None:
            if time.monotonic() > deadline:
                raise SourceError(
                    f"libvirt's backup job of domain {self.name} does not end", hint=f"virsh domjobabort {self.name}"
                )
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    # Checkpoints

    def checkpoints(self) -> list[str]:
        """Names of the checkpoints that libvirt has a record of."""
        return self._ask(
            "list the checkpoints", lambda domain: [found.getName() for found in domain.listAllCheckpoints(0)]
        )

    def bitmap_sizes(self, checkpoint: str) -> dict[str, tuple[str, int | None]]:
        """The bitmaps of a checkpoint, by disk, with their dirty bytes; see `libvirt_xml.bitmap_sizes`."""
        flags = self._libvirt.VIR_DOMAIN_CHECKPOINT_XML_SIZE | self._libvirt.VIR_DOMAIN_CHECKPOINT_XML_NO_DOMAIN
        return bitmap_sizes(self._of_checkpoint("show checkpoint", checkpoint, lambda found: found.getXMLDesc(flags)))

    def recorded(self, checkpoint: str) -> list[str]:
        """The disks that a checkpoint is recorded of."""
        flags = self._libvirt.VIR_DOMAIN_CHECKPOINT_XML_NO_DOMAIN
        text = self._of_checkpoint("show checkpoint", checkpoint, lambda found: found.getXMLDesc(flags))
        return list(bitmap_sizes(text))

    def record(self, name: str, targets: Sequence[str], *, checked: bool = True) -> bool:
        """
        Have libvirt make a record of bitmaps that are there, with the record's name; nothing is changed in QEMU.

        `checked`: only if the bitmap of each disk records, lasts, and is consistent; returns whether that is so.
        """
        flags = self._libvirt.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE
        if checked:
            flags |= self._libvirt.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE_VALIDATE
        document = checkpoint_xml(name, targets)
        try:
            self._ask("record a bitmap", lambda domain: domain.checkpointCreateXML(document, flags) and None)
        except Refused as error:
            if checked and error.code == BROKEN_BITMAP:
                return False
            raise
        return True

    def forget(self, name: str) -> None:
        """Remove libvirt's record of a checkpoint; the bitmap stays."""
        flags = self._libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY
        self._of_checkpoint("remove the record of checkpoint", name, lambda found: found.delete(flags))

    def delete(self, name: str) -> bool:
        """
        Remove a checkpoint with the bitmaps of all its disks.

        Returns False if a disk has no such bitmap: then libvirt has removed nothing.

        Raises
        ------
        Refused
            libvirt refuses for another reason.
        """
        try:
            self._of_checkpoint("delete checkpoint", name, lambda found: found.delete(0))
        except Refused as error:
            if _NO_BITMAP not in error.text:
                raise
            return False
        return True

    def _of_checkpoint(self, what: str, name: str, request: Callable[[Any], _T]) -> _T:
        return self._ask(f"{what} {name}", lambda domain: request(domain.checkpointLookupByName(name, 0)))

    # The guest

    def _state(self) -> tuple[int, int]:
        """The domain's state, and the reason for it (virDomainState)."""
        state, reason = self._ask("tell the domain's state", lambda domain: domain.state())
        return int(state), int(reason)

    def has_crashed(self) -> bool:
        """Tell whether the guest has panicked, and libvirt keeps its QEMU (`<on_crash>preserve</on_crash>`)."""
        return self._state()[0] == _CRASHED

    def lacks_space(self) -> bool:
        """Tell whether QEMU has stopped the guest because a write to one of its disks found no space."""
        if self._state() != (_PAUSED, _PAUSED_IO_ERROR):
            return False
        errors = self._ask("tell the errors of the disks", lambda domain: domain.diskErrors(0))
        return _NO_SPACE in errors.values()

    def resume(self) -> None:
        """Let a guest that was stopped go on."""
        self._ask("resume the domain", lambda domain: domain.resume())

    def freeze(self) -> int:
        """
        Have the agent flush and freeze the guest's file systems; returns how many were frozen.

        Raises
        ------
        AgentError
            The agent does not.
        """
        return int(self._of_agent("freeze the guest", self._domain.fsFreeze))

    def thaw(self) -> int:
        """
        Have the agent thaw the guest's file systems; returns how many were frozen.

        Raises
        ------
        AgentError
            The agent does not.
        """
        return int(self._of_agent("thaw the guest", self._domain.fsThaw))

    def _of_agent(self, what: str, request: Callable[[], _T]) -> _T:
        try:
            return self._answer(what, request, _AGENT_SECONDS)
        except SourceError as error:
            text = error.text if isinstance(error, Refused) else error.message
            raise AgentError(
                f"libvirt cannot {what}: {text}",
                hint="check that qemu-guest-agent runs in the guest, and that the domain has its channel "
                "(org.qemu.guest_agent.0)",
            ) from None

    # QEMU's monitor

    def command(self, name: str, arguments: Mapping[str, object] | None = None) -> Any:
        """
        Have QEMU execute a command, and return QEMU's answer.  libvirt marks the domain as tainted (custom-monitor).

        Raises
        ------
        answers.Refused
            QEMU answered with an error.
        SourceError
            libvirt does not pass the command to QEMU.
        """
        return self._of_monitor(name, arguments, None)

    def pass_fd(self, fd: int, name: str, arguments: Mapping[str, object]) -> Any:
        """
        Have QEMU execute a command that passes a file descriptor (getfd).  Our descriptor stays open.

        Raises
        ------
        answers.Refused, SourceError
            As in `command`.
        """
        return self._of_monitor(name, arguments, fd)

    def _of_monitor(self, name: str, arguments: Mapping[str, object] | None, fd: int | None) -> Any:
        send = _monitor_binding()
        command = json.dumps({"execute": name, "arguments": dict(arguments or {})})

        def request(domain: Any) -> str:
            # The caller may close its descriptor while libvirt still works: an interrupted run does not wait.
            files = [] if fd is None else [os.dup(fd)]
            try:
                return str(send(domain, command, files, 0)[0])
            finally:
                for file in files:
                    os.close(file)

        return answers.answer_of(name, json.loads(self._ask(f"pass {name} to QEMU", request)))

    # Requests

    def _ask(self, what: str, request: Callable[[Any], _T]) -> _T:
        """Make a request of the domain that may be repeated after the daemon was restarted."""
        try:
            return self._answer(what, lambda: request(self._domain))
        except Disconnected:
            self._connect_again()
            return self._answer(what, lambda: request(self._domain))

    def _connect_again(self) -> None:
        """Connect again; a daemon that has just started takes a moment until it knows that a domain runs."""
        deadline = time.monotonic() + _RECONNECT_SECONDS
        while True:
            over = time.monotonic() > deadline
            try:
                self.connect()
                if over or not self._was_on or self._answer("tell whether the domain runs", self._domain.isActive):
                    return
            except SourceError:
                if over:
                    raise
            time.sleep(_RECONNECT_PAUSE)

    def _answer(self, what: str, request: Callable[[], _T], seconds: float | None = None) -> _T:
        answer = Begun(request, "libvirt")
        if not answer.ends_within(_SOON):
            meanwhile.work(lambda: answer.ends_within(0))
        wait = Wait(f"libvirt, which was asked to {what}", seconds)
        try:
            return answer.result(wait.look)
        except self._libvirt.libvirtError as error:
            raise self._explained(what, error) from None

    def _explained(self, what: str, error: Any) -> SourceError:
        if self._connection is not None and not self._alive():
            return Disconnected(self.uri, what)
        return Refused(what, error.get_error_code(), error.get_error_message() or "no reason given")

    def _alive(self) -> bool:
        try:
            return bool(self._connection.isAlive() == 1)
        except self._libvirt.libvirtError:
            return False

    @contextmanager
    def _ignored(self) -> Iterator[None]:
        try:
            yield
        except SourceError:
            return
