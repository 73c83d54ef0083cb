"""`frostglass encode`: a shareable encoded set from private images, or a check of one."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from frostglass.core.errors import BadInput
from frostglass.core.printable import plain

MOST_CLASSES = 100_000
"""Columns of the targets at the most: each encoding takes four bytes for every one of them."""

_settings = [
    click.option("--k", default=4, show_default=True, help="Images in one encoding."),
    click.option("--private", type=int, help="Private ones among them.  [default: 2 with --public, else k]"),
    click.option("--public", type=click.Path(path_type=Path), help="Folder of a pool (`frostglass public-pool`)."),
    click.option("--rounds", default=1, show_default=True, help="Encodings of each image; more are easier to undo."),
    click.option("--labels", help="CSV of file name and label; or none.  [default: subfolders are classes]"),
    click.option("--size", type=int, help="Side in pixels, after a centre crop.  [default: as they are]"),
    click.option("--channels", type=click.Choice(["1", "3"]), help="1 grey, 3 colour."),
    click.option("--c1", default=0.65, show_default=True, help="No coefficient exceeds it."),
    click.option("--c2", default=0.3, show_default=True, help="Least private share, with a pool."),
    click.option("--law", type=click.Choice(["folded_normal", "dirichlet"]), default="folded_normal",
                 show_default=True),
    click.option("--mask", type=click.Choice(["sign", "abs", "none"]), default="sign", show_default=True),
    click.option(
        "--label-mode", type=click.Choice(["exact", "quantised", "renormalised"]), default="quantised",
        show_default=True, help="Exact labels publish the coefficients.",
    ),
    click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True),
    click.option("--max-exposure", type=int, help="Refuse to go on when an image would be in more encodings."),
    click.option("--on-error", type=click.Choice(["stop", "skip"]), default="stop", show_default=True,
                 help="At an image that does not decode."),
    click.option("--ledger", type=click.Path(path_type=Path),
                 help="Owner's file of exposures.  [default: OUT.ledger.json]"),
    click.option("--insecure-seed", type=int, help="Keys that anybody can repeat, for tests; the set is marked."),
]  # fmt: skip


def _with_settings(function: Any) -> Any:
    for option in reversed(_settings):
        function = option(function)
    return function


@click.command("encode", short_help="Encode images with InstaHide into a set to be shared")
@click.argument("paths", nargs=-1, metavar="IMAGES OUT", type=click.Path(path_type=Path))
@_with_settings
@click.option("--resume", is_flag=True, help="Go on with an encoding that was interrupted.")
@click.option("--verify", is_flag=True, help="Check the shards of an encoded set instead: --verify OUT.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON, and only that, on stdout.")
@click.pass_context
def command(
    context: click.Context, /, paths: Sequence[Path], resume: bool, verify: bool, as_json: bool, **settings: Any
) -> None:
    """Write encodings of IMAGES (a folder, digits, or parquet:FILE) to the new folder OUT, to be shared.

    OUT holds encodings, targets and a manifest; no key, no names. How often each image was used stays in
    OUT.ledger.json, readable by you alone. InstaHide is broken: it gives no (epsilon, delta).
    """
    if verify:
        if len(paths) != 1:
            raise BadInput("encode: --verify takes one folder, an encoded set.")
        _verify(context, paths[0])
        return
    if len(paths) != 2:
        raise BadInput("encode: give IMAGES and OUT, or --verify OUT.")
    manifest = _encode(str(paths[0]), paths[1], resume, settings)
    if as_json:
        click.echo(json.dumps(manifest, indent=2))
        return
    lines = [f"{manifest['encodings']} encodings in {paths[1]}", f"WARNING: {manifest['warning']}"]
    if manifest["insecure"]:
        lines.append("INSECURE: made with --insecure-seed; anybody who knows the seed can undo these encodings")
    lines += [f"- {line}" for line in (*(f"caution: {c}" for c in manifest["cautions"]), *manifest["cost"])]
    click.echo("\n".join(lines))


def _verify(context: click.Context, folder: Path) -> None:
    from frostglass.defenses.sets.manifest import MANIFEST, problems_of, read_manifest, sha256_of

    held = read_manifest(folder)
    found = problems_of(folder, held)
    for problem in found:
        click.echo(problem)
    if found:
        context.exit(1)
    click.echo(
        f"{folder}: {held['encodings']} encodings in {len(held['shards'])} shards, as written; the SHA-256 of its "
        f"{MANIFEST} is {sha256_of(folder / MANIFEST)}"
    )


def _encode(images: str, out: Path, resume: bool, settings: dict[str, Any]) -> dict[str, Any]:
    import warnings

    from tqdm import tqdm

    from frostglass.core.files import check_writable
    from frostglass.defenses.honesty import PrivacyCaution
    from frostglass.defenses.public_pool import open_pool
    from frostglass.defenses.sets.writing import SetWriter
    from frostglass.vision.byte_images import ARBITRARY, load_bytes
    from frostglass.vision.datasets import count

    if os.path.lexists(out) and not resume:
        raise BadInput(f"encode: {out} exists; name a new folder.")
    if settings["ledger"] is not None:
        check_writable(settings["ledger"], "encode", "--ledger")
    size = settings["size"]
    if size is not None and not 4 <= size <= 4096:
        raise BadInput(f"--size: {size} pixels a side are not possible; give 4 to 4096.")
    pool = open_pool(settings["public"], settings["size"]) if settings["public"] else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PrivacyCaution)  # the manifest and the last lines printed say the same
        encoder = _encoder(settings, pool)
    source = source_of(images)
    channels = int(settings["channels"]) if settings["channels"] else None
    with tqdm(total=count(source), desc="reading", unit="image", disable=None) as bar:
        held = load_bytes(
            source, size=settings["size"], channels=channels, on_error=settings["on_error"],
            tick=lambda n: bar.update(n - bar.n),
        )  # fmt: skip
    notes = [n for n in held.notes if settings["labels"] is None or ARBITRARY not in n]
    for sentence in (*notes, *(f"skipped: {s}" for s in held.skipped)):
        click.echo(plain(sentence), err=True)
    labels, classes, class_names = _labels(settings["labels"], images, held)
    # stored as the rows of the pool are: an array beside a memory map, a tensor beside fresh crops
    pixels = held.images.numpy() if pool is not None and not pool.crop else held.images
    writer = SetWriter(
        encoder, pixels, labels, classes, out, rounds=settings["rounds"], names=held.names,
        ledger=settings["ledger"], with_targets=settings["labels"] != "none", class_names=class_names,
    )  # fmt: skip
    with tqdm(total=len(held) * settings["rounds"], desc="encoding", unit="image", disable=None) as bar:
        return writer.write(resume=resume, tick=bar.update)


def _encoder(settings: dict[str, Any], pool: Any) -> Any:
    import torch

    from frostglass.defenses.instahide import InstaHide

    private = settings["private"]
    if private is None:
        private = min(2, settings["k"]) if pool is not None else settings["k"]
    return InstaHide(
        k=settings["k"], private=private, c1=settings["c1"], c2=settings["c2"], law=settings["law"],
        mask=settings["mask"], labels=settings["label_mode"], public=pool, max_exposure=settings["max_exposure"],
        rounds=max(1, settings["rounds"]), insecure_seed=settings["insecure_seed"],
        dtype=getattr(torch, settings["dtype"]),
    )  # fmt: skip


def source_of(images: str) -> str:
    """A folder's path as the source that reads it; sources stay as they are."""
    return f"folder:{images}" if Path(images).expanduser().is_dir() or ("/" in images and ":" not in images) else images


def _labels(given: str | None, images: str, held: Any) -> tuple[Any, int, list[str] | None]:
    if given == "none":
        return [0] * len(held), 1, None
    if given is not None:
        return read_labels(Path(given), held.names)
    if held.made_up:
        raise BadInput(
            f"labels: {images} is one folder without classes; give --labels FILE.csv (file name, label), --labels "
            "none, or sort the images into one subfolder for each class."
        )
    return held.labels, held.classes, list(held.words) or None


def read_labels(path: Path, names: Sequence[str]) -> tuple[list[int], int, list[str] | None]:
    """(class index of each name, number of classes, their words) from a CSV of file name and label.

    With or without a header; white space around names and labels does not count. Whole numbers from 0 are class
    indices (then there are no words); other labels are numbered in sorted order.

    Raises:
        BadInput: the file is unreadable, a name is missing or has two labels, a label is empty or below 0, or there
            are more than 100,000 classes.
    """
    table: dict[str, str] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as held:
            for name, label in ((row[0].strip(), row[1].strip()) for row in csv.reader(held) if len(row) >= 2):
                if table.setdefault(name, label) != label:
                    raise BadInput(f"labels: {path} gives {name} both {table[name]!r} and {label!r}; keep one of them.")
    except (OSError, UnicodeDecodeError, csv.Error) as wrong:
        raise BadInput(f"labels: {path} cannot be read ({wrong}).") from None
    missing = [name for name in names if name.strip() not in table]
    if missing:
        raise BadInput(f"labels: {path} has no label for {len(missing)} images, the first is {missing[0]}.")
    words = [table[name.strip()] for name in names]
    if "" in words:
        raise BadInput(f"labels: {path} has an empty label for {names[words.index('')]}; give it one.")
    if all(re.fullmatch(r"[+-]?\d+", word) for word in words):
        least, most = (pick(words, key=_whole) for pick in (min, max))
        if _whole(least) < 0:
            raise BadInput(f"labels: {least} in {path} is no class index; number classes from 0, or name them.")
        if _whole(most) >= MOST_CLASSES:
            shown = most if len(most) < 20 else f"{most[:20]}..."
            raise BadInput(
                f"labels: {shown} in {path} would take as many classes, and {MOST_CLASSES} are the most; number them "
                "without gaps from 0, or give words."
            )
        return [int(word) for word in words], int(most) + 1, None
    named = sorted(set(words))
    if len(named) > MOST_CLASSES:
        raise BadInput(f"labels: {path} names {len(named)} classes, and {MOST_CLASSES} are the most; join some.")
    order = {word: i for i, word in enumerate(named)}
    return [order[word] for word in words], len(named), named


def _whole(word: str) -> int:
    """The number, cut short where Python refuses to read so many digits: it is far out of range anyway."""
    return int(word[:1000])
