"""What does not fit in a recorded update, in words, before any attack: told from what the server holds alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from frostglass.attacks.inversion.validate import mismatches
from frostglass.auditing.recorded_finding import Finding
from frostglass.auditing.recorded_head import head_findings
from frostglass.auditing.recorded_inputs import Held, Sent
from frostglass.auditing.recorded_view import Recording, as_update, mode_of, moved_buffers
from frostglass.core.threat import Observation
from frostglass.core.update import LocalPlan
from frostglass.numerics.bn import bn_layers
from frostglass.numerics.local_update import trainable
from frostglass.vision.normalise import Normalise
from frostglass.vision.weights import WRAPPERS

SPARSE, FEW_VALUES, MANY_VALUES = 0.1, 256, 4096
SAME_NORM = 1e-3


def validate(recording: Recording, sent: Sent, seen: Observation) -> list[Finding]:
    """Everything about one update whose tensors are finite."""
    held = recording.source.tensors(sent)
    found = [Finding("warning", "record", f"The recorder noted: {p}.") for p in sent.header.problems]
    found += _names(recording, held)
    found += _buffers(recording, sent, held)
    found += _normalisation(recording)
    found += _steps(sent, held)
    found += _examples(sent)
    found += head_findings(sent, seen)
    found += _values(recording, sent, held)
    found += [
        Finding("error" if m.severity == "error" else "warning", "update", m.text.removeprefix("Update: "))
        for m in mismatches(seen)
    ]
    return list(dict.fromkeys(found))


def _names(recording: Recording, held: Held) -> Iterator[Finding]:
    for cut in held.unwrapped:
        yield Finding("note", "names", f"Names held {cut}; they were read without it.")
    weights = trainable(recording.network.module)
    known = {n for n, _ in recording.network.module.named_parameters()}
    carried = set(recording.network.module.state_dict())  # tied weights by their second name, buffers
    strange = [n for n in held.update if n not in known and n not in carried]
    if strange:
        hint = _renaming(strange, [n for n in known if n not in held.update])
        yield Finding(
            "warning",
            "names",
            f"{len(strange)} tensors are of no parameter of the network, the first {strange[0]!r}{hint}.",
        )
    frozen = [n for n in held.update if n in known and n not in weights]
    moved = [n for n in frozen if bool(held.update[n].any())]
    if moved:
        yield Finding(
            "warning", "names", f"{moved[0]!r} is frozen in the network here, and the client trained it; check --model."
        )


def _renaming(strange: Sequence[str], free: Sequence[str]) -> str:
    """Which prefix, cut or set before, would make names fit."""
    for prefix in (*WRAPPERS, *_first_parts(strange)):
        if prefix and all(n.startswith(prefix) and n.removeprefix(prefix) in free for n in strange):
            return f"; without {prefix!r} they would fit"
    for prefix in _first_parts(free):
        if prefix and all(f"{prefix}{n}" in free for n in strange):
            return f"; with {prefix!r} before them they would fit"
    return ""


def _first_parts(names: Sequence[str]) -> list[str]:
    return sorted({n.split(".")[0] + "." for n in names if "." in n})


def _buffers(recording: Recording, sent: Sent, held: Held) -> Iterator[Finding]:
    layers = bn_layers(recording.network.module)
    tracked = [n for n, m in layers.items() if getattr(m, "running_mean", None) is not None]
    if not tracked:
        return
    absent = [n for n in tracked if f"{n}.running_mean" not in held.sent]
    if absent:
        yield Finding(
            "warning", "buffers", f"Running statistics of {len(absent)} BatchNorm layers were not sent out, the first "
            f"{absent[0]!r}: those of a fresh network take their place, and eval mode is simulated wrongly.",
        )  # fmt: skip
    back = [n for n in tracked if f"{n}.running_mean" in held.buffers]
    moved = moved_buffers(held)
    if sent.header.kind == "delta" and not back:
        yield Finding(
            "note", "buffers", "The client kept its BatchNorm statistics to itself: the server does not see them, and "
            "no statistics of the batch are granted.",
        )  # fmt: skip
    ordered = sent.plan.mode if sent.plan is not None else None
    if moved and ordered == "eval":
        yield Finding(
            "warning", "mode", f"The local plan says eval mode, and {len(moved)} running statistics moved: the client "
            "trained in train mode, and what is simulated differs. Correct the mode.",
        )  # fmt: skip
    if back and not moved and ordered == "train":
        yield Finding(
            "warning", "mode", "The local plan says train mode, and no running statistic moved: the client trained in "
            "eval mode, or returned the buffers that it was sent.",
        )  # fmt: skip
    if ordered is None:
        mode = mode_of(sent, held)
        why = "the running statistics moved" if moved else "nothing was said about it"
        yield Finding("note", "mode", f"Nobody ordered a mode; {mode} mode is assumed, as {why}.")
    broken = [n for n, t in held.buffers.items() if t.is_floating_point() and not bool(t.isfinite().all())]
    if broken:
        yield Finding("warning", "buffers", f"{broken[0]!r} came back with values that are not finite.")


def _normalisation(recording: Recording) -> Iterator[Finding]:
    if not any(isinstance(m, Normalise) for m in recording.network.module.modules()):
        yield Finding(
            "warning", "normalisation", "The network normalises nothing inside, so pixels are taken to be in [0, 1] as "
            "they enter it. If clients normalise images first, wrap the network in "
            "frostglass.vision.normalise.Normalised.",
        )  # fmt: skip


def _steps(sent: Sent, held: Held) -> Iterator[Finding]:
    """The counters of BatchNorm layers count forward passes in train mode."""
    if sent.header.kind == "delta" and sent.plan is None:
        yield Finding(
            "warning", "steps", "The client's local steps and learning rate are unknown: the difference cannot be "
            "scaled, so labels are not counted and its steps are not simulated. Give them to the recorder, or --lr.",
        )  # fmt: skip
    counters = [n for n in held.buffers if n.endswith("num_batches_tracked") and n in held.sent]
    if not counters or sent.plan is None or not sent.header.examples or sent.header.clients > 1:
        return
    taken = int(held.buffers[counters[0]]) - int(held.sent[counters[0]])
    wanted = sent.plan.steps_for(sent.header.examples)
    if taken and taken != wanted:
        yield Finding(
            "warning", "steps", f"The BatchNorm counters moved by {taken}, and the local plan makes {wanted} steps of "
            f"{sent.header.examples} images: the client did something else than was ordered.",
        )  # fmt: skip


def _examples(sent: Sent) -> Iterator[Finding]:
    h = sent.header
    if h.examples is None:
        yield Finding(
            "warning", "examples", "The client does not say how many images it used: labels cannot be counted and "
            "pixels not searched for. Give --examples if you know it.",
        )  # fmt: skip
    elif h.examples == 0:
        yield Finding("warning", "examples", "The client says that it used no image, and sent an update.")
    elif sent.guessed:
        yield Finding("note", "examples", f"{h.examples} images are the user's word: results are an upper bound.")
    if h.clients > 1:
        yield Finding(
            "note", "cohort", f"A secure sum of {h.clients} clients: it is attacked as one message of all their "
            "images, and read as their mean weighted by images.",
        )  # fmt: skip


def _values(recording: Recording, sent: Sent, held: Held) -> Iterator[Finding]:
    weights = trainable(recording.network.module)
    tensors = [t.detach().float().flatten() for n, t in held.update.items() if n in weights]
    values = torch.cat(tensors)
    zeros = float((values == 0).float().mean())
    if zeros > SPARSE:
        yield Finding(
            "note", "pruning", f"{100 * zeros:.0f} % of the values are exactly zero: pruned or sparsified, or of units "
            "that no image reaches.",
        )  # fmt: skip
    coarse = [t for t in tensors if len(t) >= MANY_VALUES and len(t[t != 0].unique()) <= FEW_VALUES]
    if coarse:
        levels = max(len(t.unique()) for t in coarse)
        yield Finding(
            "note", "quantised", f"{len(coarse)} large tensors take at most {levels} different values: the update is "
            "quantised. Exact attacks may not prove anything.",
        )  # fmt: skip
    yield from _size(sent, held, float(values.norm()))


def _size(sent: Sent, held: Held, norm: float) -> Iterator[Finding]:
    """A change that is large beside the weights is no honest training step."""
    floats = [t.float() for n, t in held.sent.items() if n in held.update and t.is_floating_point()]
    own = float(torch.stack([t.norm() for t in floats]).norm()) if floats else 0.0
    if sent.header.kind == "delta" and own and norm > 3 * own:
        yield Finding(
            "warning", "scale", f"The difference ({norm:.3g}) is {norm / own:.1f} times as long as the weights: "
            "a diverged client, another starting point, or an update that was multiplied.",
        )  # fmt: skip


def same_norms(recording: Recording, updates: Sequence[Sent]) -> dict[int, Finding]:
    """By number: updates of one round that are equally long, as clipping makes them."""
    found: dict[int, Finding] = {}
    for round_ in {u.header.round for u in updates}:
        group = [u for u in updates if u.header.round == round_]
        norms = {u.header.number: _norm(recording, u) for u in group}
        low, high = min(norms.values()), max(norms.values())
        if len(group) > 1 and low > 0 and high - low <= SAME_NORM * high:
            text = f"All {len(group)} updates of round {round_} have the L2 norm {high:.4g}: clients clip to it."
            found |= dict.fromkeys(norms, Finding("note", "clipping", text))
    return found


def _norm(recording: Recording, sent: Sent) -> float:
    weights = trainable(recording.network.module)
    update = recording.source.tensors(sent).update
    return float(torch.stack([t.double().norm() for n, t in update.items() if n in weights]).norm())


def read_as(recording: Recording, sent: Sent) -> str:
    """How the message is read, half a sentence."""
    h = sent.header
    if h.kind == "gradient":
        return "a gradient"
    mode = mode_of(sent, recording.source.tensors(sent))
    update = as_update(recording, sent, recording.model(sent, mode), mode)
    if update.plan.kind == "gradient":
        return f"the gradient of one SGD step (lr {update.plan.lr:g})"
    return steps_words(sent.plan, h.examples)


def steps_words(plan: LocalPlan | None, examples: int | None) -> str:
    """`a difference of 5 SGD steps`."""
    if plan is None or examples is None:
        return "a difference of unknown steps"
    steps = plan.steps_for(examples)
    return f"a difference of {steps} {plan.optimizer.upper()} step{'s' if steps != 1 else ''} (lr {plan.lr:g})"
