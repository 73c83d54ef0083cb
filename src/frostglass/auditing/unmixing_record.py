"""Recorded updates of a client that trains on encodings, as an attacker on the encodings sees them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from frostglass.auditing.recorded_inputs import Held, Sent, Source, digest_of, read_source
from frostglass.auditing.recorded_model import network_of
from frostglass.auditing.recorded_plan import UpdatesPlan
from frostglass.auditing.unmixing_inputs import EncodedSet
from frostglass.auditing.unmixing_plan import UnmixPlan
from frostglass.auditing.unmixing_view import View, settings_of
from frostglass.core.defense import Defense
from frostglass.core.errors import BadInput
from frostglass.core.threat import GradientMessage, Observation
from frostglass.defenses.encoder import encoded_domain
from frostglass.federated.feeds import takes_encodings
from frostglass.federated.record_header import INFO


def is_record(folder: str | Path) -> bool:
    """Whether this is a folder of recorded updates."""
    return (Path(folder) / INFO).is_file()


def view_of_record(plan: UnmixPlan) -> tuple[EncodedSet, View]:
    """(the set behind the gradients, none of whose encodings are known yet; what the attacker sees).

    Raises:
        BadInput: no usable update, a client that must be named, or a network that the record does not tell.
    """
    source = read_source(UpdatesPlan(record=plan.encoded))
    network = network_of(UpdatesPlan(record=plan.encoded, model=plan.model), source)
    client = _client(plan, source)
    messages, notes, counts, digests = [], list(source.problems), [], []
    for sent in (u for u in source.updates if u.header.client == client):
        try:
            held = source.tensors(sent)
            gradients = _gradients(sent, held)
        except BadInput as wrong:
            notes += wrong.problems
            continue
        finally:
            source.drop(sent)
        messages.append(GradientMessage(gradients, "gradient", dict(held.sent), sent.header.examples))
        counts.append(sent.header.examples)
        digests.append(digest_of(held))
    if len(messages) < 2:
        raise BadInput(
            f"unmix: {len(messages)} usable updates of client {client!r}; several rounds of one step each are needed"
            + (f" ({notes[0].rstrip('.')})." if notes else ".")
        )
    known = {c for c in counts if c is not None}
    batch = known.pop() if len(known) == 1 else None
    images = plan.known.images or batch
    settings, law = settings_of(plan.known, {})
    if plan.known.images is None and batch is not None:
        notes.append(f"known.images is not given: {batch} private images are assumed, as many as one gradient holds.")
    if law is not None and plan.known.private is None:
        notes.append(f"known.private is not given: {law.private} private images in one encoding are assumed.")
    seen = Observation(
        model=takes_encodings(network.with_state(messages[0].weights or {}, "eval")),
        messages=tuple(messages),
        domain=encoded_domain(network.image_shape[0]),
        mode="eval",
        image_shape=network.image_shape,
        classes=network.classes,
        examples=images,
        defence=None if law is None else Defense("instahide", settings=settings, encodes=True),
    )
    words = (
        ("gradients", f"{len(messages)} of client {client}, with the weights of their rounds"),
        ("number of private images", "not known" if images is None else str(images)),
        ("encodings in one gradient", "not known" if batch is None else f"{batch}, as the client reports"),
        ("encoder", "not known" if law is None else f"k = {law.k}, {law.private} private"),
    )
    granted = {"examples": images, "defence": law}
    grants = ("domain", "messages", "model", "local_plan", *(n for n, v in granted.items() if v is not None))
    return _behind(source, network.image_shape, digests, (batch or 0) * len(messages)), View(
        seen, tuple(sorted(grants)), words, images, law, tuple(notes)
    )


def _behind(source: Source, shape: tuple[int, int, int], digests: Sequence[bytes], count: int) -> EncodedSet:
    name = hashlib.sha256(b"".join(digests)).hexdigest()
    return EncodedSet(torch.zeros(0, *shape), None, {}, name, source.name, behind=count)


def _client(plan: UnmixPlan, source: Source) -> str:
    """Whose updates: those named, or the only ones."""
    found = list(dict.fromkeys(u.header.client for u in source.updates))
    if plan.client is not None:
        if plan.client not in found:
            raise BadInput(f"client: {plan.client!r} sent nothing here; known: {', '.join(found) or 'nobody'}.")
        return plan.client
    if len(found) != 1:
        raise BadInput(f"client: the record holds {len(found)} ({', '.join(found[:8])}); name one with --client.")
    return found[0]


def _gradients(sent: Sent, held: Held) -> dict[str, Tensor]:
    """The gradient that an update is or was made of.

    Raises:
        BadInput: it was made of more than one step, or nobody knows how.
    """
    if sent.header.kind == "gradient":
        return dict(held.update)
    plan = sent.plan
    if plan is None:
        raise BadInput(f"{sent.title}: the record does not say how the client trained, so no gradient follows from it.")
    if not plan.one_sgd_step(sent.header.examples or 0):
        raise BadInput(f"{sent.title}: made of several local steps; its encodings are not read exactly from it.")
    return {n: d / plan.lr - plan.weight_decay * held.sent[n] for n, d in held.update.items()}
