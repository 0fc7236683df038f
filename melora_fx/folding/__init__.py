"""Merges adapters into weights, in memory and in checkpoints on disk, and reports what rounding takes."""
