"""Checkpoints: written whole or not at all, digested, kept by score, exported for every engine."""
