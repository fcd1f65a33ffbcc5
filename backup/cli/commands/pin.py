"""The commands pin and unpin."""

from __future__ import annotations

from dataclasses import dataclass

from backup.cli import find, json_output, output, places
from backup.cli.context import options
from backup.cli.parameters import IdentityFile, PointName, Repo


def pin(manifest: PointName, repo: Repo = None, identity: IdentityFile = None) -> None:
    """Protect a point from prune and remove."""
    _set_pin(manifest, repo, identity, pinned=True)


def unpin(manifest: PointName, repo: Repo = None, identity: IdentityFile = None) -> None:
    """Allow prune and remove to remove a point again."""
    _set_pin(manifest, repo, identity, pinned=False)


def _set_pin(manifest: str, repo: str | None, identity: str | None, *, pinned: bool) -> None:
    from backup.operations import prune

    machine, point = find.point(manifest, places.named(repo, identity))
    changed = prune.set_pin(machine, point.point, pinned=pinned)
    if options.json:
        json_output.write(PinDocument(point.machine, point.point, pinned, changed))
    elif not options.quiet:
        state = "pinned" if pinned else "not pinned"
        output.line(f"point {point.point} of machine {point.machine} is {state}{'' if changed else ' already'}")


@dataclass(frozen=True, slots=True)
class PinDocument:
    """A point that is pinned or not; `changed` tells whether this command changed that."""

    machine: str
    point: str
    pinned: bool
    changed: bool
