"""
Plan an incremental and print its totals and the seconds that planning took.

    plan_only.py URI BITMAP

The check of zeroes is off, so that allocation is asked only where something is dirty.
"""

from __future__ import annotations

import sys
import time

from backup.nbd.export import Export
from backup.planning import plan


def main() -> None:
    """Plan."""
    uri, bitmap = sys.argv[1:]
    with Export(uri, [bitmap]) as export:
        start = time.perf_counter()
        planned = plan.plan_incremental(export, 65536, bitmap, parent_size=export.size, chain=None)
        print(f"{time.perf_counter() - start:.3f} {planned.totals}")


if __name__ == "__main__":
    main()
