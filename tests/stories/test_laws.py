"""
The law: every point restores to what the disk was, whatever the guest did in between (after benji's smoke test).

A story is a real image and some rounds of random operations by qemu-io, each followed by a backup and by a copy of the
disk made with `qemu-img convert`.  At the end each point is restored, with pybackup and with QEMU alone, and held
against its copy.  The numbers come from a seed: LAWS_SEEDS=100:400 runs other stories than the usual ones.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from laws import Story, program, served

from backup.cli import app

KIB, MIB = 1 << 10, 1 << 20
"""What a used target held before."""

FIRST, END = (int(number) for number in os.environ.get("LAWS_SEEDS", "0:14").split(":"))
SEEDS = range(FIRST, END)


@pytest.mark.parametrize("seed", SEEDS)
def test_every_point_of_an_image_restores_bit_for_bit(tmp_path: Path, seed: int):
    story = Story(tmp_path, random.Random(seed))
    story.make_image(backed=story.rng.random() < 0.4)
    for number in range(story.rng.randint(4, 6)):
        if number:
            story.guest_changes()
        wanted = "full" if number and story.rng.random() < 0.2 else "incremental"
        point = story.back_up(wanted, "--image", str(story.image), "--bitmap", "b1")
        story.require_kind(point, "full" if number == 0 else wanted)
    story.check()


@pytest.mark.parametrize("seed", SEEDS)
def test_every_point_of_a_server_with_a_bitmap_of_any_granularity_restores_bit_for_bit(tmp_path: Path, seed: int):
    story = Story(tmp_path, random.Random(f"server {seed}"))
    story.make_image(backed=False)
    story.granularity = 2 ** story.rng.randint(9, 21)
    program("qemu-img", "bitmap", "--add", "-g", str(story.granularity), str(story.image), "mine")
    for number in range(story.rng.randint(4, 6)):
        if number:
            story.guest_changes()
        with served(tmp_path, "-r", "-f", "qcow2", "-B", "mine", "--shared=8", str(story.image)) as uri:
            since = ["--since", story.points[-1].name] if story.points else []
            point = story.back_up("incremental", "--nbd", uri, "--bitmap", "mine", "--disk", "vda", *since)
        story.require_kind(point, "incremental" if number else "full")
        # The server is off, so nobody writes between the backup and this.
        program("qemu-img", "bitmap", "--clear", str(story.image), "mine")
    story.check()


@pytest.mark.parametrize("seed", range(FIRST, FIRST + (END - FIRST) // 2))
def test_every_point_that_prune_leaves_restores_bit_for_bit(tmp_path: Path, seed: int):
    story = Story(tmp_path, random.Random(f"prune {seed}"))
    story.make_image(backed=story.rng.random() < 0.4)
    for number in range(story.rng.randint(6, 10)):
        if number:
            story.guest_changes()
        wanted = "full" if number and story.rng.random() < 0.15 else "incremental"
        point = story.back_up(wanted, "--image", str(story.image), "--bitmap", "b1")
        story.require_kind(point, "full" if number == 0 else wanted)
        if story.rng.random() < 0.15:
            assert app._run(["pin", str(point.manifest)]) == 0
        if story.rng.random() < 0.4:
            story.prune()
    story.prune()
    story.check()
