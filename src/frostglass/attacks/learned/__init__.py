"""Attacks that learn on images of their own before they look at the message."""
