"""Defences: one per file, pure given their randomness."""
