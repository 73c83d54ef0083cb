"""`frostglass cost`: what a setting of InstaHide claims, costs and does not give."""

from __future__ import annotations

import json

import click

from frostglass.core.errors import BadInput


@click.command("cost", short_help="What a set claims to cost an attacker, and what it does")
@click.option("--k", default=4, show_default=True, help="Images in one encoding.")
@click.option("--private", type=int, help="Private ones among them.  [default: 2 with public images, else k]")
@click.option("--private-images", required=True, type=float, help="Size of the private set; 5e4 is fine.")
@click.option("--public-images", default=0.0, show_default=True, help="Size of the public pool.")
@click.option("--rounds", default=1.0, show_default=True, help="Encodings of each image as first image.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, and only JSON, on stdout.")
def command(
    k: int, private: int | None, private_images: float, public_images: float, rounds: float, as_json: bool
) -> None:
    """Say what it claims to cost an attacker to undo such encodings, and what that is worth."""
    from frostglass.defenses.cost import cost_of

    whole = [
        _whole(name, value)
        for name, value in (("private-images", private_images), ("public-images", public_images), ("rounds", rounds))
    ]
    if private is None:
        private = min(2, k) if whole[1] else k
    found = cost_of(k, private, whole[0], whole[1], whole[2])
    click.echo(json.dumps(found.to_json(), indent=2) if as_json else found.text())


def _whole(name: str, value: float) -> int:
    if not value.is_integer() or not 0 <= value < 1e15:
        raise BadInput(f"--{name}: {value:g} must be a whole number from 0 (1.28e6 is one).")
    return int(value)
