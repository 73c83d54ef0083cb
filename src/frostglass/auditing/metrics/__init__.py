"""Metrics: one file each, one value per image, after matching."""
