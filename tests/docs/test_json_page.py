"""docs/json.md has the fields that the commands print, no more and no fewer, each with its types."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fake_guestfish import FISH, path_with
from forge import add_machine_files
from lab import PYBACKUP, Night, bitmaps, call_pybackup, make_image, put_in_front, run, run_pybackup, write
from live import Machine, Nights

PAGE = Path(__file__).parents[2] / "docs" / "json.md"

UNSEEN = {
    ("init", "file_system", "null"): "only of a bucket (tests/stories/test_second_places.py)",
    ("init", "free_bytes", "null"): "only of a bucket (tests/stories/test_second_places.py)",
    ("show", "disks[].replaces", "object"): "only in the instant in which prune exchanges a file (tests of exchange)",
    ("restore", "defined", "string"): "only with a libvirt (tests/libvirt_daemon/test_domain_definition.py)",
}
"""Types that no run of this test shows, and why."""


class Section:
    """A table of the page: the types of each field, by its path."""

    def __init__(self, title: str, text: str) -> None:
        self.title = title
        rows = re.findall(r"^\| `([^`]+)` \| ([^|]+) \| [^|]+ \|$", text, re.MULTILINE)
        self.rows = {path: set(re.split(r",? or ", types.strip())) for path, types in rows}
        assert len(self.rows) == len(rows) > 0, f"{title} has no table, or names a field twice"
        self.examples = [
            json.loads(code) for code in re.findall(r"^```json\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
        ]
        self.seen: defaultdict[str, set[str]] = defaultdict(set)

    def children(self, path: str) -> set[str]:
        """Names of the documented fields of the object at a path."""
        prefix = f"{path}." if path else ""
        return {
            re.split(r"[.\[]", row[len(prefix) :])[0] for row in self.rows if row.startswith(prefix) and row != prefix
        }

    def check(self, value: Any, errors: Section, path: str = "") -> None:
        """Hold a value against the table."""
        types = self.rows.get(path)
        if types is not None and "error" in types and isinstance(value, dict):
            self.seen[path].add("error")
            errors.check(value, errors)
            return
        found = kind(value, types or set())
        if types is None:
            assert found in {"list", "object"}, f"{self.title}: {path} is not in the table: {value!r}"
        else:
            assert found in types, f"{self.title}: {path} is {found}, not {types}: {value!r}"
            self.seen[path].add(found)
        if found == "list":
            for element in value:
                self.check(element, errors, f"{path}[]")
        elif found == "object":
            self._check_object(value, errors, path)

    def _check_object(self, value: dict[str, Any], errors: Section, path: str) -> None:
        prefix = f"{path}." if path else ""
        documented = self.children(path)
        if documented == {"*"}:
            for element in value.values():
                self.check(element, errors, f"{prefix}*")
            return
        if not documented:
            return  # the page refers to another one
        optional = {name for name in documented if "absent" in self.rows.get(f"{prefix}{name}", ())}
        for name in optional - set(value):
            self.seen[f"{prefix}{name}"].add("absent")
        assert documented - optional <= set(value) <= documented, f"{self.title}: {path} has {sorted(value)}"
        for name, element in value.items():
            self.check(element, errors, f"{prefix}{name}")


def kind(value: Any, types: set[str]) -> str:
    """The page's word for a value's type."""
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int():
            return "number" if "number" in types else "integer"
        case float():
            return "number"
        case str():
            return "string"
        case list():
            strings = "list of strings" in types and all(isinstance(element, str) for element in value)
            return "list of strings" if strings else "list"
    return "object"


def sections() -> dict[str, Section]:
    found = re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    return {title: Section(title, text) for title, text in found}


# What the commands print

Documents = Callable[[Path], Iterator[Any]]


def printed(*arguments: str | Path) -> Any:
    return call_pybackup([*arguments, "--json"]).document


def of_init(tmp_path: Path) -> Iterator[Any]:
    yield printed("init", tmp_path / "repo")
    yield printed("init", tmp_path / "other", "--copy-of", tmp_path / "repo")
    yield printed("init", tmp_path / "repo")  # fails


def of_keygen(tmp_path: Path) -> Iterator[Any]:
    yield printed("keygen", tmp_path / "key.txt")
    yield printed("keygen", tmp_path / "key.txt")  # fails


def of_backups(tmp_path: Path) -> Iterator[Any]:
    night = Night.of(tmp_path)
    yield night.full().document
    yield night.incremental("--dry-run").document
    lose_bitmap(night.image)
    yield night.incremental("--no-fallback").document
    yield night.incremental().document
    yield night.backup("rescan", "--bitmap", "b1").document
    (tmp_path / "copies").mkdir()
    yield from of_copies_after_backups(tmp_path / "copies")


def of_copies_after_backups(tmp_path: Path) -> Iterator[Any]:
    night = Night.with_incremental(tmp_path)
    (tmp_path / "c.yaml").write_text(
        "repository: repo\nbitmap: b1\nmachines: {disk: {disks: {disk: {image: disk.qcow2}}}}\n"
        "copies: {usb: {to: usb, after_backup: true}, gone: {to: gone, after_backup: true}}\n"
    )
    config = ("--config", tmp_path / "c.yaml")
    printed("init", "--copy-of", night.repository, "usb", *config)
    yield printed("incremental", *config)


def of_audit(tmp_path: Path) -> Iterator[Any]:
    night = Night.of(tmp_path)
    night.full()
    yield night.backup("audit", "--bitmap", "b1").document
    yield night.backup("audit", "--bitmap", "b1", "--machine", "not").document
    write(night.image, "write -P 7 0 64k")
    lose_bitmap(night.image)
    yield night.backup("audit", "--bitmap", "b1").document
    (tmp_path / "c.yaml").write_text(
        "machines: {disk: {bitmap: b1, disks: {disk: {image: disk.qcow2, format: qcow2}}}}"
    )
    yield printed("audit", "--repo", night.repository, "--config", tmp_path / "c.yaml")


def of_map(tmp_path: Path, *options: str) -> Iterator[Any]:
    night = Night.of(tmp_path)
    run("qemu-img", "bitmap", "--add", night.image, "b")
    yield printed("map", "--image", night.image, *options)
    yield printed("map", "--image", night.image, "--bitmap", "b", *options)


def of_totals(tmp_path: Path) -> Iterator[Any]:
    yield from of_map(tmp_path, "--totals")


def of_list(tmp_path: Path) -> Iterator[Any]:
    night = Night.with_incremental(tmp_path)
    yield printed("list", "--repo", night.repository)
    yield printed("list", "--repo", sealed_copy(night, tmp_path))


def sealed_copy(night: Night, folder: Path) -> Path:
    recipient = printed("keygen", folder / "key")["recipient"]
    printed("init", folder / "sealed", "--copy-of", night.repository, "--recipient", recipient)
    printed("copy", folder / "sealed", "--repo", night.repository)
    return folder / "sealed"


def of_show(tmp_path: Path) -> Iterator[Any]:
    night = Night.with_incremental(tmp_path)
    repo = ("--repo", night.repository)
    for point in printed("list", *repo):
        add_machine_files(Path(point["manifest"]), definition=b"<domain/>")
        yield printed("show", point["point"], *repo)
    below = make_image(tmp_path / "below.qcow2", "1M")
    above = make_image(tmp_path / "above.qcow2", "1M", "-b", str(below), "-F", "qcow2")
    raw = make_image(tmp_path / "raw.raw", "1M", image_format="raw")
    for image in (above, raw):
        bitmap = ["--bitmap", "b1"] if image == raw else []
        call_pybackup(["full", "--image", image, *repo, *bitmap, *(["--image-format", "raw"] if image == raw else [])])
        yield printed("show", image.stem, *repo)
    front = put_in_front(tmp_path / "front.qcow2", raw, 1 << 20)
    call_pybackup(["full", "--image", front, "--trust-data-file", *repo])
    yield printed("show", "front", *repo)
    with exported(below) as uri:
        call_pybackup(["full", "--nbd", uri, "--machine", "served", *repo])
        yield printed("show", "served", *repo)
    oldest = printed("list", "disk", *repo)[0]
    Path(oldest["manifest"]).unlink()
    yield printed("show", "disk", *repo)


def of_restore(tmp_path: Path) -> Iterator[Any]:
    night = Night.of(tmp_path)
    night.full()
    yield printed("restore", "disk", tmp_path / "a.raw", "--repo", night.repository)
    yield printed("restore", "disk", tmp_path / "b.raw", "--format", "qcow2", "--repo", night.repository)
    [manifest] = (night.repository / "disk").glob("*.json")
    add_machine_files(manifest, definition=b"<domain><name>disk</name></domain>", nvram=b"variables")
    yield printed("restore", "disk", f"{tmp_path}/back/", "--repo", night.repository)
    damage(night)
    yield printed("restore", "disk", tmp_path / "c.raw", "--salvage", "--repo", night.repository)
    yield printed("restore", "disk", tmp_path / "d.raw", "--repo", night.repository)


def of_verify(tmp_path: Path) -> Iterator[Any]:
    night = Night.with_incremental(tmp_path)
    repo = ("--repo", night.repository)
    yield printed("verify", *repo)
    yield printed("verify", "--sample", "50%", *repo)
    damage(night)
    yield printed("verify", *repo)
    [*_, newest] = sorted((night.repository / "disk").glob("*.qcow2"))
    newest.unlink()
    yield printed("verify", *repo)
    for manifest in (night.repository / "disk").glob("*.json"):
        manifest.write_text("{}")
    yield printed("verify", *repo)


def of_copy(tmp_path: Path) -> Iterator[Any]:
    night = Night.with_incremental(tmp_path)
    repo = ("--repo", night.repository)
    yield printed("copy", "disk", tmp_path / "other", "--dry-run", *repo)
    yield printed("copy", "disk", tmp_path / "other", *repo)
    shutil.rmtree(tmp_path / "other" / "disk")
    damage(night)
    yield printed("copy", "disk", tmp_path / "other", *repo)
    (night.repository / "disk" / f"{night.newest['point']}.json").write_text("{}")
    yield printed("copy", "disk", tmp_path / "other", *repo)


def of_copies(tmp_path: Path) -> Iterator[Any]:
    night = Night.with_incremental(tmp_path)
    night.backup("full", "--machine", "b")
    repo = ("--repo", night.repository)
    yield printed("copy", tmp_path / "none", *repo)
    printed("init", tmp_path / "other", "--copy-of", night.repository)
    yield printed("copy", tmp_path / "other", *repo)
    yield printed("copy", tmp_path / "other", *repo)


def of_serve(tmp_path: Path) -> Iterator[Any]:
    night = Night.of(tmp_path)
    night.full()
    command = [PYBACKUP, "serve", "disk", "--repo", night.repository, "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines: list[str] = []
        while lines[-1:] != ["}\n"]:
            lines.append(process.stdout.readline())
            assert lines[-1]
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    yield json.loads("".join(lines))
    yield printed("serve", "disk", "--disk", "not", "--repo", night.repository)


def of_files(tmp_path: Path) -> Iterator[Any]:
    night, tree, guest = guest_files(tmp_path)
    (tree / "link").symlink_to("/etc")
    yield run_pybackup(["files", "disk", tree, "--json", "--repo", night.repository], env=guest).document


def of_get(tmp_path: Path) -> Iterator[Any]:
    night, tree, guest = guest_files(tmp_path)
    os.mkfifo(tree / "pipe")
    yield run_pybackup(
        ["get", "disk", tree, tmp_path / "got", "--json", "--repo", night.repository], env=guest
    ).document


def of_status(tmp_path: Path) -> Iterator[Any]:
    night = Night.with_incremental(tmp_path)
    (tmp_path / "c.yaml").write_text(
        "repository: repo\nmachines: {disk: {disks: {disk: {image: a}, more: {image: b}}}}"
    )
    configured = ("status", "--config", tmp_path / "c.yaml")
    yield printed(*configured)
    call_pybackup(["verify", "--repo", night.repository])
    yield printed(*configured, "--max-age", "26h")
    damage(night)
    call_pybackup(["verify", "--repo", night.repository])
    yield printed(*configured)
    (night.repository / "disk" / f"{night.newest['point']}.json").write_text("{}")
    yield printed(*configured)
    next((night.repository / "disk").glob("*.qcow2")).unlink()
    yield printed(*configured)


def of_prune(tmp_path: Path) -> Iterator[Any]:
    night = Night.with_incremental(tmp_path)
    keep = ("prune", "--keep-last", "1", "--repo", night.repository)
    yield printed(*keep, "--dry-run")
    yield printed(*keep, "--batch", "1")
    Path(printed("list", "--repo", night.repository)[0]["manifest"]).write_text("{}")
    yield printed(*keep)


def of_remove(tmp_path: Path) -> Iterator[Any]:
    night = Night.with_incremental(tmp_path)
    repo = ("--repo", night.repository)
    oldest, _ = printed("list", *repo)
    yield printed("remove", f"disk/{oldest['point']}", "--yes", *repo)
    yield printed("remove", "disk", "--dry-run", *repo)
    yield printed("remove", "disk/not", "--yes", *repo)
    (night.repository / "disk" / f"{night.newest['point']}.json").write_text("{}")
    yield printed("remove", "disk", "--yes", *repo)


def of_pin(tmp_path: Path) -> Iterator[Any]:
    night = Night.of(tmp_path)
    night.full()
    for command in ("pin", "pin", "unpin"):
        yield printed(command, "disk", "--repo", night.repository)


def of_clean(tmp_path: Path) -> Iterator[Any]:
    with Machine.of(tmp_path, "a") as machine:
        machine.start()
        nights = Nights.of(machine)
        nights.full()
        yield printed("clean", "--qmp", machine.qmp, "--repo", nights.repository)


def of_clean_of_bitmaps(tmp_path: Path) -> Iterator[Any]:
    night = Night.of(tmp_path)
    night.full()
    yield printed("clean", "--image", night.image)
    chosen = ("clean", "--image", night.image, "--bitmaps", "--repo", night.repository)
    yield printed(*chosen)
    with exported(night.image):
        yield printed(*chosen, "--yes")
    yield printed(*chosen, "--yes")


def of_check_config(tmp_path: Path) -> Iterator[Any]:
    path, machines = tmp_path / "c.yaml", "machines: {m: {disks: {vda: {image: a}}}}\n"
    for text in (machines, f"repository: repo\n{machines}"):
        path.write_text(text)
        yield printed("check-config", "--config", path)


def of_example(_tmp_path: Path) -> Iterator[Any]:
    yield printed("check-config", "--example")


RUNS: dict[str, Documents] = {
    "init": of_init,
    "keygen": of_keygen,
    "full, incremental, rescan": of_backups,
    "audit": of_audit,
    "map": of_map,
    "map --totals": of_totals,
    "list": of_list,
    "show": of_show,
    "restore": of_restore,
    "verify": of_verify,
    "copy": of_copy,
    "copy of several machines": of_copies,
    "serve": of_serve,
    "files": of_files,
    "get": of_get,
    "status": of_status,
    "prune": of_prune,
    "remove": of_remove,
    "pin, unpin": of_pin,
    "clean": of_clean,
    "clean of bitmaps": of_clean_of_bitmaps,
    "check-config": of_check_config,
    "check-config --example": of_example,
}


def lose_bitmap(image: Path) -> None:
    for name in bitmaps(image):
        run("qemu-img", "bitmap", "--remove", image, name)


def damage(night: Night) -> None:
    """Change a byte of the oldest data file's first compressed cluster."""
    path = min((night.repository / "disk").glob("*.qcow2"))
    content = bytearray(path.read_bytes())
    content[content.index(b"\x28\xb5\x2f\xfd") + 12] ^= 0xFF
    path.write_bytes(content)


@contextmanager
def exported(image: Path) -> Iterator[str]:
    """Serve an image read-only, which keeps writers out."""
    socket, pid = image.with_suffix(".sock"), image.with_suffix(".pid")
    run("qemu-nbd", "--fork", "-t", "-r", "-f", "qcow2", "-k", socket, "--pid-file", pid, image)
    try:
        yield f"nbd+unix:///?socket={socket}"
    finally:
        os.kill(int(pid.read_text()), signal.SIGTERM)
        while Path(f"/proc/{pid.read_text().strip()}").exists():
            pass


def guest_files(tmp_path: Path) -> tuple[Night, Path, dict[str, str]]:
    """A point; a folder of files; and the environment in which that folder is the guest's."""
    night = Night.of(tmp_path)
    night.full()
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "a").write_text("content")
    fish = FISH.replace("/usr/bin/env python3", sys.executable)
    return night, tmp_path / "tree", path_with(tmp_path / "bin", ("guestfish", fish))


# The tests


def test_the_page_has_a_section_for_every_command():
    listed = re.findall(r"^  ([a-z-]+)  ", run_pybackup(["--help"]).stdout.split("Commands:")[1], re.MULTILINE)
    named = {word for title in sections() for word in re.split(r", | --.*| of .*", title)} - {""}
    assert named == {*listed, "error"}
    assert set(sections()) == {*RUNS, "error"}


@pytest.mark.parametrize("title", RUNS)
def test_a_commands_documents_have_the_fields_of_its_table_and_no_others(title, tmp_path):
    page = sections()
    section, errors = page[title], page["error"]
    for document in RUNS[title](tmp_path):
        if isinstance(document, dict) and set(document) == {"error"}:
            errors.check(document["error"], errors)
        else:
            section.check(document, errors)
    unseen = {
        (title, path, name)
        for path, types in section.rows.items()
        for name in types - section.seen[path]
        if (title, path, name) not in UNSEEN
    }
    assert not unseen, "these types are documented, and no run shows them"


@pytest.mark.parametrize("title", ["error", *RUNS])
def test_the_examples_are_documents_of_that_kind(title):
    page = sections()
    section, errors = page[title], page["error"]
    [example] = section.examples
    if title == "error":
        section.check(example["error"], errors)
    else:
        section.check(example, errors)
