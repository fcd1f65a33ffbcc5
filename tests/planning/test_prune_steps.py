"""Which steps a prune takes, by values alone."""

from dataclasses import replace

import pytest
from forge import entry, manifest, point_id
from hypothesis import given
from hypothesis import strategies as st

from backup.planning.prune_steps import Remove, Rewrite, thin
from backup.planning.retention import Batch

NOW = Batch(1)


def machine(*points):
    """Points in order, each a list of (disk, number of the parent point or None[, stored bytes])."""
    made = {}
    for number, disks in enumerate(points, start=1):
        entries = []
        for name, parent, *stored in disks:
            found = entry(number, parent, name=name)
            entries.append(replace(found, data=replace(found.data, size=stored[0] if stored else 100)))
        made[point_id(number)] = manifest(number, *entries)
    return made


def line(*stored):
    """One disk, a full and incrementals, with these stored bytes."""
    return machine(*([("vda", number or None, size)] for number, size in enumerate(stored)))


def numbers(points):
    return {int(point[-8:], 16) for point in points}


def steps(found):
    """Steps in short: ("rewrite", point, disk, merged, onto) and ("remove", point)."""
    short = []
    for step in found.steps:
        match step:
            case Rewrite(point, disk, merged, onto):
                names = [int(name[-8:], 16) for name in (point, *merged)]
                short.append(("rewrite", names[0], disk, names[1:], onto and int(onto[-8:], 16)))
            case Remove(point):
                short.append(("remove", int(point[-8:], 16)))
    return short


def keep(*points):
    return {point_id(number) for number in points}


def test_in_the_middle_the_next_takes_over():
    assert steps(thin(line(1000, 1, 1, 1), keep(1, 4), NOW)) == [
        ("rewrite", 4, "vda", [3, 2], 1),
        ("remove", 3),
        ("remove", 2),
    ]


def test_in_front_the_next_becomes_a_full():
    assert steps(thin(line(1000, 1, 1, 1), keep(3, 4), NOW)) == [
        ("rewrite", 3, "vda", [2, 1], None),
        ("remove", 2),
        ("remove", 1),
    ]


def test_what_nothing_builds_on_goes_first_and_rewrites_nothing():
    points = machine([("vda", None)], [("vda", 1)], [("vda", None)], [("vda", 3)])
    assert steps(thin(points, keep(3, 4), NOW)) == [("remove", 2), ("remove", 1)]
    assert steps(thin(points, keep(1, 3, 4), NOW)) == [("remove", 2)]
    assert steps(thin(points, keep(2, 4), NOW)) == [
        ("rewrite", 2, "vda", [1], None),
        ("remove", 1),
        ("rewrite", 4, "vda", [3], None),
        ("remove", 3),
    ]


def test_nothing_to_do_is_nothing():
    assert steps(thin(line(1, 1, 1), keep(1, 2, 3), NOW)) == []
    assert steps(thin({}, set(), NOW)) == []


def test_a_point_goes_for_all_its_disks_at_once():
    points = machine([("vda", None), ("vdb", None)], [("vda", 1)], [("vdb", 1)], [("vda", 2), ("vdb", 3)])
    assert steps(thin(points, keep(3, 4), NOW)) == [
        ("rewrite", 3, "vdb", [1], None),
        ("rewrite", 4, "vda", [2, 1], None),
        ("remove", 2),
        ("remove", 1),
    ]


def test_two_that_build_on_one_point_take_it_over_both():
    points = machine([("vda", None)], [("vda", 1)], [("vda", 2)], [("vda", 2)])
    assert steps(thin(points, keep(1, 3, 4), NOW)) == [
        ("rewrite", 3, "vda", [2], 1),
        ("rewrite", 4, "vda", [2], 1),
        ("remove", 2),
    ]


@pytest.mark.parametrize(
    ("stored", "first_kept", "batch", "waits"),
    [
        ((1000, 1, 1, 1, 1), 2, Batch(3), True),
        ((1000, 1, 1, 1, 1), 3, Batch(3), True),
        ((1000, 1, 1, 1, 1), 4, Batch(3), False),
        ((1000, 200, 50, 1, 1), 4, Batch(7, 25), True),  # exactly the share
        ((1000, 200, 51, 1, 1), 4, Batch(7, 25), False),
        ((1000, 200, 999, 1, 1), 3, Batch(7, 25), True),  # what stays does not count
        ((1000, 1, 1, 1, 1), 3, Batch(7, 0), False),
    ],
)
def test_a_full_is_rewritten_when_enough_can_go(stored, first_kept, batch, waits):
    found = thin(line(*stored), keep(*range(first_kept, 6)), batch)
    front = set(range(1, first_kept))
    assert (numbers(found.waiting), numbers(found.going)) == ((front, set()) if waits else (set(), front))
    assert bool(found.steps) != waits


def test_a_middle_does_not_wait_and_is_no_part_of_a_front_that_does():
    found = thin(line(1000, 1, 1, 1, 1, 1), keep(2, 5, 6), Batch(7))
    assert numbers(found.waiting) == {1}
    assert steps(found) == [("rewrite", 5, "vda", [4, 3], 2), ("remove", 4), ("remove", 3)]


def test_what_waits_for_one_disk_stays_for_the_others():
    points = machine(
        [("vda", None, 1000), ("vdb", None, 10)], [("vda", 1, 1), ("vdb", 1, 10)], [("vda", 2), ("vdb", 2)]
    )
    found = thin(points, keep(3), Batch(7, 25))
    assert numbers(found.waiting) == {1, 2}
    assert steps(found) == []


HISTORIES = st.lists(st.lists(st.sampled_from(["no", "full", "incremental"]), min_size=2, max_size=2), max_size=12)


def made_of(history):
    newest, points = {}, []
    for wanted in history:
        disks = []
        for name, kind in zip(("vda", "vdb"), wanted, strict=True):
            if kind != "no":
                disks.append((name, newest.get(name) if kind == "incremental" else None))
        if disks:
            points.append(disks)
            newest.update({name: len(points) for name, _ in disks})
    return machine(*points)


@given(HISTORIES, st.sets(st.integers(1, 12)), st.integers(1, 5))
def test_after_any_step_everything_that_is_left_has_its_parent(history, kept, least):
    points = made_of(history)
    kept_points = {point_id(number) for number in kept} & set(points)
    for name in ("vda", "vdb"):
        kept_points.update(sorted(point for point, found in points.items() if found.disk(name))[-1:])
    found = thin(points, kept_points, Batch(least, 1000))
    assert found.going | found.waiting | kept_points == set(points)
    assert not found.going & (found.waiting | kept_points)
    parents = {
        (point, disk.name): disk.parent and disk.parent.point for point, held in points.items() for disk in held.disks
    }
    for step in found.steps:
        match step:
            case Rewrite(point, disk, merged, onto):
                below = parents[point, disk]
                for name in merged:  # what is taken over is all that lies between
                    assert below == name
                    assert name in found.going
                    below = parents[name, disk]
                assert below == onto
                assert point not in found.going
                parents[point, disk] = onto
            case Remove(point):
                assert point in found.going
                assert point not in parents.values()
                parents = {key: parent for key, parent in parents.items() if key[0] != point}
    assert {point for point, _ in parents} == set(points) - found.going
