"""Checks for `frostglass.federated.gate.Gate`: what this very update gives away of this very client's images.

The checks play the server: every attack reads an `Observation` of the update as it would leave, and nothing else. What
it found is compared with the client's own images by `frostglass.auditing.score`, as in an audit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from frostglass.attacks.analytic.peel import peel
from frostglass.attacks.analytic.peel_residual import peel_residual
from frostglass.attacks.analytic.spear import spear
from frostglass.attacks.identification.gallery import gallery as gallery_attack
from frostglass.attacks.inversion.restore import by_counts, restored_of
from frostglass.attacks.inversion.target import update_problems
from frostglass.auditing.outgoing_game import candidates_for, check_decoys, named
from frostglass.auditing.outgoing_linter import linted
from frostglass.auditing.score import Scored, score
from frostglass.auditing.simulate import Round, Truth
from frostglass.core.batch import Batch, Sealed
from frostglass.core.defense import encoded_by
from frostglass.core.drive import Attack, drive
from frostglass.core.errors import AttackFailed, BadInput, FrostglassError
from frostglass.core.events import Event
from frostglass.core.randomness import OsKey, Randomness, Rng
from frostglass.core.reconstruction import Reconstruction
from frostglass.core.runtime import Runtime
from frostglass.core.threat import Facts, Knows, Observation, ThreatModel
from frostglass.federated.exchange import misfits
from frostglass.federated.gate import Decide, Decision, Finding, NotRun, Outgoing
from frostglass.numerics.bn import running_statistics
from frostglass.numerics.called import copied
from frostglass.vision.borrowed import refuse_unfit
from frostglass.vision.normalise import domain_of

SERVER = frozenset({Knows.EXAMPLES, Knows.LOCAL_PLAN, Knows.BN_BATCH, Knows.BN_RUNNING, Knows.DEFENCE})
"""What the checks suppose the server to know: FedAvg reports the number of images, and the server ordered the plan."""

RECOVERED = 25.0
"""PSNR in dB from which an image counts as recovered; a grey picture has 5 to 15."""

_EXACT = frozenset({"heads_residual", "peel_residual", "pixel_loss", "features_error", "proved", "candidates"})
"""What attacks report while they still are exact; anything else comes from their fall-back."""

Check = Callable[[Any], Finding | NotRun]


def outgoing_checks(
    *,
    label_leakage: float | None = 0.8,
    exact_recovery: bool = True,
    gallery: float | None = None,
    linter: bool = True,
    decoys: tuple[Tensor, Tensor] | None = None,
    candidates: int = 10,
    targets: int = 8,
    randomness: Randomness | None = None,
) -> Decide:
    """The checks of a gate, cheapest first; each ends by itself when the gate's time is over.

    Args:
        label_leakage: share of the labels, as a multiset, up to which their restoration is tolerated; exceeded only if
            it also beats guessing. None leaves the check out.
        exact_recovery: algebraic attacks (`spear`, `peel`, `peel_residual`, as far as they fit the network): exceeded
            by a single image that they recover to `RECOVERED` dB.
        gallery: share of the client's images up to which their being named among `candidates` of their class is
            tolerated; needs `decoys`. None leaves the check out.
        linter: rules of `frostglass check` on the defence's parameters: exceeded by an error.
        decoys: ([n, c, h, w] in [0, 1], [n] class indices) of images that the client does not train on.
        candidates: of each identification, the client's own image among them.
        targets: how many of the client's images are asked for, drawn anew for each update.
        randomness: of the attacks; None for keys of the operating system.

    Raises:
        BadInput: tolerances outside [0, 1], a gallery without decoys, or decoys that are no images with labels.
    """
    for name, value in (("label_leakage", label_leakage), ("gallery", gallery)):
        if value is not None and not (isinstance(value, int | float) and 0 <= value <= 1):
            raise BadInput(f"outgoing_checks.{name}: {value!r} must be a share between 0 and 1.")
    if gallery is not None and decoys is None:
        raise BadInput("outgoing_checks.gallery: there is nothing to hide an image among; give `decoys`.")
    if decoys is not None:
        check_decoys(decoys)
    if not (isinstance(candidates, int) and candidates >= 2 and isinstance(targets, int) and targets >= 1):
        raise BadInput(
            f"outgoing_checks: candidates = {candidates!r} must be a whole number from 2, and targets = {targets!r} "
            "one from 1."
        )
    checks: dict[str, Check] = {}
    if linter:
        checks["linter"] = linted
    if label_leakage is not None:
        checks["label_leakage"] = lambda looked: _labels(looked, label_leakage)
    if gallery is not None and decoys is not None:
        checks["gallery"] = lambda looked: _gallery(looked, gallery, decoys, candidates, targets)
    if exact_recovery:
        checks["exact_recovery"] = _exact

    def decide(outgoing: Outgoing) -> Decision:
        begun = time.monotonic()
        done = list(_each(checks, outgoing, (randomness or OsKey()).rng()))
        findings = tuple(d for d in done if isinstance(d, Finding))
        return Decision(findings, time.monotonic() - begun, tuple(d for d in done if isinstance(d, NotRun)))

    return decide


@dataclass(frozen=True, eq=False)
class _Looked:
    """An update as the server sees it, beside what its client knows.

    Args:
        outgoing: the update.
        seen: what every attack gets; the gallery adds its candidates.
        trained: private images in the domain of what was trained on; their pixels where nothing is encoded.
        run: device and randomness of attacks.
    """

    outgoing: Outgoing
    seen: Observation
    trained: Batch
    run: Runtime

    def scored(self, result: Reconstruction, private: Batch | None = None, place: int | None = None) -> Scored:
        """The result beside the client's images, opened by scoring alone."""
        truth = Truth(private or self.outgoing.private, private or self.trained, place)
        return score(result, Round(self.seen, Sealed(truth), None, self.outgoing.update.plan), [], null=False)


def _each(checks: dict[str, Check], outgoing: Outgoing, rng: Rng) -> Iterator[Finding | NotRun]:
    """Every check's finding, or why it has none; what breaks one leaves the others running."""
    looked: _Looked | str | None = None
    for name, check in checks.items():
        if outgoing.expired():
            yield NotRun(name, "the time was over", True)
            continue
        try:
            if check is linted:  # reads parameters alone
                yield linted(outgoing)
                continue
            looked = _look(outgoing, rng) if looked is None else looked
            yield NotRun(name, looked, True) if isinstance(looked, str) else check(looked)
        except Exception as wrong:
            first = next((line.strip() for line in str(wrong).splitlines() if line.strip()), "no detail")
            text = first if isinstance(wrong, FrostglassError) else f"{type(wrong).__name__}: {first}"
            yield NotRun(name, text.rstrip("."), True)


def _look(outgoing: Outgoing, rng: Rng) -> _Looked | str:
    """The server's view, or what is wrong with the update."""
    refuse_unfit(outgoing.model, type(outgoing.model).__name__)  # attacks would see no layer there, and not apply
    update = outgoing.update
    device = next((g.device for g in update.gradients.values()), torch.device("cpu"))
    outgoing = replace(outgoing, private=outgoing.private.to(device))
    model, private = copied(outgoing.model).to(device), outgoing.private
    wrong = misfits(outgoing.sent, model)
    if wrong:
        return f"what was sent does not fit the model: {'; '.join(wrong[:3])}"
    model.load_state_dict(dict(outgoing.sent))
    model.train(update.plan.mode == "train")
    domain = domain_of(model)
    trained = private
    if outgoing.defence.encodes:  # keys of the operating system: other encodings than were sent, of the same domain
        domain = encoded_by(outgoing.defence, private, OsKey()).domain
        trained = replace(private, images=domain.low + private.images * (domain.high - domain.low), domain=domain)
    facts = Facts(
        domain=domain,
        mode=update.plan.mode,
        image_shape=private.image_shape,
        classes=private.targets.shape[1],
        local_plan=update.plan,
        bn_running=running_statistics(model),
        defence=outgoing.defence,
    )
    known = SERVER if update.bn else SERVER - {Knows.BN_BATCH}
    seen = ThreatModel("gate", known).observe(model, [update], facts)
    problems = update_problems(seen)
    if problems:
        return problems[0].rstrip(".")
    if not all(bool(g.isfinite().all()) for g in update.gradients.values()):
        return "the update holds values that are not finite"
    return _Looked(outgoing, seen, trained, Runtime(rng, device))


def _labels(looked: _Looked, tolerance: float) -> Finding | NotRun:
    """How many of the labels follow from the update alone."""
    try:
        found = restored_of(looked.seen, by_counts())
    except BadInput as wrong:
        return NotRun("label_leakage", wrong.problems[0].rstrip("."), False)
    nothing = torch.zeros(0, *looked.seen.image_shape)
    counts = None if found.counts is None else found.counts.float().cpu()
    result = Reconstruction(nothing, torch.zeros(0, dtype=torch.bool), math.nan, label_counts=counts)
    labels = looked.scored(result, looked.outgoing.private).labels
    value, guess = labels.count_accuracy or 0.0, labels.no_gradient_guess or 0.0
    blind = found.confidence == "none"
    text = f"{value:.0%} of the labels follow from the update; guessing gets {guess:.0%}"
    text += ", and the rule itself says that it only guessed." if blind else f" (rule: {found.rule})."
    return Finding("label_leakage", value > tolerance and value > guess and not blind, value, tolerance, text)


def _exact(looked: _Looked) -> Finding | NotRun:
    """Images that an exact attack recovers, whatever it says of them itself."""
    plan, n = looked.outgoing.update.plan, looked.outgoing.update.examples
    if plan.kind == "delta" and not plan.one_sgd_step(n):
        return NotRun("exact_recovery", f"{plan.steps_for(n)} local steps are no single gradient", False)
    refused, tried, foreign = [], [], 0
    for attack in (spear(), peel(every=1), peel_residual(every=1)):
        problems = attack.check(looked.seen)
        if problems:
            refused.append(f"{attack.name}: {problems[0].rstrip('.')}")
            continue
        result, late = _driven(attack, looked)
        rows = looked.scored(result).private if result is not None else []
        recovered = sum(r.psnr is not None and r.psnr >= RECOVERED for r in rows)
        proved = 0 if result is None else int(result.proved.sum())
        if recovered:
            text = (
                f"{attack.name} recovered {recovered} of {len(rows)} images to at least {RECOVERED:g} dB from the "
                f"update alone ({proved} rows with a proof)."
            )
            return Finding("exact_recovery", True, recovered, 0, text)
        if late:
            return NotRun("exact_recovery", f"{attack.name} had found nothing when the time was over", True)
        tried.append(attack.name)
        foreign = max(foreign, proved)
    if not tried:
        return NotRun("exact_recovery", "; ".join(refused), False)
    text = f"{', '.join(tried)} recovered no image exactly, which proves nothing about other attacks."
    if foreign:
        text += f" {foreign} rows that were trained on were recovered with a proof, none of them a private image."
    return Finding("exact_recovery", False, 0, 0, text)


def _driven(attack: Attack, looked: _Looked) -> tuple[Reconstruction | None, bool]:
    """(what an attack found, whether the time ran out); None where the update is no exact gradient.

    Where an exact attack falls back to gradient matching it is ended: that belongs into an audit, not before a send.
    """
    ended: list[str] = []

    def listen(event: Event) -> None:
        if event.kind == "progress" and event.values and not _EXACT & set(event.values):
            ended.append("inexact")

    def stop() -> bool:
        if looked.outgoing.expired():
            ended.append("late")
        return bool(ended)

    try:
        return drive(attack, looked.seen, looked.run.at(attack.name), emit=listen, stop=stop), "late" in ended
    except AttackFailed:
        return None, False


def _gallery(
    looked: _Looked, tolerance: float, decoys: tuple[Tensor, Tensor], candidates: int, targets: int
) -> Finding | NotRun:
    """How many of the client's images are told from others of their class, each knowing the rest of the message."""
    private, rng = looked.outgoing.private, looked.run.rng.at("gallery")
    hits = asked = 0
    problem = f"{candidates - 1} decoys of one class are lacking, or the images stand twice in the update"
    late = False
    for i in rng.at("targets").permutation(len(private)).tolist():
        if asked == targets or late:
            break
        own = private.take([i, *(j for j in range(len(private)) if j != i)])
        game = candidates_for(own, decoys, candidates, rng.at("candidates", i))
        if game is None:
            continue
        known, place = game
        seen = replace(looked.seen, gallery=known)
        attack = gallery_attack()
        problems = attack.check(seen)
        if problems:
            return NotRun("gallery", problems[0].rstrip("."), False)
        result, late = _driven(attack, replace(looked, seen=seen, run=looked.run.at("game", i)))
        if result is not None and not late:  # a game that was cut short has not looked at every candidate
            asked += 1
            hits += bool(looked.scored(result, own, place).identified)
    if not asked:
        return NotRun("gallery", "the time was over" if late else problem, late)
    return named(hits, asked, candidates, tolerance)
