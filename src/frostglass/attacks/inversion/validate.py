"""Why an update does not fit the model it is said to come from, in words, before any compute."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from frostglass.attacks.inversion.suspicions import suspicions
from frostglass.core.threat import GradientMessage, Observation
from frostglass.core.update import LocalPlan
from frostglass.numerics.local_update import trainable

_WRAPPERS = {
    "module.": "DataParallel or DistributedDataParallel",
    "_module.": "Opacus",
    "_orig_mod.": "torch.compile",
}


@dataclass(frozen=True)
class Mismatch:
    """One thing that does not fit.

    Args:
        severity: "error": the attack cannot run; "warning": it can, and its result may mislead.
        text: a sentence or two, with what to do.
    """

    severity: Literal["error", "warning"]
    text: str


def mismatches(seen: Observation) -> list[Mismatch]:
    """Everything that does not fit between the update and the model, errors first.

    Values that are not finite, or zeros only, are no mismatch: such a run fails (`target.refuse_broken_values`).
    """
    errors = errors_of(seen)
    found = [Mismatch("error", text) for text in errors]
    if errors or not all(bool(g.isfinite().all()) for g in seen.gradients.values()):
        return found
    doubts = (*_partial(seen), *_unknown(seen), *suspicions(seen))
    return found + [Mismatch("warning", text) for text in doubts]


def errors_of(seen: Observation) -> list[str]:
    """Sentences on why the update cannot be attacked at all; cheap."""
    return [*_name_errors(seen), *_shape_errors(seen), *_kind_errors(seen), *_label_errors(seen)]


def warnings_of(seen: Observation) -> list[str]:
    """Sentences on why a result may mislead."""
    return [m.text for m in mismatches(seen) if m.severity == "warning"]


def _name_errors(seen: Observation) -> Iterator[str]:
    weights, sent = trainable(seen.model), seen.gradients
    known = {name for name, _ in seen.model.named_parameters()}
    buffers = {name for name, _ in seen.model.named_buffers()}
    strange = sorted(set(sent) - known)
    for prefix, maker in _WRAPPERS.items():
        if strange and all(n.startswith(prefix) and n.removeprefix(prefix) in known for n in strange):
            yield (
                f"update: {strange[0]!r} is not in the model, {strange[0].removeprefix(prefix)!r} is: {maker} puts "
                f"{prefix!r} before every name ({len(strange)} such); strip it."
            )
            return
        if strange and all(prefix + n in known for n in strange):
            yield (
                f"update: {strange[0]!r} is not in the model, {prefix + strange[0]!r} is: the model is wrapped by "
                f"{maker} ({len(strange)} such names); give the model inside."
            )
            return
    stored = [n for n in strange if n in buffers]
    if stored:
        yield (
            f"update: {stored[0]!r} is a buffer, not a parameter in the model ({len(stored)} such); send gradients of "
            "parameters alone, and grant statistics by 'bn_batch'."
        )
    unknown = [n for n in strange if n not in buffers]
    if unknown:
        yield (
            f"update: parameter {unknown[0]!r} is not in the model ({len(unknown)} such); names must agree"
            f"{_nearest(unknown[0], sent[unknown[0]], weights)}."
        )
    frozen = sorted(n for n in sent if n in known and n not in weights)
    if frozen and not any(n in weights for n in sent):
        yield (
            f"update: only frozen parameters were sent ({frozen[0]!r}, {len(frozen)} such); set requires_grad on what "
            "the client trained."
        )
    elif not any(n in weights for n in sent):
        yield "update: no trainable parameter of the model was sent; there is nothing to match."


def _nearest(name: str, g: Tensor, weights: Mapping[str, Tensor]) -> str:
    """ ", did you mean" for a name that ends alike and has the same shape."""
    tail = name.rsplit(".", 1)[-1]
    alike = [n for n, w in weights.items() if n.rsplit(".", 1)[-1] == tail and w.shape == g.shape]
    return f"; {alike[0]!r} has the same shape" if len(alike) == 1 else ""


def _shape_errors(seen: Observation) -> Iterator[str]:
    for name, weight in trainable(seen.model).items():
        g = seen.gradients.get(name)
        if g is not None and g.shape != weight.shape:
            yield (
                f"update: {name!r} has shape {tuple(g.shape)}, the model's parameter {tuple(weight.shape)}"
                f"{_shape_hint(g, weight)}."
            )


def _shape_hint(g: Tensor, weight: Tensor) -> str:
    if g.ndim == 2 and g.shape == weight.shape[::-1]:
        return "; it is transposed, as Keras and Flax keep dense layers: send its .T"
    if g.ndim == 4 and weight.ndim == 4 and g.permute(3, 2, 0, 1).shape == weight.shape:
        return "; it is laid out as height, width, in, out, as Keras and Flax keep it: send .permute(3, 2, 0, 1)"
    if g.numel() == weight.numel():
        return "; it has as many values: was it flattened or reshaped?"
    if g.ndim == weight.ndim + 1 and g.shape[1:] == weight.shape:
        return "; the first dimension looks like one gradient per example or per client: send their mean"
    return "; another architecture, width or number of classes"


def _kind_errors(seen: Observation) -> Iterator[str]:
    wrong = sorted(n for n, g in seen.gradients.items() if not g.is_floating_point())
    if wrong:
        yield (
            f"update: {wrong[0]!r} holds {seen.gradients[wrong[0]].dtype} ({len(wrong)} such); quantised values must "
            "be scaled back to floating point first."
        )


def _label_errors(seen: Observation) -> Iterator[str]:
    if seen.examples is not None and seen.examples < 1:
        yield f"examples: {seen.examples} images cannot have made an update; give a whole number from 1."
    if seen.labels is None:
        return
    if seen.labels.ndim != 2 or seen.labels.shape[1] != seen.classes:
        yield (
            f"labels: granted with shape {tuple(seen.labels.shape)}; give a row of {seen.classes} for every image, 1 "
            "at its class."
        )
    elif seen.examples is not None and len(seen.labels) != seen.examples:
        yield f"labels: {len(seen.labels)} rows were granted for {seen.examples} images; they must agree."


def _partial(seen: Observation) -> Iterator[str]:
    weights, sent = trainable(seen.model), seen.gradients
    absent = [n for n in weights if n not in sent]
    if absent:
        yield (
            f"Update: {len(absent)} of {len(weights)} trainable parameters were not sent ({_some(absent)}); only the "
            "others are matched. If the client does not train them, clear their requires_grad."
        )
    silent = [n for n in weights if n in sent and sent[n].numel() and not bool(sent[n].any())]
    if silent and len(silent) < len(sent):
        yield (
            f"Update: {len(silent)} of {len(sent)} tensors are zero throughout ({_some(silent)}): frozen, pruned or "
            "reached by no image. They are matched as zeros; leave them out if the client did not train them."
        )
    dtypes = {g.dtype for g in sent.values()}
    coarse = {torch.bfloat16: "bfloat16", torch.float16: "half precision"}  # bfloat16 first: float16 holds its values
    named = [word for dtype, word in coarse.items() if dtype in dtypes]
    if not named:
        named = [word for dtype, word in coarse.items() if _rounded_to(sent, dtype)]
    if named:
        digits = "about 3" if named[0] == "half precision" else "about 2"
        yield (
            f"Update: the values have {named[0]}, {digits} digits: the objective at the truth is not 0, and an exact "
            "attack may not prove anything."
        )


def _unknown(seen: Observation) -> Iterator[str]:
    """What the simulation must make up."""
    kinds = {m.kind for m in seen.messages if isinstance(m, GradientMessage)}
    if "delta" in kinds and seen.local_plan is None:
        assumed = LocalPlan(kind="delta")
        yield (
            f"Update: a weight difference, and 'local_plan' is not granted: one step of SGD at lr {assumed.lr:g} is "
            "assumed. The cosine does not mind the rate, L2 matching does, and neither covers several steps; grant "
            "'local_plan'."
        )
    drawing = [n for n, m in seen.model.named_modules() if isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0]
    if seen.mode == "train" and drawing:
        yield (
            f"Model: {len(drawing)} Dropout layers are active in train mode ({_some(drawing)}). Nobody knows the "
            "client's masks, so the simulation draws its own, and the objective at the truth is not 0."
        )


def _rounded_to(sent: Mapping[str, Tensor], dtype: torch.dtype) -> bool:
    """Whether float32 values are all exact in a coarser dtype; few values, or round ones, prove nothing."""
    values = torch.cat([g.detach().flatten()[:1000] for g in sent.values() if g.is_floating_point()])
    values = values[values != 0]
    return (
        len(values) >= 100 and len(values.unique()) > 50 and bool((values.to(dtype).to(values.dtype) == values).all())
    )


def _some(names: list[str]) -> str:
    return ", ".join(repr(n) for n in names[:2]) + (", ..." if len(names) > 2 else "")
