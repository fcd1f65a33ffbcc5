"""Documents and data files that were changed at random: the right exit code, two lines, and all others are shown."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
from pathlib import Path

import pytest
from forge import bless, replaced, signed, signed_bytes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lab import MIB, Night, call_pybackup, run, write
from places import machine_at

from backup.model import digests
from backup.repository import verified as memory

EXAMPLES = int(os.environ.get("FUZZ", "20"))
"""FUZZ=500 looks further, and elsewhere in each run; without it all runs are the same."""
FUZZ = settings(
    max_examples=EXAMPLES,
    derandomize="FUZZ" not in os.environ,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def night(tmp_path_factory):
    """Machines `a` and `b` of the same image: of each a full and an incremental, of which `a`'s were verified."""
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "noise").write_bytes(random.Random(3).randbytes(MIB))
    night = Night.of(folder)
    night.full()
    write(night.image, f"write -s {folder / 'noise'} 2M 200k", "write -z 1100k 64k")
    assert night.incremental().rc == 0
    run("cp", "-r", night.repository / "disk", night.repository / "b")
    os.rename(night.repository / "disk", night.repository / "a")
    for path in (night.repository / "b").glob("*.json"):
        document = json.loads(path.read_bytes())
        del document["digest"]
        path.write_bytes(signed({**document, "machine": "b"}))
    assert call_pybackup(["verify", "a", "--repo", night.repository]).rc == 0
    return night


HUGE_TEXT = "9" * 5000
"""Stands for a number of so many digits, which json.dumps does not write."""
VALUES = st.one_of(
    st.sampled_from(
        [None, True, False, 0, -1, 1, 1.5, -0.0, 256, 1 << 62, 1 << 63, 1 << 70, float("nan"), float("inf"), HUGE_TEXT]
    ),
    st.sampled_from(
        [
            "",
            "\0",
            "a\0b",
            "\x1b[2J\x1b]0;owned\x07",
            "\ud800",
            "\udcff",
            "../../etc/passwd",
            "0001-01-01T00:00:00+14:00",
            "9999-12-31T23:59:59Z",
            "2099-01-01T00:00:00Z",
            "x" * 100_000,
            "full",
            "zstd:99",
        ]
    ),
    st.sampled_from([[], {}, [[]], [None], {"a": {}}, [{}] * 3]),
    st.text(max_size=20),
    st.integers(),
)


def places(value, path=()):
    """The paths of all values in a document."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, found in inner:
        yield from places(found, (*path, key))


def changed(document, path, value, how):
    """A document in which one value is another, is not there, or is there twice."""
    copy = json.loads(json.dumps(document))
    *outer, last = path
    inner = copy
    for key in outer:
        inner = inner[key]
    if how == "remove":
        del inner[last]
    elif how == "repeat" and isinstance(inner, list):
        inner.append(inner[last])
    else:
        inner[last] = value
    return copy


def text_of(document):
    return json.dumps(document, indent=2).replace(f'"{HUGE_TEXT}"', HUGE_TEXT)


@st.composite
def changes(draw, document):
    """Bytes that some writer could have left in the place of a document, before any signature."""
    path = draw(st.sampled_from([path for path in places(document) if path]))
    how = draw(st.sampled_from(["set", "set", "set", "remove", "repeat"]))
    return changed(document, path, draw(VALUES), how)


def require_graceful(command, done, codes):
    assert done.rc in codes, (command, done)
    assert "a bug" not in done.stderr, (command, done)
    assert "Traceback" not in done.stderr, (command, done)
    lines = done.stderr.splitlines()
    assert all(line.isprintable() for line in lines + done.stdout.splitlines()), (command, done)
    kinds = [re.match(r"pybackup: (error|hint|warning|note): .", line)[1] for line in lines]
    assert [kind for kind in kinds if kind in {"error", "hint"}] == ["error", "hint"] * kinds.count("error"), done
    if done.rc not in {0, 3} and command[0] != "status":
        assert "error" in kinds, (command, done)


def require_the_others(repository):
    """Every command says what is wrong with `a`, and shows or does what there is of `b`."""
    done = call_pybackup(["list", "--json", "--repo", repository])
    require_graceful(["list"], done, {0, 3})
    assert [point["machine"] for point in done.document].count("b") == 2
    done = call_pybackup(["status", "--json", "--repo", repository])
    assert done.rc in {0, 1, 10, 12}, done
    assert "a bug" not in done.stderr
    assert [(disk["code"], disk["chain_points"]) for disk in done.document["disks"] if disk["machine"] == "b"] == [
        (0, 2)
    ]
    wrong = done.rc
    require_graceful(["status"], call_pybackup(["status", "--repo", repository]), {wrong})
    done = call_pybackup(["verify", "--json", "--older-than", "1d", "--repo", repository])
    require_graceful(["verify"], done, {0, 1, 10, 12})
    assert {problem["machine"] for problem in done.document["problems"]} <= {"a"}
    done = call_pybackup(["prune", "--dry-run", "--keep-last", "1", "--json", "--repo", repository])
    require_graceful(["prune"], done, {0, 1, 3, 10, 12})
    [b] = [found for found in done.document if found["machine"] == "b"]
    assert (b["error"], len(b["points"])) == (None, 2)


@FUZZ
@given(st.data())
def test_a_manifest_that_was_changed_hides_no_other(night, data):
    path = data.draw(st.sampled_from(sorted((night.repository / "a").glob("*.json"))))
    document = json.loads(path.read_bytes())
    del document["digest"]
    content = data.draw(changes(document))
    text = (text_of({**content, "digest": "0" * 64}) + "\n").encode()
    with replaced(path, signed_bytes(text) if b',\n  "digest"' in text else text):
        require_the_others(night.repository)
        require_graceful(["show"], call_pybackup(["show", path]), {0, 1, 10, 12})
        require_graceful(["show", "--json"], call_pybackup(["show", "--json", path]), {0, 1, 10, 12})
        target = night.image.with_name("r.raw")
        done = call_pybackup(["restore", path, target])
        require_graceful(["restore"], done, {0, 1, 10, 12})
        assert target.exists() == (done.rc == 0)
        target.unlink(missing_ok=True)


@FUZZ
@given(st.data())
def test_any_document_whose_bytes_were_changed_hides_no_other(night, data):
    path = data.draw(
        st.sampled_from([*sorted((night.repository / "a").glob("*.json")), night.repository / "a/verified"])
    )
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content)))
    noise = data.draw(st.binary(max_size=40))
    content[at : at + data.draw(st.integers(0, 40))] = noise
    with replaced(path, bytes(content)):
        require_the_others(night.repository)


@FUZZ
@given(st.data())
def test_a_memory_that_was_changed_is_none_or_another_and_no_fault(night, data):
    path = night.repository / "a" / "verified"
    lines = path.read_bytes().splitlines()
    number = data.draw(st.integers(0, len(lines) - 2))
    lines[number] = (
        json.dumps(data.draw(changes(json.loads(lines[number])))).replace(f'"{HUGE_TEXT}"', HUGE_TEXT).encode()
    )
    head = b"\n".join(lines[:-1]) + b"\n"
    with replaced(path, head + json.dumps({"digest": digests.digest(head).hex()}).encode() + b"\n"):
        require_the_others(night.repository)
        found = memory.recall(machine_at(night.repository / "a"))
        assert all(record.code in {0, 10, 12} for record in found.values())


@FUZZ
@given(st.data())
def test_a_marker_that_was_changed_is_damaged_and_nothing_is_done(night, data):
    path = night.repository / "pybackup.json"
    document = data.draw(changes(json.loads(path.read_bytes())))
    with replaced(path, text_of(document).encode()):
        for command in (["list"], ["status"], ["verify", "a"], ["prune", "--keep-last", "1"]):
            done = call_pybackup([*command, "--repo", night.repository])
            require_graceful(["list"], done, {0, 1, 12})


CONFIGURATION = {
    "repository": "/x",
    "bitmap": "b1",
    "compression": "zstd:1",
    "cluster_size": "64K",
    "limit": "50M",
    "retention": {"last": 3, "within": "30d", "after_backup": True},
    "machines": {
        "web1": {"qmp": "/x.qmp", "freeze": True, "disks": {"vda": {"node": "/a.qcow2"}}},
        "old1": {"disks": {"vda": {"image": "/b.qcow2", "format": "qcow2"}}},
    },
}


@FUZZ
@given(st.data())
def test_a_configuration_that_was_changed_is_right_or_wrong_usage(night, data):
    """JSON is YAML."""
    path = night.image.with_name("config.yaml")
    path.write_text(text_of(data.draw(changes(CONFIGURATION))))
    done = call_pybackup(["--config", path, "check-config"])
    assert done.rc in {0, 2}, done
    assert "a bug" not in done.stderr
    assert all(line.isprintable() for line in (done.stderr + done.stdout).splitlines())


def test_names_that_are_no_text_are_left_alone(night, tmp_path):
    """Bytes that are not UTF-8, in a repository and in a machine's folder."""
    run("cp", "-r", night.repository, tmp_path / "repo")
    root = os.fsencode(tmp_path / "repo")
    for folder in (b"", b"/a"):
        os.mkdir(root + folder + b"/\xff\xfe")
        for name in (
            b"/\xff.json",
            b"/\x1b[2J.json",
            b"/20261122T010000Z-1f3a09c1.json\xff",
            b"/\xff.qcow2",
            b"/\xff.tmp",
        ):
            Path(os.fsdecode(root + folder + name)).write_bytes(b"x")
    require_the_others(tmp_path / "repo")
    for command in (["list"], ["status"], ["verify"], ["prune", "--keep-last", "1", "--batch", "1"]):
        done = call_pybackup(["--quiet", *command, "--repo", tmp_path / "repo"])
        assert (done.rc, done.stderr) == (0, ""), (command, done)
    assert (tmp_path / "repo" / os.fsdecode(b"\xff.json")).exists()
    assert (tmp_path / "repo" / "a" / os.fsdecode(b"\xff.qcow2")).exists()


# Data files under valid digests: only their structure can tell


def _headers(content):
    """Where a data file has its header, its L1 and L2 tables, and its refcounts."""
    word = lambda at: int.from_bytes(content[at : at + 8], "big")  # noqa: E731
    l1, refcounts = word(40), word(48)
    tables = [word(l1 + 8 * i) & ((1 << 56) - 512) for i in range(int.from_bytes(content[36:40], "big"))]
    return [(0, 160), (l1, 64), (refcounts, 64), *((table, 512) for table in tables if table)]


@settings(FUZZ, max_examples=2 * EXAMPLES)
@given(st.data())
def test_a_data_file_whose_structure_was_changed_is_refused_or_read_as_qemu_reads_it(night, data):
    manifest = max((night.repository / "a").glob("*.json"), key=lambda path: json.loads(path.read_bytes())["sequence"])
    entry = json.loads(manifest.read_bytes())["disks"][0]["data"]
    path, listed = manifest.parent / entry["file"], manifest.parent / entry["digests"]
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        start, length = data.draw(st.sampled_from(_headers(path.read_bytes())))
        at = start + data.draw(st.integers(0, length - 1))
        content[at] = data.draw(st.one_of(st.just(content[at] ^ 1), st.just(content[at] ^ 0x80), st.integers(0, 255)))
    target, expected = (night.image.with_name(name) for name in ("r.raw", "q.raw"))
    for leftover in (target, expected):
        leftover.unlink(missing_ok=True)
    with (
        replaced(manifest, manifest.read_bytes()),
        replaced(listed, listed.read_bytes()),
        replaced(path, bytes(content)),
    ):
        bless(manifest)
        verified = call_pybackup(["verify", manifest])
        require_graceful(["verify"], verified, {0, 10, 12})
        done = call_pybackup(["restore", manifest, target])
        require_graceful(["restore"], done, {0, 10, 12})
        require_the_others_of_status(night.repository)
        if done.rc == 0:
            qemu = subprocess.run(
                ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, expected], check=False, capture_output=True
            )
            if qemu.returncode == 0:
                run("cmp", target, expected)
            else:
                assert verified.rc == 12, (qemu.stderr, verified)


def require_the_others_of_status(repository):
    done = call_pybackup(["status", "--json", "--repo", repository])
    assert [(disk["code"], disk["chain_points"]) for disk in done.document["disks"] if disk["machine"] == "b"] == [
        (0, 2)
    ]
