"""Gradient inversion: one machine (terms, rules, spaces), many recipes."""
