"""
One export of an NBD server as an open disk (`OpenDisk`): block status and reads, through libnbd.

What a server may answer to a block status request; all of it is legal (NBD protocol, nbd_block_status(3), traps 7-10):

    request    |.......................|
    short      |data   |zero |                  at least one extent: the next request starts at its end
    long       |data   |zero             |      the last extent may end beyond the request: it is clipped
    unmerged   |data|data|zero|zero|zero |      neighbours may have equal flags: they are merged
    unequal    |data   |zero |                  base:allocation
               |dirty                |clean|    qemu:dirty-bitmap: another count, another length

So each context is followed independently, by its own lengths.

A blocking call of libnbd starts again after a signal, so a run whose server hangs could not be stopped.  Therefore
every call that may take long is started (aio_...) and awaited in ticks, between which Python delivers signals.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

from backup.errors import SourceError
from backup.model import extents
from backup.model.extents import Runs
from backup.model.names import without_password
from backup.nbd.connection import (
    ALLOCATION,
    DIRTY_BITMAP,
    EXTRA_SECONDS,
    NO_PROTOCOL,
    Dialled,
    connect,
    listed,
    load_binding,
    shutdown,
    source_error,
    tick,
)
from backup.nbd.replies import Blocks, Pieces, Question, blocks_of, extents_from_reply
from backup.runtime import signals
from backup.runtime.timeouts import Wait

if TYPE_CHECKING:
    import nbd


_MODEST_REQUEST, _MODEST_REQUESTS, _MODEST_QUESTION = 64 << 10, 2, 32 << 20
"""
What fits into a socket: bytes of a read, reads in flight, and bytes that one block status request covers (8,192 extents
of 8 bytes each if every cluster of 4 KiB is an extent).
"""


class Export:
    """
    One export of an NBD server, opened for block status and for reading.

    Parameters
    ----------
    uri : str
        A URI for libnbd's nbd_connect_uri(3): nbd, nbds, nbd+unix and so on.
    bitmaps : sequence of str
        Names of the dirty bitmaps for which `dirty` will be called.
    size : int, optional
        The disk's exact size in bytes, for a server that rounds it (qemu-nbd rounds a raw image up to 512).
    dialled : Dialled, optional
        How connections are made without the URI, which then appears only in messages.

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
        self._expected: dict[tuple[str, int, int], Question] = {}
        self._blocks: Blocks = self._ask(lambda: blocks_of(self._nbd, first))
        self._size: int = self._blocks.size if size is None else size
        self.max_request: int = self._blocks.largest
        self.max_in_flight: int | None = None
        """Largest number of reads in flight on one connection; None: any number."""
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
        """Bytes; reads are extended to multiples of this number, and stay within `max_request` if they start at one."""
        return self._blocks.smallest

    def has_bitmap(self, name: str) -> bool:
        """Tell whether the server has the bitmap; a server silently leaves out a context that it lacks (trap 14)."""
        return DIRTY_BITMAP + name in self._by_context

    def allocation(self, start: int, end: int) -> Runs:
        """Return base:allocation of [start, end); data everywhere if the server does not report allocation."""
        if ALLOCATION not in self._by_context:
            return Runs.uniform(start, end, 0)
        return self._status(ALLOCATION, start, end).masked(extents.HOLE | extents.ZERO)

    def dirty(self, bitmap: str, start: int, end: int) -> Runs:
        """
        Return which of the bytes [start, end) the dirty bitmap reports as dirty.

        Raises
        ------
        SourceError
            The server has no such bitmap, which never means "all clean", or the request fails.
        """
        if not self.has_bitmap(bitmap):
            raise SourceError(
                f"{self.uri} has no dirty bitmap {bitmap!r}",
                hint=f"it offers: {listed(self.offered_bitmaps())}; qemu-nbd needs -f qcow2 -B {bitmap}",
            )
        return self._status(DIRTY_BITMAP + bitmap, start, end).masked(extents.DIRTY)

    def expect_allocation(self, start: int, end: int) -> None:
        """Send the request of a later call of `allocation` with the same range."""
        self._expect(ALLOCATION, start, end)

    def expect_dirty(self, bitmap: str, start: int, end: int) -> None:
        """Send the request of a later call of `dirty` with the same range."""
        self._expect(DIRTY_BITMAP + bitmap, start, end)

    def offered_bitmaps(self) -> list[str]:
        """Return the names of the bitmaps that the server offers; empty if it lists none, or none was requested."""
        return [name.removeprefix(DIRTY_BITMAP) for name in self._offered or () if name.startswith(DIRTY_BITMAP)]

    @contextmanager
    def lanes(self, wanted: int) -> Iterator[list[Lane]]:
        """
        Open lanes: `wanted` if the server allows several connections (can_multi_conn) and accepts them, else one.

        Existing connections are used first, so that no server sees more connections than needed.
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
        """End the connections, with an orderly disconnect if that is still possible."""
        for handle in self._handles if self._dialled is None else ():
            shutdown(self._nbd, handle)
        self._handles.clear()
        self._by_context.clear()
        self._expected.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _withdraw(self) -> None:
        """Receive the answers to requests that were sent but not needed; a lane accepts only those to its own reads."""
        while self._expected:
            _, question = self._expected.popitem()
            self._answer(question)

    def _another(self, contexts: Sequence[str] | None) -> nbd.NBD | None:
        """
        Open one more connection, only for reads if `contexts` is None.

        Returns None if the server does not accept the connection; then no further connection is tried.
        `qemu-nbd --shared=2` allows several connections and lets the third one wait for ever; other servers close it.
        """
        if not self._takes_more:
            return None
        try:
            handle = connect(self._nbd, self._address, contexts, seconds=EXTRA_SECONDS, dialled=self._dialled)
        except SourceError:
            self._takes_more = False
            return None
        blocks = self._ask(lambda: blocks_of(self._nbd, handle))
        if blocks != self._blocks:
            raise SourceError(
                f"{self.uri} is not the same export on each connection: {self._blocks.size} bytes on the first one, "
                f"{blocks.size} on another",
                hint="was the disk resized, or the server restarted? run the command again",
            )
        return handle

    def _split_contexts(self) -> None:
        """
        Give each context a connection of its own, as far as the server accepts them.

        A server computes every negotiated context for every request, and a request for the bitmap alone must not make
        it read the image's allocation tables.
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
        return SourceError(f"{self.uri} {what}", hint=NO_PROTOCOL)

    def _expect(self, context: str, start: int, end: int) -> None:
        """Send a request whose answer will be needed later."""
        if start < end and context in self._by_context:
            self._expected[context, start, end] = self._asked(context, start, end)

    def _asked(self, context: str, start: int, end: int) -> Question:
        handle = self._by_context[context]
        answers: list[list[int]] = []
        if self._max_question is not None:
            end = min(end, start + self._max_question)
        start, end = self._blocks.around(start, end)

        def collect(name: str, _offset: int, entries: list[int], _error: object) -> int:
            if name != context:
                return 0
            # A second answer is an error already; later ones need not be kept.
            answers[:] = [*answers[:1], entries]
            return 0 if len(answers) == 1 else -1

        with signals.deferred():  # with another request in flight, an answer may arrive here
            cookie = self._ask(lambda: handle.aio_block_status(end - start, start, collect))
        return Question(handle, cookie, context, start, end, answers)

    def _answer(self, question: Question) -> list[int]:
        handle = question.handle
        asked = f"answered a block status request at {question.start}"
        wait = Wait(f"block status from {self.uri}")
        while len(question.answers) < 2 and not self._ask(lambda: handle.aio_command_completed(question.cookie)):
            self._ask(lambda: tick(handle))
            wait.look()
        if not question.answers:
            raise self._odd(f"{asked} without {question.context}")
        if len(question.answers) > 1:
            raise self._odd(f"{asked} with {question.context} more than once")
        return question.answers[0]


class _Read:
    """A read in flight: from `start` into `room`, of which `view` receives the part that begins at `offset`."""

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
        """Note a piece of the answer (an error has no bytes).  A callback of libnbd; -1 makes the read fail."""
        self._begun.add(self)
        if len(data) == self._length:  # nearly always; libnbd counts the bytes and finds any further piece
            self._whole = True
            return 0
        if self._pieces is None:
            self._pieces = Pieces(self._start, self._start + self._length)
        return 0 if self._pieces.add(start, len(data)) else -1

    def finish(self, *, in_pieces: bool) -> bool:
        """Copy the bytes to the view; False if not all of them arrived."""
        if in_pieces and not (self._whole or (self._pieces is not None and self._pieces.complete())):
            return False
        if self._room is not self._view:
            low = self._offset - self._start
            self._view[:] = self._room[low : low + len(self._view)]
        return True


class Lane:
    """One connection with reads in flight.  One thread at a time uses it, and nothing else does meanwhile."""

    def __init__(self, binding: Any, handle: nbd.NBD, uri: str, blocks: Blocks) -> None:
        self._nbd = binding
        self._handle: Any = handle
        self._uri = uri
        self._blocks = blocks
        # A simple reply has all bytes in one run.  Without pieces to watch, libnbd needs no callback for each.
        self._in_pieces: bool = handle.get_structured_replies_negotiated()
        self._reads: dict[int, _Read] = {}
        self._begun: set[_Read] = set()
        """Reads that have received a piece: only these can be finished (a failed read is noticed at the next poll)."""
        self._patience = Wait(f"data from {uri}")
        # A read that lacks bytes is an error, so that zeroing the buffer before each read would only cost time.
        handle.set_pread_initialize(False)

    @property
    def in_flight(self) -> int:
        """Number of reads that have no answer yet."""
        return len(self._reads)

    def submit(self, offset: int, view: memoryview, token: object) -> None:
        """
        Start to read len(view) bytes at `offset` into `view`; `wait` returns `token` when they have arrived.

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
        Wait until `enough` reads have finished or the time is over; return the tokens of all reads that have finished.

        Raises
        ------
        SourceError
            A read failed or lacks bytes, the connection broke, or nothing arrived within the timeout.
        """
        self._patience.resume()
        poll = self._handle.poll
        deadline = time.monotonic() + milliseconds / 1000
        try:
            done = self._finished()
            # Each call receives what the socket holds now, a small part of a read: the loop must be short.
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
        Take the reads that have an answer.

        Only `aio_command_completed` reports missing bytes: to a completion callback, libnbd reports success.
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
            hint="check the server's log and the storage below it; no point was made",
        )

    def close(self) -> None:
        """End the use of the connection, which the export closes."""
        self._handle = None
        self._reads.clear()
        self._begun.clear()
