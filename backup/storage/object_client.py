"""
The requests to a server that speaks S3, through obstore: all of them, and their errors in words.

Every request runs in one event loop in a thread of its own, so that a signal or a time limit can end any wait, and no
panic of the library's can end the program.  Names are relative to the bucket's prefix.  obstore repeats requests that
fail for a moment (a server error, 503, a lost connection); this module repeats reads whose answer broke off.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from backup.errors import Failed, NotFound
from backup.model.location import Bucket
from backup.runtime.timeouts import TimedOut, Wait, limit_within
from backup.storage.base import Unavailable
from backup.storage.credentials import Access

if TYPE_CHECKING:
    from obstore.store import S3Store

_T = TypeVar("_T")

_TICK = 0.1
_CONNECT_SECONDS = 10
_RETRIES = 6
_BACKOFF = {"init_backoff": timedelta(seconds=0.2), "max_backoff": timedelta(seconds=10), "base": 2}
_READ_ATTEMPTS = 4
"""How often a read is begun whose answer breaks off."""
_CONNECTIONS = "32"
"""Idle connections that are kept: as many as threads that read."""

LEAST_PART = 8 << 20
_MOST_PARTS = 9000
"""S3 permits 10,000 parts of an object."""
_PARTS_AT_ONCE = 4


@dataclass(frozen=True, slots=True)
class Found:
    """An object: its size in bytes, its e_tag, and when it was written, by the server's clock."""

    size: int
    tag: str
    modified: datetime


@dataclass(frozen=True, slots=True)
class Folder:
    """The objects of a folder by name, and the names of the folders in it."""

    objects: Mapping[str, Found]
    folders: tuple[str, ...]


NOTHING = Folder(MappingProxyType({}), ())


class Replaced(Unavailable):
    """The object that was opened is no longer there under its name, or another one is."""

    def __init__(self, path: str) -> None:
        super().__init__(
            errno.ESTALE,
            "it was replaced or removed while it was read",
            path,
            hint="run the command again; a prune of the second place was at work",
        )


class Client:
    """
    The requests to one prefix of one bucket.  Safe to use from several threads.

    Raises
    ------
    Failed
        obstore is not installed, or cannot work with these settings.
    """

    def __init__(self, bucket: Bucket, access: Access) -> None:
        self.location = str(bucket)
        self._bucket = bucket
        self._server = access.endpoint or f"AWS, region {access.region}"
        self._store = _store(bucket, access)
        self._answered = False  # True once a request was successful, so that the bucket exists

    def path(self, name: str) -> str:
        """Return an object's URL, for messages."""
        return f"{self.location}/{name}" if name else self.location

    def list(self, folder: str = "") -> Folder:
        """List a folder: one request for each thousand names."""
        from obstore import list_with_delimiter_async  # noqa: PLC0415 - an extra

        listed: Any = self.ask(folder, lambda: list_with_delimiter_async(self._store, folder or None))
        start = len(folder) + 1 if folder else 0
        return Folder(
            {meta["path"][start:]: _found(meta) for meta in listed["objects"]},
            tuple(path[start:] for path in listed["common_prefixes"]),
        )

    def head(self, name: str) -> Found:
        """Return what is known of an object; raise FileNotFoundError if it does not exist."""
        from obstore import head_async  # noqa: PLC0415

        try:
            return _found(self.ask(name, lambda: head_async(self._store, name)))
        except FileNotFoundError:
            if not self._answered:
                self.list(name)  # the answer to HEAD has no body that tells whether the bucket exists
            raise
        except PermissionError:
            self.list(name)  # nor one that tells why the key is refused
            raise

    def get(self, name: str, limit: int) -> bytes:
        """Return an object's content, at most `limit` + 1 bytes."""
        from obstore import get_async  # noqa: PLC0415

        async def get() -> bytes:
            result = await get_async(self._store, name)
            if result.meta["size"] <= limit + 1:
                return bytes(await result.bytes_async())
            part = await get_async(self._store, name, options={"range": (0, limit + 1)})
            return bytes(await part.bytes_async())

        return self._read(name, get)

    def get_range(self, name: str, start: int, length: int, tag: str) -> memoryview:
        """
        Return bytes of the object with this e_tag.

        Raises
        ------
        Replaced
            There is another object by now, or none.
        """
        from obstore import get_async  # noqa: PLC0415

        async def get() -> memoryview:
            options: Any = {"range": (start, start + length)}
            if tag:
                options["if_match"] = tag
            result = await get_async(self._store, name, options=options)
            content = memoryview(await result.bytes_async())
            if len(content) != length:
                raise _Broken
            return content

        try:
            return self._read(name, get)
        except FileNotFoundError:
            raise Replaced(self.path(name)) from None

    def put(self, name: str, content: bytes, seconds: float | None = None) -> None:
        """Write a small object, in place of another one; give up after `seconds` or the usual limit."""
        from obstore import put_async  # noqa: PLC0415

        self.ask(name, lambda: put_async(self._store, name, content, use_multipart=False), seconds)

    def delete(self, name: str, seconds: float | None = None) -> None:
        """Remove an object, if it exists; give up after `seconds` or the usual limit."""
        from obstore import delete_async  # noqa: PLC0415

        self.ask(name, lambda: delete_async(self._store, name), seconds)

    def copy(self, name: str, to: str) -> None:
        """Copy an object within the server, in place of another one."""
        from obstore import copy_async  # noqa: PLC0415

        self.ask(name, lambda: copy_async(self._store, name, to))

    def upload(self, name: str, size: int) -> Upload:
        """Begin to write a large object of about `size` bytes."""
        return Upload(self, name, size)

    # Shared by the methods above

    def open_writer(self, name: str, part: int) -> Any:
        """Return obstore's writer of an object; called within the event loop."""
        from obstore import open_writer_async  # noqa: PLC0415

        return open_writer_async(self._store, name, buffer_size=part, max_concurrency=_PARTS_AT_ONCE)

    def _read(self, name: str, make: Callable[[], Awaitable[_T]]) -> _T:
        for attempt in range(1, _READ_ATTEMPTS + 1):
            try:
                return self.ask(name, make)
            except _BrokenOff:
                if attempt == _READ_ATTEMPTS:
                    raise
                time.sleep(0.2 * 2**attempt)
        raise AssertionError

    def ask(self, name: str, make: Callable[[], Awaitable[_T]], seconds: float | None = None) -> _T:
        """
        Run one request in the event loop, and wait for its answer.

        Raises
        ------
        OSError
            FileNotFoundError; PermissionError; Unavailable for whatever else prevents the request.
        NotFound
            The bucket does not exist.
        """
        path = self.path(name)
        try:
            answer = _finished(make, Wait(f"{path} at {self._server}", seconds))
        except TimedOut as error:
            raise Unavailable(
                errno.ETIMEDOUT,
                f"no answer from {self._server} ({error.message.partition(':')[0]})",
                path,
                hint="is the server full, or the line slow? `timeout` in the configuration sets the limit",
            ) from None
        except (OSError, NotFound) as error:
            if type(error) is FileNotFoundError:
                raise self._explained(error, path) from None
            raise
        except _Broken:
            raise _BrokenOff(path) from None
        except BaseException as error:
            if not _of_obstore(error):
                raise
            raise self._explained(error, path) from None
        self._answered = True
        return answer

    def _explained(self, error: BaseException, path: str) -> Exception:
        return explained(str(error), path, self._bucket.name, self._server, type(error).__name__)


class Upload:
    """
    A large object that is written in order.  It appears whole when it is finished, or never.

    The parts are as large as the size demands, and some are sent at once.  A small object is one request.
    """

    def __init__(self, client: Client, name: str, size: int) -> None:
        self._client = client
        self._name = name
        part = max(LEAST_PART, -(-size // _MOST_PARTS))

        async def begin() -> Any:
            return client.open_writer(name, part)

        self._writer: Any = client.ask(name, begin)
        self._failed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append bytes; memory that may change is copied, since obstore keeps what it is given until it is sent."""
        content = data if isinstance(data, bytes) else bytes(data)
        self._step(lambda: self._writer.write(content))

    def finish(self) -> None:
        """Complete the object."""
        self._step(self._writer.close)
        self._writer = None

    def _step(self, make: Callable[[], Awaitable[Any]]) -> None:
        if self._writer is None or self._failed:
            raise Unavailable(errno.EIO, "the upload has failed before", self._client.path(self._name), hint=_AGAIN)
        try:
            self._client.ask(self._name, make)
        except FileNotFoundError:
            self._failed = True
            raise Unavailable(
                errno.EIO, "the server has no such upload any more", self._client.path(self._name), hint=_AGAIN
            ) from None
        except BaseException:
            self._failed = True
            raise

    def abort(self) -> None:
        """Stop an upload that is not finished; the server forgets its parts."""
        writer, self._writer = self._writer, None
        if writer is not None:
            stopped = OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))
            self._client.ask(self._name, lambda: writer.__aexit__(OSError, stopped, None), _ABORT_SECONDS)


_ABORT_SECONDS = 20.0
_AGAIN = "run the command again; what was published before is untouched"


class _Broken(Exception):
    """The answer has fewer bytes than it says."""


class _BrokenOff(Unavailable):
    """The answer to a read broke off."""

    def __init__(self, path: str) -> None:
        super().__init__(errno.EIO, "the server's answer broke off", path, hint=_LINE)


_LINE = "check the line to the server, and proxies on the way; then run the command again"


def _found(meta: Any) -> Found:
    return Found(meta["size"], meta["e_tag"] or "", meta["last_modified"])


# The library, and its loop


def _store(bucket: Bucket, access: Access) -> S3Store:
    try:
        from obstore.store import S3Store  # noqa: PLC0415
    except ImportError:
        raise Failed(
            f"{bucket} needs the library obstore, which is not installed",
            hint="install it beside pybackup: `pipx inject pybackup 'obstore>=0.12.1'`; README has both extras",
        ) from None
    config: dict[str, Any] = {"region": access.region}
    if access.endpoint is not None:
        config["endpoint"] = access.endpoint
    client: dict[str, Any] = {
        "allow_http": (access.endpoint or "").startswith("http://"),
        "connect_timeout": timedelta(seconds=_CONNECT_SECONDS),
        # Two tries of a request fit into the limit.  Small enough for a lost connection, long enough for a slow line.
        "timeout": timedelta(seconds=max(1.0, limit_within() / 2)),
        "pool_max_idle_per_host": _CONNECTIONS,
    }
    if access.authorities is not None:
        client["root_certificate"] = access.authorities
    retry: Any = {"max_retries": _RETRIES, "backoff": _BACKOFF, "retry_timeout": timedelta(seconds=limit_within())}
    keys = access.keys
    # A provider, since obstore would add what the environment says to a key: another session's token, for example.
    provider: Any = None
    if keys is not None:
        credential = {
            "access_key_id": keys.key_id,
            "secret_access_key": keys.secret,
            "token": keys.token,
            "expires_at": None,
        }

        def provider() -> Any:
            return credential

    options: Any = {"client_options": client, "retry_config": retry, "credential_provider": provider}
    try:
        return S3Store(bucket.name, prefix=bucket.prefix or None, config=config, **options)  # type: ignore[arg-type]
    except Exception as error:  # noqa: BLE001 - obstore's errors and ValueError, about settings
        raise Failed(
            f"{bucket} cannot be opened: {_first_line(str(error))}", hint="check endpoint, region and certificates"
        ) from None


class _Loop:
    """The event loop of the process, and its lock."""

    lock = threading.Lock()
    running: asyncio.AbstractEventLoop | None = None


def _loop() -> asyncio.AbstractEventLoop:
    with _Loop.lock:
        if _Loop.running is None:
            loop = asyncio.new_event_loop()
            threading.Thread(target=loop.run_forever, name="requests", daemon=True).start()
            _Loop.running = loop
        return _Loop.running


def _finished(make: Callable[[], Awaitable[_T]], wait: Wait) -> _T:
    async def call() -> _T:
        return await make()

    future = asyncio.run_coroutine_threadsafe(call(), _loop())
    try:
        while True:
            try:
                return future.result(_TICK)
            except TimeoutError:
                if future.done():
                    raise
                wait.look()
    finally:
        future.cancel()


# Errors in words


def _of_obstore(error: BaseException) -> bool:
    return type(error).__module__.startswith(("obstore", "pyo3")) or isinstance(error, (TimeoutError, ValueError))


_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>([A-Za-z0-9.]{1,64})</Code>")
_CAUSES = (
    ("redirect without LOCATION", errno.EPROTO, "the bucket is at another server or in another region"),
    ("ConnectionRefused", errno.ECONNREFUSED, "the connection is refused"),
    ("Connection refused", errno.ECONNREFUSED, "the connection is refused"),
    ("dns error", errno.EHOSTUNREACH, "the server's name is unknown"),
    ("failed to lookup address", errno.EHOSTUNREACH, "the server's name is unknown"),
    ("certificate", errno.EPROTO, "the server's certificate is not trusted"),
    ("InvalidContentType", errno.EPROTO, "the server does not speak TLS (http:// and not https://?)"),
    ("CorruptMessage", errno.EPROTO, "the server does not speak TLS (http:// and not https://?)"),
    ("Unreachable", errno.EHOSTUNREACH, "there is no route to the server"),
    ("TimedOut", errno.ETIMEDOUT, "the server does not answer"),
    ("timed out", errno.ETIMEDOUT, "the server does not answer"),
    ("ConnectionReset", errno.ECONNRESET, "the connection was lost"),
    ("IncompleteMessage", errno.ECONNRESET, "the connection was lost"),
    ("BrokenPipe", errno.ECONNRESET, "the connection was lost"),
)
"""Words in an error of the HTTP library, and what they mean."""
_BODY = ("response body", "error reading a body", "decoding response", "end of file before message length")
_DENIED = {"PermissionDeniedError", "UnauthenticatedError"}
_BAD_KEY = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken", "TokenRefreshRequired"}
_FULL = {"QuotaExceeded", "EntityTooLarge", "XMinioStorageFull", "InsufficientCapacity"}
_SLOW = {"SlowDown", "ServiceUnavailable", "TooManyRequests", "RequestLimitExceeded", "Throttling"}


def explained(text: str, path: str, bucket: str, server: str, kind: str) -> Exception:
    """
    Return the error for what obstore says, whose `text` has many lines: the status, S3's code, the causes.  Pure.

    Parameters
    ----------
    kind : str
        The name of obstore's class of the error.
    """
    match, status = _CODE.search(text), _STATUS.search(text)
    code, number = match[1] if match else "", int(status[1]) if status else 0
    if code == "NoSuchBucket":
        return NotFound(f"there is no bucket {bucket} at {server}", hint="make the bucket, or name another one")
    if kind == "PreconditionError" or number == 412:
        return Replaced(path)
    if kind == "FileNotFoundError" or code in {"NoSuchKey", "NoSuchUpload"}:
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    if number or kind in _DENIED:
        return _answered(code, number, path, server, denied=number in {401, 403} or kind in _DENIED)
    if any(words in text for words in _BODY):
        return _BrokenOff(path)
    for words, reason, cause in _CAUSES:
        if words in text:
            return Unavailable(reason, f"{server}: {cause}", path, hint=_LATER)
    return Unavailable(errno.EREMOTEIO, f"{server}: {_first_line(text)}", path, hint=_SERVER)


def _answered(code: str, number: int, path: str, server: str, *, denied: bool) -> Unavailable:
    """Return the error for a server's answer: its status and S3's code."""
    shown = f"{number or ''} {code}".strip() or "AccessDenied"
    if code == "RequestTimeTooSkewed":
        words, hint = "this host's clock and the server's differ too much", "set the clock of this host"
        return Unavailable(errno.EACCES, words, path, hint=hint)
    if code in _FULL or number == 507:
        words = f"the store is full, or a quota is used up ({shown})"
        return Unavailable(errno.ENOSPC, words, path, hint=_SPACE)
    if code in _BAD_KEY:
        return Unavailable(errno.EACCES, f"{server} refuses the access key ({shown})", path, hint=_KEY)
    if denied:
        return Refused(errno.EACCES, f"the access key has no permission for this ({shown})", path)
    if code in _SLOW or number in {429, 503}:
        words = f"{server} asks to slow down, also after {_RETRIES} tries ({shown})"
        return Unavailable(errno.EBUSY, words, path, hint=_LATER)
    if number in {301, 307, 308}:
        words = f"the bucket is at another server or in another region ({shown})"
        return Unavailable(errno.EPROTO, words, path, hint=_SERVER)
    return Unavailable(errno.EREMOTEIO, f"{server} answers with an error ({shown})", path, hint=_LATER)


class Refused(Unavailable, PermissionError):
    """The access key may not do this."""

    def __init__(self, number: int, text: str, path: str) -> None:
        super().__init__(number, text, path, hint="see docs/object-storage.md for what a key must be permitted to do")


_SPACE = "add space there; what was published before is untouched"
_KEY = "check the access key and its secret, in the environment or in the profile"
_LATER = "run the command again when the server can be reached; what was published before is untouched"
_SERVER = "check endpoint and region: is this a server that speaks S3?"


def _first_line(text: str) -> str:
    """Return the first line of an error without the URL in it."""
    line = text.strip().partition("\n")[0]
    return re.sub(r"https?://\S+", "...", line)[:200] or "no reason is given"
