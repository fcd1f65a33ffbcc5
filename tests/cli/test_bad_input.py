"""Hostile and broken input: two lines, the right code, no hang, and what was backed up stays as it was."""

import json
import os
import random
import subprocess
import sys

import pytest
from forge import rewrite
from lab import KIB, MIB, PYBACKUP, Night, call_pybackup, make_image, restore_and_cmp, run, run_pybackup, write
from places import machine_at

from backup.operations import verify
from backup.qemu.truncation import may_be_truncated

ESCAPE = "\x1b[2J\x1b]0;owned\x07"


@pytest.fixture(scope="module")
def night(tmp_path_factory):
    """A full and an incremental.  Tests work on copies or change nothing."""
    night = Night.of(tmp_path_factory.mktemp("night"))
    night.full()
    write(night.image, "write -P 9 64k 64k")
    assert night.incremental().rc == 0
    return night


@pytest.fixture
def copied(night, tmp_path):
    run("cp", "-r", night.repository, tmp_path / "repo")
    return Night(night.image, tmp_path / "repo")


def tree(folder):
    """Every file's name and content."""
    changing = {"lock", "verified"}  # what verify remembers is no part of any point
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name not in changing}


def require_two_lines(done, *codes):
    assert done.rc in codes, done
    lines = done.stderr.splitlines()
    assert [line.split(" ")[1] for line in lines] == ["error:", "hint:"], done.stderr
    assert all(line.isprintable() for line in lines)
    assert "bug" not in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert all(len(line) < 2000 for line in lines)


def image_of(tmp_path, kind):
    path = tmp_path / "disk.qcow2"
    make_image(path, "4M")
    write(path, "write -P 1 0 1M")
    content = path.read_bytes()
    broken = {
        "empty-qcow2": content[:4],
        "cut-header": content[:60],
        "random-behind-magic": content[:4] + random.Random(1).randbytes(100 * KIB),
        "huge-size": content[:24] + b"\x7f" * 8 + content[32:],
        "bad-cluster-bits": content[:20] + (63).to_bytes(4, "big") + content[24:],
        "unknown-feature": content[:72] + b"\x80" + content[73:],
        "backing-missing": None,
        "backing-loop": None,
    }[kind]
    if broken is not None:
        path.write_bytes(broken)
    elif kind == "backing-missing":
        run("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", tmp_path / "gone", "-F", "raw", path, "4M")
    else:
        run("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", path, "-F", "qcow2", path)
    return path


IMAGES = [
    "empty-qcow2",
    "cut-header",
    "random-behind-magic",
    "huge-size",
    "bad-cluster-bits",
    "unknown-feature",
    "backing-missing",
    "backing-loop",
]


@pytest.mark.parametrize("kind", IMAGES)
def test_a_broken_image_is_a_source_that_cannot_be_read(copied, tmp_path, kind):
    image = image_of(tmp_path, kind)
    before = tree(copied.repository)
    for wanted in ("full", "incremental"):
        done = call_pybackup(
            [wanted, "--image", image, "--machine", "disk", "--repo", copied.repository, "--bitmap", "b1"]
        )
        require_two_lines(done, 13, 1)
    assert tree(copied.repository) == before
    require_two_lines(call_pybackup(["map", "--image", image]), 13, 1)


@pytest.mark.parametrize("make", [os.mkdir, lambda path: path.symlink_to(path)], ids=["folder", "loop"])
def test_something_else_than_a_file_as_image_is_refused_at_once(tmp_path, make):
    make(tmp_path / "disk.raw")
    done = run_pybackup(["full", "--image", tmp_path / "disk.raw", "--repo", tmp_path / "repo"])
    require_two_lines(done, 13, 2, 1)
    assert not list((tmp_path / "repo").glob("*/*.json"))


@pytest.mark.parametrize(
    "source",
    [
        ["--image", "nope.qcow2"],
        ["--nbd", "nbd+unix:///nope?socket=/nowhere/nope"],
        ["--qmp", "/nowhere/nope", "--node", "nope"],
        ["--image", "nope.vmdk"],
        ["--image", "huge.qcow2"],
    ],
    ids=["image", "nbd", "qmp", "foreign", "too-large"],
)
@pytest.mark.parametrize("wanted", ["full", "incremental", "rescan"])
def test_a_source_that_cannot_be_opened_leaves_no_machine(copied, tmp_path, monkeypatch, wanted, source):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nope.vmdk").write_bytes(b"KDMV" + bytes(1000))
    make_image(tmp_path / "huge.qcow2", "9T")
    (tmp_path / "c.yaml").write_text("cluster_size: 4K\n")
    before = tree(copied.repository), sorted(os.listdir(copied.repository))
    given = [*source, "--machine", "other", "--bitmap", "b1", "--repo", copied.repository]
    done = call_pybackup(["--config", tmp_path / "c.yaml", wanted, *given])
    require_two_lines(done, 13, 2)
    assert (tree(copied.repository), sorted(os.listdir(copied.repository))) == before
    assert call_pybackup(["status", "--repo", copied.repository]).rc == 0


def test_a_first_backup_that_no_fallback_forbids_leaves_no_machine(copied):
    before = sorted(os.listdir(copied.repository))
    assert copied.incremental("--machine", "other", "--no-fallback").rc == 14
    assert sorted(os.listdir(copied.repository)) == before


@pytest.mark.parametrize(
    "content",
    [
        b"\0" * 100,
        b"\xff\xfe\xfd",
        b"[" * 1500,
        b"a: &a [*a, *a]",
        b"!!python/object/apply:os.system [x]",
        b"- " * 3000,
        b"a: [" + b"[]," * 200_000 + b"[]]",
    ],
)
def test_a_broken_configuration_is_wrong_usage(tmp_path, content):
    (tmp_path / "c.yaml").write_bytes(content)
    for command in (["full"], ["list"], ["check-config"], ["restore", "a/latest", "x"]):
        done = call_pybackup(["--config", tmp_path / "c.yaml", *command])
        assert done.rc == 2, done
        assert "bug" not in done.stderr
        assert all(line.isprintable() for line in done.stderr.splitlines())


KINDS = ["pipe", "folder", "link", "dangling", "empty", "random", "large"]


def replace_by(path, kind, elsewhere):
    content = path.read_bytes()
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link":
        elsewhere.write_bytes(content)
        path.symlink_to(elsewhere)
    elif kind == "dangling":
        path.symlink_to(elsewhere)
    else:
        path.write_bytes({"empty": b"", "random": random.Random(1).randbytes(5000), "large": b"x"}[kind])
        if kind == "large":
            os.truncate(path, 1 << 36)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", ["manifest", "file", "digests"])
def test_anything_else_in_the_place_of_a_file_is_damage_at_once(copied, tmp_path, which, kind):
    full = min((copied.repository / "disk").glob("*.json"), key=lambda path: json.loads(path.read_bytes())["sequence"])
    newest = f"disk/{copied.newest['point']}"
    victim = full if which == "manifest" else full.with_name(json.loads(full.read_bytes())["disks"][0]["data"][which])
    replace_by(victim, kind, tmp_path / "elsewhere")
    assert call_pybackup(["verify", "--repo", copied.repository]).rc == 12
    require_two_lines(call_pybackup(["restore", newest, tmp_path / "r.raw", "--repo", copied.repository]), 12)
    require_two_lines(call_pybackup(["restore", full, tmp_path / "r.raw"]), 12)
    assert not (tmp_path / "r.raw").exists()
    assert not list(tmp_path.glob(".r*"))
    done = call_pybackup(["list", "--json", "--repo", copied.repository])
    assert (done.rc, len(done.document)) == ((3, 1) if which == "manifest" else (0, 2))
    # The next run notices: it takes a full and says why, and removes nothing that may be needed.
    before = sorted(os.listdir(full.parent))
    run("cp", copied.image, tmp_path / "disk.qcow2")
    done = call_pybackup(
        [
            *("incremental", "--image", tmp_path / "disk.qcow2", "--machine", "disk"),
            *("--bitmap", "b1", "--json", "--repo", copied.repository),
        ]
    )
    if which == "digests" and kind in {"empty", "random", "large", "link"}:
        assert done.rc in {0, 3}  # contents are verify's to judge
    elif which == "manifest" or kind != "random":
        assert (done.rc, done.disk["kind"]) == (3, "full"), done
    assert set(before) <= set(os.listdir(full.parent))


@pytest.mark.parametrize("kind", KINDS)
def test_prune_removes_nothing_where_anything_else_has_the_place_of_a_data_file(copied, tmp_path, kind):
    folder = copied.repository / "disk"
    replace_by(folder / copied.newest["disks"][0]["data"]["file"], kind, tmp_path / "elsewhere")
    before = sorted(os.listdir(folder))
    require_two_lines(call_pybackup(["prune", "--keep-last", "1", "--batch", "1", "--repo", copied.repository]), 12)
    assert sorted(os.listdir(folder)) == before


HUGE = 1 << 50
"""Bytes that a manifest may claim, and no memory holds."""


def set_data(**values):
    return lambda document: document["disks"][0]["data"].update(values)


HOSTILE = {
    "data-size": set_data(size=HUGE),
    "disk-size": lambda document: document["disks"][0].update(size=HUGE),
    "both-sizes": lambda document: (document["disks"][0].update(size=HUGE), set_data(size=HUGE)(document)),
    "cluster-size": set_data(cluster_size=4096),
    "other-file": set_data(file="vdz.20200101T000000Z-00000000.qcow2"),
    "digests-as-data": lambda document: set_data(file=document["disks"][0]["data"]["digests"])(document),
    "data-as-digests": lambda document: set_data(digests=document["disks"][0]["data"]["file"])(document),
    "shrunk": lambda document: document["disks"][0].update(size=512),
    "own-parent": lambda document: document["disks"][0].update(
        parent={"point": document["point"], "identity": document["disks"][0]["identity"]}
    ),
    "no-parent": lambda document: document["disks"][0].update(kind="full", parent=None),
    "etc-passwd": set_data(file="../../../../etc/passwd"),
    "absolute": set_data(digests="/etc/passwd"),
    "newer": lambda document: document.update(version=9),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_manifest_with_a_valid_digest_gets_nowhere(copied, tmp_path, kind):
    path = copied.repository / "disk" / f"{copied.newest['point']}.json"
    rewrite(path, HOSTILE[kind])
    before = tree(copied.repository)
    codes = (1,) if kind == "newer" else (10, 12)
    require_two_lines(call_pybackup(["restore", path, tmp_path / "r.raw"]), *codes)
    assert not (tmp_path / "r.raw").exists()
    assert call_pybackup(["verify", "--repo", copied.repository]).rc in codes
    assert call_pybackup(["show", path]).rc in {0, *codes}
    assert tree(copied.repository) == before
    full = next(point for point in path.parent.glob("*.json") if point != path)
    assert call_pybackup(["restore", full, tmp_path / "r.raw"]).rc == 0


def test_a_length_that_no_file_has_holds_up_no_sample_and_no_progress_bar(copied):
    path = copied.repository / "disk" / f"{copied.newest['point']}.json"
    rewrite(path, set_data(size=HUGE))
    machine = machine_at(copied.repository / "disk")
    for choice in (verify.ALL, verify.Choice(share=0.05)):
        assert verify.stored_bytes(machine, None, choice) < 1 << 30
    # In a process of its own, which can be ended: the loop that this is about has no end.
    command = [PYBACKUP, "verify", "--sample", "5%", "--repo", copied.repository]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 12, done
    assert f"bytes, and its manifest says {HUGE}" in done.stderr + done.stdout


def test_a_machine_that_cannot_be_read_hides_none_of_the_others(copied, monkeypatch):
    for name in ("a", "z"):  # before it and after it
        run("cp", "-r", copied.repository / "disk", copied.repository / name)
    listdir = os.listdir

    def refusing(path="."):
        if str(path) == str(copied.repository / "disk"):
            raise PermissionError(13, "Permission denied", path)
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refusing)
    done = call_pybackup(["list", "--json", "--repo", copied.repository])
    assert (done.rc, len(done.document)) == (3, 4), done
    assert [line.split(" ")[1] for line in done.stderr.splitlines()] == ["warning:"], done.stderr
    done = call_pybackup(["status", "--json", "--repo", copied.repository])
    assert done.rc == 1
    assert [disk["code"] for disk in done.document["disks"]] == [0, 1, 0]
    assert done.document["disks"][1]["next"].startswith("unreadable: ")
    done = call_pybackup(["verify", "--json", "--repo", copied.repository])
    assert (done.rc, done.document["points"]) == (1, 4), done
    assert [problem["machine"] for problem in done.document["problems"]] == ["disk"]
    done = call_pybackup(["prune", "--keep-last", "1", "--dry-run", "--json", "--repo", copied.repository])
    assert (done.rc, [len(found["points"]) for found in done.document]) == (1, [2, 0, 2]), done


def test_a_link_that_leads_nowhere_hides_no_machine(copied):
    for name, target in (("loop", "loop"), ("gone", "nowhere")):
        (copied.repository / name).symlink_to(target)
    for command in (["list"], ["status"], ["verify"]):
        done = call_pybackup([*command, "--repo", copied.repository])
        assert done.rc in {0, 12}, done
        assert "disk" in done.stdout or command == ["verify"]
        assert "a bug" not in done.stderr


def test_the_highest_possible_sequence_is_not_passed_silently(copied):
    path = copied.repository / "disk" / f"{copied.newest['point']}.json"
    rewrite(path, lambda document: document.update(sequence=(1 << 62) - 1))
    before = tree(copied.repository)
    done = copied.backup("full", "--bitmap", "b1")
    assert (done.rc, "after which none can follow" in done.stderr) == (12, True), done
    assert tree(copied.repository) == before


def test_terminal_codes_in_a_manifest_reach_no_terminal(copied):
    path = copied.repository / "disk" / f"{copied.newest['point']}.json"

    def change(document):
        disk = document["disks"][0]
        disk.update(reason=f"{ESCAPE}\r\n\u202e\x9b")
        disk["source"].update(path=ESCAPE)
        disk["bitmap"].update(read=ESCAPE, started=ESCAPE)

    def change_words(document):
        document.update(program=ESCAPE)

    rewrite(path, change)
    assert call_pybackup(["show", path]).rc == 0
    other = path.with_name(path.name.replace(path.stem[-8:], "00000000"))
    other.write_bytes(path.read_bytes())
    rewrite(other, change_words)
    (copied.repository / "disk" / "20200101T000000Z-00000000.json").write_text(f'{{"format": "{ESCAPE}"}}')
    for command in (
        ["list", "--repo", copied.repository],
        ["show", path],
        ["show", other],
        ["verify", "--repo", copied.repository],
        ["list", "--json", "--repo", copied.repository],
        ["show", "--json", path],
    ):
        done = call_pybackup(command)
        for line in (done.stdout + done.stderr).split("\n"):
            assert line.isprintable(), line


def test_terminal_codes_in_names_that_users_or_guests_chose_reach_no_terminal(tmp_path):
    folder = tmp_path / ESCAPE.replace("/", "")
    folder.mkdir()
    image = make_image(folder / "disk.qcow2", "1M")
    run("qemu-img", "bitmap", "--add", image, ESCAPE)
    for command in (
        ["full", "--image", image, "--repo", folder / "repo"],
        ["restore", folder / "repo" / "disk" / "x.json", folder / "r"],
        ["map", "--image", image, "--bitmap", ESCAPE],
        ["map", "--image", image, "--bitmap", f"{ESCAPE}2"],
        ["full", "--image", image, "--repo", folder / "repo", "--machine", ESCAPE],
        ["full", ESCAPE, "--repo", folder / "repo"],
        ["list", ESCAPE, "--repo", folder / "repo"],
        [ESCAPE],
        [f"--{ESCAPE}"],
        ["--config", folder, "list"],
        ["verify", "--repo", folder / "repo"],
        ["restore", "disk/latest", folder / "r.raw", "--repo", folder / "repo"],
    ):
        done = call_pybackup(command)
        for line in (done.stdout + done.stderr).split("\n"):
            assert line.isprintable(), (command, line)
        assert "bug" not in done.stderr


def test_a_path_that_the_system_refuses_to_look_at_is_no_bug(copied, tmp_path):
    """A name too long for any file system stands for a folder that may not be entered, as these tests run as root."""
    refused, repository = tmp_path / ("x" * 256), ("--repo", copied.repository)
    newest = f"disk/{copied.newest['point']}"
    require_two_lines(call_pybackup(["show", refused]), 10)
    require_two_lines(call_pybackup(["verify", refused.with_name(f"{refused.name}.json")]), 12)
    require_two_lines(call_pybackup(["show", copied.image / "x.json"]), 10)
    require_two_lines(call_pybackup(["map", "--image", refused]), 13)
    require_two_lines(call_pybackup(["full", "--image", refused, "--machine", "m", "--disk", "d", *repository]), 13)
    require_two_lines(call_pybackup(["restore", newest, refused, *repository]), 1)
    require_two_lines(call_pybackup(["restore", newest, refused, "--force", *repository]), 1)
    require_two_lines(call_pybackup(["get", newest, "/etc", refused / "x", *repository]), 2)


def test_verify_in_a_folder_with_a_hostile_name_prints_it_harmlessly(copied, tmp_path):
    (copied.repository / "disk").rename(copied.repository / f"x{ESCAPE}")
    path = next((copied.repository / f"x{ESCAPE}").glob("*.json"))
    next(path.parent.glob("*.b3")).write_bytes(b"")
    for done in (call_pybackup(["verify", found]) for found in path.parent.glob("*.json")):
        assert all(line.isprintable() for line in (done.stdout + done.stderr).split("\n"))


FAKES = {
    "missing": "raise ModuleNotFoundError(\"No module named 'nbd'\", name='nbd')",
    "for-another-python": "raise ModuleNotFoundError(\"No module named 'libnbdmod'\", name='libnbdmod')",
    "broken": "raise ImportError('libnbd.so.0: cannot open shared object file')",
    "of-pypi": "VERSION = 'network block device, another one'",
}


@pytest.mark.parametrize("kind", FAKES)
def test_without_libnbds_binding_it_says_what_to_install(tmp_path, kind):
    (tmp_path / "nbd.py").write_text(FAKES[kind])
    image = make_image(tmp_path / "disk.qcow2", "1M")
    done = run_pybackup(["full", "--image", image, "--repo", tmp_path / "repo"], env={"PYTHONPATH": str(tmp_path)})
    require_two_lines(done, 1)
    assert "python3-libnbd" in done.stderr
    assert "ImportError" not in done.stderr


def test_a_repository_that_needs_no_server_is_read_without_the_binding(copied, tmp_path):
    (tmp_path / "nbd.py").write_text(FAKES["missing"])
    env = {"PYTHONPATH": str(tmp_path)}
    for command in (["list"], ["verify"], ["restore", "disk/latest", tmp_path / "r.raw"]):
        done = run_pybackup([*command, "--repo", copied.repository], env=env)
        assert done.rc == 0, done.stderr


def test_without_qemus_programs_it_says_what_to_install(tmp_path):
    image = make_image(tmp_path / "disk.qcow2", "1M")
    done = run_pybackup(["full", "--image", image, "--repo", tmp_path / "repo"], env={"PATH": str(tmp_path)})
    require_two_lines(done, 1, 13)
    assert "qemu-utils" in done.stderr


def test_memory_stays_bounded_when_a_manifest_lies_about_sizes(copied, tmp_path):
    path = copied.repository / "disk" / f"{copied.newest['point']}.json"
    rewrite(path, HOSTILE["both-sizes"])
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))\n"
        "from backup.cli.app import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "verify", str(path)], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 12, done.stderr


# Images that are not what their name or their last point says


@pytest.mark.parametrize("size", [300_000, 5_000_000, 9_000_000])
def test_an_image_that_is_cut_off_is_refused_before_anything_writes_to_it(tmp_path, size):
    """QEMU reads the lost clusters as zeroes without an error, and adding a bitmap hides that they are lost."""
    whole = make_image(tmp_path / "whole.qcow2", "64M")
    write(whole, "write -P 7 0 10M")
    image = tmp_path / "disk.qcow2"
    image.write_bytes(whole.read_bytes()[:size])
    before = image.read_bytes()
    done = call_pybackup(["full", "--image", image, "--repo", tmp_path / "repo", "--bitmap", "b1"])
    assert done.rc == 13, done
    assert len(done.stderr.splitlines()) == 2
    assert "truncated" in done.stderr
    assert image.read_bytes() == before


def test_clusters_that_a_crash_left_counted_and_unused_do_not_make_an_image_cut_off(tmp_path):
    """A refcount without a reference beyond the end is a leak, which a killed machine may leave."""
    image = make_image(tmp_path / "disk.qcow2", "64M")
    write(image, "write -P 7 0 1M")
    with open(image, "r+b") as file:
        file.seek(48)
        table = int.from_bytes(file.read(8), "big")
        file.seek(table)
        block = int.from_bytes(file.read(8), "big")
        beyond = image.stat().st_size // 65536 + 3
        file.seek(block + 2 * beyond)
        file.write(b"\0\1")
    done = call_pybackup(["full", "--image", image, "--repo", tmp_path / "repo", "--bitmap", "b1"])
    assert done.rc == 0, done


@pytest.mark.parametrize("content", [b"", b"x" * 5000], ids=["empty", "random"])
def test_a_qcow2_that_lost_its_header_is_refused(tmp_path, content):
    night = Night.of(tmp_path)
    night.full()
    before = sorted(night.repository.rglob("*"))
    night.image.write_bytes(content)
    for options in ([], ["--machine", "other"]):
        done = night.backup("incremental", "--bitmap", "b1", *options)
        assert done.rc == 13, done
        assert len(done.stderr.splitlines()) == 2
    assert [path for path in sorted(night.repository.rglob("*")) if "other" not in str(path)] == before


def test_an_empty_raw_image_is_refused(tmp_path):
    image = tmp_path / "disk.raw"
    image.touch()
    done = call_pybackup(["full", "--image", image, "--repo", tmp_path / "repo"])
    assert (done.rc, len(done.stderr.splitlines())) == (13, 2)


def test_a_damaged_table_of_the_parent_is_a_broken_chain_and_a_full(tmp_path):
    night = Night.of(tmp_path)
    night.full()
    [data] = night.repository.glob("disk/*.qcow2")
    with open(data, "r+b") as file:
        file.seek(40)
        file.seek(int.from_bytes(file.read(8), "big"))
        table = int.from_bytes(file.read(8), "big") & ~(1 << 63)
        file.seek(table + 8)
        file.write(b"\xff" * 8)
    assert night.incremental("--no-fallback").rc == 14
    done = night.incremental()
    assert (done.rc, done.disk["kind"]) == (3, "full")
    assert "the chain is broken" in done.stderr
    restore_and_cmp(night.repository, "disk/latest", night.image)


@pytest.mark.parametrize("preallocation", ["off", "metadata", "falloc"])
@pytest.mark.parametrize(("cluster", "refcount_bits"), [(512, 16), (4096, 1), (65536, 16), (65536, 64), (2 * MIB, 8)])
def test_whole_images_of_every_kind_are_not_suspected_to_be_cut_off(tmp_path, preallocation, cluster, refcount_bits):
    options = f"preallocation={preallocation},cluster_size={cluster},refcount_bits={refcount_bits}"
    image = make_image(tmp_path / "disk.qcow2", "20M", "-o", options)
    for command in ("write 5M 512", "write -z 1M 3M", "discard 5M 1M"):
        write(image, command)
        with open(image, "rb") as file:
            assert not may_be_truncated(file, image.stat().st_size), command
            assert may_be_truncated(file, cluster)
