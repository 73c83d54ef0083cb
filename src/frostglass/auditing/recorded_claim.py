"""Whether a network as a record describes it can be the one whose weights were sent: before it takes any memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from frostglass.auditing.recorded_inputs import Source
from frostglass.core.errors import BadInput
from frostglass.core.randomness import Rng
from frostglass.vision import networks

SPARE = 2**24
"""Numbers that a network may have beyond twice what was sent: a wrong one of such a size is told by its parameters."""

UNREAD = 2**28
"""Numbers that a network may have where nothing that was sent can be read."""

MOST_VALUES = 2**26
"""Of an image: 4096 x 4096 in colour have three quarters of it."""


@dataclass(frozen=True)
class Claimed:
    """What a record, or the user, says of the network.

    Args:
        name: as in a plan.
        classes, channels, size: as `networks.build` takes them.
        options: of its maker.
    """

    name: str
    classes: int
    channels: int
    size: int
    options: Mapping[str, Any]

    def build(self) -> nn.Module:
        """The network, with weights that do not matter."""
        return networks.build(
            self.name, classes=self.classes, channels=self.channels, size=self.size, options=self.options,
            rng=Rng.from_seed(0, "recorded network"),
        )  # fmt: skip

    @property
    def code(self) -> bool:
        """Whether a factory of the user's makes it, which is called once and no more."""
        return ":" in self.name and not self.name.startswith("torchvision:")


def check_claim(claimed: Claimed, source: Source) -> None:
    """Refuses what is larger than anything that was sent: such a network would only be built to fit no update.

    Raises:
        BadInput: images, classes or parameters that cannot be.
    """
    values = claimed.channels * claimed.size**2
    if values > MOST_VALUES:
        raise BadInput(
            f"updates.size: images of {claimed.channels} x {claimed.size} x {claimed.size} have more than the "
            f"{MOST_VALUES} values that an audit takes; give --channels and --size."
        )
    rows = 0
    for sent in _states(source):
        rows = max(rows, *(len(t) for t in sent.values() if t.ndim), 0)
        if claimed.classes <= rows:
            break
    if 0 < rows < claimed.classes:
        raise BadInput(
            f"updates.classes: {claimed.classes} are more than the {rows} rows of the largest tensor that was sent; "
            "give --classes with the outputs of the network."
        )
    if not claimed.code:
        _check_parameters(claimed, source)


def _check_parameters(claimed: Claimed, source: Source) -> None:
    try:
        with torch.device("meta"):  # shapes without memory
            needed = sum(p.numel() for p in claimed.build().parameters())
    except (RuntimeError, OverflowError) as wrong:
        text = f"{type(wrong).__name__}: {wrong}".splitlines()[0]
        raise BadInput(
            f"updates.model: {claimed.name!r} cannot be built as described ({text}); give --model and its --option."
        ) from None
    most = 0
    for sent in _states(source):
        most = max(most, sum(t.numel() for t in sent.values()))
        if needed <= 2 * most + SPARE:
            return
    if needed > (2 * most + SPARE if most else UNREAD):
        raise BadInput(
            f"updates.model: {claimed.name!r} as described has {needed} parameters, and no more than {most} numbers "
            "were sent; give --model and the --option, --classes, --channels and --size that were trained."
        )


def _states(source: Source) -> Iterator[Mapping[str, Tensor]]:
    """What clients were sent, as far as it can be read; forgotten when the next one is asked for."""
    for one in source.updates:
        try:
            yield source.tensors(one).sent
        except BadInput:
            continue
        source.drop(one)
