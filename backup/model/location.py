"""Where a repository lies: in a folder, or in a bucket of an object store."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from backup.errors import UsageError
from backup.model.names import check_folder

SCHEME = "s3://"
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")
"""Names of buckets: AWS's are a part of what older servers (Ceph's `rgw_relaxed_s3_bucket_names`) permit."""
_PREFIX = re.compile(r"[A-Za-z0-9!_.*'()+=,@-]+(/[A-Za-z0-9!_.*'()+=,@-]+)*")
"""Characters that S3 calls safe, and some that need no quoting in a URL's path either."""
FIRST_IN_FOLDER = "backups are made to a folder; `copies:` and `pybackup copy` bring the points to other places"
"""Why a bucket cannot be the repository that backups are made to, and what to do instead."""
_FORM = "write s3://BUCKET or s3://BUCKET/PREFIX, of letters, digits and . _ -"


@dataclass(frozen=True, slots=True)
class Bucket:
    """
    A prefix in a bucket of a server that speaks S3.

    Attributes
    ----------
    prefix : str
        Without slashes at its ends; empty for the bucket itself.
    endpoint, region, profile : str or None
        The server's URL, its region, and the section of the AWS credentials file; None: as the environment says.
    """

    name: str
    prefix: str = ""
    endpoint: str | None = None
    region: str | None = None
    profile: str | None = None

    def __str__(self) -> str:
        return f"{SCHEME}{self.name}/{self.prefix}" if self.prefix else f"{SCHEME}{self.name}"


Location = Path | Bucket


def is_same(one: Location, other: Location) -> bool:
    """Tell whether two locations name the same place, however its server is reached; links are not followed."""
    if isinstance(one, Bucket) and isinstance(other, Bucket):
        return (one.name, one.prefix) == (other.name, other.prefix)
    return one == other


def parse(text: str) -> Location:
    """
    Return the location of a repository that a text names.

    Raises
    ------
    UsageError
        The text names neither a folder nor a bucket, or a bucket with a name or prefix that pybackup does not use.
    """
    if not text.startswith(SCHEME):
        return Path(check_folder(text))
    name, _, prefix = text.removeprefix(SCHEME).removesuffix("/").partition("/")
    if not _BUCKET.fullmatch(name):
        # The text may be a URL with a password in it.
        raise UsageError("the text after s3:// does not begin with the name of a bucket", hint=_FORM)
    if prefix and (not _PREFIX.fullmatch(prefix) or {".", ".."} & set(prefix.split("/"))):
        raise UsageError(f"{text!r} has a prefix with an empty part, or with characters that are not used", hint=_FORM)
    return Bucket(name, prefix)
