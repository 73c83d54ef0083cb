"""`frostglass fit-similarity`: the siamese network for the attack `unmix_learned`, from any images."""

from __future__ import annotations

import math
from pathlib import Path

import click

from frostglass.core.errors import BadInput


@click.command("fit-similarity", short_help="Fit a network for unmix_learned to images")
@click.argument("images")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The file, ending in .safetensors.")
@click.option("--k", default=6, show_default=True, help="Images in one encoding.")
@click.option("--private", default=2, show_default=True, help="Private ones among them.")
@click.option("--law", type=click.Choice(["folded_normal", "dirichlet"]), default="folded_normal", show_default=True)
@click.option("--size", default=32, show_default=True, help="Side of an encoding, pixels.")
@click.option("--channels", type=click.Choice(["1", "3"]), help="1 grey, 3 colour.  [default: as the images are]")
@click.option("--steps", default=1500, show_default=True, help="Of AdamW.")
@click.option("--batch", default=128, show_default=True, help="Images a step, each encoded twice.")
@click.option("--width", default=24, show_default=True, help="Channels; the time grows with their square.")
@click.option(
    "--limit", type=click.IntRange(64), default=20_000, show_default=True, help="Images at the most, drawn from all."
)
@click.option(
    "--seed",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="The same images and seed give the same file on one device.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
def command(
    images: str, out: Path, k: int, private: int, law: str, size: int, channels: str | None, steps: int, batch: int,
    width: int, limit: int, seed: int, device: str,
) -> None:  # fmt: skip
    """Fit a network that sees whether two encodings share an image to IMAGES, and write it to --out.

    Fit it to other images than those that are attacked. About ten minutes on two cores, one on a GPU.
    """
    from tqdm import tqdm

    from frostglass.app.commands.encode import source_of
    from frostglass.core.files import check_writable
    from frostglass.core.randomness import Rng
    from frostglass.core.runtime import pick_device
    from frostglass.numerics.key_rows import MixLaw
    from frostglass.numerics.similarity_network import save_network
    from frostglass.numerics.similarity_network_fit import FitSettings, fit
    from frostglass.vision import datasets

    if out.suffix != ".safetensors":
        raise BadInput(f"fit-similarity: {out} must end in .safetensors; change --out.")
    check_writable(out, "fit-similarity")
    settings, place = FitSettings(steps=steps, batch=batch, width=width), pick_device(device)
    mixing = MixLaw(k, private, law=law)  # type: ignore[arg-type]
    mixing.check()
    rng, source = Rng.from_seed(seed, "fit similarity"), source_of(images)
    total = datasets.count(source)
    rows = rng.at("rows").permutation(total)[:limit].sort().values.tolist()
    held = datasets.load(source, size=size, channels=int(channels) if channels else None, rows=rows)
    for note in held.notes:
        click.echo(f"note: {note}", err=True)
    with tqdm(total=steps, desc="fitting", unit="step", disable=None) as bar:

        def show(step: int, loss: float) -> None:
            bar.update(step - bar.n)
            if step % 50 == 0:
                bar.set_postfix(loss=f"{loss:.2f}")

        found = fit(held.images * 2 - 1, mixing, settings, rng, device=place, progress=show)
    about = {"fitted_on": f"{len(held)} images", "k": str(k), "private": str(private), "steps": str(steps),
             "seed": str(seed), "auc": f"{found.auc:.4f}"}  # fmt: skip
    save_network(found.network, out, **about)
    if math.isnan(found.auc):
        click.echo(f"{out}: the held-out images are too few to say how well it tells encodings apart.")
        return
    click.echo(
        f"{out}: tells two encodings of one image from others with AUC {found.auc:.3f} on images that it was not "
        "fitted to (0.5 is chance)."
    )
