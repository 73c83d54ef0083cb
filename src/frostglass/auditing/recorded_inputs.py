"""Updates as a server holds them: out of a record, a pair of states, or raw gradients, in one form."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from frostglass.auditing.recorded_plan import LocalTable, UpdatesPlan
from frostglass.core.errors import BadInput
from frostglass.core.update import LocalPlan
from frostglass.federated.exchange import State, difference
from frostglass.federated.gradient_tap import unscaled
from frostglass.federated.record_header import Header, digest
from frostglass.federated.recorded import Recorded, read_record
from frostglass.vision.weights import WRAPPERS, read_weights
from frostglass.vision.weights import unwrapped as without_wrappers


@dataclass(frozen=True)
class Held:
    """Tensors of one update.

    Args:
        sent: the state that the client was sent, by name.
        update: W_before - W_after, or the gradient, by parameter name.
        buffers: as returned; empty if the client keeps them.
        unwrapped: prefixes that names had, and which wrapper leaves them.
    """

    sent: State
    update: State
    buffers: State
    unwrapped: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sent:
    """One update and all that a server knows about it.

    Args:
        header: as recorded.
        plan: what the client did; None if unknown.
        load: reads the tensors; raises BadInput with the reason where there are none.
        sent_key: equal for updates that start from the same weights.
        recorded: False for states and gradients, whose facts are the user's own word.
        guessed: the number of images is the user's word, as the client did not say it.
    """

    header: Header
    plan: LocalPlan | None
    load: Callable[[], Held]
    sent_key: str
    recorded: bool = True
    guessed: bool = False

    @property
    def title(self) -> str:
        """For people."""
        return f"round {self.header.round}, client {self.header.client}"


@dataclass(frozen=True)
class Source:
    """All updates of one audit.

    Args:
        name: for people.
        engine: what they went through.
        model: name, options, classes, channels and size of the network, as far as recorded.
        image_shape: (channels, height, width), if recorded.
        updates: in order of arrival.
        problems: what could not be read, a sentence each.
        note: what was seen, in the record's words.
    """

    name: str
    engine: str
    model: Mapping[str, Any]
    image_shape: tuple[int, int, int] | None
    updates: tuple[Sent, ...]
    problems: tuple[str, ...] = ()
    note: str = ""
    held: dict[int, Held | BadInput] = field(default_factory=dict, repr=False, compare=False)

    def tensors(self, sent: Sent) -> Held:
        """Of one update, read once.

        Raises:
            BadInput: there are none, and why.
        """
        number = sent.header.number
        if number not in self.held:
            try:
                self.held[number] = sent.load()
            except BadInput as wrong:
                self.held[number] = wrong
        found = self.held[number]
        if isinstance(found, BadInput):
            raise found
        return found

    def drop(self, sent: Sent) -> None:
        """Forgets tensors that are not needed any longer."""
        self.held.pop(sent.header.number, None)


def read_source(plan: UpdatesPlan) -> Source:
    """The updates that a plan names; tensors of a record stay on disk.

    Raises:
        BadInput: no record, or files that cannot be read.
    """
    plan.check()
    if plan.record is not None:
        return _of_record(Path(plan.record), plan.examples)
    return _of_states(plan) if plan.gradients is None else _of_gradients(plan)


def _of_record(folder: Path, examples: int | None) -> Source:
    record = read_record(folder)
    seen: set[int] = set()
    updates, problems = [], list(record.problems)
    for one in record.updates:
        if one.header.number in seen:
            problems.append(f"update {one.header.number} is recorded twice; the first is read.")
            continue
        seen.add(one.header.number)
        local, wrong = _local_plan(one.header)
        problems += [f"{one.title}: its local plan cannot be read ({wrong}); it counts as unknown."] if wrong else []
        key = one.header.sent_sha256 or one.header.sent or str(one.header.number)
        guessed = one.header.examples is None and examples is not None
        header = one.header.model_copy(update={"examples": examples}) if guessed else one.header
        updates.append(Sent(header, local, _loader(one), key, guessed=guessed))
    return Source(
        folder.resolve().name, record.info.engine, dict(record.info.model), record.info.image_shape, tuple(updates),
        tuple(problems), record.info.note,
    )  # fmt: skip


def _local_plan(header: Header) -> tuple[LocalPlan | None, str]:
    """(what the client did, "") or (None, why that cannot be): a record is not trusted to make sense."""
    if header.plan is None:
        return None, ""
    given = {k: v for k, v in header.plan.items() if k in LocalTable.model_fields}
    try:
        return LocalTable.model_validate(given).local_plan(header.kind), ""
    except ValidationError as wrong:
        first = wrong.errors()[0]
        return None, f"{'.'.join(map(str, first['loc']))}: {first['msg'][0].lower()}{first['msg'][1:]}"


def _loader(one: Recorded) -> Callable[[], Held]:
    def load() -> Held:
        update, buffers = one.payload()
        if not update:
            raise BadInput(f"{one.title}: its file holds no update.")
        sent = one.sent()
        told: list[str] = []
        update, sent = unwrapped(update, told), unwrapped(sent, told)
        return Held(sent, update, unwrapped(buffers, told), tuple(dict.fromkeys(told)))

    return load


def unwrapped(state: State, told: list[str]) -> dict[str, Tensor]:
    """Names without those of wrappers; what was cut is noted in `told`."""
    held, cut = without_wrappers(state)
    told += [f"{prefix!r} ({WRAPPERS[prefix]})" for prefix in cut]
    return held


def _of_states(plan: UpdatesPlan) -> Source:
    """One client whose states before and after are known."""
    assert plan.before is not None
    assert plan.after is not None
    before, after = read_weights(plan.before, "before"), read_weights(plan.after, "after")
    strange = [n for n in after if n not in before]
    if strange:
        raise BadInput(f"after: {strange[0]!r} is not in {plan.before}; give two states of one network.")
    shapes = [n for n, t in after.items() if t.shape != before[n].shape]
    if shapes:
        n = shapes[0]
        raise BadInput(f"after: {n!r} has shape {tuple(after[n].shape)}, before it {tuple(before[n].shape)}.")

    def load() -> Held:
        buffers = {n: t for n, t in after.items() if _is_buffer(n)}
        trained = tuple(n for n, t in after.items() if t.is_floating_point() and n not in buffers)
        return Held(before, difference(before, after, trained), buffers)

    header = Header(
        number=1, round=0, client=Path(plan.after).stem, kind="delta", examples=plan.examples,
        defence=_declared(plan),
    )  # fmt: skip
    local = plan.local.local_plan("delta")
    return Source(f"{Path(plan.before).name} and {Path(plan.after).name}", "two states", {}, None,
                  (Sent(header, local, load, "before", recorded=False),))  # fmt: skip


def _of_gradients(plan: UpdatesPlan) -> Source:
    assert plan.gradients is not None
    assert plan.weights is not None
    gradients, weights = read_weights(plan.gradients, "gradients"), read_weights(plan.weights)
    gradients = {n: unscaled(t, plan.loss_scale) for n, t in gradients.items()}
    header = Header(
        number=1, round=0, client=Path(plan.gradients).stem, kind="gradient", examples=plan.examples,
        defence=_declared(plan),
    )  # fmt: skip
    sent = Sent(
        header, plan.local.local_plan("gradient"), lambda: Held(weights, gradients, {}), "weights", recorded=False
    )
    return Source(Path(plan.gradients).name, "raw gradients", {}, None, (sent,))


def _declared(plan: UpdatesPlan) -> str | None:
    return None if plan.defense is None else str(plan.defense["name"])


def _is_buffer(name: str) -> bool:
    return name.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked")


def digest_of(held: Held) -> bytes:
    """SHA-256 of everything in it."""
    parts = (digest(part) for part in (held.sent, held.update, held.buffers))
    return hashlib.sha256("".join(parts).encode()).digest()
