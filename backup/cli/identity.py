"""The identity that opens the files of a sealed repository."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from backup.age.keys import Identities

VARIABLE = "PYBACKUP_IDENTITY"


def identities(option: str | None, environment: Mapping[str, str] = os.environ) -> Identities | None:
    """
    Return the identities in the file of --identity, else in the file that $PYBACKUP_IDENTITY names, else None.

    A repository that is not sealed needs none, and a sealed one only for what is read there.

    Raises
    ------
    UsageError
        The file is missing, other users may read it, or it holds something else.
    """
    named = option if option is not None else environment.get(VARIABLE) or None
    if named is None:
        return None
    from backup.age.key_files import load_identities

    return load_identities(Path(named))
