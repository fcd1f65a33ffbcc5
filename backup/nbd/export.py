"""
NBD through libnbd: block status, reading for the copier, writing for a restore.  The only user of `nbd`.

What a server may answer to a block status request, all of it legal (NBD protocol, nbd_block_status(3), traps 7 to 10):

    asked      |.......................|
    short      |data   |zero |                  at least one extent; ask again from its end
    long       |data   |zero             |      the last extent may end beyond what was asked; clipped
    unmerged   |data|data|zero|zero|zero |      neighbours with equal flags; merged
    unequal    |data   |zero |                  base:allocation
               |dirty                |clean|    qemu:dirty-bitmap: another count, another length

Each context is therefore followed on its own, by its own length.

libnbd's blocking calls start again when a signal comes, so that nothing could stop a run whose server hangs.  What may
take long is therefore started (aio_...) and awaited in ticks, in which Python delivers signals.
"""

from __future__ import annotations

import importlib
import os
import queue
import socket
import sys
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from backup.errors import BackupError, Failed, SourceError
from backup.model import extents
from backup.model.extents import Runs
from backup.model.names import without_password
from backup.runtime import signals
from backup.runtime.timeouts import Silent, Wait

if TYPE_CHECKING:
    import nbd

ALLOCATION = "base:allocation"
DIRTY_BITMAP = "qemu:dirty-bitmap:"

_MAX_REQUEST = 32 << 20
"""Largest read or write of a server that announces no other limit (NBD protocol, "Block sizes")."""
_MAX_ZERO = 1 << 30
"""Bytes zeroed by one request, well below the 32-bit limit, so that a slow server answers in time."""
_MODEST_REQUEST, _MODEST_REQUESTS, _MODEST_QUESTION = 64 << 10, 2, 32 << 20
"""
What fits into a socket: bytes of a read, reads in flight, and bytes that a block status question is about (8,192
extents of 8 bytes, where each cluster of 4 KiB is one).
"""
_SMALLEST_PIECE = 512
"""Bytes of a read for each piece that the answer may come in, out of order: what is noted of them must have an end."""
_TICK = 100
"""Milliseconds between looks at signals and deadlines."""
_CONNECT_SECONDS = 30.0
"""How long a server may take for the handshake.  One that serves another client says nothing at all until it leaves."""
_EXTRA_SECONDS = 5.0
"""The same for one more connection to a server that has just answered."""
_LEAVE_SECONDS = 5.0
"""How long a server may take to hang up after a disconnect."""
_NO_PROTOCOL = "the server does not keep to the NBD protocol; nothing was assumed about the disk"
_MOST_OFFERED, _A_NAME = 32 << 20, 64
"""Bytes of memory for the names of a server's bitmaps (an image holds 65,535 of them), and of each beside its text."""
_MOST_SHOWN, _LONGEST_SHOWN = 10, 128
"""Names of bitmaps that a hint lists, and characters of each."""
_KEEPALIVE = {socket.TCP_KEEPIDLE: 60, socket.TCP_KEEPINTVL: 15, socket.TCP_KEEPCNT: 4}
"""Seconds without traffic, seconds between probes, and probes without an answer that end a connection."""
_INSTALL = (
    "install the distribution's binding: apt-get install python3-libnbd (dnf install python3-libnbd), then make setup"
)


def load_binding() -> Any:
    """
    Import libnbd's Python binding.

    Raises
    ------
    BackupError
        It is missing, made for another Python, or is PyPI's unrelated package of the same name.
    """
    try:
        module = importlib.import_module("nbd")
    except ModuleNotFoundError as error:
        what = (
            f"python3-libnbd on this machine was built for another Python than {sys.executable}"
            if error.name == "libnbdmod"
            else f"libnbd's Python binding (package python3-libnbd) is missing for {sys.executable}"
        )
        raise BackupError(what, hint=_INSTALL) from None
    except ImportError as error:
        raise BackupError(
            f"libnbd's Python binding (package python3-libnbd) does not load: {error}", hint=_INSTALL
        ) from None
    if not hasattr(module, "NBD"):
        raise BackupError(
            f"the module 'nbd' at {module.__file__} is another program's, not libnbd's (package python3-libnbd)",
            hint="pip uninstall nbd, then " + _INSTALL,
        )
    return module


@dataclass(frozen=True, slots=True)
class _Question:
    """A block status request under way, about [start, end) in bytes; `found` gets the answers of its context."""

    handle: nbd.NBD
    cookie: int
    context: str
    start: int
    end: int
    found: list[list[int]]


@dataclass(frozen=True, slots=True)
class Blocks:
    """
    What a server wants of a request (NBD protocol, "Block sizes").  Bytes.

    A request begins and ends at multiples of `smallest`, or at the end of the export, which has `size` bytes; a read or
    write has at most `largest`, a multiple of `smallest`.
    """

    smallest: int
    largest: int
    size: int

    def around(self, start: int, end: int) -> tuple[int, int]:
        """Round [start, end) out to whole blocks, as far as the export has them."""
        return start - start % self.smallest, max(end, min(end + -end % self.smallest, self.size))


@dataclass(frozen=True, slots=True)
class Dialled:
    """
    Connections to an export that are made for us, and ended by the server: we say no goodbye and only let go.

    `dial` returns a connected socket, which is ours then; `name` is the export's.  `modest`: never ask for more than
    the server can send without anybody reading, in the buffer that a unix socket has (net.core.wmem_default, 208 KiB).
    """

    name: str
    dial: Callable[[], int]
    modest: bool = False


class Export:
    """
    One export of an NBD server, opened for block status and for reading.

    Parameters
    ----------
    uri : str
        As libnbd's nbd_connect_uri(3) has it: nbd, nbds, nbd+unix and so on.
    bitmaps : sequence of str
        Names of the dirty bitmaps that will be asked about.
    size : int, optional
        The disk's exact size where the server rounds it (qemu-nbd rounds a raw image up to 512).  Bytes.
    dialled : Dialled, optional
        How connections are made where they are not by the URI, which then only stands in messages.

    Raises
    ------
    SourceError
        The server cannot be reached.
    """

    def __init__(
        self, uri: str, bitmaps: Sequence[str] = (), size: int | None = None, dialled: Dialled | None = None
    ) -> None:
        self.uri = without_password(uri)
        self._address = uri
        self._dialled = dialled
        self._nbd = load_binding()
        wanted = [ALLOCATION, *(DIRTY_BITMAP + name for name in bitmaps)]
        self._offered: list[str] | None = [] if bitmaps else None
        first = connect(self._nbd, uri, wanted, offered=self._offered, dialled=dialled)
        self._handles: list[nbd.NBD] = [first]
        self._by_context = {name: first for name in wanted if self._can(first, name)}
        self.multi_conn: bool = self._ask(first.can_multi_conn)
        self._takes_more = self.multi_conn
        self._expected: dict[tuple[str, int, int], _Question] = {}
        self._blocks: Blocks = self._ask(lambda: _blocks_of(self._nbd, first))
        self._size: int = self._blocks.size if size is None else size
        self.max_request: int = self._blocks.largest
        self.max_in_flight: int | None = None
        """Reads on one connection at once; None: as many as one likes."""
        self._max_question: int | None = None
        if dialled is not None and dialled.modest:
            self.max_request = min(self.max_request, _MODEST_REQUEST)
            self.max_in_flight, self._max_question = _MODEST_REQUESTS, _MODEST_QUESTION
        if self.multi_conn and len(self._by_context) > 1:
            self._split_contexts()

    @property
    def size(self) -> int:
        """Exact size of the disk in bytes."""
        return self._size

    @property
    def smallest_request(self) -> int:
        """Reads are rounded out to multiples of this (bytes); one that begins at a multiple never exceeds its limit."""
        return self._blocks.smallest

    def has_bitmap(self, name: str) -> bool:
        """Was the bitmap's context negotiated?  A context that does not exist is silently left out (trap 14)."""
        return DIRTY_BITMAP + name in self._by_context

    def allocation(self, start: int, end: int) -> Runs:
        """base:allocation of [start, end).  All data where the server has no such context: reading is right."""
        if ALLOCATION not in self._by_context:
            return Runs.uniform(start, end, 0)
        return self._status(ALLOCATION, start, end).masked(extents.HOLE | extents.ZERO)

    def dirty(self, bitmap: str, start: int, end: int) -> Runs:
        """
        The dirty bitmap's view of [start, end).

        Raises
        ------
        SourceError
            The server has no such bitmap (absence is never "all clean"), or the request fails.
        """
        if not self.has_bitmap(bitmap):
            raise SourceError(
                f"{self.uri} has no dirty bitmap {bitmap!r}",
                hint=f"it offers: {_listed(self.offered_bitmaps())}; qemu-nbd needs -f qcow2 -B {bitmap}",
            )
        return self._status(DIRTY_BITMAP + bitmap, start, end).masked(extents.DIRTY)

    def expect_allocation(self, start: int, end: int) -> None:
        """Say that `allocation` will be called with the same range soon."""
        self._expect(ALLOCATION, start, end)

    def expect_dirty(self, bitmap: str, start: int, end: int) -> None:
        """Say that `dirty` will be called with the same range soon."""
        self._expect(DIRTY_BITMAP + bitmap, start, end)

    def offered_bitmaps(self) -> list[str]:
        """Names of the dirty bitmaps that the server would serve; empty where it cannot say, or none was asked for."""
        return [name.removeprefix(DIRTY_BITMAP) for name in self._offered or () if name.startswith(DIRTY_BITMAP)]

    @contextmanager
    def lanes(self, wanted: int) -> Iterator[list[Lane]]:
        """
        Connections to read through: `wanted` where the server allows several (can_multi_conn) and takes them, else one.

        Those that there are serve first, so that no server sees more connections than needed.
        """
        self._withdraw()
        while len(self._handles) < wanted:
            more = self._another(None)
            if more is None:
                break
            self._handles.append(more)
        lanes = [Lane(self._nbd, handle, self.uri, self._blocks) for handle in self._handles[:wanted]]
        try:
            yield lanes
        finally:
            for lane in lanes:
                lane.close()

    def close(self) -> None:
        """End the connections; the server sees an orderly disconnect where that is still possible."""
        for handle in self._handles if self._dialled is None else ():
            _shutdown(self._nbd, handle)
        self._handles.clear()
        self._by_context.clear()
        self._expected.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _withdraw(self) -> None:
        """Take the answers to questions that were not needed: a lane takes only its own."""
        while self._expected:
            _, question = self._expected.popitem()
            self._answer(question)

    def _another(self, contexts: Sequence[str] | None) -> nbd.NBD | None:
        """
        Open one more connection, for reading alone where `contexts` is None.

        Returns None where the server does not take it; the server is not asked again then.  `qemu-nbd --shared=2`
        allows several connections and lets the third wait for ever; other servers close it.
        """
        if not self._takes_more:
            return None
        try:
            handle = connect(self._nbd, self._address, contexts, seconds=_EXTRA_SECONDS, dialled=self._dialled)
        except SourceError:
            self._takes_more = False
            return None
        found = self._ask(lambda: _blocks_of(self._nbd, handle))
        if found != self._blocks:
            raise SourceError(
                f"{self.uri} is not the same export on each connection: {self._blocks.size} bytes on the first one, "
                f"{found.size} on another",
                hint="was the disk resized, or the server restarted? run the command again",
            )
        return handle

    def _split_contexts(self) -> None:
        """
        Give each context a connection of its own, as far as the server takes them.

        A server computes every negotiated context for every request; asking for the bitmap alone must not read the
        image's allocation tables.
        """
        for context in self._by_context:
            handle = self._another([context])
            if handle is None:
                return
            self._handles.append(handle)
            if not self._can(handle, context):
                raise SourceError(
                    f"{self.uri} offered {context} on one connection and not on the next",
                    hint="the server's exports changed during the run; run the command again",
                )
            self._by_context[context] = handle

    def _can(self, handle: nbd.NBD, context: str) -> bool:
        return bool(self._ask(lambda: handle.can_meta_context(context)))

    def _ask(self, question: Any) -> Any:
        try:
            return question()
        except self._nbd.Error as error:
            raise source_error(self.uri, error) from None

    def _status(self, context: str, start: int, end: int) -> Runs:
        parts = []
        while start < end:
            question = self._expected.pop((context, start, end), None) or self._asked(context, start, end)
            part = extents_from_reply(self._answer(question), question.start, question.end, self.uri)
            if part.end <= start:
                raise self._odd(
                    f"answered a block status request at {question.start} with extents of {part.end - question.start} "
                    f"bytes, less than its smallest block of {self._blocks.smallest}"
                )
            part = part.between(start, end)
            parts.append(part)
            start = part.end
        return extents.joined(parts)

    def _odd(self, what: str) -> SourceError:
        return SourceError(f"{self.uri} {what}", hint=_NO_PROTOCOL)

    def _expect(self, context: str, start: int, end: int) -> None:
        """Have the server look it up while we do other things."""
        if start < end and context in self._by_context:
            self._expected[context, start, end] = self._asked(context, start, end)

    def _asked(self, context: str, start: int, end: int) -> _Question:
        handle = self._by_context[context]
        found: list[list[int]] = []
        if self._max_question is not None:
            end = min(end, start + self._max_question)
        start, end = self._blocks.around(start, end)

        def collect(name: str, _offset: int, entries: list[int], _error: object) -> int:
            if name != context:
                return 0
            # A second answer is an error already; what follows it need not be kept.
            found[:] = [*found[:1], entries]
            return 0 if len(found) == 1 else -1

        with signals.held():  # with another question under way, an answer may come in here
            cookie = self._ask(lambda: handle.aio_block_status(end - start, start, collect))
        return _Question(handle, cookie, context, start, end, found)

    def _answer(self, question: _Question) -> list[int]:
        handle = question.handle
        asked = f"answered a block status request at {question.start}"
        wait = Wait(f"block status from {self.uri}")
        while len(question.found) < 2 and not self._ask(lambda: handle.aio_command_completed(question.cookie)):
            self._ask(lambda: _tick(handle))
            wait.look()
        if not question.found:
            raise self._odd(f"{asked} without {question.context}")
        if len(question.found) > 1:
            raise self._odd(f"{asked} with {question.context} more than once")
        return question.found[0]


def extents_from_reply(entries: list[int], start: int, end: int, uri: str) -> Runs:
    """
    Turn one reply (length, flags, length, flags, ...) into runs of [start, at most end).

    Raises
    ------
    SourceError
        The reply makes no progress.
    """
    if len(entries) == 2 and entries[0]:  # an idle disk's windows are one extent each
        return Runs.uniform(start, min(start + entries[0], end), entries[1])
    # array takes the integers out of a list three times as fast as numpy does.
    columns = np.frombuffer(array("Q", entries), np.int64).reshape(-1, 2)
    if not columns[:, 0].all():
        columns = columns[columns[:, 0] > 0]
    if not len(columns):
        raise SourceError(
            f"{uri} answered a block status request at {start} with no extent",
            hint=_NO_PROTOCOL,
        )
    bounds = np.empty(len(columns) + 1, dtype=np.int64)
    bounds[0] = 0
    np.cumsum(columns[:, 0], out=bounds[1:])
    bounds += start
    inside = int(np.searchsorted(bounds[:-1], end))
    return Runs.of(bounds[:inside], min(int(bounds[-1]), end), columns[:inside, 1].astype(np.uint32))


class Pieces:
    """
    The pieces of [start, end) that have come, in any order.  Bytes.

    libnbd only adds up the lengths of the pieces (structured replies) that answer a read, so that a piece that comes
    twice hides one that never comes.
    """

    __slots__ = ("_end", "_found", "_start")

    def __init__(self, start: int, end: int) -> None:
        self._start, self._end = start, end
        self._found: list[list[int]] = []

    def add(self, start: int, length: int) -> bool:
        """Note a piece; False where there are more pieces than a server can have a reason for."""
        if self._found and self._found[-1][1] == start:
            self._found[-1][1] += length
        elif length:
            self._found.append([start, start + length])
        return len(self._found) <= 1 + (self._end - self._start) // _SMALLEST_PIECE

    def complete(self) -> bool:
        """Has every byte come exactly once?"""
        end = self._start
        for low, high in sorted(self._found):
            if low != end:
                return False
            end = high
        return end == self._end


class _Read:
    """A read under way: `length` bytes into `room`, of which `view` gets what begins at `offset`."""

    __slots__ = ("_begun", "_length", "_offset", "_pieces", "_room", "_start", "_view", "_whole", "token")

    def __init__(
        self, token: object, view: memoryview, room: memoryview, *, offset: int, start: int, begun: set[_Read]
    ) -> None:
        self.token = token
        self._begun = begun
        self._offset, self._start, self._length = offset, start, len(room)
        self._view, self._room = view, room
        self._whole = False
        self._pieces: Pieces | None = None

    def arrived(self, data: Any, start: int, _status: int, _error: object) -> int:
        """Note a piece of the answer (of an error: no bytes); libnbd's callback, which fails the read with -1."""
        self._begun.add(self)
        if len(data) == self._length:  # nearly always; libnbd counts the bytes, and finds what comes beside it
            self._whole = True
            return 0
        if self._pieces is None:
            self._pieces = Pieces(self._start, self._start + self._length)
        return 0 if self._pieces.add(start, len(data)) else -1

    def finish(self, *, in_pieces: bool) -> bool:
        """Hand the bytes on; False where not all of them came."""
        if in_pieces and not (self._whole or (self._pieces is not None and self._pieces.complete())):
            return False
        if self._room is not self._view:
            low = self._offset - self._start
            self._view[:] = self._room[low : low + len(self._view)]
        return True


class Lane:
    """One connection with reads in flight.  Used by one thread at a time, and by nothing else meanwhile."""

    def __init__(self, binding: Any, handle: nbd.NBD, uri: str, blocks: Blocks) -> None:
        self._nbd = binding
        self._handle: Any = handle
        self._uri = uri
        self._blocks = blocks
        # A simple reply is one run of all the bytes.  Without pieces to watch, libnbd need not call us for each.
        self._in_pieces: bool = handle.get_structured_replies_negotiated()
        self._reads: dict[int, _Read] = {}
        self._begun: set[_Read] = set()
        """Reads of which pieces came: only then one may be finished (or have failed, which has a moment's time)."""
        self._patience = Wait(f"data from {uri}")
        # A read whose bytes did not all come is an error, so the zeroing before each read would only cost time.
        handle.set_pread_initialize(False)

    @property
    def in_flight(self) -> int:
        """Reads that were not answered yet."""
        return len(self._reads)

    def submit(self, offset: int, view: memoryview, token: object) -> None:
        """
        Start to read len(view) bytes at `offset` into view; `wait` returns `token` when they are there.

        Raises
        ------
        SourceError
            The connection is gone.
        """
        start, end = self._blocks.around(offset, offset + len(view))
        room = view if end - start == len(view) else memoryview(bytearray(end - start))
        read = _Read(token, view, room, offset=offset, start=start, begun=self._begun)
        try:
            if self._in_pieces:
                cookie = self._handle.aio_pread_structured(room, start, read.arrived)
            else:
                cookie = self._handle.aio_pread(room, start)
        except self._nbd.Error as error:
            raise source_error(self._uri, error) from None
        self._reads[cookie] = read

    def wait(self, milliseconds: int, enough: int) -> list[object]:
        """
        Wait until `enough` reads have finished, at most so long, and return the tokens of all that have.

        Raises
        ------
        SourceError
            A read failed, was answered with less than all of its bytes, the connection broke, or nothing came for so
            long that the program's patience is over.
        """
        self._patience.resume()
        poll = self._handle.poll
        deadline = time.monotonic() + milliseconds / 1000
        try:
            done = self._finished()
            # Each call takes what a socket holds just now, a small part of a read: back to it with no detour.
            while len(done) < enough and poll(milliseconds):
                if self._begun or not self._in_pieces:
                    done += self._finished()
                if time.monotonic() >= deadline:
                    break
        except self._nbd.Error as error:
            raise source_error(self._uri, error) from None
        if done:
            self._patience.progressed()
        else:
            self._patience.look()
        return done

    def _finished(self) -> list[object]:
        """
        Take the reads that are answered.

        Whether all bytes came is what libnbd tells when it is asked whether the command is completed, and only then: a
        completion callback is told of success.
        """
        done = []
        while self._reads and (cookie := self._handle.aio_peek_command_completed()):
            read = self._reads.pop(cookie)
            self._begun.discard(read)
            try:
                self._handle.aio_command_completed(cookie)
            except self._nbd.Error as error:
                raise self._failed(os.strerror(error.errnum)) from None
            if not read.finish(in_pieces=self._in_pieces):
                raise self._failed("the server sent some bytes twice and others never")
            done.append(read.token)
        return done

    def _failed(self, why: str) -> SourceError:
        return SourceError(
            f"{self._uri}: reading failed: {why}",
            hint="look at the server's log and the storage below it; no point was made",
        )

    def close(self) -> None:
        """No more reads; the connection is the export's to end."""
        self._handle = None
        self._reads.clear()
        self._begun.clear()


class Target:
    """
    An export opened for writing, for a restore.  Safe to use from several threads.

    A request has a connection to itself until it is answered: polling holds libnbd's lock on the handle, so that two
    threads on one would only wait for each other.  There are as many as threads ask at once where the server allows it
    (can_multi_conn, which also has one flush cover the writes of all) and takes them, else one.

    Nothing here calls back into Python, so that `interrupts.held` is not needed, and could not be had in a worker.

    Raises
    ------
    Failed
        The server cannot be reached.  Not a SourceError: its exit code is the source's.
    """

    _ZEROES = memoryview(bytes(1 << 20))  # a server without write-zeroes may announce requests of 4 GiB

    reads_zero = False  # whatever it held before is still there

    def __init__(self, uri: str) -> None:
        self.uri = without_password(uri)
        self._address = uri
        self._nbd = load_binding()
        self._abandoned = threading.Event()
        self._mending = threading.Lock()  # of two threads that write parts of one block, one reads what the other wrote
        try:
            first = connect(self._nbd, uri, ())
        except SourceError as error:
            raise Failed(error.message, hint=error.hint) from None
        try:
            self.size: int = first.get_size()
            self.read_only: bool = first.is_read_only()
            self._can_zero: bool = first.can_zero()
            self._can_flush: bool = first.can_flush()
            self._takes_more: bool = first.can_multi_conn()
            self._blocks = _blocks_of(self._nbd, first)
        except self._nbd.Error as error:
            raise self._failed(error) from None
        self._handles: list[nbd.NBD] = [first]
        self._idle: queue.LifoQueue[nbd.NBD] = queue.LifoQueue()  # last in, first out: no more connections than needed
        self._idle.put(first)

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """
        Write data (bytes) at offset.

        Raises
        ------
        Failed
            The server cannot write it, or the target was abandoned.
        """
        view, end, largest = memoryview(data), offset + len(data), self._blocks.largest
        first, last = self._whole_blocks(offset, end)
        self._write_part(offset, view[: first - offset])
        for low in range(first, last, largest):
            self._write_once(low, view[low - offset : min(low + largest, last) - offset])
        self._write_part(last, view[last - offset :])

    def zero(self, offset: int, length: int) -> None:
        """
        Make the range read as zeroes.

        Raises
        ------
        Failed
            As for `write`.
        """
        step = _MAX_ZERO if self._can_zero else min(self._blocks.largest, len(self._ZEROES))
        first, last = self._whole_blocks(offset, offset + length)
        self._write_part(offset, memoryview(bytes(first - offset)))
        for low in range(first, last, step):
            count = min(step, last - low)
            if self._can_zero:
                self._zero_once(low, count)
            else:
                self._write_once(low, self._ZEROES[:count])
        self._write_part(last, memoryview(bytes(offset + length - last)))

    def flush(self) -> None:
        """Have the server store everything written so far, on whichever connection."""
        if self._can_flush:
            self._answered(lambda handle: handle.aio_flush())

    def abandon(self) -> None:
        """Have what is under way, in whichever thread, fail within moments: the server may never answer."""
        self._abandoned.set()

    def close(self) -> None:
        """End the connections: in order, or at once where a request never ended."""
        if not self._abandoned.is_set():
            for handle in self._handles:
                _shutdown(self._nbd, handle)
        self._handles.clear()
        self._idle = queue.LifoQueue()

    def _whole_blocks(self, start: int, end: int) -> tuple[int, int]:
        """The part of [start, end) that is whole blocks of the server; an empty part at `end` where there is none."""
        smallest = self._blocks.smallest
        first, last = start + -start % smallest, end if end >= self.size else end - end % smallest
        return (first, last) if first <= last else (end, end)

    def _write_part(self, offset: int, data: memoryview) -> None:
        """Write a part of one block, the rest of which keeps what it holds: the server takes whole blocks only."""
        if not data:
            return
        start, end = self._blocks.around(offset, offset + len(data))
        block = bytearray(end - start)
        with self._mending:
            self._answered(lambda handle: handle.aio_pread(memoryview(block), start))
            block[offset - start : offset - start + len(data)] = data
            self._write_once(start, memoryview(block))

    def _write_once(self, offset: int, data: memoryview) -> None:
        self._answered(lambda handle: handle.aio_pwrite(data, offset))

    def _zero_once(self, offset: int, count: int) -> None:
        self._answered(lambda handle: handle.aio_zero(count, offset))

    def _answered(self, start: Callable[[nbd.NBD], int]) -> None:
        """Start a request and wait for its answer."""
        try:
            with self._connection() as handle:
                cookie = start(handle)
                wait = Wait(f"{self.uri} to store data")
                while not handle.aio_command_completed(cookie):
                    self._tick(handle)
                    wait.look()
        except self._nbd.Error as error:
            raise self._failed(error) from None
        except Silent as silent:
            self.abandon()
            raise Failed(silent.message, hint=f"the target is incomplete; {silent.hint}") from None
        except BaseException:
            # The main thread was interrupted, and no other thread should wait for this server any more.
            self.abandon()
            raise

    @contextmanager
    def _connection(self) -> Iterator[nbd.NBD]:
        handle = self._idle_one() or self._another() or self._next_idle()
        try:
            yield handle
        finally:
            self._idle.put(handle)

    def _idle_one(self, seconds: float = 0) -> nbd.NBD | None:
        self._require_wanted()
        try:
            return self._idle.get(block=seconds > 0, timeout=seconds)
        except queue.Empty:
            return None

    def _next_idle(self) -> nbd.NBD:
        while True:
            handle = self._idle_one(_TICK / 1000)
            if handle is not None:
                return handle

    def _another(self) -> nbd.NBD | None:
        """One more connection, or None where the server does not take it (see Export); it is not asked again then."""
        if not self._takes_more:
            return None
        handle: nbd.NBD = self._nbd.NBD()
        deadline = time.monotonic() + _EXTRA_SECONDS
        with suppress(self._nbd.Error):
            handle.set_uri_allow_local_file(True)
            handle.aio_connect_uri(self._address)
            while handle.aio_is_connecting() and time.monotonic() < deadline:
                self._tick(handle)
            if handle.aio_is_ready():
                self._handles.append(handle)
                return handle
        self._takes_more = False
        return None

    def _tick(self, handle: nbd.NBD) -> None:
        self._require_wanted()
        handle.poll(_TICK)

    def _require_wanted(self) -> None:
        if self._abandoned.is_set():
            raise Failed(f"{self.uri}: writing was abandoned", hint="the target is incomplete; restore again")

    def _failed(self, error: Any) -> Failed:
        return Failed(
            without_password(f"{self.uri}: writing failed: {error.string}"),
            hint="the target is incomplete; look at the server's log, then restore again",
        )


def _blocks_of(binding: Any, handle: nbd.NBD) -> Blocks:
    smallest = handle.get_block_size(binding.SIZE_MINIMUM) or 1
    # libnbd itself refuses more than 64 MiB, whatever the server announces (nbd_pwrite(3)).
    largest = min(handle.get_block_size(binding.SIZE_MAXIMUM) or _MAX_REQUEST, _MAX_REQUEST)
    return Blocks(smallest, max(largest - largest % smallest, smallest), handle.get_size())


def connect(
    binding: Any,
    uri: str,
    contexts: Sequence[str] | None,
    *,
    offered: list[str] | None = None,
    seconds: float = _CONNECT_SECONDS,
    dialled: Dialled | None = None,
) -> nbd.NBD:
    """
    Connect one handle and negotiate `contexts`; which of them the server has is the caller's to ask.

    Parameters
    ----------
    contexts : sequence of str or None
        None: nothing but reads will be asked, and each is to be answered in one piece (a simple reply).
    offered : list of str, optional
        Gets the names of all dirty bitmap contexts that the server lists.  Asked on the same connection: a server of
        one client lets a second one wait.
    seconds : float
        How long the server may take.

    Raises
    ------
    SourceError
        The server cannot be reached, does not answer, has no such export, or the URI is not one.
    """
    handle: nbd.NBD = binding.NBD()
    address, uri = uri, without_password(uri)
    deadline = time.monotonic() + seconds
    try:
        # The user names the URI, so that its tls-psk-file and tls-certificates are the user's own files.
        handle.set_uri_allow_local_file(True)
        handle.set_opt_mode(offered is not None)
        if contexts is None:
            handle.set_request_structured_replies(False)
        _ask_for(handle, contexts or () if offered is None else [DIRTY_BITMAP])
        if dialled is None:
            handle.aio_connect_uri(address)
        else:
            handle.set_export_name(dialled.name)
            handle.aio_connect_socket(dialled.dial())
        _await_handshake(handle, uri, deadline)
        if offered is not None and handle.aio_is_negotiating():
            _list_contexts(binding, handle, uri, deadline, offered)
            _ask_for(handle, contexts or ())
            handle.aio_opt_go()
            _await_handshake(handle, uri, deadline)
            if handle.aio_is_negotiating():
                raise SourceError(f"{uri}: the server refuses the export", hint="see what it has: nbdinfo --list URI")
        if handle.aio_is_ready():
            _keep_alive(handle)
    except binding.Error as error:
        raise source_error(uri, error) from None
    return handle


def _ask_for(handle: nbd.NBD, contexts: Sequence[str]) -> None:
    handle.clear_meta_contexts()
    for context in contexts:
        handle.add_meta_context(context)


def _list_contexts(binding: Any, handle: nbd.NBD, uri: str, deadline: float, offered: list[str]) -> None:
    fd = handle.aio_get_fd()
    room = _MOST_OFFERED

    def collect(name: str) -> int:
        nonlocal room
        room -= len(name) + _A_NAME
        if room >= 0:
            offered.append(name)
            return 0
        _hang_up(fd)  # libnbd goes on as long as replies come
        return -1

    with suppress(binding.Error):  # it cannot list them: only a hint is poorer without
        handle.aio_opt_list_meta_context(collect)
        _await_handshake(handle, uri, deadline)
    if room < 0:
        raise SourceError(f"{uri} lists more dirty bitmaps than a disk can have", hint=_NO_PROTOCOL)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_SHOWN} more" if len(names) > _MOST_SHOWN else ""
    return ", ".join(name[:_LONGEST_SHOWN] for name in names[:_MOST_SHOWN]) + more or "none"


def _hang_up(fd: int) -> None:
    """End a connection under libnbd's hands; its descriptor stays libnbd's."""
    with suppress(OSError), socket.socket(fileno=os.dup(fd)) as connection:
        connection.shutdown(socket.SHUT_RDWR)


def _keep_alive(handle: nbd.NBD) -> None:
    """Have the kernel notice a peer over TCP that is gone, also while it owes us nothing."""
    with socket.socket(fileno=os.dup(handle.aio_get_fd())) as connection:
        if connection.family in {socket.AF_INET, socket.AF_INET6}:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _KEEPALIVE.items():
                connection.setsockopt(socket.IPPROTO_TCP, option, value)


def _await_handshake(handle: nbd.NBD, uri: str, deadline: float) -> None:
    while handle.aio_is_connecting():
        if time.monotonic() > deadline:
            raise SourceError(
                f"{uri}: the server does not answer",
                hint="does it serve another client? qemu-nbd serves one at a time without --shared=N",
            )
        _tick(handle)


def _tick(handle: nbd.NBD) -> None:
    """Let libnbd work for a moment; it prints and swallows what a callback of ours raises, so signals wait so long."""
    with signals.held():
        handle.poll(_TICK)


def source_error(uri: str, error: Any) -> SourceError:
    """Put libnbd's message into an error of ours, with the URI it is about."""
    return SourceError(
        without_password(f"{uri}: {error.string}"), hint="is the server running, and the URI right? try: nbdinfo URI"
    )


def _shutdown(binding: Any, handle: nbd.NBD) -> None:
    """Say goodbye where nothing is under way; else, and where it is gone, dropping the handle closes it."""
    with suppress(binding.Error):
        if handle.aio_in_flight():
            return
        handle.aio_disconnect()
        deadline = time.monotonic() + _LEAVE_SECONDS
        while not (handle.aio_is_closed() or handle.aio_is_dead()) and time.monotonic() < deadline:
            handle.poll(_TICK)
