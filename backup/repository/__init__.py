"""Points in a storage: a machine's manifests and data files are published, opened, verified and replaced here."""
