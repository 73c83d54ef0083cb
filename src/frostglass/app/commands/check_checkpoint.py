"""`frostglass check-checkpoint`: does a checkpoint hold generator states from which keys can be recomputed?"""

from __future__ import annotations

from pathlib import Path

import click


@click.command("check-checkpoint")
@click.argument("file", type=click.Path(path_type=Path))
@click.pass_context
def command(context: click.Context, file: Path) -> None:
    """Flag generator states in FILE (.pt, .pth, .ckpt, .bin, .pkl, .safetensors, or a folder of these); runs nothing.

    Exit code 1 if there is one.
    """
    from frostglass.core.printable import plain
    from frostglass.federated.checkpoint_check import check_checkpoint

    found = check_checkpoint(file)
    name = plain(file.name or file.as_posix())  # "." and "/" have no name
    for x in found:
        fix = (
            "save the checkpoint without it; a resumed run draws new keys"
            if x.state
            else "keys must not follow from it"
        )
        click.echo(plain(f"{name}: {x.where} holds {x.what}; {fix}."))  # the file says where, and it is not trusted
    if any(x.state for x in found):  # not counted: in a pickle that is only read, one state may show in several lines
        click.echo(
            f"{name}: keys that were drawn from such a generator, as the released InstaHide draws them, can be "
            "recomputed from it."
        )
        context.exit(1)
    click.echo(f"{name}: no generator state found.")
