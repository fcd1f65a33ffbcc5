"""
What a backup costs the machine that is backed up: how long its writes take meanwhile.
"""

from __future__ import annotations

import os
import random
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from mmap import mmap
from pathlib import Path

from inputs import Bench, Place, new_repository, remove
from measure import PYBACKUP, Latency, fail, run
from servers import Machine, machine, why_no_machine

WRITE = 4096
"""Bytes of a write."""
PACE = 0.002
"""Seconds from one write's beginning to the next one's, if it takes no longer."""
LOOK = 0.05
"""Seconds between looks whether it is over."""
ALONE = 4.0
"""Seconds for which the guest writes without a backup, in each round."""


class Guest:
    """Writes to a disk at random places, one write after the other, and notes how long each took."""

    def __init__(self, path: Path) -> None:
        # Past the page cache: each write goes to QEMU, and is done when QEMU says so.
        self._disk = os.open(path, os.O_RDWR | os.O_DIRECT)
        self._blocks = os.fstat(self._disk).st_size // WRITE
        self._random = random.Random(1)
        self._data = mmap(-1, WRITE)
        self._data.write(os.urandom(WRITE))

    def work_until(self, over: Callable[[], bool]) -> list[float]:
        """Write until it is over; the seconds that each write took."""
        took = []
        while not over():
            look = time.perf_counter() + LOOK
            while (began := time.perf_counter()) < look:
                os.pwrite(self._disk, self._data, self._random.randrange(self._blocks) * WRITE)
                took.append(time.perf_counter() - began)
                time.sleep(max(0.0, PACE - took[-1]))
        return took

    def close(self) -> None:
        """Close the disk."""
        os.close(self._disk)


def guest_latency(bench: Bench) -> Iterator[Latency]:
    """A guest's writes alone, under our full, and under QEMU's own backup job."""
    for place in bench.places:
        if reason := why_no_machine():
            yield Latency(reason, place.name, [], [], [], 0)
            continue
        image = place.path("running.qcow2")
        run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(bench.pool()), str(image)])
        with machine(image) as running:
            yield from measured(bench, place, running)


def measured(bench: Bench, place: Place, machine: Machine) -> list[Latency]:
    """Let all three have their turn, some times."""
    guest = Guest(machine.disk)
    sides = {
        "no backup": lambda: alone(guest),
        "our full, zstd:1": lambda: ours(guest, machine, place),
        "QEMU's backup job (drive-backup), to qcow2": lambda: theirs(guest, machine, place),
    }
    found: dict[str, list[list[float]]] = {name: [] for name in sides}
    for _ in range(bench.rounds):
        for name, side in sides.items():
            os.sync()
            found[name].append(sorted(side()))
    guest.close()
    return [summed_up(name, place, rounds) for name, rounds in found.items()]


def summed_up(name: str, place: Place, rounds: list[list[float]]) -> Latency:
    """The figures of each round."""
    middle = [statistics.median(took) for took in rounds]
    nearly_all = [took[int(len(took) * 0.99)] for took in rounds]
    return Latency(name, place.name, middle, nearly_all, [took[-1] for took in rounds], sum(map(len, rounds)))


def alone(guest: Guest) -> list[float]:
    """Nothing but the guest."""
    end = time.monotonic() + ALONE
    return guest.work_until(lambda: time.monotonic() >= end)


def ours(guest: Guest, machine: Machine, place: Place) -> list[float]:
    """A full while the guest writes, from the start of the command to its end."""
    repository = new_repository(place.path("repository"))
    command = [PYBACKUP, "full", "--qmp", str(machine.qmp), "--node", "disk0", "--machine", "m", "--disk", "vda"]
    command += ["--repo", str(repository), "--scratch", str(place.folder)]
    with open("complaints", "w+") as complaints:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=complaints)
        took = guest.work_until(lambda: process.poll() is not None)
    if process.returncode:
        fail(command, process.returncode, Path("complaints").read_text())
    shutil.rmtree(repository)
    return took


def theirs(guest: Guest, machine: Machine, place: Place) -> list[float]:
    """QEMU's job while the guest writes, until all is copied."""
    target = place.path("target.qcow2")
    run(["qemu-img", "create", "-q", "-f", "qcow2", str(target), str(machine.disk.stat().st_size)])
    machine.begin_backup(target)
    took = guest.work_until(machine.backup_ended)
    machine.forget_backup()
    remove(target)
    return took
