"""Encoded sets on disk: encodings, targets and a manifest that may be shared; keys and per-image counts never are."""
