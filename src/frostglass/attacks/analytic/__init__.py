"""Exact attacks: algebra instead of optimisation."""
