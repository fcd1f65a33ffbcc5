"""The small files of a machine are parts of the point: verified, copied, pruned, removed and shown with it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from forge import add_machine_files
from lab import Night, call_pybackup, restore_and_cmp, run, write

FILES = {"definition": b"<domain><name>disk</name></domain>\n", "nvram": bytes(range(256)) * 9, "tpm": b"state"}


@pytest.fixture
def night(tmp_path: Path) -> Night:
    """A full and an incremental, both of which hold files of the machine."""
    night = Night.with_incremental(tmp_path)
    for manifest in manifests(night):
        add_machine_files(manifest, **FILES)
    return night


def manifests(night: Night) -> list[Path]:
    """Oldest first."""
    listed = call_pybackup(["list", "--repo", night.repository, "--json"]).document
    return [Path(point["manifest"]) for point in listed]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix in {".xml", ".nvram", ".tpm"})


def test_verify_finds_each_changed_byte_and_each_missing_file(night):
    assert call_pybackup(["verify", "--repo", night.repository]).rc == 0
    newest = manifests(night)[-1]
    for suffix in (".xml", ".nvram", ".tpm"):
        path = newest.with_suffix(suffix)
        content = path.read_bytes()
        for changed in (content[:-1], content + b" ", bytes([content[0] ^ 1]) + content[1:]):
            path.write_bytes(changed)
            done = call_pybackup(["verify", "--repo", night.repository, "--older-than", "1d", "--json"])
            assert (done.rc, done.document["problems"][0]["point"]) == (12, newest.stem), done
            assert "is not the file that the manifest describes" in done.stderr
        path.unlink()
        done = call_pybackup(["verify", "disk/latest", "--repo", night.repository])
        assert (done.rc, f"{path.name} is missing" in done.stderr) == (10, True), done
        os.mkfifo(path)
        done = call_pybackup(["verify", "--repo", night.repository])
        assert (done.rc, "is not a plain file" in done.stderr) == (12, True), done
        path.unlink()
        path.write_bytes(content)
    assert call_pybackup(["verify", "--repo", night.repository]).rc == 0


def test_a_copy_has_the_files_and_is_refused_a_damaged_one(night, tmp_path):
    second = tmp_path / "second"
    assert call_pybackup(["init", "--copy-of", night.repository, second]).rc == 0
    newest = manifests(night)[-1]
    damaged = newest.with_suffix(".nvram")
    content = damaged.read_bytes()
    damaged.write_bytes(bytes(len(content)))
    assert call_pybackup(["copy", "disk", second, "--repo", night.repository]).rc == 12
    assert newest.name not in os.listdir(second / "disk")
    damaged.write_bytes(content)
    assert call_pybackup(["copy", "disk", second, "--repo", night.repository]).rc == 0
    assert files(second / "disk") == files(night.repository / "disk")
    for name in files(second / "disk"):
        run("cmp", second / "disk" / name, night.repository / "disk" / name)
    assert call_pybackup(["verify", "--repo", second]).rc == 0


def test_a_pinned_and_pruned_machine_keeps_the_files_of_its_points_only(night):
    write(night.image, "write -P 9 1M 64k")
    assert night.incremental().rc == 0
    oldest, middle, newest = manifests(night)
    assert call_pybackup(["pin", f"disk/{middle.stem}", "--repo", night.repository]).rc == 0
    done = call_pybackup(["prune", "disk", "--keep-last", "1", "--batch", "1", "--repo", night.repository])
    assert done.rc == 0, done
    assert not oldest.exists()
    assert files(night.repository / "disk") == sorted(f"{middle.stem}.{suffix}" for suffix in ("xml", "nvram", "tpm"))
    assert call_pybackup(["verify", "--repo", night.repository]).rc == 0
    assert newest.exists()
    assert call_pybackup(["unpin", f"disk/{middle.stem}", "--repo", night.repository]).rc == 0
    assert call_pybackup(["remove", f"disk/{middle.stem}", "--yes", "--repo", night.repository]).rc == 0
    assert files(night.repository / "disk") == []
    restore_and_cmp(night.repository, "disk", night.image)


def test_the_next_run_removes_what_a_killed_one_left(night):
    left = night.repository / "disk/20261122T010000Z-1f3a09c1.xml"
    kept = night.repository / "disk/notes.xml"
    left.write_bytes(b"<dom")
    kept.write_bytes(b"somebody else's")
    assert night.incremental().rc == 0
    assert (left.exists(), kept.exists()) == (False, True)


def test_a_removed_machine_leaves_nothing(night):
    assert call_pybackup(["remove", "disk", "--yes", "--repo", night.repository]).rc == 0
    assert not (night.repository / "disk").exists()


def test_show_prints_the_definition_without_what_a_terminal_would_obey(night):
    newest = manifests(night)[-1]
    done = call_pybackup(["show", "disk", "--definition", "--repo", night.repository])
    assert (done.rc, done.stdout.encode()) == (0, FILES["definition"])
    assert f"definition {newest.stem}.xml" in call_pybackup(["show", "disk", "--repo", night.repository]).stdout
    both = call_pybackup(["show", "disk", "--definition", "--json", "--repo", night.repository])
    assert both.rc == 2
    write(night.image, "write -P 9 1M 64k")
    assert night.incremental().rc == 0
    none = call_pybackup(["show", "disk", "--definition", "--repo", night.repository])
    assert (none.rc, "holds no definition" in none.stderr) == (10, True)
    add_machine_files(manifests(night)[-1], definition=b"\x1b]0;x\x07\n")
    assert call_pybackup(["show", "disk", "--definition", "--repo", night.repository]).stdout == "?]0;x?\n"


def test_a_restore_writes_the_files_beside_the_disks_and_overwrites_none(night, tmp_path):
    back = tmp_path / "back"
    words = ["restore", "disk", f"{back}/", "--repo", night.repository]
    assert call_pybackup(words).rc == 0
    assert sorted(os.listdir(back)) == ["disk.nvram", "disk.raw", "disk.tpm", "disk.xml"]
    assert (back / "disk.nvram").read_bytes() == FILES["nvram"]
    assert {path.stat().st_mode & 0o777 for path in back.iterdir()} == {0o600}
    for name in ("disk.raw", "disk.xml"):
        (back / name).rename(tmp_path / name)
    refused = call_pybackup(words)
    assert (refused.rc, "disk.nvram exists" in refused.stderr) == (2, True)
    assert sorted(os.listdir(back)) == ["disk.nvram", "disk.tpm"]
    assert call_pybackup([*words, "--force"]).rc == 0
    run("cmp", back / "disk.raw", tmp_path / "disk.raw")
    one = call_pybackup(["restore", "disk", tmp_path / "one.raw", "--repo", night.repository])
    assert (one.rc, (tmp_path / "one.xml").exists()) == (0, False)


@pytest.mark.parametrize(
    ("target", "options", "error"),
    [
        ("one.raw", ["--define"], (2, "a machine is restored as a whole")),
        ("one.raw", ["--name", "new"], (2, "a machine is restored as a whole")),
        ("back/", ["--define", "--disk", "disk"], (2, "a machine is restored as a whole")),
        ("back/", ["--name", "../x"], (2, "cannot name a machine")),
        ("back/", ["--define", "--libvirt", "qemu+ssh://host/system"], (2, "cannot be used")),
        ("back/", ["--define", "--libvirt", "qemu:///system?socket=/nowhere"], (13, "cannot be reached")),
    ],
)
def test_what_cannot_be_defined_is_refused_before_anything_is_written(night, tmp_path, target, options, error):
    code, why = error
    if code == 13:
        pytest.importorskip("libvirt", reason="python3-libvirt is missing: tools/setup libvirt")
    done = call_pybackup(["restore", "disk", f"{tmp_path}/{target}", "--repo", night.repository, *options])
    assert (done.rc, why in done.stderr) == (code, True), done
    assert not (tmp_path / target).exists()


@pytest.mark.parametrize(
    "hostile",
    [b"<!DOCTYPE d [<!ENTITY a 'a'>]><domain>&a;</domain>", b"\xff", b"<a>" * 50_000, b"x", b"<domain/>" + b"\0"],
)
def test_a_hostile_definition_costs_the_definition_only(tmp_path, hostile):
    night = Night.of(tmp_path)
    night.full()
    [manifest] = manifests(night)
    add_machine_files(manifest, definition=hostile, nvram=b"v")
    done = call_pybackup(["restore", "disk", f"{tmp_path}/back/", "--repo", night.repository])
    assert (done.rc, "definition in the point cannot be used" in done.stderr) == (12, True), done
    assert sorted(os.listdir(tmp_path / "back")) == ["disk.nvram", "disk.raw"]
