"""
Find the credentials, the server and the region of a bucket, where the AWS tools find them.

    credentials   the configured profile; else AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; else the profile AWS_PROFILE
                  or "default"
    server        the configuration; else AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL; else the profile; else AWS
    region        the configuration; else AWS_REGION or AWS_DEFAULT_REGION; else the profile; else us-east-1

A profile is a section of ~/.aws/credentials (AWS_SHARED_CREDENTIALS_FILE) and of ~/.aws/config (AWS_CONFIG_FILE).  The
profile "instance" is none of the files': the server of the instance that runs this program is asked for credentials.
"""

from __future__ import annotations

import configparser
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from backup.errors import UsageError
from backup.model.location import Bucket

INSTANCE = "instance"
"""The profile of which the credentials come from the instance's own server."""
_DEFAULT = "default"
_DEFAULT_REGION = "us-east-1"
_ELSEWHERE = ("credential_process", "role_arn", "sso_session", "sso_account_id", "web_identity_token_file")
"""Settings of a profile whose credentials must be fetched by a program or from a server."""


@dataclass(frozen=True, slots=True)
class Keys:
    """An access key; its secret parts are in no representation."""

    key_id: str
    secret: str = field(repr=False)
    token: str | None = field(repr=False, default=None)


@dataclass(frozen=True, slots=True)
class Access:
    """
    How to reach a bucket.

    Attributes
    ----------
    keys : Keys or None
        None: the instance's server gives them.
    endpoint : str or None
        The server's URL; None is AWS.
    authorities : str or None
        PEM certificates of authorities to trust besides the system's.
    """

    keys: Keys | None
    endpoint: str | None
    region: str
    authorities: str | None = None


def find(bucket: Bucket, environment: Mapping[str, str], home: Path) -> Access:
    """
    Return how to reach a bucket.

    Raises
    ------
    UsageError
        There are no credentials; a file of AWS's or of certificates cannot be read; the server's URL is none.
    """
    profile = _Profile.read(bucket.profile or environment.get("AWS_PROFILE") or _DEFAULT, environment, home)
    endpoint = (
        bucket.endpoint
        or environment.get("AWS_ENDPOINT_URL_S3")
        or environment.get("AWS_ENDPOINT_URL")
        or profile.settings.get("endpoint_url")
    )
    region = (
        bucket.region
        or environment.get("AWS_REGION")
        or environment.get("AWS_DEFAULT_REGION")
        or profile.settings.get("region")
        or _DEFAULT_REGION
    )
    return Access(_keys(bucket, profile, environment), _checked_endpoint(endpoint), region, _authorities(environment))


def _keys(bucket: Bucket, profile: _Profile, environment: Mapping[str, str]) -> Keys | None:
    if bucket.profile == INSTANCE:
        return None
    if bucket.profile is None:
        key_id, secret = environment.get("AWS_ACCESS_KEY_ID"), environment.get("AWS_SECRET_ACCESS_KEY")
        if key_id and secret:
            return Keys(key_id, secret, environment.get("AWS_SESSION_TOKEN") or None)
        if key_id or secret:
            there, missing = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")[:: 1 if key_id else -1]
            raise UsageError(f"{there} is set, and {missing} is not", hint="set both, or neither and use a profile")
    return profile.keys(bucket)


@dataclass(frozen=True, slots=True)
class _Profile:
    """The settings of a profile of both files; where both have a key, that of the credentials file counts."""

    name: str
    settings: Mapping[str, str] = field(repr=False)
    files: tuple[Path, Path]

    @classmethod
    def read(cls, name: str, environment: Mapping[str, str], home: Path) -> _Profile:
        credentials = Path(environment.get("AWS_SHARED_CREDENTIALS_FILE") or home / ".aws/credentials").expanduser()
        config = Path(environment.get("AWS_CONFIG_FILE") or home / ".aws/config").expanduser()
        settings = {**_section(config, _config_section(name)), **_section(credentials, name)}
        return cls(name, settings, (credentials, config))

    def keys(self, bucket: Bucket) -> Keys:
        key_id, secret = self.settings.get("aws_access_key_id"), self.settings.get("aws_secret_access_key")
        if key_id and secret:
            return Keys(key_id, secret, self.settings.get("aws_session_token") or None)
        elsewhere = next((name for name in _ELSEWHERE if name in self.settings), None)
        if elsewhere is not None:
            raise UsageError(
                f"profile {self.name} of {self.files[1]} has {elsewhere}, which pybackup does not follow",
                hint="give an access key: aws_access_key_id and aws_secret_access_key in the profile, or in the "
                "environment (`aws configure export-credentials --format env`)",
            )
        if bucket.profile is not None or self.name != _DEFAULT:
            raise UsageError(
                f"profile {self.name} has no aws_access_key_id and aws_secret_access_key in {self.files[0]}",
                hint="add them there, or name another profile",
            )
        raise UsageError(
            f"there are no credentials for {bucket}",
            hint=f"set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or write a profile into {self.files[0]}",
        )


def _config_section(name: str) -> str:
    return name if name == _DEFAULT else f"profile {name}"


def _section(path: Path, name: str) -> Mapping[str, str]:
    """Return a section of a file; nothing where either is missing.  Errors show no content, which may be a secret."""
    parser = configparser.RawConfigParser(strict=False, allow_no_value=True, default_section="")
    try:
        parser.read_string(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except PermissionError:
        raise UsageError(f"{path} cannot be read: permission denied", hint="run as the file's owner") from None
    except (OSError, UnicodeError, configparser.Error) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no file of sections with NAME = VALUE"
        raise UsageError(f"{path} cannot be read: {why}", hint="see the AWS tools' documentation of the file") from None
    if not parser.has_section(name):
        return {}
    return {key: value.strip() for key, value in parser.items(name) if value is not None}


def _checked_endpoint(endpoint: str | None) -> str | None:
    if endpoint is None:
        return None
    try:
        parts = urlsplit(endpoint)
        usable = parts.scheme in {"http", "https"} and parts.hostname and not parts.query and parts.port != 0
    except ValueError:
        usable = False
    if not usable or "@" in endpoint:  # a password in a URL would be shown in messages
        raise UsageError(
            "the endpoint of the object store is not the URL of a server",
            hint="write https://SERVER, or http://SERVER:PORT; no user or password in it",
        )
    return endpoint.rstrip("/")


def _authorities(environment: Mapping[str, str]) -> str | None:
    path = environment.get("AWS_CA_BUNDLE")
    if not path:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise UsageError(
            f"AWS_CA_BUNDLE names {path}, which cannot be read: {why}", hint="name a file of PEM certificates"
        ) from None
