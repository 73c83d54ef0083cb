"""The plan of an audit of encodings: the set, what the attacker knows of it, and which attacks run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from frostglass.attacks.registry import ATTACKS
from frostglass.auditing.metrics.registry import ALWAYS_SCORED, METRICS
from frostglass.auditing.plan import Named, Resolved, ThresholdPlan, Title
from frostglass.auditing.plan_reading import read_values, sentences
from frostglass.auditing.plan_verdict import Strict
from frostglass.core.errors import BadInput, close_match
from frostglass.core.files import placed, source_placed
from frostglass.defenses.sets.manifest import sha256_of
from frostglass.federated.record_header import INFO
from frostglass.numerics.key_rows import MixLaw

AUTO = ("unmix_statistical", "mixup_attack", "averaging", "demask", "prng_attack")
"""Attacks of a plan that names none, quick ones first; those that do not apply are skipped, with the reason."""

AUTO_SEEDS = 1 << 16
"""Seeds that `prng_attack` searches where no plan asks for it: seconds; 2^20 take up to minutes."""


class KnownPlan(Strict):
    """What the attacker knows; what is left out is taken from the set's manifest, which is public, or is not known."""

    labels: Literal["published", "classes", "none"] = Field(
        "published", description="labels as published, their classes without coefficients, or none"
    )
    images: int | None = Field(None, ge=1, description="private images in all")
    per_class: list[int] | None = Field(None, description="private images of each class")
    k: int | None = Field(None, ge=1, description="images in one encoding")
    private: int | None = Field(None, ge=1, description="private ones among them")
    c1: float | None = Field(None, gt=0, le=1, description="no coefficient exceeds it; 0.65 if the set does not say")
    c2: float | None = Field(
        None, ge=0, le=1, description="least private share, with public images; 0.3 if the set does not say"
    )
    law: Literal["folded_normal", "dirichlet"] | None = Field(None, description="of the coefficients")
    mask: Literal["sign", "abs", "none"] | None = Field(None, description="sign, abs or none")
    public: int | None = Field(None, ge=1, description="public images in the pool")


class UnmixReport(Strict):
    """What the report shows."""

    metrics: list[str] = Field(default_factory=lambda: ["psnr", "ssim"], description="names of metrics")
    show_images: bool = Field(True, description="false leaves all pictures out of report and folder")
    threshold: ThresholdPlan = Field(default_factory=ThresholdPlan, description="what counts as recognisable")


class UnmixPlan(Resolved):
    """An audit of one encoded set."""

    name: Title = Field("unmix", min_length=1, description="of the audit, for the report")
    seed: int = Field(0, ge=0, lt=2**63, description="of everything random")
    encoded: str = Field(
        description="an encoded set, a folder with encryption.npy, or recorded updates; python: given there"
    )
    client: str | None = Field(None, description="of recorded updates: whose; none: the only client")
    model: str | None = Field(None, description="of recorded updates: package.module:factory, to confirm the record's")
    truth: str | None = Field(None, description="the private images, as for frostglass encode; for scoring alone")
    pool: str | None = Field(None, description="the public pool that was mixed in, as frostglass public-pool writes it")
    groups: str | None = Field(None, description=".npy, a number for each encoding: equal ones are of one image")
    auxiliary: str | None = Field(None, description="a data source with other images of the same kind")
    known: KnownPlan = Field(default_factory=KnownPlan, description="what the attacker knows of the encoder")
    attack: list[Named] = Field(default_factory=list, description="attacks; none: all that apply")
    report: UnmixReport = Field(default_factory=UnmixReport, description="what is measured and shown")

    @property
    def of_updates(self) -> bool:
        """Whether gradients of recorded updates are attacked, and not encodings."""
        return (Path(self.encoded) / INFO).is_file()

    @property
    def automatic(self) -> bool:
        """Whether the plan left the choice of attacks open."""
        return not self.attack

    @property
    def attacks(self) -> list[Named]:
        """Those named, or all that may apply."""
        if self.of_updates:
            return self.attack or [Named(name="gradient_then_unmix")]
        named = [Named(name=name) for name in AUTO if name != "prng_attack"]
        search = [Named.model_validate({"name": name, "last": AUTO_SEEDS}) for name in AUTO if name == "prng_attack"]
        return self.attack or named + search


def load_unmix_plan(path: Path, overrides: Sequence[str] = ()) -> UnmixPlan:
    """The plan in a TOML file; its relative paths start at its folder.

    Raises:
        BadInput: every problem that was found, together.
    """
    values = read_values(path, overrides)
    for key in ("encoded", "truth", "pool", "groups", "auxiliary"):
        if isinstance(values.get(key), str):
            values[key] = anchored(values[key], path.parent)
    for attack in values.get("attack", []) if isinstance(values.get("attack"), list) else []:
        if isinstance(attack, dict) and isinstance(attack.get("network"), str):
            attack["network"] = anchored(attack["network"], path.parent)
    return parse_unmix_plan(values)


def anchored(text: str, folder: Path) -> str:
    """A path, or the path of a source, made absolute from `folder`; names of bundled sources stay."""
    if text in ("digits", "photos", "python") or text.startswith(("folder:", "parquet:")):
        return source_placed(text, folder)
    return placed(text, folder)


def parse_unmix_plan(values: Mapping[str, Any]) -> UnmixPlan:
    """Checks a plan.

    Raises:
        BadInput: every problem that was found, together.
    """
    try:
        plan = UnmixPlan.model_validate(values)
    except ValidationError as wrong:
        raise BadInput(sentences(wrong, UnmixPlan)) from None
    found = _attack_problems(plan) + _known_problems(plan.known) + _metric_problems(plan)
    if plan.client is not None and not plan.of_updates:
        found.append("client: an encoded set names no clients; leave it out.")
    if plan.model is not None and not plan.of_updates:
        found.append("model: an encoded set has no network; leave it out.")
    if plan.of_updates and (plan.pool or plan.groups or plan.auxiliary):
        found.append("pool, groups, auxiliary: attacks on recorded updates do not use them; leave them out.")
    if found:
        raise BadInput(found)
    return plan


def _attack_problems(plan: UnmixPlan) -> list[str]:
    found = []
    reads = "rounds" if plan.of_updates else "encodings"
    on_encodings = [e.name for e in ATTACKS if e.about.get("reads") == reads]
    for i, entry in enumerate(plan.attack):
        if entry.name not in on_encodings:
            wrong = "reads encodings, not updates" if plan.of_updates else "reads gradients, not encodings"
            what = wrong if entry.name in ATTACKS else "is not a known attack"
            found.append(f"attack.{i}.name: {entry.name!r} {what}; {close_match(entry.name, on_encodings)}.")
        else:
            found += ATTACKS[entry.name].problems(entry.settings, f"attack.{i}")
    return found


def files_digest(plan: UnmixPlan) -> str:
    """SHA-256 of the files that attacks are given by name, as a fitted network is; empty if there are none."""
    values = [value for entry in plan.attack for value in entry.settings.values() if isinstance(value, str)]
    return "".join(sha256_of(Path(value)) for value in values if Path(value).is_file())


def _known_problems(known: KnownPlan) -> list[str]:
    if known.private is not None and known.k is None:
        return [f"known.k: missing, and known.private = {known.private} says nothing without it; give both."]
    if known.k is not None:
        given = {key: value for key in ("c1", "c2", "law") if (value := getattr(known, key)) is not None}
        try:
            MixLaw(known.k, known.private or known.k, **given).check()
        except BadInput as wrong:
            return [f"known.{p}" for p in wrong.problems]
    return []


def _metric_problems(plan: UnmixPlan) -> list[str]:
    names = METRICS.names()
    found = [
        f"report.metrics: {m!r} is not a metric; {close_match(m, names)}."
        for m in plan.report.metrics
        if m not in names
    ]
    found += [
        f"report.metrics: {m!r} compares with a pool of private images, which there is none of here; leave it out."
        for m in plan.report.metrics
        if m in names and METRICS[m].make().needs_context
    ]
    if plan.report.threshold.metric not in (*ALWAYS_SCORED, *plan.report.metrics):
        found.append(f"report.threshold.metric: {plan.report.threshold.metric!r} is not among report.metrics; add it.")
    return found
