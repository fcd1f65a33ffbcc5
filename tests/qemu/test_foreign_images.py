"""An image of another program's format is not taken for a raw disk; what the error advises works."""

import subprocess
from pathlib import Path

import pytest
from lab import MIB, call_pybackup, make_image, raw_copy, require_identical, run, write
from servers import qemu_nbd

FORMATS = ["vmdk", "vdi", "vhdx", "vpc", "qed", "parallels"]


def image_of(folder: Path, image_format: str) -> Path:
    """An image of 8 MiB with something in it."""
    path = folder / "disk.img"
    options = ("-o", "subformat=dynamic") if image_format in {"vpc", "vhdx"} else ()
    make_image(path, 8 * MIB, *options, image_format=image_format)
    write(path, "write -P 7 1M 100k", image_format=image_format)
    return path


@pytest.mark.parametrize("image_format", FORMATS)
@pytest.mark.parametrize("wanted", ["full", "incremental"])
def test_it_is_refused_by_its_name(tmp_path, image_format, wanted):
    image = image_of(tmp_path, image_format)
    done = call_pybackup([wanted, "--image", image, "--repo", tmp_path / "repo", "--bitmap", "b1"])
    assert done.rc == 2
    assert f"looks like a {image_format}," in done.stderr
    assert f"qemu-nbd -r -t -f {image_format}" in done.stderr
    assert not list(tmp_path.glob("repo/*/*.json"))


@pytest.mark.parametrize("image_format", ["vmdk", "vdi"])
def test_it_can_be_served_and_backed_up(tmp_path, image_format):
    image = image_of(tmp_path, image_format)
    given = ["--repo", tmp_path / "repo", "--machine", "m", "--disk", "vda"]
    with qemu_nbd(image, "-t", image_format=image_format) as uri:
        assert call_pybackup(["full", "--nbd", uri, *given]).rc == 0
    assert call_pybackup(["restore", "m/latest", tmp_path / "restored", "--repo", tmp_path / "repo"]).rc == 0
    require_identical(raw_copy(image, tmp_path / "expected", image_format=image_format), tmp_path / "restored")


def test_its_bytes_are_the_disk_where_that_is_said(tmp_path):
    image = image_of(tmp_path, "vdi")
    given = ["--image", image, "--repo", tmp_path / "repo"]
    assert call_pybackup(["full", *given, "--image-format", "raw"]).rc == 0
    assert call_pybackup(["restore", "disk/latest", tmp_path / "restored", "--repo", tmp_path / "repo"]).rc == 0
    require_identical(image, tmp_path / "restored")


def test_a_guest_may_begin_its_raw_disk_with_what_it_likes(tmp_path):
    """Once there is a chain; and with LUKS from the start, as guests do."""
    image = make_image(tmp_path / "disk.raw", MIB, image_format="raw")
    given = ["--image", image, "--repo", tmp_path / "repo", "--bitmap", "b1"]
    with image.open("rb+") as file:
        file.write(b"LUKS\xba\xbe")
    assert call_pybackup(["full", *given]).rc == 0
    with image.open("rb+") as file:
        file.write(b"KDMV")
    assert call_pybackup(["incremental", *given]).rc == 3
    assert call_pybackup(["restore", "disk/latest", tmp_path / "restored", "--repo", tmp_path / "repo"]).rc == 0
    require_identical(image, tmp_path / "restored")


def test_the_formats_names_are_qemus():
    known = subprocess.run(["qemu-img", "--help"], check=True, capture_output=True, text=True).stdout
    for image_format in FORMATS:
        assert f" {image_format}" in known
    assert run("qemu-img", "--version")
