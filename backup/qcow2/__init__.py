"""The data file: a plain qcow2 file that pybackup writes, reads and checks itself (FORMAT.md, "The data file")."""

from backup.qcow2.check import check
from backup.qcow2.codec import Codec, frame_length, frame_lengths
from backup.qcow2.layout import (
    COMPRESSED,
    HEADER_BYTES,
    PART,
    RAW,
    UNALLOCATED,
    ZERO,
    Image,
    parse_header,
    require_writable,
    spans,
)
from backup.qcow2.parts import PartSink
from backup.qcow2.reader import Reader
from backup.qcow2.writer import Writer

__all__ = [
    "COMPRESSED",
    "HEADER_BYTES",
    "PART",
    "RAW",
    "UNALLOCATED",
    "ZERO",
    "Codec",
    "Image",
    "PartSink",
    "Reader",
    "Writer",
    "check",
    "frame_length",
    "frame_lengths",
    "parse_header",
    "require_writable",
    "spans",
]
