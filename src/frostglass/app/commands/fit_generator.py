"""`frostglass fit-generator`: a small generator from any images, for the attack `latent_projection`."""

from __future__ import annotations

from pathlib import Path

import click

from frostglass.core.errors import BadInput


@click.command("fit-generator", short_help="Fit a generator for latent_projection to images")
@click.argument("images")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The file, ending in .safetensors.")
@click.option("--size", default=32, show_default=True, help="Side of a drawn image, pixels.")
@click.option("--channels", type=click.Choice(["1", "3"]), help="1 grey, 3 colour.  [default: as the images are]")
@click.option("--steps", default=2500, show_default=True, help="Of Adam.")
@click.option("--latent", default=256, show_default=True, help="Numbers that an image is drawn from.")
@click.option("--width", default=24, show_default=True, help="Channels; the time grows with their square.")
@click.option("--batch", default=32, show_default=True, help="Images a step.")
@click.option("--limit", default=20_000, show_default=True, help="Images at the most, drawn from all.")
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="The same images and seed give the same file."
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
def command(
    images: str,
    out: Path,
    size: int,
    channels: str | None,
    steps: int,
    latent: int,
    width: int,
    batch: int,
    limit: int,
    seed: int,
    device: str,
) -> None:
    """Fit a small generator to IMAGES (a folder, photos, digits, or parquet:FILE) and write it to --out.

    Fit it to public images, never to those that are audited: an attack with a generator that knows the private images
    shows nothing. It is a VAE's decoder; minutes on a CPU at 32 pixels.
    """
    from tqdm import tqdm

    from frostglass.app.commands.encode import source_of
    from frostglass.core.files import check_writable
    from frostglass.core.randomness import Rng
    from frostglass.core.runtime import pick_device
    from frostglass.vision import datasets
    from frostglass.vision.generator_fitting import FitSettings, fit
    from frostglass.vision.generators import save_generator

    if out.suffix != ".safetensors":
        raise BadInput(f"fit-generator: {out} must end in .safetensors; change --out.")
    check_writable(out, "fit-generator")
    if limit < 2:
        raise BadInput(f"fit-generator: --limit {limit} must be from 2.")
    settings, place = FitSettings(latent, width, steps, batch), pick_device(device)
    rng, source = Rng.from_seed(seed, "fit generator"), source_of(images)
    total = datasets.count(source)
    rows = rng.at("rows").permutation(total)[:limit].sort().values.tolist()
    held = datasets.load(source, size=size, channels=int(channels) if channels else None, rows=rows)
    for note in held.notes:
        click.echo(f"note: {note}", err=True)
    with tqdm(total=steps, desc="fitting", unit="step", disable=None) as bar:

        def show(step: int, psnr: float) -> None:
            bar.update(step - bar.n)
            if step % 50 == 0:
                bar.set_postfix(psnr=f"{psnr:.1f}")

        found = fit(held.images, settings, rng, device=place, progress=show)
    about = {"fitted_on": f"{len(held)} images", "steps": str(steps), "seed": str(seed)}
    save_generator(found.decoder, out, **about, **{"held_out_psnr" if found.held_out else "psnr": f"{found.psnr:.2f}"})
    judged = "images that it was not fitted to come back at"
    means = "the best that a projection onto it can give is near that"
    if not found.held_out:
        judged = "with fewer than 20 images none was held out, and those that it was fitted to come back at"
        means = "others will come back worse"
    click.echo(f"{out}: draws {size} x {size} images from {latent} numbers; {judged} {found.psnr:.1f} dB ({means}).")
