"""Raw disks behind a qcow2 image with bitmaps (docs/raw-disks.md), of machines that are off."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from lab import MIB, Night, bitmaps, call_pybackup, raw_copy, restore_and_cmp, run, write

from backup.qemu.images import device_id

ROOT = Path(__file__).parents[2]
TRUST = "--trust-data-file"
NEVER_SEEN = "an external data file, whose writes no bitmap need see"


def documented(raw: Path, image: Path, heading: str) -> str:
    """Run the commands below a heading of the page, for these two files; returns what they print."""
    page = (ROOT / "docs/raw-disks.md").read_text()
    section = page.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    found = re.search(r"```sh\n(.*?)```", section, re.DOTALL)
    assert found, section
    commands = re.sub(r"^(raw|image)=.*\n", "", found[1], flags=re.MULTILINE)
    environment = os.environ | {"raw": str(raw), "image": str(image)}
    done = subprocess.run(["sh", "-ec", commands], check=True, capture_output=True, text=True, env=environment)
    return done.stdout


def new_raw(path: Path, size: int = 4 * MIB) -> Path:
    run("qemu-img", "create", "-q", "-f", "raw", path, str(size))
    write(path, "write -P 0x11 0 200k", "write -P 0x12 1M 300k", image_format="raw")
    return path


@pytest.fixture
def night(tmp_path) -> Night:
    """A raw file behind a qcow2, converted as the page says; the raw file is `disk.raw` beside the image."""
    raw = new_raw(tmp_path / "disk.raw")
    content = raw.read_bytes()
    assert "Images are identical." in documented(raw, tmp_path / "disk.qcow2", "Convert a machine")
    assert raw.read_bytes() == content
    return Night(tmp_path / "disk.qcow2", tmp_path / "repo")


def raw_of(night: Night) -> Path:
    return night.image.with_suffix(".raw")


def claim(night: Night) -> object:
    return night.newest["disks"][0]["source"]["trusted_data_file"]


def test_a_trusted_data_file_is_backed_up_by_the_images_bitmap(night):
    night.full(TRUST)
    assert claim(night) == {"path": str(raw_of(night)), "file_id": f"inode {raw_of(night).stat().st_ino}"}
    write(night.image, "write -P 0x21 2M 70k", "write -z 1100k 64k", "discard 0 64k")
    done = night.require_incremental(TRUST)
    assert done.disk["data_bytes"] < MIB
    assert claim(night)["path"] == str(raw_of(night))
    restore_and_cmp(night.repository, "disk/latest", raw_of(night))
    night.require_incremental(TRUST)


def test_without_the_users_word_nothing_changes(night):
    done = night.full()
    assert (NEVER_SEEN in done.stderr, bitmaps(night.image), claim(night)) == (True, {}, None)
    assert "except through the image: --trust-data-file (`trust_data_file: true`)" in done.stderr
    night.require_fallback(NEVER_SEEN)


def test_a_word_that_is_taken_back_ends_the_incrementals_and_their_bitmaps(night):
    night.full(TRUST)
    night.require_fallback(NEVER_SEEN)
    assert bitmaps(night.image) == {}
    night.require_fallback("the newest point was made without starting a bitmap", TRUST)
    night.require_incremental(TRUST)


def test_a_machine_of_the_configuration_says_it_for_a_disk_or_for_all_of_them(night):
    config = night.repository.with_name("pybackup.yaml")
    for machine in (
        f"disks: {{disk: {{image: {night.image}, trust_data_file: true}}}}",
        f"disks: {{disk: {{image: {night.image}}}}}\n    trust_data_file: true",
    ):
        config.write_text(f"repository: {night.repository}\nbitmap: b1\nmachines:\n  disk:\n    {machine}\n")
        done = call_pybackup(["--config", config, "full", "--json"])
        assert (done.rc, done.stderr) == (0, ""), done
        assert claim(night) is not None
        done = call_pybackup(["--config", config, "incremental", "--json"])
        assert (done.rc, done.stderr, done.disk["kind"]) == (0, "", "incremental"), done


def test_a_raw_file_that_was_replaced_is_read_whole(night):
    night.full(TRUST)
    other = new_raw(night.image.with_name("other.raw"))
    write(other, "write -P 0x77 3M 64k", image_format="raw")
    other.rename(raw_of(night))
    night.require_fallback("was replaced since the newest point", TRUST)
    night.require_incremental(TRUST)


def test_an_image_that_names_another_raw_file_is_read_whole(night):
    night.full(TRUST)
    other = new_raw(night.image.with_name("other.raw"))
    write(other, "write -P 0x77 3M 64k", image_format="raw")
    run("qemu-img", "amend", "-q", "-f", "qcow2", "-o", f"data_file={other}", night.image)
    night.require_fallback(f"the external data file is {other} now, and was {raw_of(night)}", TRUST)


def test_an_image_without_a_data_file_any_more_is_read_whole(night):
    night.full(TRUST)
    inside = night.image.with_name("inside.qcow2")
    run("qemu-img", "convert", "-q", "-f", "qcow2", "-O", "qcow2", "--bitmaps", night.image, inside)
    inside.rename(night.image)
    night.require_fallback("the image has no external data file, and had the external data file", TRUST)


def test_what_wrote_to_the_raw_file_while_the_machine_was_off_is_found(night):
    night.full(TRUST)
    with raw_of(night).open("r+b") as raw:
        raw.seek(3 * MIB)
        raw.write(b"past the image")
    night.require_fallback("something wrote to the external data file", TRUST)
    night.require_incremental(TRUST)


def test_a_spot_check_covers_a_data_file_that_does_not_deserve_its_trust(night):
    """The image is touched afterwards, as a machine does that was on meanwhile."""
    night.full(TRUST)
    raw_of(night).write_bytes(os.urandom(4 * MIB))
    os.utime(night.image)
    done = night.incremental(TRUST)
    assert (done.rc, done.disk["rescan"]) == (3, True), done
    assert "clean clusters that were read again differ" in done.disk["reason"]
    night.require_restored()


def test_a_raw_file_that_was_truncated_is_found_by_its_zeroes(night):
    night.full(TRUST)
    os.truncate(raw_of(night), MIB)
    os.utime(night.image)
    done = night.incremental(TRUST)
    assert (done.rc, done.disk["rescan"]) == (3, True), done
    assert "bytes that were data and read as zeroes now" in done.disk["reason"]


def test_a_disk_that_grows_with_its_image_goes_on(night):
    night.full(TRUST)
    run("qemu-img", "resize", "-q", "-f", "qcow2", night.image, "6M")
    write(night.image, "write -P 0x31 5M 64k")
    night.require_incremental(TRUST)
    assert raw_of(night).stat().st_size == 6 * MIB


def test_a_relative_name_of_a_data_file_is_not_trusted(night, monkeypatch):
    """QEMU takes it from its working folder, so that the next start may open another file."""
    run("qemu-img", "amend", "-q", "-f", "qcow2", "-o", "data_file=disk.raw", night.image)
    monkeypatch.chdir(night.image.parent)
    done = night.full(TRUST)
    assert "names by an absolute path" in done.stderr
    assert (claim(night), bitmaps(night.image)) == (None, {})
    night.require_fallback("names by an absolute path", TRUST)


def test_no_machine_may_write_to_the_raw_file_while_it_is_read(night):
    night.full(TRUST)
    with open_for_writing(raw_of(night)):
        done = night.incremental(TRUST)
    assert (done.rc, f"{raw_of(night)} is in use by another program" in done.stderr) == (13, True), done


@contextmanager
def open_for_writing(raw: Path) -> Iterator[None]:
    """Have QEMU open a raw file, as a machine does that was started on it."""
    command = ["qemu-io", "-f", "raw", raw]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("write -P 1 0 512\n")
        process.stdin.flush()
        assert "wrote" in process.stdout.readline()
        yield
        process.communicate("quit\n")


def test_an_audit_trusts_the_data_file_as_well(night):
    night.full(TRUST)
    write(night.image, "write -P 0x21 2M 64k")
    words = ["audit", "--image", night.image, "--repo", night.repository, "--bitmap", "b1", "--json"]
    done = call_pybackup([*words, TRUST])
    assert (done.rc, done.disk["verdict"]) == (0, "true"), done
    assert call_pybackup(words).rc == 14


def test_back_to_raw_the_chain_goes_on_with_rescans(night):
    night.full(TRUST)
    write(night.image, "write -P 0x21 2M 64k")
    assert "Images are identical." in documented(raw_of(night), night.image, "Back to raw")
    words = ["incremental", "--image", raw_of(night), "--image-format", "raw", "--machine", "disk", "--disk", "disk"]
    done = call_pybackup([*words, "--repo", night.repository, "--bitmap", "b1", "--json"])
    assert (done.rc, done.disk["rescan"]) == (3, True), done
    restore_and_cmp(night.repository, "disk/latest", raw_of(night))


def test_a_block_device_is_converted_and_backed_up_in_the_same_way(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("only root makes loop devices")
    store = new_raw(tmp_path / "store")
    made = subprocess.run(["losetup", "--find", "--show", store], check=False, capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no loop device can be made here: {made.stderr}")
    device = Path(made.stdout.strip())
    try:
        content = store.read_bytes()
        image = tmp_path / "disk.qcow2"
        assert "Images are identical." in documented(device, image, "Convert a machine")
        assert store.read_bytes() == content
        night = Night(image, tmp_path / "repo")
        night.full(TRUST)
        assert claim(night) == {"path": str(device), "file_id": "device"}
        write(image, "write -P 0x21 2M 70k", "discard 1M 64k")
        night.require_incremental(TRUST)
        restore_and_cmp(night.repository, "disk/latest", raw_copy(device, tmp_path / "now.raw", image_format="raw"))
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


def test_the_option_needs_a_source_that_can_have_a_data_file(tmp_path):
    repo = ["--repo", str(tmp_path)]
    assert "without a source" in call_pybackup(["full", TRUST, *repo]).stderr
    done = call_pybackup(["full", "--nbd", "nbd+unix:///x?socket=/s", TRUST, "--machine", "m", *repo])
    assert (done.rc, "--trust-data-file together with --nbd" in done.stderr) == (2, True), done


def test_a_volume_is_known_by_the_uuid_that_lvm_gives_it(tmp_path):
    """No device mapper is asked: the folder stands for the kernel's."""
    (tmp_path / "253:7/dm").mkdir(parents=True)
    (tmp_path / "253:7/dm/uuid").write_text("LVM-abc\n")
    assert device_id(os.makedev(253, 7), tmp_path) == "uuid LVM-abc"
    assert device_id(os.makedev(253, 8), tmp_path) == "device"
