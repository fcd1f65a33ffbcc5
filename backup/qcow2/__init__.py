"""The data file: a plain qcow2 that pybackup writes, reads and checks itself (FORMAT.md, "The data file")."""

from backup.qcow2.check import check
from backup.qcow2.codec import Codec, frame_length
from backup.qcow2.layout import COMPRESSED, PART, RAW, UNALLOCATED, ZERO, Image, require_writable
from backup.qcow2.parts import PartSink
from backup.qcow2.reader import Reader
from backup.qcow2.writer import Writer

__all__ = [
    "COMPRESSED",
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
    "require_writable",
]
