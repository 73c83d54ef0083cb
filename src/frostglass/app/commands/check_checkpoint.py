"""`frostglass check-checkpoint`: does a checkpoint hold generator states from which keys can be recomputed?"""

from __future__ import annotations

from pathlib import Path

import click


@click.command("check-checkpoint", short_help="Find generator states that would give keys away")
@click.argument("file", type=click.Path(path_type=Path))
@click.pass_context
def command(context: click.Context, file: Path) -> None:
    """Flag generator states in FILE (.pt, .pth, .ckpt, .bin, .pkl, .safetensors, or a folder of these); runs nothing.

    Exit code 1 if there is one, 2 if there is none in what could be read and something could not.
    """
    from frostglass.core.printable import plain
    from frostglass.federated.checkpoint_check import check_checkpoint

    unread: list[str] = []
    found = check_checkpoint(file, unread)
    name = plain(file.name or file.as_posix())  # "." and "/" have no name
    for x in found:
        fix = (
            "save the checkpoint without it; a resumed run draws new keys"
            if x.state
            else "keys must not follow from it"
        )
        click.echo(plain(f"{name}: {x.where} holds {x.what}; {fix}."))  # the file says where, and it is not trusted
    held = any(x.state for x in found)  # not counted: in a pickle that is only read, a state may show in several lines
    if held:
        click.echo(
            f"{name}: keys that were drawn from such a generator, as the released InstaHide draws them, can be "
            "recomputed from it."
        )
    for problem in unread:
        click.echo(f"error: {plain(problem)}", err=True)
    if held:
        context.exit(1)
    click.echo(f"{name}: no generator state found{' in what could be read' if unread else ''}.")
    context.exit(2 if unread else 0)
