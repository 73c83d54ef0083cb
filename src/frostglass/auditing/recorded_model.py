"""The network of recorded updates, with the weights that a client was sent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from frostglass.auditing.plan import FROM_PYTHON
from frostglass.auditing.recorded_claim import Claimed, check_claim
from frostglass.auditing.recorded_inputs import Source
from frostglass.auditing.recorded_plan import UpdatesPlan
from frostglass.core.errors import BadInput
from frostglass.federated.exchange import State
from frostglass.federated.feeds import takes_encodings
from frostglass.numerics.called import copied
from frostglass.numerics.local_update import in_mode, trainable
from frostglass.vision import networks
from frostglass.vision.borrowed import refuse_unfit, unwrapped


@dataclass(frozen=True)
class Network:
    """What is known of the network before any weights.

    Args:
        name: as in a plan.
        options: of its maker.
        module: built once; copied for every state.
        image_shape: (channels, height, width).
        classes: outputs.
        encodings: clients train on encodings in [-1, 1], and the record says so.
    """

    name: str
    options: Mapping[str, Any]
    module: nn.Module
    image_shape: tuple[int, int, int]
    classes: int
    encodings: bool = False

    def with_state(self, sent: State, mode: str) -> nn.Module:
        """A copy that holds `sent`, as far as it goes, in the client's mode.

        Raises:
            BadInput: parameters are missing or of other shapes.
        """
        made = copied(self.module)
        own = made.state_dict()
        weights = dict(made.named_parameters())
        missing = [n for n in weights if n not in sent]
        if missing:
            raise BadInput(f"what was sent lacks {len(missing)} parameters of {self.name}, the first {missing[0]!r}.")
        shapes = [n for n, t in own.items() if n in sent and sent[n].shape != t.shape]
        if shapes:
            n = shapes[0]
            raise BadInput(f"{n!r} was sent with shape {tuple(sent[n].shape)}, {self.name} has {tuple(own[n].shape)}.")
        made.load_state_dict(own | {n: _like(sent[n], t) for n, t in own.items() if n in sent})
        return made.train(mode == "train")


def _like(value: Tensor, own: Tensor) -> Tensor:
    return value.to(own.dtype)


def network_of(plan: UpdatesPlan, source: Source, given: nn.Module | None = None) -> Network:
    """The network that the plan names, or the one of the record; `given` from Python before both.

    Raises:
        BadInput: it is not named, or cannot be built; or the record names code, which nobody has confirmed by `model`.
    """
    about = _described(source)
    shape = _image_shape(plan, source, about)
    own = given is None and plan.model in (None, about.get("name"))
    if given is not None:
        refuse_unfit(given, type(given).__name__)  # some of these cannot even be copied
        module, name = copied(unwrapped(given)), f"{FROM_PYTHON}:{type(given).__name__}"
        options: dict[str, Any] = {}
    else:
        name = plan.model or about.get("name", "")
        if not name:
            raise BadInput("updates.model: the record does not name its network; give --model NAME or pkg:factory.")
        if name.partition(":")[0] == FROM_PYTHON:
            raise BadInput("updates.model: it was given from Python; call frostglass.auditing.audit_updates again.")
        if plan.model is None and ":" in name and not name.startswith("torchvision:"):
            raise BadInput(
                f"updates.model: the record names {name!r}, and what a record names is not called unasked; if you know "
                f"this code, give --model {name}."
            )
        options = dict(plan.options) or (dict(about.get("options", {})) if own else {})
        classes = plan.classes or about.get("classes")
        if classes is None:
            classes = _outputs_sent(source)
        claimed = Claimed(name, int(classes), shape[0], shape[1], options)
        check_claim(claimed, source)
        module = claimed.build()
    module = module.float()
    if own and about.get("fix") == "opacus":
        module = networks.fix_for_opacus(module)
    encodings = own and about.get("takes") == "encodings"
    if encodings:
        module = takes_encodings(module, "magnitudes" if about.get("sees") == "magnitudes" else "pixels")
    if not trainable(module):
        raise BadInput("updates.model: no parameter of it requires a gradient, so a client sends nothing.")
    return Network(name, options, module, shape, _outputs(module, shape), encodings)


def _described(source: Source) -> dict[str, Any]:
    """What the record says of the network, as far as it is of the kind that it should be: a record is not trusted."""
    kinds = {"name": str, "options": dict, "classes": int, "channels": int, "size": int}
    return {k: v for k, v in source.model.items() if type(v) is kinds.get(k, type(v))}


def _image_shape(plan: UpdatesPlan, source: Source, about: Mapping[str, Any]) -> tuple[int, int, int]:
    known = source.image_shape
    channels: Any = plan.channels or (known[0] if known else about.get("channels"))
    size: Any = plan.size or (known[1] if known else about.get("size"))
    lacking = [w for w, v in (("channels", channels), ("size", size)) if not v]
    if lacking:
        raise BadInput([f"updates.{w}: the record does not say it; give --{w}." for w in lacking])
    height, width = (known[1], known[2]) if known and plan.size is None else (int(size), int(size))
    return int(channels), int(height), int(width)


def _outputs_sent(source: Source) -> int:
    """Outputs by the last matrix that was sent and that feeds no other one: the classifier of any ordinary network.

    Files may name tensors in the order of the alphabet, so the last one may lie before the classifier.
    """
    for one in source.updates:
        try:
            sent = source.tensors(one).sent
        except BadInput:
            continue
        shapes = [tuple(t.shape) for t in sent.values() if t.ndim == 2]
        last = [
            rows for i, (rows, _) in enumerate(shapes)
            if rows not in [columns for j, (_, columns) in enumerate(shapes) if j != i]
        ]  # fmt: skip
        if shapes:
            return int(last[-1] if last else shapes[-1][0])
    raise BadInput("updates.classes: neither the record nor what was sent tells it; give --classes.")


def _outputs(module: nn.Module, shape: tuple[int, int, int]) -> int:
    like = next(module.parameters())
    try:
        with torch.no_grad(), in_mode(module, "eval"):
            out = module(torch.zeros(2, *shape, dtype=like.dtype, device=like.device))
    except Exception as wrong:
        text = f"{type(wrong).__name__}: {wrong}".splitlines()[0]
        raise BadInput(
            f"updates.model: it does not take images of shape {shape} ({text}); give --channels and --size."
        ) from wrong
    if not isinstance(out, Tensor) or out.ndim != 2 or len(out) != 2 or out.shape[1] < 2:
        raise BadInput("updates.model: it must return logits [batch, classes].")
    return int(out.shape[1])
