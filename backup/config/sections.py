"""Read the keys of one section of the configuration; collect every problem with its line."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import yaml

from backup.config.settings import OnUnusableBitmap
from backup.errors import UsageError
from backup.model.compression import Compression
from backup.model.libvirt_uri import URI_HINT, uri_problem
from backup.model.location import FIRST_IN_FOLDER, SCHEME, Bucket, Location, parse
from backup.model.names import FOLDER_HINT, Kind, folder_problem, name_problem, without_password
from backup.planning.retention import Duration
from backup.units import parse_duration, parse_size, show_duration, show_size

HINT = "`pybackup check-config --example` shows every key with a comment; `pybackup check-config` checks again"
_NBD_SCHEMES = ("nbd", "nbds", "nbd+unix", "nbds+unix", "nbd+vsock", "nbds+vsock")  # NBD's doc/uri.md
_ENDPOINT = "the URL of a server, for example https://rgw.example:7480, without a password"
_PLAIN = {"int": "number", "float": "number", "bool": "truth value", "timestamp": "date"}


class Problems:
    """Collects the problems of a configuration file, to report all of them in one error."""

    def __init__(self) -> None:
        self._listed: list[tuple[int, str]] = []
        self.images: dict[str, str] = {}
        """The disk that names an image, by the image's real path."""

    def add(self, line: int, where: str, what: str) -> None:
        """Add a problem of a line; `where` is the key, empty for the file itself."""
        self._listed.append((line, f"line {line}: {where}: {what}" if where else f"line {line}: {what}"))

    def raise_any(self, path: Path) -> None:
        """
        Raise all problems as one error.

        Raises
        ------
        UsageError
            The file has a problem.
        """
        problems = [text for _, text in sorted(self._listed)]
        if len(problems) == 1:
            raise UsageError(f"{path}: {problems[0]}", hint=HINT)
        if problems:
            lines = [f"{path}: {len(problems)} problems", *(f"  {text}" for text in problems)]
            raise UsageError("\n".join(lines), hint=HINT, listed=True)


class Section:
    """
    One section of the file: a mapping from keys to values.

    Each method reads the value of a key.  If the key is absent or its value is wrong, the method returns `otherwise` or
    None, and adds a wrong value to the problems.
    """

    def __init__(self, node: yaml.Node, line: int, keys: tuple[str, ...], problems: Problems, folder: Path) -> None:
        self._line, self._keys, self._problems, self._folder = line, keys, problems, folder
        self.fields: dict[str, yaml.Node] = {}
        self._lines: dict[str, int] = {}
        if not isinstance(node, yaml.MappingNode):
            self.problem(None, f"expected keys and values, got {_describe(node)}")
            return
        for key, value in node.value:
            self._add(key, value)

    @classmethod
    def root(cls, node: yaml.Node | None, problems: Problems, folder: Path) -> Section:
        """Return the whole file's mapping; an empty file has no keys."""
        empty = yaml.MappingNode("tag:yaml.org,2002:map", [])
        return cls(empty if node is None else node, 1, (), problems, folder)

    @property
    def last(self) -> str:
        """The section's own key: the name of the machine or disk."""
        return self._keys[-1]

    def _add(self, key: yaml.Node, value: yaml.Node) -> None:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode) or _type(key) == "null":
            self._problems.add(line, ".".join(self._keys), f"expected a key, got {_describe(key)}")
        elif key.value in self.fields:
            self.problem(key.value, f"given twice, first on line {self._lines[key.value]}", line)
        else:
            self.fields[key.value] = value
            self._lines[key.value] = line

    def problem(self, key: str | None, what: str, line: int | None = None) -> None:
        """Add a problem of a key, or of the section itself (None).  `what` says what is wrong."""
        where = ".".join([*self._keys, *([] if key is None else [key])])
        self._problems.add(line or self._lines.get(key or "", self._line), where, what)

    def allow(self, *known: str) -> None:
        """Add a problem for each key that is not one of `known`."""
        for key in self.fields:
            if key not in known:
                close = difflib.get_close_matches(key, known, 1)
                meant = f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(known)}"
                self.problem(key, f"unknown key; {meant}")

    def children(self, kind: Kind, key: str) -> Iterator[Section]:
        """Yield the sections below a key that maps names (of machines or disks, by `kind`) to sections."""
        if key not in self.fields:
            return
        outer = Section(self.fields[key], self._lines[key], (*self._keys, key), self._problems, self._folder)
        if not outer.fields and isinstance(self.fields[key], yaml.MappingNode):
            self.problem(key, f"expected at least one {kind}")
        for name, node in outer.fields.items():
            if problem := name_problem(kind, name):
                outer.problem(name, f"not a {kind}'s name: {problem}")
            yield Section(node, outer._lines[name], (*outer._keys, name), self._problems, self._folder)

    def inner(self, key: str) -> Section | None:
        """The section of a key that holds keys and values."""
        if key not in self.fields:
            return None
        if not isinstance(self.fields[key], yaml.MappingNode):
            self.problem(key, f"expected keys and values, got {_describe(self.fields[key])}")
            return None
        return Section(self.fields[key], self._lines[key], (*self._keys, key), self._problems, self._folder)

    def duration(self, key: str) -> Duration | None:
        """A duration, for example 30d."""
        expected = "a duration, for example 30d, 12h, 2w, 6m or 1y"
        text = self._scalar(key, ("str",), expected)
        try:
            return None if text is None else Duration.parse(text)
        except UsageError:
            self.problem(key, f"expected {expected}, got {text!r}")
            return None

    def _scalar(self, key: str, types: tuple[str, ...], expected: str) -> str | None:
        """Return a scalar's text as the file has it, if its YAML type is one of these."""
        if key not in self.fields:
            return None
        node = self.fields[key]
        if isinstance(node, yaml.ScalarNode) and _type(node) in types and node.value and _is_utf8(node.value):
            return str(node.value)
        self.problem(key, f"expected {expected}, got {_describe(node)}")
        return None

    def text(self, key: str, expected: str) -> str | None:
        """Any text."""
        return self._scalar(key, ("str",), expected)

    def texts(self, key: str, expected: str) -> tuple[str, ...]:
        """A list of texts, or one text."""
        node = self.fields.get(key)
        if not isinstance(node, yaml.SequenceNode):
            text = self.text(key, f"{expected}, or a list of these")
            return () if text is None else (text,)
        entries = []
        for entry in node.value:
            if isinstance(entry, yaml.ScalarNode) and _type(entry) == "str" and entry.value and _is_utf8(entry.value):
                entries.append(str(entry.value))
            else:
                self.problem(key, f"expected {expected}, got {_describe(entry)}", entry.start_mark.line + 1)
        return tuple(entries)

    def freeze(self) -> Literal["no", "yes", "required"]:
        """The key `freeze`: a truth value, or `required`."""
        text = self._scalar("freeze", ("bool", "str"), "true, false or required")
        if text is None:
            return "no"
        if text == "required":
            return "required"
        known = yaml.SafeLoader.bool_values.get(text.lower())
        if known is None:
            self.problem("freeze", f"expected true, false or required, got {text!r}")
        return "yes" if known else "no"

    def unusable(self, otherwise: OnUnusableBitmap) -> OnUnusableBitmap:
        """The key `on_unusable_bitmap`."""
        match self._scalar("on_unusable_bitmap", ("str",), "rescan, full or fail"):
            case "rescan":
                return "rescan"
            case "full":
                return "full"
            case "fail":
                return "fail"
            case None:
                return otherwise
            case other:
                self.problem("on_unusable_bitmap", f"expected rescan, full or fail, got {other!r}")
                return otherwise

    def path(self, key: str) -> Path | None:
        """A path; a relative path starts from the file's folder."""
        text = self._scalar(key, ("str",), "a path")
        return None if text is None else self._folder / Path(text)

    def repository(self) -> Path | None:
        """The key `repository`, a folder."""
        text = self._scalar("repository", ("str",), "a path")
        if text is not None and text.startswith(SCHEME):
            self.problem("repository", f"{text!r} is a bucket: {FIRST_IN_FOLDER}")
            return None
        if text is not None and (problem := folder_problem(text)):
            self.problem("repository", f"{text!r} is not a folder: {problem} ({FOLDER_HINT})")
            return None
        return None if text is None else self._folder / Path(text)

    def location(self) -> Location | None:
        """The keys `to`, `endpoint`, `region` and `profile`: a folder, or a bucket and how it is reached."""
        text = self._scalar("to", ("str",), "a folder or s3://BUCKET/PREFIX")
        endpoint = self._endpoint()
        region = self.text("region", "a region's name")
        profile = self.text("profile", "the name of a section of ~/.aws/credentials")
        try:
            location = None if text is None else parse(text)
        except UsageError as error:
            self.problem("to", f"{error.message} ({error.hint})")
            return None
        if isinstance(location, Bucket):
            return replace(location, endpoint=endpoint, region=region, profile=profile)
        for key in ("endpoint", "region", "profile"):
            if location is not None and key in self.fields:
                self.problem(key, "only a bucket (s3://) has this key")
        return None if location is None else self._folder / location

    def _endpoint(self) -> str | None:
        text = self._scalar("endpoint", ("str",), _ENDPOINT)
        if text is None or re.fullmatch(r"https?://[^/?#@\s]+(/[^?#@\s]*)?", text):
            return text
        self.problem("endpoint", f"expected {_ENDPOINT}, got {without_password(text)!r}")
        return None

    def recipients(self) -> tuple[str, ...]:
        """The key `recipients`: public keys of age (age1...), and files that hold such keys, as absolute paths."""
        given = self.texts("recipients", "a key (age1...) or a file with keys")
        return tuple(text if text.startswith("age1") else str(self._folder / text) for text in given)

    def name(self, kind: Kind, key: str) -> str | None:
        """A name that follows the rules of `backup.model.names`."""
        text = self._scalar(key, ("str",), f"the name of a {kind}")
        if text is not None and (problem := name_problem(kind, text)):
            self.problem(key, f"not a {kind}'s name: {problem}")
            return None
        return text

    def compression(self, otherwise: Compression) -> Compression:
        """The key `compression`."""
        text = self._scalar("compression", ("str",), "none, zstd or zstd:LEVEL")
        try:
            return otherwise if text is None else Compression.parse(text)
        except UsageError as error:
            self.problem("compression", f"{error.message}: {error.hint}")
            return otherwise

    def size(self, key: str, otherwise: int, low: int, high: int) -> int:
        """A size in bytes between two bounds."""
        expected = f"a size from {show_size(low)} to {show_size(high)}"
        text = self._scalar(key, ("str", "int", "float"), expected)
        try:
            size = otherwise if text is None else parse_size(text)
        except UsageError:
            size = -1
        if low <= size <= high:
            return size
        self.problem(key, f"expected {expected}, got {text!r}")
        return otherwise

    def seconds(self, key: str, otherwise: float, low: float, high: float) -> float:
        """A time between two bounds, for example 30s, 5m (also 5min) or 1h; in seconds."""
        expected = f"a time from {show_duration(low)} to {show_duration(high)}, for example 30s, 5m or 1h"
        text = self._scalar(key, ("str",), expected)
        try:
            seconds = otherwise if text is None else parse_duration(re.sub(r"m$", "min", text))
        except UsageError:
            seconds = -1.0
        if low <= seconds <= high:
            return seconds
        self.problem(key, f"expected {expected}, got {text!r}")
        return otherwise

    def integer(self, key: str, low: int, high: int) -> int | None:
        """A whole number between two bounds, written in decimal."""
        expected = f"a whole number from {low} to {high}"
        text = self._scalar(key, ("int",), expected)
        if text is None:
            return None
        if re.fullmatch(r"0|[1-9][0-9]{0,9}", text, re.ASCII) and low <= int(text) <= high:
            return int(text)
        self.problem(key, f"expected {expected}, got {text!r}")
        return None

    def boolean(self, key: str, *, otherwise: bool) -> bool:
        """YAML's true or false; YAML reads yes, no, on and off as well."""
        text = self._scalar(key, ("bool",), "true or false")
        if text is not None and text.lower() not in yaml.SafeLoader.bool_values:  # tagged !!bool by hand
            self.problem(key, f"expected true or false, got {text!r}")
            return otherwise
        return otherwise if text is None else yaml.SafeLoader.bool_values[text.lower()]

    def image(self) -> Path | None:
        """An image's path, which only one disk of the file may name: two would remove each other's bitmaps."""
        path = self.path("image")
        if path is not None:
            mine = ".".join(self._keys)
            other = self._problems.images.setdefault(os.path.realpath(path), mine)
            if other != mine:
                self.problem("image", f"{path} is already the image of {other}")
        return path

    def nbd(self) -> str | None:
        """An NBD URI."""
        text = self._scalar("nbd", ("str",), "an NBD URI")
        if text is not None and text.partition(":")[0] not in _NBD_SCHEMES:
            shown = without_password(text)
            self.problem(
                "nbd",
                f"expected an NBD URI, for example nbd://HOST/EXPORT or nbd+unix:///EXPORT?socket=PATH, got {shown!r}",
            )
            return None
        return text

    def libvirt(self) -> str | None:
        """The URI of a local libvirt."""
        text = self._scalar("libvirt", ("str",), "a URI of libvirt")
        if text is not None and (problem := uri_problem(text)):
            self.problem("libvirt", f"{without_password(text)!r} cannot be used: {problem} ({URI_HINT})")
            return None
        return text

    def format(self) -> Literal["qcow2", "raw"] | None:
        """An image's format."""
        match self._scalar("format", ("str",), "qcow2 or raw"):
            case "qcow2":
                return "qcow2"
            case "raw":
                return "raw"
            case None:
                return None
            case other:
                self.problem("format", f"expected qcow2 or raw, got {other!r}")
                return None

    def bitmap_name(self) -> str | None:
        """The exact name of a bitmap on an NBD server; QEMU allows up to 1023 bytes of any text."""
        text = self._scalar("bitmap", ("str",), "a bitmap's name")
        if text is not None and len(text.encode()) > 1023:
            self.problem("bitmap", f"expected at most 1023 bytes, got {len(text.encode())}")
            return None
        return text


def _type(node: yaml.Node) -> str:
    """Return the short YAML type of a node: "str", "int", "bool", "null" and so on; any other tag unchanged."""
    return str(node.tag).removeprefix("tag:yaml.org,2002:")


def _describe(node: yaml.Node) -> str:
    """Describe a node, for "expected X, got Y"."""
    if isinstance(node, yaml.MappingNode):
        return "keys and values"
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    kind = _type(node)
    if kind == "null" or not node.value:
        return "nothing"
    shown = node.value if len(node.value) <= 60 else node.value[:60] + "..."
    if kind == "str":
        return f"the text {shown!r}"
    if kind in _PLAIN:
        return f"the {_PLAIN[kind]} {shown} (for text, put it in quotes)"
    return f"{shown!r} of type {kind}"


def _is_utf8(text: str) -> bool:
    """Whether the system accepts a text as a name: no NUL, no half of a surrogate pair (YAML can escape both)."""
    return "\0" not in text and not re.search("[\ud800-\udfff]", text)
