"""Incremental backups of QEMU/KVM disks, by dirty bitmaps over NBD, into chains of plain qcow2 files."""

__version__ = "0.1.0"
