"""
Random nights of a running machine: whatever happened to guest, machine and runs, every point that exists restores.
"""

from __future__ import annotations

import random
import signal
import subprocess
from pathlib import Path

import pytest
from lab import CLUSTER, MIB
from live import Machine, Nights, Step, private_tmp, remove_empty_folders

SIZE = 2 * MIB


class Chance:
    """One thing after the other, by chance; `done` tells what it was when a test fails."""

    def __init__(self, nights: Nights, seed: int) -> None:
        self.nights = nights
        self.machine = nights.machine
        self.rng = random.Random(seed)
        self.done: list[str] = []
        self.crashed = False
        """Since the newest point the machine was killed: no bitmap may be trusted."""

    def step(self) -> None:
        happenings = [self.write] * 4 + [self.incremental] * 4 + [self.cut_off] * 4 + [self.restart, self.replug] * 2
        happening = self.rng.choice([*happenings, self.full, self.crash, self.grow, self.clean])
        self.done.append(happening.__name__)
        happening()

    def write(self) -> None:
        discards = not self.machine.leftovers()
        for name in self.machine.disks:
            for _ in range(self.rng.randrange(4)):
                offset = self.rng.randrange(0, SIZE - CLUSTER, 512)
                length = self.rng.choice([512, 5120, CLUSTER])
                match self.rng.randrange(4):
                    case 0:
                        self.machine.zero(name, offset, length)
                    case 1 if discards:
                        self.machine.zero(name, offset // CLUSTER * CLUSTER, CLUSTER, discard=True)
                    case _:
                        self.machine.write(name, offset, length, self.rng.randrange(256))

    def restart(self) -> None:
        self.machine.restart()

    def crash(self) -> None:
        self.machine.crash()
        self.crashed = True

    def grow(self) -> None:
        if not self.crashed and not self.machine.leftovers():  # QEMU refuses it with an inconsistent bitmap or a job
            name = self.rng.choice(list(self.machine.disks))
            size = len(self.machine.disks[name].model) + self.rng.choice([512, CLUSTER, 3 * CLUSTER + 1024])
            self.machine.resize(name, size)
            self.machine.write(name, size - 512, 512, 7)

    def replug(self) -> None:
        if not self.machine.leftovers():
            self.machine.unplug("b")
            self.machine.plug("b")

    def clean(self) -> None:
        self.nights.require_cleaned()

    def full(self) -> None:
        done = self.nights.backup("full")
        assert done.rc == 0, done
        self.crashed = False
        self.nights.require_own_bitmap_alone()

    def incremental(self) -> None:
        done = self.nights.backup("incremental")
        wanted = ("incremental", self.crashed, 3 if self.crashed else 0)
        assert [(disk["kind"], disk["rescan"], done.rc) for disk in done.machine["disks"]] == [wanted, wanted], done
        self.crashed = False
        self.nights.require_own_bitmap_alone()
        remove_empty_folders()
        self.nights.require_nothing_left()

    def cut_off(self) -> None:
        """A run that is killed at any of its QMP commands, or at none."""
        wanted = self.rng.choice(["incremental", "incremental", "full"])
        step = Step("*", self.rng.choice(["before", "after"]), self.rng.randrange(1, 60))
        self.done[-1] += f" {wanted} {step}"
        points, held = self.nights.points(), self.machine.held()
        command = step.command(signal.SIGKILL, self.nights.arguments(wanted))
        ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=100)
        assert ended.returncode in {-signal.SIGKILL, 0, 3}, ended
        new = self.nights.points() - points
        self.nights.references.update(dict.fromkeys(new, held))
        self.crashed = self.crashed and not new


@pytest.mark.parametrize("seed", [1, None])
def test_whatever_happens_every_point_restores_and_only_a_crash_costs_a_full(tmp_path: Path, seed):
    seed = random.randrange(1 << 32) if seed is None else seed
    with Machine.of(tmp_path, "a", "b", size=SIZE) as machine, private_tmp(machine.place):
        nights = Nights.of(machine.start())
        chance = Chance(nights, seed)
        try:
            chance.full()
            for _ in range(14):
                chance.step()
            chance.incremental()
            nights.require_restored()
            machine.quit()
        except BaseException as error:
            error.add_note(f"seed {seed}: {', '.join(chance.done)}")
            raise
