"""NBD connections through libnbd: exports to read from, and servers to restore to."""
