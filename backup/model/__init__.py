"""What a backup is, as values without I/O: points and their manifests, chains, disks, bitmaps, extents and names."""
