"""
Leases on the folders of a bucket: what flock is in a folder of this host.

A lease is an object FOLDER/lock.HEX8 that says who has it, of which kind it is, and until when it holds.

    exclusive   the writer's: at most one of a folder
    shared      a reader's: keeps a prune from removing what the reader reads; any number, also beside a writer

Taking an exclusive lease: list the folder; put the own object; list again.  Of two that take one at once, at least one
sees the other's object in its second listing, since listings are consistent; the one whose object's name comes first
stays, the others remove theirs, wait for a random time and try again.  This needs no conditional request, which some
servers ignore (Ceph 16 on versioned buckets).

Taking a shared lease: put the own object, then read the manifests again.  A prune looks for shared leases after it has
removed a manifest and before it removes the files that the manifest names.  So either the prune sees the lease, or the
reader sees that the point is gone.

All times are the server's: an object's time of modification tells what the server's clock says.  A lease is renewed
long before it runs out; a writer that could not renew its lease in time stops.  Processes of one host exclude each
other with locks of that host, which end with a process: what a killed process of this host left keeps no other one out.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import random
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from backup.errors import BackupError, Locked
from backup.runtime import at_end
from backup.runtime.ignoring import ignoring
from backup.storage.base import Unavailable
from backup.storage.host_state import HostState
from backup.storage.object_client import Client, Folder, Found

_log = logging.getLogger(__name__)

NAME = re.compile(r"lock\.[0-9a-f]{8}")
EXCLUSIVE, SHARED = "exclusive", "shared"
_SLOTS = 64
"""How many readers of one folder a host can have at once."""
_MAX_BYTES = 4096
_RENEW_SECONDS = 30.0
"""Seconds to wait for the renewal of a lease, before the next attempt."""
_GIVE_BACK_SECONDS = 10.0
"""Seconds to wait for the end of a lease: without an answer it ends by its time, and the process need not wait."""
_CLOSE_ENOUGH = 30.0
"""Seconds that an `until` may be wrong before the lease is written again by the server's clock."""


@dataclass(frozen=True, slots=True)
class Terms:
    """Seconds that a lease holds, after which it is renewed, before its end when its holder stops, and of waiting."""

    lasting: float = 900.0
    renewed: float = 300.0
    margin: float = 60.0
    patience: float = 5.0


@dataclass(frozen=True, slots=True)
class Lease:
    """What a lease's object says.  `until` is in seconds since 1970; `slot` is which of its host's readers has it."""

    kind: str
    host: str
    pid: int
    until: float
    identity: str = ""
    slot: int = 0

    def encode(self) -> bytes:
        """Return the object's content."""
        document: dict[str, object] = {"kind": self.kind, "host": self.host, "pid": self.pid, "until": int(self.until)}
        return (json.dumps({**document, "identity": self.identity, "slot": self.slot}) + "\n").encode()

    @classmethod
    def decode(cls, content: bytes, modified: datetime, lasting: float) -> Lease:
        """
        Return what an object says; one that cannot be understood is a writer's.

        No lease holds for longer than the usual time after it was written: a host's clock may have been wrong.
        """
        longest = modified.timestamp() + lasting
        unknown = cls(EXCLUSIVE, "an unknown host", 0, longest)
        try:
            document = json.loads(content)
            host, identity = str(document.get("host", ""))[:64], str(document.get("identity", ""))
            until = min(_seconds(document.get("until")), longest)
            kind = SHARED if document.get("kind") == SHARED else EXCLUSIVE
            return cls(kind, host, int(document.get("pid", 0)), until, identity, int(document.get("slot", 0)))
        except (ValueError, TypeError, AttributeError, RecursionError, OverflowError):
            return unknown


def _seconds(value: Any) -> float:
    if isinstance(value, str):
        moment = datetime.fromisoformat(value)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    return float(value)


def _now() -> float:
    """Return seconds that also pass while the host is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class _Clock:
    """
    The server's clock, known between two bounds from the time of modification of an object that we put.

    Before that, this host's clock is taken for the server's.
    """

    def __init__(self) -> None:
        self.early = self.late = time.time() - _now()
        self.known = False

    def learn(self, modified: datetime, before: float, after: float) -> None:
        """Note that the server wrote an object at `modified`, between two of our moments."""
        self.early, self.late = modified.timestamp() - after, modified.timestamp() + 1.0 - before
        self.known = True

    def earliest(self) -> float:
        """Return the server's time, or some time before it."""
        return self.early + _now()

    def latest(self) -> float:
        """Return the server's time, or some time after it."""
        return self.late + _now()


@dataclass(slots=True)
class _Held:
    """A lease that this access has."""

    folder: str
    name: str
    kind: str
    slot: int
    free: Callable[[], None]
    until: float = 0.0
    put_at: float = 0.0
    users: int = 0
    kept: bool = False

    @property
    def path(self) -> str:
        return _join(self.folder, self.name)


class Leases:
    """The leases of one access to a bucket.  Safe to use from several threads."""

    def __init__(self, client: Client, state: HostState, terms: Terms = Terms()) -> None:
        self._client, self._state, self._terms = client, state, terms
        self._clock = _Clock()
        self._held: dict[tuple[str, str], _Held] = {}
        self._lock = threading.RLock()
        self._stop = threading.Event()
        self._renewing: threading.Thread | None = None
        self._known: dict[tuple[str, str], Lease] = {}
        self.can_share = True
        """False once the server has refused a reader's lease: the access key may not write."""

    # A writer's

    @contextmanager
    def exclusive(self, folder: str, patience: float | None = None) -> Iterator[None]:
        """
        Hold the exclusive lease of a folder.

        Raises
        ------
        Locked
            Another process has it, also after `patience` (seconds).
        """
        held = self._take_exclusive(folder, self._terms.patience if patience is None else patience)
        try:
            yield
        finally:
            self._give_back(held)

    def _take_exclusive(self, folder: str, patience: float) -> _Held:
        free = self._state.try_lock(f"{folder}.writer", patience / 4)
        if free is None:
            raise _locked(folder, "another process of this host")
        held = _Held(folder, _name(self._state.identity, EXCLUSIVE, 0), EXCLUSIVE, 0, free)
        try:
            self._contend(held, patience)
        except BaseException:
            self._give_back(held, quickly=True)
            raise
        return held

    def _contend(self, held: _Held, patience: float) -> None:
        until = _now() + patience
        ours = False
        while True:
            if not ours and not self._rivals(held.folder, held.name, self._client.list(held.folder)):
                self._put(held)
                ours = True
            if ours:
                listed = self._put_again_by_clock(held, self._client.list(held.folder))
                rivals = self._rivals(held.folder, held.name, listed)
                if not rivals:
                    self._keep(held)
                    return
                if min(rivals) < held.name:
                    self._withdraw(held)
                    ours = False
            if _now() > until:
                raise _locked(held.folder, self._holder(held))
            time.sleep(random.uniform(0.1, 0.5))  # noqa: S311

    def _rivals(self, folder: str, ours: str, listed: Folder) -> dict[str, Lease]:
        """Return the leases of other writers that hold by now."""
        leases = self._leases(folder, listed, ours)
        return {name: lease for name, lease in leases.items() if lease.kind == EXCLUSIVE}

    def _holder(self, held: _Held) -> str:
        rivals = self._rivals(held.folder, held.name, self._client.list(held.folder))
        return next((f"host {lease.host} pid {lease.pid}" for lease in rivals.values()), "another process")

    def require_unlocked(self, folder: str) -> None:
        """
        Make sure that no process has the exclusive lease; changes nothing.

        Raises
        ------
        Locked
            A process has it.
        """
        free = self._state.try_lock(f"{folder}.writer", self._terms.patience / 10)
        if free is None:
            raise _locked(folder, "another process of this host")
        free()
        ours = _name(self._state.identity, EXCLUSIVE, 0)
        for lease in self._rivals(folder, ours, self._client.list(folder)).values():
            raise _locked(folder, f"host {lease.host} pid {lease.pid}")

    def writes(self, folder: str) -> bool:
        """Tell whether this access has the exclusive lease of a folder."""
        return (folder, EXCLUSIVE) in self._held

    def require_valid(self, folder: str) -> None:
        """
        Make sure that our exclusive lease of a folder, if we have it, still holds.

        Raises
        ------
        Unavailable
            The lease could not be renewed in time.  Another process may write to the folder by now.
        """
        held = self._held.get((folder, EXCLUSIVE))
        if held is not None and self._clock.latest() > held.until - self._terms.margin:
            raise Unavailable(
                errno.ESTALE,
                "the lease could not be renewed in time, so another run may write here by now",
                self._client.path(folder),
                hint="run the command again; what was published before is untouched",
            )

    # A reader's

    def share(self, folder: str) -> bool:
        """
        Have a shared lease of a folder until `close`; return False if the access key may not write one.

        The caller reads the manifests again afterwards.
        """
        with self._lock:
            held = self._taken(folder)
            if held is not None:
                held.kept = True
            return held is not None or self.writes(folder)

    @contextmanager
    def shared(self, folder: str) -> Iterator[bool]:
        """Have a shared lease of a folder for the block, as `share`."""
        with self._lock:
            held = self._taken(folder)
            if held is not None:
                held.users += 1
        try:
            yield held is not None or self.writes(folder)
        finally:
            if held is not None:
                with self._lock:
                    held.users -= 1
                if not held.users and not held.kept:
                    self._give_back(held)

    def _taken(self, folder: str) -> _Held | None:
        """Return the shared lease of a folder, a new one if need be; None if it is not needed, or not permitted."""
        held = self._held.get((folder, SHARED))
        if held is not None or self.writes(folder) or not self.can_share:
            return held
        slot, free = self._slot(folder)
        held = _Held(folder, _name(self._state.identity, SHARED, slot), SHARED, slot, free)
        try:
            self._put(held)
            if not self._clock.known:
                self._put_again_by_clock(held, Folder({held.name: self._client.head(held.path)}, ()))
        except PermissionError as error:
            free()
            _log.info("no reader's lease on %s: %s", self._client.path(folder), error.strerror)
            self.can_share = False
            return None
        except BaseException:
            free()
            raise
        self._keep(held)
        return held

    def _slot(self, folder: str) -> tuple[int, Callable[[], None]]:
        for slot in range(_SLOTS):
            free = self._state.try_lock(f"{folder}.reader-{slot}")
            if free is not None:
                return (slot if self._state.shared else random.getrandbits(31)), free
        raise Unavailable(
            errno.EAGAIN,
            f"{_SLOTS} processes of this host read it already",
            self._client.path(folder),
            hint="wait for one of them to end",
        )

    def has_readers(self, folder: str) -> bool:
        """Tell whether another access has a shared lease of the folder that holds by now."""
        ours = self._held.get((folder, SHARED))
        leases = self._leases(folder, self._client.list(folder), ours.name if ours else "").values()
        return any(lease.kind == SHARED and not self._is_dead(folder, lease) for lease in leases)

    def _is_dead(self, folder: str, lease: Lease) -> bool:
        """Tell whether a shared lease is one of this host's, and its process has ended."""
        if lease.identity != self._state.identity or not self._state.shared:
            return False
        free = self._state.try_lock(f"{folder}.reader-{lease.slot}")
        if free is None:
            return False
        free()
        return True

    # Objects

    def _leases(self, folder: str, listed: Folder, ours: str) -> dict[str, Lease]:
        """Return the leases of others that hold by now."""
        leases = {}
        for name, found in listed.objects.items():
            if name == ours or not NAME.fullmatch(name):
                continue
            lease = self._lease(folder, name, found)
            if lease is not None and lease.until > self._clock.earliest():
                leases[name] = lease
        return leases

    def _lease(self, folder: str, name: str, found: Found) -> Lease | None:
        path = _join(folder, name)
        known = self._known.get((path, found.tag))
        if known is not None:
            return known
        try:
            content = self._client.get(path, _MAX_BYTES)
        except FileNotFoundError:
            return None
        except PermissionError:  # another account's object: it holds for the usual time
            content = b""
        lease = Lease.decode(content, found.modified, self._terms.lasting)
        if found.tag:
            self._known[path, found.tag] = lease
        return lease

    def _put(self, held: _Held, seconds: float | None = None) -> None:
        """Write or renew a lease's object."""
        before = _now()
        until = self._clock.earliest() + self._terms.lasting
        lease = Lease(held.kind, socket.gethostname(), os.getpid(), until, self._state.identity, held.slot)
        self._client.put(held.path, lease.encode(), seconds)
        held.until, held.put_at = until, before

    def _put_again_by_clock(self, held: _Held, listed: Folder) -> Folder:
        """Learn the server's clock from our object; write it again, and list again, if its `until` is wrong."""
        found = listed.objects.get(held.name)
        if found is None:
            raise Unavailable(
                errno.ESTALE, "its lease was removed", self._client.path(held.folder), hint="run the command again"
            )
        if self._clock.known:
            return listed
        self._clock.learn(found.modified, held.put_at, _now())
        if abs(self._clock.earliest() + self._terms.lasting - held.until) < min(_CLOSE_ENOUGH, self._terms.margin / 2):
            return listed
        self._put(held)
        return self._client.list(held.folder)

    def _keep(self, held: _Held) -> None:
        with self._lock:
            self._held[held.folder, held.kind] = held
            if self._renewing is None:
                at_end.call(self.close)
                self._renewing = threading.Thread(target=self._renew, name="leases", daemon=True)
                self._renewing.start()

    def _renew(self) -> None:
        while not self._stop.wait(self._terms.renewed / 10):
            for held in list(self._held.values()):
                if _now() - held.put_at >= self._terms.renewed:
                    self._renew_one(held)

    def _renew_one(self, held: _Held) -> None:
        """Renew a lease, unless it was given back; under the lock, so that it is not given back meanwhile."""
        with self._lock, ignoring(_log, f"renewing {held.path}", OSError, BackupError):
            if self._held.get((held.folder, held.kind)) is held:
                self._put(held, _RENEW_SECONDS)

    def _give_back(self, held: _Held, *, quickly: bool = False) -> None:
        """End a lease: remove its object, or write that it is over."""
        with self._lock:
            known = self._held.pop((held.folder, held.kind), None)
        try:
            if held.put_at and (known is not None or quickly):
                self._withdraw(held)
        finally:
            held.free()

    def _withdraw(self, held: _Held) -> None:
        with ignoring(_log, f"ending {held.path}", OSError, BackupError):
            try:
                self._client.delete(held.path, _GIVE_BACK_SECONDS)
            except PermissionError:
                over = Lease(held.kind, socket.gethostname(), os.getpid(), 0, self._state.identity, held.slot)
                self._client.put(held.path, over.encode(), _GIVE_BACK_SECONDS)
        held.put_at = 0.0

    def close(self) -> None:
        """End all leases."""
        self._stop.set()
        at_end.forget(self.close)
        for held in list(self._held.values()):
            self._give_back(held)
        with self._lock:
            self._stop, self._renewing = threading.Event(), None


def _name(identity: str, kind: str, slot: int) -> str:
    return f"lock.{hashlib.sha256(f'{identity} {kind} {slot}'.encode()).hexdigest()[:8]}"


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _locked(folder: str, holder: str) -> Locked:
    what = f"machine {folder}" if folder else "the place"
    return Locked(
        f"{what} is locked by another run ({holder})",
        hint="wait for that run to end; a killed run's lease on another host ends after a quarter of an hour",
    )
