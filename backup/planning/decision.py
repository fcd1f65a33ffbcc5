"""
Decisions: whether a disk's next backup may be an incremental, and why not.

A bitmap is named for the point at which it was started, `FAMILY.REPO8.POINT` (design.md, "The bitmap's life").  Only
P's bitmap can continue the newest point P of a disk, and only if that bitmap is in the image itself, recording and
consistent.  Otherwise the backup is a rescan, or a full if the configuration says so.  Without a sound chain the backup
is a full.  Every decision has a reason.  Pure functions over values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from backup.errors import BackupError
from backup.model.chain import Chain
from backup.model.disk import Claim, DiskState, bitmap_name, own_bitmaps
from backup.model.manifest import DataFileClaim, DiskEntry, LowerFile

FULL, INCREMENTAL, RESCAN = "full", "incremental", "rescan"
_FIRST = "first point of this disk"
ITSELF = "this disk"
_UNKNOWN: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Refusal:
    """
    Why a new bitmap could not be started on a disk in this run.

    `lasting`: the reason is a property of the disk, and every run meets it.  `lost` names the bitmap that continued the
    newest point before the attempt; QEMU may have lost it in the attempt.  `final`: no further attempt is made.
    """

    why: str
    lasting: bool
    lost: str | None
    final: bool


@dataclass(frozen=True, slots=True)
class Decision:
    """
    What one disk's backup will be.

    `kind` is FULL or INCREMENTAL.  `fallback`: there is a point to continue, and it cannot be continued as requested.
    `first`: the disk has no point yet.  `parent` is set for an incremental only, together with either `read`, the exact
    name of the bitmap that records what changed, or `rescan`: the whole disk is read and compared with the parent.
    `claimed`: the user stated that the bitmap starts from the parent.  `unavoidable`: the decision is a fallback,
    and every later backup of this disk will be one as well.
    """

    kind: str
    reason: str
    fallback: bool = False
    first: bool = False
    parent: Chain | None = None
    read: str | None = None
    claimed: bool = False
    rescan: bool = False
    unavoidable: bool = False

    @property
    def way(self) -> str:
        """What the backup does, for the user: FULL, INCREMENTAL or RESCAN."""
        return RESCAN if self.rescan else self.kind

    def with_difference(self, differing: int) -> Decision:
        """Add the result of a rescan to the reason: the number of bytes that differ from the parent."""
        assert self.parent is not None
        result = f"{differing} bytes differ from {self.parent.newest.point}" if differing else "nothing differs"
        return replace(self, reason=f"{self.reason}; {result}")


def decide(
    wanted: str,
    state: DiskState,
    last: Chain | BackupError | None,
    *,
    bitmap_family: str | None,
    short_id: str,
    max_chain: int,
    claim: Claim,
    unusable: str = RESCAN,
    was: str | None = None,
    refusal: Refusal | None = None,
    origins: Mapping[str, str] = _UNKNOWN,
) -> Decision:
    """
    Decide one disk's backup.

    Parameters
    ----------
    wanted : str
        FULL, INCREMENTAL or RESCAN.
    last : Chain, BackupError or None
        The chain of the disk's newest point, or the error of a broken chain.  None: the disk has no point.
    unusable : str
        FULL or RESCAN: what an incremental becomes if the chain is sound and no bitmap continues it.
    was : str or None
        The other disk that this image was at the newest point.  The bitmaps of one point have the same name on all
        disks, so that the name alone would be misleading.
    refusal : Refusal or None
        Why a new bitmap could not be started earlier in this run.
    origins : mapping
        For each point other than the newest whose bitmap the disk has: ITSELF for an earlier point of this disk, else
        the point's owner ("machine db1").
    """
    if wanted == FULL:
        return Decision(FULL, "asked for")
    if last is None:
        return Decision(FULL, _FIRST + _later_backups(state, unusable, refusal), first=True)
    if isinstance(last, BackupError):
        return broken(last)
    if state.shows_encryption and state.plaintext != last.newest.entry.source.plaintext:
        return Decision(FULL, _why_not_mixed(state, last), fallback=True)
    if len(last.links) >= max_chain:
        return Decision(FULL, f"the chain has {len(last.links)} points and max_chain is {max_chain}")
    if wanted == RESCAN:
        return Decision(INCREMENTAL, "rescan: asked for", parent=last, rescan=True)
    if not state.owns_bitmaps:
        return _decide_claim(state, last, claim, unusable)
    name = bitmap_name(bitmap_family or "", short_id, last.newest.point)
    why_not = _why_not(state, last.newest.entry, name, short_id, refusal=refusal, origins=origins)
    if why_not is None and was is not None:
        why_not = f"bitmap {name} belongs to disk {was}: {state.path} was that disk at the newest point"
    if why_not is not None:
        never = _never(why_not, state, last.newest.entry, refusal)
        return replace(instead(why_not, last, unusable), unavoidable=never)
    return Decision(INCREMENTAL, f"changes since {last.newest.point}", parent=last, read=name)


def instead(why: str, last: Chain, unusable: str) -> Decision:
    """Decide for the fallback `unusable` (FULL or RESCAN), because no bitmap can continue the chain; `why` not."""
    if unusable == RESCAN:
        return Decision(INCREMENTAL, f"rescan: {why}", fallback=True, parent=last, rescan=True)
    return Decision(FULL, why, fallback=True)


def warned(before: Sequence[DiskEntry], why: str, *, refused: bool) -> bool:
    """
    Tell whether an earlier backup has already warned the user that the disk has no bitmap, with the reason `why`.

    Parameters
    ----------
    before : sequence of DiskEntry
        The disk's entries, from the oldest, of the same kind of source.
    refused : bool
        Whether the reason appeared only in the attempt to add the bitmap.  Then the first full has warned already, and
        the newest point counts: storage can become read-only for a second time.
    """
    if refused:
        return bool(before) and before[-1].bitmap.why_none == why
    return any(entry.bitmap.why_none == why and why in entry.reason and _FIRST not in entry.reason for entry in before)


def broken(error: BackupError) -> Decision:
    """Decide for a full because the chain cannot be continued."""
    return Decision(FULL, f"the chain is broken: {error.message}", fallback=True)


def why_missed(bitmap: str, missed: int) -> str:
    """
    Explain why the bitmap cannot be trusted: `missed` bytes that it reports as clean now read as zeroes although the
    chain holds data there.

    The bitmap has not recorded every change: the disk may have been shrunk and grown again, for example.  The bitmap
    may have missed other changes too, which zeroes do not reveal (traps 4 and 28).
    """
    return (
        f"bitmap {bitmap} missed {missed} bytes that were data and read as zeroes now; was the disk shrunk and grown?"
    )


def why_wrong(bitmap: str, point: str, differing: int, checked: int, offset: int) -> str:
    """
    Explain why the bitmap cannot be trusted: a spot check has read `checked` clusters that the bitmap reports as clean,
    and `differing` of them differ from the chain, the first at byte `offset`.

    The bitmap was cleared, or disabled for a while, or something wrote to the image without QEMU (trap 47).
    """
    return (
        f"bitmap {bitmap} is wrong: {differing} of {checked} clean clusters that were read again differ from {point}, "
        f"the first at byte {offset}"
    )


def _why_not_mixed(state: DiskState, last: Chain) -> str:
    """Explain why one chain cannot hold a disk both as QEMU decrypts it and as the encrypted container."""
    before, now = "the encrypted container", "the disk's plaintext"
    if not state.plaintext:
        before, now = now, before
    return f"point {last.newest.point} holds {before}, and this backup holds {now}: one chain holds only one of them"


def _later_backups(state: DiskState, unusable: str, refusal: Refusal | None) -> str:
    why = state.why_untrusted or state.no_bitmaps or (refusal.why if refusal and refusal.lasting else None)
    later = "a full as well" if unusable == FULL else f"a {unusable}"
    return f"; every later one is {later}: {why}" if why else ""


def _decide_claim(state: DiskState, last: Chain, claim: Claim, unusable: str) -> Decision:
    if claim.bitmap is None:
        return instead("no bitmap of the NBD server was named", last, unusable)
    if claim.since is None:
        why = f"nothing says which point the server's bitmap {claim.bitmap} starts from (--since POINT)"
        return instead(why, last, unusable)
    if state.bitmap(claim.bitmap) is None:
        return instead(f"the NBD server has no bitmap {claim.bitmap}", last, unusable)
    why = f"changes since {claim.since}, by the user's word about bitmap {claim.bitmap}"
    return Decision(INCREMENTAL, why, parent=last, read=claim.bitmap, claimed=True)


def _never(why_not: str, state: DiskState, parent: DiskEntry, refusal: Refusal | None) -> bool:
    """Tell whether every later backup of this disk will meet the same reason, judged by the disk and newest point."""
    if why_not in {state.why_untrusted, state.no_bitmaps}:
        return True
    same = refusal is not None and refusal.lasting and parent.bitmap.why_none == refusal.why
    return same and why_not == _made_without(parent)


def _why_not(
    state: DiskState,
    parent: DiskEntry,
    name: str,
    short_id: str,
    *,
    refusal: Refusal | None,
    origins: Mapping[str, str],
) -> str | None:
    """Explain why the bitmap `name` cannot continue the parent point; None: it can."""
    if state.why_untrusted or state.no_bitmaps:
        return state.why_untrusted or state.no_bitmaps
    if state.lower != parent.source.lower:
        return _lower_changed(parent.source.lower, state.lower)
    if parent.bitmap.started is not None:
        why_not = _data_file_changed(parent.source.trusted_data_file, state)
        if why_not is not None:
            return why_not
    bitmap = state.bitmap(name)
    if refusal is not None and refusal.lost == name and (bitmap is None or bitmap.inconsistent):
        return f"bitmap {name} was lost when QEMU tried to add a new one: {refusal.why}"
    if bitmap is None:
        return _why_missing(state, parent, name, short_id, origins)
    if bitmap.inconsistent:
        return (
            f"bitmap {name} is inconsistent: QEMU was killed or crashed while it recorded, or had no room to store it"
        )
    if not bitmap.recording:
        return f"bitmap {name} is disabled: writes since then were not recorded"
    if bitmap.busy:
        return f"bitmap {name} is in use by another operation in QEMU"
    if not bitmap.persistent and not state.volatile:
        return f"bitmap {name} is not persistent, as pybackup makes it: another program made this one"
    recorded = parent.bitmap.granularity
    if None not in (bitmap.granularity, recorded) and bitmap.granularity != recorded:
        return (
            f"bitmap {name} has a granularity of {bitmap.granularity} bytes, and pybackup's had {recorded}: "
            "another program removed the bitmap and added one of the same name"
        )
    if state.data_file is not None and state.data_file.written:
        return (
            f"something wrote to the external data file {state.data_file.path} after the image {state.path} was closed"
        )
    return None


def _why_missing(state: DiskState, parent: DiskEntry, name: str, short_id: str, origins: Mapping[str, str]) -> str:
    if parent.bitmap.started is None:
        return _made_without(parent)
    if name in state.lower_bitmaps:
        return f"bitmap {name} is only in a backing file: writes to the image above it were not recorded"
    others = own_bitmaps((bitmap.name for bitmap in state.bitmaps), short_id, keep=None)
    if others:
        return min((_why_another(name, other, origins) for other in others), key=lambda ranked: ranked[0])[1]
    if state.volatile:
        return (
            f"bitmap {name} is missing: {state.volatile}, and the machine was restarted; or someone removed the bitmap"
        )
    return (
        f"bitmap {name} is missing: someone removed it, QEMU was killed or had no room to store it, or the image was "
        "replaced by a restore or a copy"
    )


def _why_another(name: str, other: str, origins: Mapping[str, str]) -> tuple[int, str]:
    """Explain why the image has `other`, a bitmap of this repository, and not `name`; with the rank of this reason."""
    point = other.rpartition(".")[2]
    missing = f"bitmap {name} is missing, and the image has {other}"
    if point == name.rpartition(".")[2]:
        return 0, f"{missing}: the newest point started that one, and this run names another bitmap"
    if point not in origins:
        return (
            3,
            f"{missing}, which belongs to no point: it is left from a failed run, or from a copy of the repository",
        )
    if origins[point] == ITSELF:
        return 2, f"{missing}, which an earlier point started: the image was rolled back"
    return 1, f"{missing}: the image has been backed up as {origins[point]} since"


def _made_without(parent: DiskEntry) -> str:
    why = f": {parent.bitmap.why_none}" if parent.bitmap.why_none else ""
    return f"the newest point was made without starting a bitmap{why}"


def _lower_changed(before: tuple[LowerFile, ...], now: tuple[LowerFile, ...]) -> str:
    for old, new in zip(before, now, strict=False):
        if old != new:
            which = old.path if old.path == new.path else f"{old.path} (now {new.path})"
            return f"the backing file {which} changed since the newest point"
    return f"the image's backing chain has {len(now)} files and had {len(before)}"


def _data_file_changed(before: DataFileClaim | None, state: DiskState) -> str | None:
    """Explain why the external data file is not the one of the newest point; None: it is."""
    now = state.data_file_claim
    if before is None and now is None:
        return None
    if before is None or now is None:
        return f"the image has {_data_file(now)}, and had {_data_file(before)} at the newest point"
    if before.path != now.path:
        return f"the external data file is {now.path} now, and was {before.path} at the newest point"
    if before.file_id != now.file_id:
        return (
            f"the external data file {now.path} was replaced since the newest point ({before.file_id}, now "
            f"{now.file_id})"
        )
    return None


def _data_file(claim: DataFileClaim | None) -> str:
    return "no external data file" if claim is None else f"the external data file {claim.path}"
