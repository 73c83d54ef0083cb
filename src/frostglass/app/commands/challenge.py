"""`frostglass challenge`: make a challenge in InstaHide's format, and score what others recover from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from frostglass.core.errors import BadInput


@click.group("challenge", short_help="Make or score a public challenge on encodings")
def command() -> None:
    """Make a challenge on encodings, or score a submission to one."""


@command.command("make")
@click.argument("images")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--public", type=click.Path(path_type=Path), help="Folder of a pool (`frostglass public-pool`).")
@click.option(
    "--private-images", default=100, show_default=True, help="Images to encode, drawn from the first 20,000 of IMAGES."
)
@click.option("--rounds", default=50, show_default=True, help="Encodings with each image first.")
@click.option("--k", default=6, show_default=True, help="Images in one encoding.")
@click.option("--private", default=2, show_default=True, help="Private ones among them.")
@click.option(
    "--labels",
    type=click.Choice(["exact", "quantised", "renormalised"]),
    default="exact",
    show_default=True,
    help="Exact ones publish the coefficients, as in 2020.",
)
@click.option("--size", default=32, show_default=True, help="Side in pixels.")
@click.option("--channels", type=click.Choice(["1", "3"]), help="1 grey, 3 colour.  [default: as the images are]")
@click.option("--opening", type=click.Path(path_type=Path), help="Your file to score with.  [default: OUT.opening]")
@click.option("--insecure-seed", type=int, help="Keys that anybody can search, for tests.")
@click.option(
    "--generator",
    type=click.Choice(["frostglass", "released"]),
    default="frostglass",
    show_default=True,
    help="released: as the challenge of 2020; needs --insecure-seed.",
)
@click.option("--json", "as_json", is_flag=True, help="Print challenge.json on stdout.")
def make(images: str, out: Path, public: Path | None, opening: Path | None, as_json: bool, **options: Any) -> None:
    """Encode IMAGES (a folder, digits, or parquet:FILE) as a challenge in the new folder OUT.

    OUT holds encryption.npy, label.npy and challenge.json with a commitment, and is to be published. The opening (the
    images, and every one-time key) stays beside it, readable by you alone: keep it to score submissions, and publish it
    when the challenge ends. Use images that you give up: InstaHide is broken.
    """
    from frostglass.app.commands.encode import source_of
    from frostglass.auditing.unmixing_challenge import Settings, make_challenge
    from frostglass.core.randomness import OsKey, Rng
    from frostglass.defenses.public_pool import open_pool
    from frostglass.numerics.key_rows import MixLaw
    from frostglass.vision.byte_images import load_bytes

    law = MixLaw(options["k"], options["private"])
    settings = Settings(
        options["private_images"], options["rounds"], law, options["labels"], options["insecure_seed"],
        options["generator"],
    )  # fmt: skip
    settings.check()
    if not 4 <= options["size"] <= 4096:
        raise BadInput(f"--size: {options['size']} pixels a side are not possible; give 4 to 4096.")
    channels = int(options["channels"]) if options["channels"] else None
    held = load_bytes(source_of(images), size=options["size"], channels=channels, limit=20_000)
    for sentence in held.notes:
        click.echo(sentence, err=True)
    seed = settings.seed
    rows = (OsKey().rng() if seed is None else Rng.from_seed(seed, "challenge")).at("images").permutation(len(held))
    pool = open_pool(public, options["size"]) if public else None
    secret = opening or out.with_name(f"{out.name}.opening")
    chosen = held.images[rows[: settings.images]], held.labels[rows[: settings.images]]
    about = make_challenge(settings, *chosen, max(held.classes, 2), pool, out, secret)
    if as_json:
        click.echo(json.dumps(about, indent=2))
        return
    lines = [
        f"{about['encodings']} encodings of {about['private_images']} images in {out}",
        f"Commitment: {about['commitment']}",
        f"The opening is {secret}: keep it to yourself until the challenge ends.",
        f"WARNING: {about['warning']}",
    ]
    if about["insecure"]:
        lines.append("INSECURE: made with --insecure-seed; the seed can be searched.")
    click.echo("\n".join(lines))


@command.command("score")
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("submission", type=click.Path(path_type=Path))
@click.option("--opening", type=click.Path(path_type=Path), help="The maker's file.  [default: FOLDER.opening]")
@click.option("--either-sign", is_flag=True, help="Score the negated submission too, and take the better.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, and only JSON, on stdout.")
def score(folder: Path, submission: Path, opening: Path | None, either_sign: bool, as_json: bool) -> None:
    """Score SUBMISSION (decryption.npy, one image for each encoding) against the challenge in FOLDER."""
    from frostglass.auditing.unmixing_challenge_score import score_challenge

    if not submission.exists():
        raise BadInput(f"challenge: {submission} does not exist; give decryption.npy or the folder that holds it.")
    found = score_challenge(
        folder, submission, opening or folder.with_name(f"{folder.name}.opening"), either_sign=either_sign
    )
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    lines = [f"{name:<10} {found[name]:.4f}" for name in ("Max_SSIM", "Mean_SSIM", "Min_L2", "Max_L2", "Mean_L2")]
    lines.append(f"means over {found['encodings']} encodings; the opening is the one that was committed to")
    lines.append("L2: mean squared difference in [-1, 1]; the challenge's text says Max_L2, its table Min_L2")
    if found["negated"]:
        lines.append("the submission was negated (--either-sign)")
    click.echo("\n".join(lines))
