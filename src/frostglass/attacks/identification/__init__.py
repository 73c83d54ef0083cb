"""Attacks that choose among candidates instead of drawing a picture."""
