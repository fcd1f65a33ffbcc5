"""Sizes, rates, durations and names."""

from __future__ import annotations

import json
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backup.errors import UsageError
from backup.model.names import check_name
from backup.units import parse_size, show_duration, show_rate, show_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("64K", 65536),
        ("64k", 65536),
        ("64KiB", 65536),
        ("64 KiB", 65536),
        ("64KB", 65536),
        ("1.5G", 3 << 29),
        ("512B", 512),
        ("0.5K", 512),
        ("2T", 2 << 40),
        (" 1M ", 1 << 20),
    ],
)
def test_sizes_are_binary(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["4096", "64K", "1.5G", "3M", "2T", "0.5K"])
def test_sizes_mean_what_qemu_img_means(tmp_path, text):
    image = tmp_path / "disk.raw"
    subprocess.run(["qemu-img", "create", "-q", "-f", "raw", image, text], check=True)
    info = subprocess.run(["qemu-img", "info", "--output=json", image], check=True, capture_output=True)
    assert json.loads(info.stdout)["virtual-size"] == parse_size(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "K",
        "50M/s",
        "-1",
        "+1",
        "1e3",
        "0x10",
        "1,5G",
        "64 Kib/s",
        "1.G",
        ".5K",
        "1X",
        "0.3",
        "1 2",
        "٣",
        "64\N{KELVIN SIGN}",
    ],
)
def test_what_is_not_a_size_is_refused_and_named(text):
    with pytest.raises(UsageError) as caught:
        parse_size(text)
    assert repr(text) in caught.value.message
    assert "64K" in caught.value.hint


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (512, "512 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (65536, "64 KiB"),
        (3 << 20, "3 MiB"),
        (3 << 29, "1.5 GiB"),
        (1024 * 1024 - 1, "1 MiB"),
        ((1 << 20) * 10 + 1, "10 MiB"),
        ((1 << 64) - 1, "16 EiB"),
        (-2048, "-2 KiB"),
    ],
)
def test_sizes_are_shown_short(size, text):
    assert show_size(size) == text


@given(st.integers(0, 1 << 62))
def test_a_shown_size_reads_back_within_its_rounding(size):
    shown = show_size(size)
    number, unit = shown.split()
    assert float(number) < 1024 or unit == "EiB"
    step = 1 if unit == "B" else 1 << 10 * ("KMGTPE".index(unit[0]) + 1)
    scaled = size * 20 // step  # in twentieths: half of the last digit shown
    assert abs(scaled - round(float(number) * 20)) <= 1


def test_rates_are_sizes_per_second():
    assert show_rate(3 << 20, 1.5) == "2 MiB/s"
    assert show_rate(100, 0.0) == "-"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.00 s"),
        (0.254, "0.25 s"),
        (0.999, "1.0 s"),
        (4.24, "4.2 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (65, "1 min 05 s"),
        (3599.7, "1 h 00 min"),
        (7380, "2 h 03 min"),
    ],
)
def test_durations_are_shown_in_two_units(seconds, text):
    assert show_duration(seconds) == text


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("machine", "web1"),
        ("machine", "web1.example.org"),
        ("disk", "vda"),
        ("disk", "_a-b"),
        ("bitmap", "b1"),
        ("disk", "x" * 64),
    ],
)
def test_a_good_name_is_returned(kind, name):
    assert check_name(kind, name) == name


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("machine", ""),
        ("machine", ".."),
        ("machine", ".hidden"),
        ("machine", "-rf"),
        ("machine", "a/b"),
        ("machine", "a b"),
        ("machine", "a\n"),
        ("machine", "ä"),
        ("machine", "٣"),
        ("machine", "pybackup.json"),
        ("disk", "x" * 65),
        ("bitmap", "b1.x"),
    ],
)
def test_a_name_that_would_leave_its_folder_or_confuse_a_reader_is_refused(kind, name):
    with pytest.raises(UsageError) as caught:
        check_name(kind, name)
    assert repr(name) in caught.value.message
    assert kind in caught.value.message
