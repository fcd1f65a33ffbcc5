"""The sampler: every set position as likely as every other, whatever the windows."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest

from backup.planning.sampling import Reservoir

RUNS = 1500


def sampled(mask: np.ndarray, size: int, cuts: list[int], draw) -> list[int]:
    found = Reservoir(size, draw)
    for low, high in pairwise([0, *cuts, len(mask)]):
        found.offer(low, mask[low:high])
    assert found.seen == mask.sum()
    return found.chosen().tolist()


@pytest.mark.parametrize("cuts", [[], [1, 2, 3], [20], [7, 7, 40]])
def test_of_few_all_are_chosen(cuts):
    mask = np.zeros(50, dtype=np.bool_)
    mask[[0, 3, 8, 20, 49]] = True
    for size in (5, 6, 64):
        assert sampled(mask, size, cuts, random.Random(1).random) == [0, 3, 8, 20, 49]


def test_of_none_none_is_chosen_and_of_many_by_none():
    assert sampled(np.zeros(9, dtype=np.bool_), 4, [3], random.Random(1).random) == []
    assert sampled(np.ones(9, dtype=np.bool_), 0, [3], random.Random(1).random) == []


def test_the_sample_is_ascending_set_and_without_repeats():
    mask = np.random.default_rng(3).random(5000) < 0.3
    for seed in range(50):
        chosen = sampled(mask, 64, [1000, 1001, 4000], random.Random(seed).random)
        assert len(chosen) == len(set(chosen)) == 64
        assert chosen == sorted(chosen)
        assert mask[chosen].all()


@pytest.mark.parametrize("cuts", [[], [10, 11, 60, 90]])
def test_every_position_is_as_likely_as_every_other(cuts):
    """
    Chi-squared over 80 positions, of which each is expected in a tenth of the samples.

    Its mean is 79 * 0.9 (samples without replacement) and its deviation about 12; the seed is fixed.
    """
    mask = np.ones(120, dtype=np.bool_)
    mask[::3] = False
    generator = random.Random(7)
    counts = np.zeros(120)
    for _ in range(RUNS):
        counts[sampled(mask, 8, cuts, generator.random)] += 1
    assert not counts[::3].any()
    expected = RUNS * 8 / 80
    assert ((counts[mask] - expected) ** 2 / expected).sum() < 79 * 0.9 + 4 * 12
    # No half of the positions is favoured, which chi-squared over many sees badly: 5 deviations.
    assert abs(counts[:60].sum() - RUNS * 4) < 5 * (RUNS * 8 * 0.25) ** 0.5


@pytest.mark.parametrize(("lies", "of"), [(1, 640), (20, 1000), (100, 1000)])
def test_lies_are_found_with_the_probability_that_the_readme_gives(lies, of):
    """1 - (1 - k/n)^64, or a little more since no cluster is taken twice."""
    generator = random.Random(11)
    lying = set(generator.sample(range(of), lies))
    mask = np.ones(of, dtype=np.bool_)
    found = sum(bool(lying & set(sampled(mask, 64, [of // 3], generator.random))) for _ in range(RUNS)) / RUNS
    stated = 1 - (1 - lies / of) ** 64
    deviation = (0.25 / RUNS) ** 0.5
    assert stated - 4 * deviation < found < stated + 0.01 + 4 * deviation


@pytest.mark.parametrize("constant", [0.0, 0.5, 1 - 2**-53])
def test_no_draw_is_too_odd(constant):
    assert len(sampled(np.ones(1000, dtype=np.bool_), 8, [500], lambda: constant)) == 8


def test_a_huge_disk_costs_few_draws():
    """A TiB in clusters of 64 KiB: the draws grow with the logarithm, not with the disk."""
    draws = 0

    def draw() -> float:
        nonlocal draws
        draws += 1
        return generator.random()

    generator = random.Random(5)
    reservoir = Reservoir(64, draw)
    window = np.ones(1 << 16, dtype=np.bool_)
    for number in range(1 << 8):
        reservoir.offer(number << 16, window)
    assert len(reservoir.chosen()) == 64
    assert draws < 64 * 40  # 2 for each that enters, of about 64 * ln(2**24 / 64)
