"""Which backup is taken and why: one test for each rule, over values alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from backup.errors import Damaged
from backup.model.chain import Chain, Link
from backup.model.disk import Bitmap, Claim, DiskState, ExternalFile, bitmap_name, own_bitmaps
from backup.model.manifest import (
    BitmapRecord,
    ByteCounts,
    DataFile,
    DataFileClaim,
    DiskEntry,
    LowerFile,
    Parent,
    SourceRecord,
)
from backup.planning.decision import FULL, INCREMENTAL, ITSELF, RESCAN, Decision, Refusal, decide, warned

P = "20261122T010000Z-1f3a09c1"
OLDER = "20261121T010000Z-00000001"
REPO8 = "abcdef01"
NAME = f"b1.{REPO8}.{P}"
BASE = LowerFile("/base.qcow2", 1000, 5, 7)
NO_CLAIM = Claim(None, None)
SOUND = DiskState(kind="image", path="/disk.qcow2", format="qcow2", size=4096, bitmaps=(Bitmap(NAME, 65536),))


def entry(*, started: str | None = NAME, lower: tuple[LowerFile, ...] = (), parent: Parent | None = None) -> DiskEntry:
    return DiskEntry(
        name="disk",
        kind=FULL if parent is None else INCREMENTAL,
        reason="",
        size=4096,
        identity="1" * 32,
        parent=parent,
        bitmap=BitmapRecord(None, started, 65536, claimed=False),
        data=DataFile("disk.x.qcow2", 1, "disk.x.b3", "0" * 64, 65536, "zstd:1"),
        bytes=ByteCounts(0, 0, 0, 0, 1),
        source=SourceRecord("image", "/disk.qcow2", "qcow2", "crash", "7.2", lower),
    )


def chain(newest: DiskEntry | None = None, length: int = 1) -> Chain:
    newest = newest or entry()
    older = tuple(Link(OLDER, length - n, newest) for n in range(1, length))
    return Chain("disk", (Link(P, length, newest), *older))


def decided(state: DiskState = SOUND, last: Chain | Damaged | None = None, **changed: object) -> Decision:
    settings = {"bitmap_family": "b1", "short_id": REPO8, "max_chain": 100, "claim": NO_CLAIM, "wanted": INCREMENTAL}
    settings |= changed
    wanted = settings.pop("wanted")
    found = decide(wanted, state, last, unusable=FULL, **settings)
    require_a_rescan_in_place_of_a_full(found, decide(wanted, state, last, unusable=RESCAN, **settings), last)
    return found


def require_a_rescan_in_place_of_a_full(full: Decision, found: Decision, last: Chain | Damaged | None) -> None:
    """Where a full is taken for want of a bitmap, and the chain is sound, the other word makes it a rescan."""
    if full.fallback and isinstance(last, Chain):
        expected = Decision(INCREMENTAL, f"rescan: {full.reason}", fallback=True, parent=last, rescan=True)
        assert found == replace(expected, unavoidable=full.unavoidable)
    else:
        assert (found.kind, found.fallback, found.rescan) == (full.kind, full.fallback, full.rescan)
    assert (full.way, found.way) in {(FULL, FULL), (FULL, RESCAN), (INCREMENTAL, INCREMENTAL), (RESCAN, RESCAN)}


def require_fallback(found: Decision, *words: str) -> None:
    assert (found.kind, found.fallback, found.parent, found.read) == (FULL, True, None, None)
    for word in words:
        assert word in found.reason


def test_a_sound_bitmap_of_another_disk_is_not_continued():
    require_fallback(decided(last=chain(), was="vdb"), NAME, "disk vdb", "/disk.qcow2")


def test_a_sound_bitmap_of_the_newest_point_is_continued():
    last = chain()
    assert decided(SOUND, last) == Decision(INCREMENTAL, f"changes since {P}", parent=last, read=NAME)


def test_a_full_that_was_asked_for_is_no_fallback_however_sound_the_bitmap():
    assert decided(SOUND, chain(), wanted=FULL) == Decision(FULL, "asked for")


def test_the_first_point_is_a_full_and_no_fallback():
    assert decided(SOUND, None) == Decision(FULL, "first point of this disk", first=True)


@pytest.mark.parametrize("which", ["no_bitmaps", "unseen_writes"])
def test_the_first_point_of_a_disk_without_bitmaps_says_that_all_others_are_fulls(which):
    found = decided(replace(SOUND, bitmaps=(), **{which: "it is raw"}), None)
    assert (found.kind, found.fallback) == (FULL, False)
    assert found.reason == "first point of this disk; every later one is a full as well: it is raw"


def test_a_broken_chain_is_a_fallback_with_what_is_broken():
    require_fallback(decided(SOUND, Damaged("file x is missing", hint="")), "chain is broken", "file x is missing")


@pytest.mark.parametrize(("length", "kind"), [(2, INCREMENTAL), (3, FULL), (4, FULL)])
def test_a_chain_ends_at_max_chain_and_that_is_no_fallback(length, kind):
    found = decided(SOUND, chain(length=length), max_chain=3)
    assert (found.kind, found.fallback) == (kind, False)
    if kind == FULL:
        assert found.reason == f"the chain has {length} points and max_chain is 3"


@pytest.mark.parametrize("which", ["no_bitmaps", "unseen_writes"])
def test_an_image_whose_bitmaps_prove_nothing_is_read_whole_even_if_one_is_there(which):
    found = decided(replace(SOUND, **{which: "it is so"}), chain())
    require_fallback(found, "it is so")
    assert found.unavoidable


# External data files

RAW = ExternalFile("/disk.raw", "inode 7")
BEHIND = replace(SOUND, data_file=RAW, trusts_data_file=True)


def trusting(path: str = "/disk.raw", file_id: str = "inode 7") -> Chain:
    """A chain whose newest point records the user's statement about this data file."""
    found = entry()
    claim = DataFileClaim(path, file_id)
    return chain(replace(found, source=replace(found.source, trusted_data_file=claim)))


def test_the_bitmap_of_a_trusted_data_file_counts():
    assert decided(BEHIND, trusting()).read == NAME
    assert BEHIND.data_file_claim == DataFileClaim("/disk.raw", "inode 7")


@pytest.mark.parametrize("last", [chain(), trusting()])
def test_without_the_users_statement_a_data_file_makes_every_backup_read_everything(last):
    state = replace(BEHIND, trusts_data_file=False)
    found = decided(state, last)
    require_fallback(found, "external data file, whose writes no bitmap need see")
    assert (found.unavoidable, state.data_file_claim) == (True, None)


def test_a_data_file_that_cannot_be_watched_is_not_trusted():
    state = replace(BEHIND, data_file=ExternalFile("disk.raw", None))
    found = decided(state, trusting())
    require_fallback(found, "disk.raw", "by an absolute path")
    assert (found.unavoidable, state.data_file_claim) == (True, None)


def test_another_reason_counts_although_the_data_file_is_trusted():
    require_fallback(decided(replace(BEHIND, unseen_writes="it is shared"), trusting()), "it is shared")


@pytest.mark.parametrize(
    ("state", "last", "reason"),
    [
        (BEHIND, trusting(file_id="inode 8"), "was replaced since the newest point (inode 8, now inode 7)"),
        (BEHIND, trusting("/other.raw"), "the external data file is /disk.raw now, and was /other.raw"),
        (BEHIND, chain(), "the image has the external data file /disk.raw, and had no external data file"),
        (SOUND, trusting(), "the image has no external data file, and had the external data file /disk.raw"),
        (
            replace(BEHIND, data_file=replace(RAW, written=True)),
            trusting(),
            "something wrote to the external data file /disk.raw after the image /disk.qcow2 was closed",
        ),
    ],
)
def test_a_data_file_that_is_not_what_it_was_makes_one_backup_read_everything(state, last, reason):
    found = decided(state, last)
    require_fallback(found, reason)
    assert not found.unavoidable


def test_a_point_without_a_bitmap_says_so_although_its_data_file_was_not_trusted():
    found = decided(replace(BEHIND, bitmaps=()), chain(entry(started=None)))
    require_fallback(found, "the newest point was made without starting a bitmap")


def test_a_killed_qemu_is_the_reason_rather_than_that_its_data_file_is_newer():
    bitmap = Bitmap(NAME, 65536, inconsistent=True)
    found = decided(replace(BEHIND, data_file=replace(RAW, written=True), bitmaps=(bitmap,)), trusting())
    require_fallback(found, "is inconsistent")


# Disks without bitmaps

READ_ONLY = "the image cannot be opened for writing"
REFUSED = Refusal(READ_ONLY, lasting=True, lost=None, final=True)


def without(why: str | None, reason: str = "rescan: it is so") -> DiskEntry:
    return replace(entry(), reason=reason, bitmap=BitmapRecord(None, None, None, claimed=False, why_none=why))


def test_an_image_that_can_hold_no_bitmap_is_never_anything_else():
    assert decided(replace(SOUND, no_bitmaps="it is raw"), chain()).unavoidable
    assert not decided(replace(SOUND, bitmaps=()), chain()).unavoidable


def test_a_read_only_image_is_never_anything_else_once_a_point_was_made_without_a_bitmap():
    nothing = replace(SOUND, bitmaps=())
    found = decided(nothing, chain(without(READ_ONLY)), refusal=REFUSED)
    assert (found.unavoidable, READ_ONLY in found.reason) == (True, True)
    for refusal in (None, replace(REFUSED, why="other"), replace(REFUSED, lasting=False)):
        assert not decided(nothing, chain(without(READ_ONLY)), refusal=refusal).unavoidable
    changed = decided(replace(nothing, lower=(BASE,)), chain(without(READ_ONLY)), refusal=REFUSED)
    assert (changed.unavoidable, "backing chain" in changed.reason) == (False, True)


def test_a_bitmap_that_an_image_keeps_is_continued_although_it_takes_no_new_one():
    assert decided(SOUND, chain(), refusal=REFUSED).read == NAME
    assert decided(SOUND, chain(), refusal=replace(REFUSED, lost=NAME)).read == NAME


@pytest.mark.parametrize("left", [(), (Bitmap(NAME, 65536, inconsistent=True),)])
def test_a_bitmap_that_the_attempt_to_add_one_cost_is_not_called_removed_or_crashed(left):
    lost = Refusal("no room", lasting=False, lost=NAME, final=False)
    require_fallback(decided(replace(SOUND, bitmaps=left), chain(), refusal=lost), "was lost", "no room")
    other = decided(replace(SOUND, bitmaps=left), chain(), refusal=replace(lost, lost=None))
    assert "was lost" not in other.reason


def test_the_first_point_of_a_read_only_disk_says_what_later_ones_are():
    assert decided(SOUND, None, refusal=REFUSED).reason.endswith(f"every later one is a full as well: {READ_ONLY}")
    assert "later" not in decided(SOUND, None, refusal=replace(REFUSED, lasting=False)).reason


def test_a_disk_without_bitmaps_warns_once_for_each_reason():
    first = without("it is raw", "first point of this disk; every later one is a rescan: it is raw")
    later = without("it is raw", "rescan: it is raw; nothing differs")
    full = without("it is raw", "asked for")
    assert not warned([], "it is raw", refused=False)
    assert not warned([first, full], "it is raw", refused=False)
    assert warned([first, later, full], "it is raw", refused=False)
    assert not warned([first, later], "it is of version 2", refused=False)


def test_a_read_only_image_warns_again_when_a_bitmap_was_started_meanwhile():
    assert warned([without(READ_ONLY, "asked for")], READ_ONLY, refused=True)
    assert not warned([], READ_ONLY, refused=True)
    assert not warned([without(READ_ONLY), entry()], READ_ONLY, refused=True)


def test_a_missing_bitmap_is_a_fallback():
    require_fallback(decided(replace(SOUND, bitmaps=()), chain()), NAME, "missing")


@pytest.mark.parametrize("was", [True, False])
@pytest.mark.parametrize("wanted", [INCREMENTAL, RESCAN])
def test_a_chain_holds_plaintext_or_the_container_and_never_both(was, wanted):
    """A full, whatever else is wanted where no bitmap continues a chain."""
    newest = entry()
    last = chain(replace(newest, source=replace(newest.source, plaintext=was)))
    settings = {"bitmap_family": "b1", "short_id": REPO8, "max_chain": 100, "claim": NO_CLAIM}
    for unusable in (FULL, RESCAN):
        found = decide(wanted, replace(SOUND, plaintext=not was), last, unusable=unusable, **settings)
        require_fallback(found, P, "plaintext", "container")
    assert decide(wanted, replace(SOUND, plaintext=was), last, **settings).kind == INCREMENTAL


@pytest.mark.parametrize("recorded", [4096, 1 << 20])
def test_a_bitmap_of_another_granularity_than_the_recorded_one_was_made_by_another_program(recorded):
    changed = entry()
    newest = replace(changed, bitmap=replace(changed.bitmap, granularity=recorded))
    require_fallback(decided(SOUND, chain(newest)), NAME, "granularity of 65536", str(recorded), "another program")


@pytest.mark.parametrize(("shown", "recorded"), [(None, 65536), (65536, None)])
def test_a_granularity_that_is_not_known_proves_nothing(shown, recorded):
    changed = entry()
    newest = replace(changed, bitmap=replace(changed.bitmap, granularity=recorded))
    assert decided(replace(SOUND, bitmaps=(Bitmap(NAME, shown),)), chain(newest)).read == NAME


@pytest.mark.parametrize(
    "other",
    [
        f"b1.{REPO8}.{OLDER}",
        f"b2.{REPO8}.{P}",
        f"b1.00000000.{P}",
        f"b1.{REPO8}.{P}x",
        f"xb1.{REPO8}.{P}",
        f"b1.{REPO8}",
        "b1",
        NAME.upper(),
    ],
)
def test_only_the_exact_name_continues_a_point(other):
    require_fallback(decided(replace(SOUND, bitmaps=(Bitmap(other, 65536),)), chain()), NAME, "missing")


ANOTHER = Bitmap(f"b1.{REPO8}.{OLDER}", 65536)


@pytest.mark.parametrize(
    ("origins", "words"),
    [
        ({OLDER: ITSELF}, "an earlier point started: the image was rolled back"),
        ({OLDER: "disk vdb of this machine"}, "the image has been backed up as disk vdb of this machine since"),
        ({OLDER: "machine db1"}, "the image has been backed up as machine db1 since"),
        ({}, "belongs to no point"),
    ],
)
def test_another_of_our_bitmaps_is_called_a_rollback_only_where_it_is_one(origins, words):
    found = decided(replace(SOUND, bitmaps=(ANOTHER,)), chain(), origins=origins)
    require_fallback(found, f"{NAME} is missing, and the image has {ANOTHER.name}", words)
    assert ("rolled back" in found.reason) == (origins == {OLDER: ITSELF})


def test_a_bitmap_of_the_newest_point_and_another_family_explains_most():
    named = Bitmap(f"b2.{REPO8}.{P}", 65536)
    found = decided(replace(SOUND, bitmaps=(ANOTHER, named)), chain(), origins={OLDER: ITSELF})
    require_fallback(found, named.name, "this run names another bitmap")


def test_a_bitmap_that_is_missing_without_a_trace_is_no_rollback():
    assert "rolled back" not in decided(replace(SOUND, bitmaps=()), chain()).reason


def test_an_inconsistent_bitmap_is_a_fallback_even_while_it_looks_enabled():
    state = replace(SOUND, bitmaps=(Bitmap(NAME, 65536, recording=True, inconsistent=True),))
    require_fallback(decided(state, chain()), NAME, "inconsistent")


def test_a_disabled_bitmap_is_a_fallback():
    state = replace(SOUND, bitmaps=(Bitmap(NAME, 65536, recording=False),))
    require_fallback(decided(state, chain()), NAME, "disabled")


def test_a_bitmap_that_another_operation_holds_is_a_fallback():
    state = replace(SOUND, bitmaps=(Bitmap(NAME, 65536, busy=True),))
    require_fallback(decided(state, chain()), NAME, "in use by another operation")


def test_a_bitmap_in_a_backing_file_only_is_a_fallback():
    lower = (BASE,)
    state = replace(SOUND, bitmaps=(), lower=lower, lower_bitmaps=(NAME,))
    require_fallback(decided(state, chain(entry(lower=lower))), NAME, "backing file")


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ((BASE,), (replace(BASE, mtime_ns=6),)),
        ((BASE,), (replace(BASE, size=1001),)),
        ((BASE,), (replace(BASE, inode=8),)),
        ((BASE,), (replace(BASE, path="/other.qcow2"),)),
        ((BASE,), ()),
        ((), (BASE,)),
        ((BASE,), (BASE, BASE)),
        ((BASE, BASE), (BASE, replace(BASE, mtime_ns=6))),
    ],
)
def test_any_change_below_the_image_is_a_fallback_however_sound_its_bitmap(before, now):
    require_fallback(decided(replace(SOUND, lower=now), chain(entry(lower=before))), "backing")


def test_the_same_files_below_the_image_are_no_reason_for_a_full():
    assert decided(replace(SOUND, lower=(BASE,)), chain(entry(lower=(BASE,)))).kind == INCREMENTAL


def test_a_point_that_started_no_bitmap_says_so():
    found = decided(replace(SOUND, bitmaps=()), chain(entry(started=None)))
    require_fallback(found, "without starting a bitmap")


def test_without_a_family_nothing_is_continued():
    require_fallback(decided(SOUND, chain(), bitmap_family=None))


NBD = DiskState(
    kind="nbd",
    path="nbd://host",
    format="raw",
    size=4096,
    bitmaps=(Bitmap("theirs"),),
    owns_bitmaps=False,
    shows_encryption=False,
)


def test_a_servers_bitmap_is_read_on_the_users_word():
    found = decided(NBD, chain(), claim=Claim("theirs", P))
    assert (found.kind, found.read, found.claimed, found.fallback) == (INCREMENTAL, "theirs", True, False)
    assert "by the user's word" in found.reason


@pytest.mark.parametrize(
    ("state", "claim", "word"),
    [
        (NBD, Claim(None, None), "no bitmap"),
        (NBD, Claim("theirs", None), "--since"),
        (NBD, Claim("absent", P), "has no bitmap absent"),
        (replace(NBD, bitmaps=()), Claim("theirs", P), "has no bitmap theirs"),
    ],
)
def test_a_servers_bitmap_without_the_users_word_or_absent_is_a_fallback(state, claim, word):
    require_fallback(decided(state, chain(), claim=claim), word)


def test_our_bitmaps_are_those_of_exactly_our_form_and_repository():
    ours = [bitmap_name(family, REPO8, point) for family in ("b1", "b2", "x-y_z") for point in (P, OLDER)]
    foreign = [
        "b1",
        f"b1.{REPO8}",
        f"b1.{REPO8}.",
        f".{REPO8}.{P}",
        f"b1.00000000.{P}",
        f"b1.{REPO8}.{P}0",
        f"b1.{REPO8}.{P}\n",
        f"a.b1.{REPO8}.{P}",
        f"-b.{REPO8}.{P}",
        f"b1.{REPO8}.{P.lower()}",
        f"b1-{REPO8}-{P}",
    ]
    assert own_bitmaps(foreign + ours, REPO8, keep=None) == ours
    assert own_bitmaps(ours, REPO8, keep=ours[3]) == [*ours[:3], *ours[4:]]


def test_an_id_with_signs_of_a_pattern_matches_only_itself():
    assert own_bitmaps([f"b1.abcdefgh.{P}"], "........", keep=None) == []


# Rescans


@pytest.mark.parametrize("state", [SOUND, NBD, replace(SOUND, bitmaps=(), no_bitmaps="it is raw", lower=(BASE,))])
def test_a_rescan_that_was_asked_for_needs_a_sound_chain_and_nothing_else(state):
    last = chain()
    found = decided(state, last, wanted=RESCAN, bitmap_family=None)
    assert found == Decision(INCREMENTAL, "rescan: asked for", parent=last, rescan=True)
    require_fallback(decided(state, Damaged("file x is missing", hint=""), wanted=RESCAN), "file x is missing")
    assert decided(state, chain(length=3), wanted=RESCAN, max_chain=3).kind == FULL
    assert decided(state, None, wanted=RESCAN).reason.startswith("first point")


def test_a_rescan_says_what_it_found():
    found = decided(SOUND, chain(), wanted=RESCAN)
    assert found.with_difference(0).reason == "rescan: asked for; nothing differs"
    assert found.with_difference(65536) == replace(found, reason=f"rescan: asked for; 65536 bytes differ from {P}")
