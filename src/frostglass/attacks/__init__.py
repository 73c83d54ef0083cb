"""Attacks: each registers itself; none imports a defence, none opens ground truth, none contains the loop."""
