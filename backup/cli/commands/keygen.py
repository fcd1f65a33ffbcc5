"""The command keygen."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from backup.cli import json_output, output
from backup.cli.context import options


def keygen(
    file: Annotated[str, typer.Argument(metavar="FILE", help="New file for the identity, of mode 0600.")],
) -> None:
    """
    Make a key pair for sealed second places.

    The identity, which opens sealed copies, goes to FILE.  The recipient, to which copies are sealed, goes to standard
    output.  Both are keys of age (https://age-encryption.org), as `age-keygen` makes them.
    """
    from backup.age import primitives
    from backup.age.key_files import create_identity

    primitives.require()
    document = KeygenDocument(Path(file), str(create_identity(Path(file))))
    if options.json:
        json_output.write(document)
    else:
        output.line(document.recipient)
    if not options.quiet:
        output.note(
            f"print {file} and keep it away from this host: nothing else opens what is sealed to this recipient",
            to_stderr=True,
        )


# JSON


@dataclass(frozen=True, slots=True)
class KeygenDocument:
    """A new key pair: the file of the identity, and the recipient."""

    identity: Path
    recipient: str
