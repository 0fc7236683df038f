"""Adapter folders: their format, the fingerprint of the base, saving, loading, and checkpoints of a Trainer."""
