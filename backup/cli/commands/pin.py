"""The commands pin and unpin."""

from __future__ import annotations

from backup.cli import find
from backup.cli import output as render
from backup.cli.context import options
from backup.cli.find import folder_of
from backup.cli.parameters import (
    PointName,
    Repo,
)


def pin(manifest: PointName, repo: Repo = None) -> None:
    """Protect a point from prune and remove."""
    _set_pin(manifest, repo, pinned=True)


def unpin(manifest: PointName, repo: Repo = None) -> None:
    """Let prune and remove take a point again."""
    _set_pin(manifest, repo, pinned=False)


def _set_pin(manifest: str, repo: str | None, *, pinned: bool) -> None:
    from backup.operations import prune as pruning

    machine, found = find.point(manifest, folder_of(repo))
    changed = pruning.set_pin(machine, found.point, pinned=pinned)
    if options.json:
        render.document({"machine": found.machine, "point": found.point, "pinned": pinned, "changed": changed})
    elif not options.quiet:
        state = "pinned" if pinned else "not pinned"
        render.line(f"point {found.point} of machine {found.machine} is {state}{'' if changed else ' already'}")
