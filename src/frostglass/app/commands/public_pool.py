"""`frostglass public-pool`: patches with enough detail, for the public slots of an encoding."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click


@click.command("public-pool", short_help="Cut patches for public partners out of images")
@click.argument("images")
@click.argument("pool", type=click.Path(path_type=Path))
@click.option("--size", default=32, show_default=True, help="Side of a patch in the pool, pixels.")
@click.option("--crops", default=10_000, show_default=True, help="Patches wanted in all.")
@click.option("--cut", type=int, help="Side of the square that is cut and judged, then shrunk.  [default: 2 x size]")
@click.option("--key-points", default=40, show_default=True, help="Keep a patch if SIFT finds more; -1 keeps all.")
@click.option("--channels", type=click.Choice(["1", "3"]), default="3", show_default=True)
@click.option("--tries", default=20, show_default=True, help="Cuts tried in each image.")
@click.option("--on-error", type=click.Choice(["stop", "skip"]), default="stop", show_default=True)
@click.option("--seed", type=click.IntRange(0), help="Repeatable cuts.  [default: from the operating system]")
def command(
    images: str,
    pool: Path,
    size: int,
    crops: int,
    cut: int | None,
    key_points: int,
    channels: str,
    tries: int,
    on_error: Literal["stop", "skip"],
    seed: int | None,
) -> None:
    """Cut patches with more than 40 SIFT key points out of IMAGES (a folder, or parquet:FILE) and write POOL."""
    from tqdm import tqdm

    from frostglass.app.commands.encode import source_of
    from frostglass.core.printable import plain
    from frostglass.core.randomness import OsKey, Rng
    from frostglass.defenses.public_pool import PoolSettings, make_pool
    from frostglass.vision.datasets import catalogue

    source = source_of(images)
    catalogue(source)  # refuses what it cannot read while there is no folder yet
    settings = PoolSettings(size, crops, cut, key_points, int(channels), tries, on_error)
    rng = OsKey().rng() if seed is None else Rng.from_seed(seed, "public pool")
    with tqdm(total=crops, desc="patches", unit="patch", disable=None) as bar:
        found = make_pool(source, pool, settings, rng, bar.update)
    for sentence in found.broken:
        click.echo(f"skipped: {plain(sentence)}", err=True)
    click.echo("\n".join([*found.lines(), f"{found.kept} patches of {size} x {size} in {pool}"]))
    if found.kept < crops:
        click.echo(
            f"fewer than the {crops} asked for: give more images, more --tries, or lower --key-points.", err=True
        )
