"""Checkpoints with checksums: saved atomically, read without running code, and loaded on any number of ranks."""
