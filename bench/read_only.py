"""
A full with its output thrown away: plan, read and hash, and store nothing.

    read_only.py URI

Compression is none; each part of the data file that would be is hashed with BLAKE3, as it is when it is stored.
"""

from __future__ import annotations

import sys
import threading

from backup.cli import process
from backup.model import digests

process.prepare()  # as the program does before it imports numpy, whose OpenBLAS else starts threads

from backup import qcow2  # noqa: E402 - see above
from backup.engine import copier  # noqa: E402
from backup.engine.copy_settings import CopySettings  # noqa: E402
from backup.model.extents import Offsets  # noqa: E402
from backup.nbd.export import Export  # noqa: E402
from backup.planning import plan  # noqa: E402

CLUSTER = 65536


class HashedAway:
    """Hashes parts and forgets them (a `qcow2.PartSink`)."""

    def put(self, number: int, data: bytes | bytearray | memoryview) -> None:  # noqa: ARG002 - the sink's signature
        """Take part `number`."""
        digests.digest(data)


class Sink:
    """What the copier writes to (a `copier.Sink`)."""

    batch = qcow2.PART

    def __init__(self, size: int) -> None:
        self.writer = qcow2.Writer(qcow2.Image(size, CLUSTER, None, zstd=False), HashedAway(), level=None)
        self.zero = self.writer.zero
        self.completed_below = self.writer.completed_below
        self._codecs = threading.local()

    def write(self, clusters: Offsets, data: memoryview) -> int:
        """Take whole clusters with these numbers; returns how many of them are all zeroes."""
        if not hasattr(self._codecs, "codec"):
            self._codecs.codec = qcow2.Codec(CLUSTER, None)
        return self.writer.write_scattered(clusters, data, self._codecs.codec)


def main() -> None:
    """Read the export that the first argument names."""
    settings = CopySettings()
    with Export(sys.argv[1]) as export:
        planned = plan.plan_full(export, CLUSTER)
        sink = Sink(planned.size)
        copier.copy_disk(planned, export, sink, settings, progress=lambda _done: None)
        sink.writer.finish()


if __name__ == "__main__":
    main()
