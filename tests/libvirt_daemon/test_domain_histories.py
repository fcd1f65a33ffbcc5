"""
Random nights of a domain: whatever happened to guest, domain, daemon and runs, every point restores bit for bit.

DOMAIN_SEEDS=FIRST:END lives through other nights, DOMAIN_EVENTS=N through more of them.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import pytest
from domains import Domain, kind_of, wait_until
from kills import DRIVER
from lab import CLUSTER, MIB, bitmaps, call_pybackup, check_repository, init, run

from backup.model.names import MARKER
from backup.sources.libvirt_job import Job

FIRST, END = (int(number) for number in os.environ.get("DOMAIN_SEEDS", "0:2").split(":"))
EVENTS = int(os.environ.get("DOMAIN_EVENTS", "14"))
STEPS = (
    "backup.sources.libvirt_domain Domain.begin_job",
    "backup.sources.libvirt_job Job.open",
    "backup.repository.machine Machine.publish",
    "backup.sources.libvirt_domain Domain.end_job",
    "backup.sources.libvirt_domain Domain.record",
    "backup.sources.libvirt_domain Domain.delete",
    "backup.sources.libvirt_domain Domain.forget",
    "backup.sources.libvirt_domain Domain.close",
)
"""Steps of a run before or after which it is killed."""


class Chance:
    """
    One event after the other, by chance; `done` tells what happened when a test fails.

    `costs` are the disks whose next point may be a rescan; a rescan of another disk is a fault.
    """

    def __init__(self, domain: Domain, seed: int) -> None:
        self.domain = domain
        self.rng = random.Random(seed)
        self.done: list[str] = []
        self.costs: set[str] = set()
        self.bases: dict[str, list[Path]] = {target: [] for target in domain.disks}
        """The images below each disk's image, the newest last."""
        self.newest: dict[str, str] = {}
        """The newest point that holds each disk."""
        self.second = domain.repository.with_name("second")
        """Another repository, which is backed up to now and then."""

    @property
    def on(self) -> bool:
        return self.domain.state == "running"

    @property
    def short_id(self) -> str:
        return str(json.loads((self.domain.repository / MARKER).read_text())["id"][:8])

    def step(self) -> None:
        events = [self.scribble] * 5 + [self.night] * 4 + [self.night_with_writes] * 2 + [self.cut_off] * 3
        events += [self.snapshot] * 2 + [self.commit] * 2 + [self.power] * 2 + [self.save, self.lose_bitmap]
        events += [self.night_of_one_disk, self.other_repository, self.clean]
        event = self.rng.choice([*events, self.grow, self.crash, self.restart_daemon, self.define_anew])
        self.done.append(event.__name__)
        event()

    def note(self, what: object) -> None:
        self.done[-1] += f" {what}"

    # The guest

    def scribble(self) -> None:
        if self.on:
            self.write(self.rng.randrange(1, 8))

    def write(self, times: int) -> None:
        for _ in range(times):
            target = self.rng.choice(list(self.domain.disks))
            start = self.rng.randrange(0, self.domain.size - MIB, 512)
            length = self.rng.choice([512, 4096, CLUSTER, self.rng.randrange(512, MIB, 512)])
            kinds = [f"write -P {self.rng.randrange(1, 255)}"] * 3 + ["write -z", "write -z -u", "discard"]
            self.domain.io(target, f"{self.rng.choice(kinds)} {start} {length}")

    # The domain

    def power(self) -> None:
        if self.on:
            with suppress(Exception):  # a daemon that has just started may say that the domain is not running
                self.domain.destroy()
            wait_until(lambda: not self.on, "the end of the domain")
        else:
            self.domain.start()
        self.note("on" if self.on else "off")

    def save(self) -> None:
        """Save the domain's memory; often a night of the saved domain follows."""
        if not self.on or self.domain.job():
            return
        self.domain.daemon.virsh("managedsave", self.domain.name)
        if self.rng.random() < 0.5:
            self.note("and night")
            self.night()
        self.domain.start()

    def crash(self) -> None:
        if self.on:
            self.domain.kill_qemu()
            self.costs |= set(self.domain.disks)

    def grow(self) -> None:
        if not self.on or self.costs or self.domain.job():  # QEMU resizes no image with an inconsistent bitmap
            return
        target = self.rng.choice(list(self.domain.disks))
        with self.domain.found() as found:
            size = found.blockInfo(target)[0] + self.rng.choice([512, CLUSTER, 3 * CLUSTER + 1024])
        self.domain.daemon.virsh("blockresize", self.domain.name, target, f"{size}b")
        self.domain.io(target, f"write -P 5 {size - 512} 512")

    def restart_daemon(self) -> None:
        on = self.on
        self.domain.daemon.restart()
        wait_until(lambda: self.on == on, "the daemon's connection to the domain")

    def define_anew(self) -> None:
        definition = self.domain.daemon.virsh("dumpxml", "--inactive", self.domain.name)
        with suppress(Exception), self.domain.found() as found:
            found.undefineFlags(1)  # with what managedsave left
            with self.domain.daemon.connected() as connection:
                connection.defineXML(definition)

    # Images

    def snapshot(self) -> None:
        """Put an overlay over a disk, or over several at one instant, while the domain is on or off."""
        if self.domain.job():
            return
        chosen = [target for target in self.domain.disks if self.rng.random() < 0.6] or ["vda"]
        words = ["snapshot-create-as", self.domain.name, f"s{len(self.done)}", "--disk-only", "--no-metadata"]
        for target, image in self.domain.disks.items():
            if target in chosen:
                overlay = self.domain.folder / f"{target}.{len(self.done)}"
                self.bases[target].append(image)
                self.domain.disks[target] = overlay
                words += ["--diskspec", f"{target},file={overlay}"]
            else:
                words += ["--diskspec", f"{target},snapshot=no"]
        self.domain.daemon.virsh(*words)
        self.costs |= set(chosen)
        self.note(",".join(chosen))

    def commit(self) -> None:
        """Commit an overlay into the image below it."""
        layered = [target for target, below in self.bases.items() if below]
        if not layered or not self.on or self.domain.job():
            return
        target = self.rng.choice(layered)
        base = self.bases[target].pop()
        words = ["blockcommit", self.domain.name, target, "--base", base, "--active", "--pivot", "--wait"]
        self.domain.daemon.virsh(*words)
        self.domain.disks[target].unlink()
        self.domain.disks[target] = base
        self.costs.add(target)
        self.note(target)

    def lose_bitmap(self) -> None:
        """Remove the bitmaps of a disk past pybackup and libvirt."""
        target = self.rng.choice(list(self.domain.disks))
        if self.on:
            for node, name in in_qemu(self.domain, self.domain.disks[target]):
                self.domain.qmp("block-dirty-bitmap-remove", node=node, name=name)
        else:
            image = self.domain.disks[target]
            for name in bitmaps(image):
                run("qemu-img", "bitmap", "--remove", "-f", "qcow2", image, name)
        self.costs.add(target)
        self.note(target)

    # Runs

    def night(self) -> None:
        held = self.domain.hold()
        self.judge(held, "incremental")

    def night_with_writes(self) -> None:
        if not self.on:
            return
        held = self.domain.hold()
        begin = Job.begin

        def begin_and_write(job: Job) -> None:
            begin(job)
            self.write(6)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Job, "begin", begin_and_write)
            self.judge(held, "incremental")

    def night_of_one_disk(self) -> None:
        one, *others = self.rng.sample(list(self.domain.disks), len(self.domain.disks))
        self.note(one)
        self.judge({one: self.domain.hold()[one]}, "incremental", "--disk", one, *(f"--exclude={t}" for t in others))

    def other_repository(self) -> None:
        """A night of another repository, whose bitmaps are none of ours."""
        held, ours = self.domain.hold(), self.domain.repository
        self.domain.repository = self.second
        try:
            done = self.domain.night("incremental")
            assert done.rc in {0, 3}, done
            self.keep(str(done.machine["point"]), held)
        finally:
            self.domain.repository = ours
        self.costs |= self.with_bitmaps_below()

    def clean(self) -> None:
        source = ["--libvirt", self.domain.daemon.uri, "--domain", self.domain.name]
        done = call_pybackup(["clean", *source, "--repo", self.domain.repository])
        assert done.rc == 0, done
        assert self.domain.job() == ""

    def judge(self, held: dict[str, Path], wanted: str, *options: str) -> None:
        touched = self.with_bitmaps_below()
        done = self.domain.night(wanted, *options)
        assert done.rc in {0, 3}, done
        for disk in done.machine["disks"]:
            assert kind_of(disk) == wanted or disk["name"] in self.costs, (disk, done)
        assert (done.rc == 3) == any(kind_of(disk) == "rescan" for disk in done.machine["disks"]), done
        self.costs = self.costs - set(held) | touched
        self.keep(str(done.machine["point"]), held)
        self.newest.update(dict.fromkeys(held, done.machine["point"]))
        assert self.domain.checkpoints() == []
        assert self.domain.job() == ""
        assert self.domain.leftovers() == []
        self.require_own_bitmaps_alone(held)

    def with_bitmaps_below(self) -> set[str]:
        """Disks below whose image a bitmap lies: its removal changes that file, so that the next point is a rescan."""
        return {target for target, below in self.bases.items() if any(map(bitmaps, below))}

    def keep(self, point: str, held: dict[str, Path]) -> None:
        self.domain.require_holds(point, held)

    def require_own_bitmaps_alone(self, disks: Iterable[str]) -> None:
        """
        Each of these disks' images has the bitmap of its newest point, and no other.

        An overlay also gets a bitmap that a night has forgotten below it; a later night removes that.
        """
        for target in disks:
            image = self.domain.disks[target]
            names = [name for _, name in in_qemu(self.domain, image)] if self.on else bitmaps(image)
            below = {name for base in self.bases[target] for name in bitmaps(base)}
            own = [name for name in names if name not in below and name.split(".")[1] == self.short_id]
            assert [name.rpartition(".")[2] for name in own] == [self.newest[target]], (target, names)

    def cut_off(self) -> None:
        """A run that is killed or stopped at a step, or that never comes to the step."""
        number = self.rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
        wanted = self.rng.choice(["incremental", "incremental", "full"])
        step = f"{self.rng.choice(STEPS)} {self.rng.choice(['before', 'after'])} {self.rng.randrange(1, 3)}"
        self.note(f"{wanted} {step} {number.name}")
        points, held = self.points(), self.domain.hold()
        touched = self.with_bitmaps_below()
        words = self.domain.words(wanted)
        init(words)
        command = [sys.executable, "-c", DRIVER, f"{step} {int(number)}", *map(str, words)]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=100)
        assert done.returncode in {-number, 128 + number, 0, 3}, done
        new = self.points() - points
        assert len(new) <= 1, new
        for point in new:
            self.note(f"made {point}")
            self.keep(point, held)
            self.newest.update(dict.fromkeys(held, point))
            self.costs.clear()
        self.costs |= touched

    def points(self) -> set[str]:
        done = call_pybackup(["list", "--repo", self.domain.repository, "--json"])
        return {point["point"] for point in done.document}


def in_qemu(domain: Domain, image: Path) -> list[tuple[str, str]]:
    """The bitmaps that QEMU has of an image, each with its node."""
    nodes = domain.qmp("query-named-block-nodes", flat=True)
    return [
        (node["node-name"], bitmap["name"])
        for node in nodes
        if node["drv"] == "qcow2" and node["file"] == str(image)
        for bitmap in node.get("dirty-bitmaps", ())
        if "name" in bitmap
    ]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(FIRST, END))
def test_whatever_happens_every_point_restores_and_only_what_loses_bitmaps_costs_a_rescan(domain, seed):
    chance = Chance(domain, seed)
    try:
        domain.io("vda", "write -P 7 1M 1M")
        chance.judge(domain.hold(), "full")
        for _ in range(EVENTS):
            chance.step()
        chance.done.append("end")
        chance.night()
        check_repository(domain.repository)
    except BaseException as error:
        error.add_note(f"seed {seed}: {', '.join(chance.done)}")
        raise
