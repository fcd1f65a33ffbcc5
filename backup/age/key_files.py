"""Files of keys, as the program `age-keygen` writes them: identities, for their owner only, and recipients."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from backup.age import keys
from backup.age.keys import Identities, Identity, Recipient
from backup.errors import Failed, UsageError, os_errors_as

_MOST_BYTES = 64 << 10
_KEYGEN = "name the file that `pybackup keygen` or `age-keygen` wrote"


def load_identities(path: Path) -> Identities:
    """
    Read a file of identities; nothing of its content is ever shown.

    Raises
    ------
    UsageError
        The file is missing, other users may read it, or it holds something else.
    """
    what = f"the identity file {path}"
    with os_errors_as(f"{what} cannot be read", hint=_KEYGEN, kind=UsageError):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY)
        with open(fd, "rb") as file:
            mode = os.fstat(fd).st_mode
            if stat.S_ISREG(mode) and mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise UsageError(
                    f"{what} has mode {stat.S_IMODE(mode):04o}: others than its owner may use it",
                    hint=f"chmod 600 {path}",
                )
            content = file.read(_MOST_BYTES + 1)
    return keys.identities_in(_text(content, what), what)


def load_recipients(path: Path) -> tuple[Recipient, ...]:
    """
    Read a file of recipients.

    Raises
    ------
    UsageError
        The file is missing, or holds something else.
    """
    cannot_read = os_errors_as(f"the file of recipients {path} cannot be read", hint=_RECIPIENTS, kind=UsageError)
    with cannot_read, open(path, "rb") as file:
        content = file.read(_MOST_BYTES + 1)
    return keys.recipients_in(_text(content, str(path)), str(path))


_RECIPIENTS = "name a recipient (age1...) as `pybackup keygen` printed it, or a file with one on each line"


def recipients(texts: Iterable[str]) -> tuple[Recipient, ...]:
    """
    Return the recipients that texts name, each once; a text is a recipient, or the name of a file of recipients.

    Raises
    ------
    UsageError
        A text is neither.
    """
    found: dict[Recipient, None] = {}
    for text in texts:
        named = load_recipients(Path(text)) if keys.is_file_name(text) else (keys.recipient(text),)
        found |= dict.fromkeys(named)
    return tuple(found)


def create_identity(path: Path) -> Recipient:
    """
    Write a new identity to a new file of mode 0600, durable, and return its recipient.

    Raises
    ------
    UsageError
        The file exists.
    Failed
        The file cannot be written, or the package `cryptography` is missing.
    """
    made = Identity.new()
    recipient = made.recipient
    created = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    content = f"# created: {created}\n# public key: {recipient}\n{made.secret()}\n"
    with os_errors_as(f"{path} cannot be written", hint="check the folder, its permissions and its space", kind=Failed):
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            raise UsageError(
                f"{path} exists already; nothing was changed",
                hint="name a new file: an identity that is overwritten opens no copies any more",
            ) from None
        try:
            with open(fd, "w", encoding="ascii") as file:
                os.fchmod(fd, 0o600)
                file.write(content)
                file.flush()
                os.fsync(fd)
            _sync_folder(path)
        except BaseException:
            path.unlink()
            raise
    return recipient


def _sync_folder(path: Path) -> None:
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _text(content: bytes, what: str) -> str:
    if len(content) > _MOST_BYTES:
        raise UsageError(f"{what} has more than {_MOST_BYTES} bytes, and is no file of keys", hint=_KEYGEN)
    return content.decode("utf-8", "replace")
