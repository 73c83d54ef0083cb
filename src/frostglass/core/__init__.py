"""The nouns, the randomness, the registry and the one loop: everything else stands on these.

Imports nothing of frostglass but itself, and nothing outside torch, numpy and jaxtyping.
"""
