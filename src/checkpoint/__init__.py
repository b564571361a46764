"""Checkpoints: when to save, what to keep, how they reach the disk, and how they come back."""
