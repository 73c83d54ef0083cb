"""The versioned schema of `scorecard.json`: what was found, under which grants, with which limits.

Documented in docs/scorecard.md. A reader may rely on every field here within one `schema_version`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from frostglass.core.errors import BadInput

SCHEMA_VERSION: Literal["1.0"] = "1.0"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Labels(_Strict):
    """How the attack came by the labels, and how right it was. Accuracies are shares in [0, 1]."""

    source: Literal["granted", "restored", "unused"] = Field(description="how the attack came by the labels")
    restored: list[int] | None = Field(None, description="the restored labels of the first batch, sorted; else null")
    set_accuracy: float | None = Field(
        None, description="share of the classes present that were named; null: none restored"
    )
    count_accuracy: float | None = Field(None, description="share of labels right as a multiset; null: none restored")
    no_gradient_guess: float | None = Field(None, description="count_accuracy of guessing every class equally often")


class NullRank(_Strict):
    """Whether a reconstruction is closer to its own original than to images that were not in the batch.

    A rank is p = (1 + number of non-members that score at least as close) / (1 + number of non-members).
    """

    n0: int = Field(description="non-members of the same class; fewer than 99 give no `p`")
    p: dict[str, float] = Field(default_factory=dict, description="rank among them by metric; low: not a coincidence")
    any_n0: int | None = Field(None, description="non-members of any class; null if those of the class suffice")
    any_p: dict[str, float] = Field(
        default_factory=dict, description="rank among those; says less, as a picture of the class may be what is close"
    )


class ImageScore(_Strict):
    """One private image and the reconstruction matched to it; scores are null where nothing was matched."""

    id: str = Field(description="name of the image in its source")
    sha256: str = Field(description="of its float32 pixels: identifies the image without showing it")
    psnr: float | None = Field(description="dB, at most 150; higher is closer")
    ssim: float | None = Field(description="in [-1, 1]; higher is closer")
    proved: bool = Field(description="the attack verified this row algebraically against the observation")
    target: Literal["private", "encoding", "recovered"] = Field(
        "private", description="what it was compared with; recovered: with nothing, as no truth was given"
    )
    extra: dict[str, float | None] = Field(default_factory=dict, description="further metrics by name")
    identified: bool | None = Field(
        None, description="named by the attack among `candidates`; null: it was not asked about this image"
    )
    candidates: int | None = Field(None, description="equally likely candidates, itself among them; null: no such game")
    null: NullRank | None = Field(
        None, description="its scores among non-members; null: not asked for, not matched, none there, or an encoding"
    )


class OverThreshold(_Strict):
    """How many images reach a score that a person calls recognisable; fixed in the plan before the run."""

    metric: str = Field(description="its name")
    value: float = Field(description="score that counts as recognisable")
    count: int = Field(description="images that reach it")


class Summary(_Strict):
    """Over the images of one cell, all its finished batches.

    Means and bests are over the matched images; in medians, worst values and counts the unmatched are below every
    score, so that a median or worst value is null if it falls on one.
    """

    images: int = Field(description="private images")
    matched: int = Field(description="those that a reconstruction was matched to")
    batches: int = Field(description="finished batches")
    psnr_mean: float | None = Field(description="over the matched")
    psnr_median: float | None = Field(description="over all; null if it falls on an unmatched image")
    psnr_worst: float | None = Field(description="null if an image is unmatched")
    psnr_best: float | None = Field(description="null if none is matched")
    ssim_mean: float | None = Field(description="over the matched")
    ssim_median: float | None = Field(description="over all; null if it falls on an unmatched image")
    ssim_worst: float | None = Field(description="null if an image is unmatched")
    ssim_best: float | None = Field(description="null if none is matched")
    proved: int = Field(description="images whose row the attack verified")
    over_threshold: OverThreshold = Field(description="recognisable images")
    psnr_batch_means: list[float] = Field(
        default_factory=list, description="one mean for each batch with a match: the spread"
    )
    asked: int | None = Field(None, description="messages in which the attack had to name one image; null: none")
    identified: int | None = Field(None, description="messages in which it named the right one")
    candidates: int | None = Field(None, description="among how many; chance is 1 / candidates")
    extra_means: dict[str, float] = Field(
        default_factory=dict, description="means of further metrics over the images that have them"
    )


class Verdict(_Strict):
    """What a cell shows about its success event, which the plan fixed before the run."""

    verdict: Literal["BROKEN CLAIM", "VIOLATED", "BOUNDED", "INCONCLUSIVE"] = Field(
        description="the first that holds, in this order"
    )
    holds: list[str] = Field(description="all that hold")
    text: str = Field(description="the reason, with its numbers")
    role: Literal["test", "control", "exploratory"] = Field(
        description="control: shows that the attack works; exploratory: not the primary test; neither is in the total"
    )
    event: str = Field(description="what counted as a success")
    kappa: float = Field(description="success of a guess without access")
    tolerance: float = Field(description="success rate that is tolerated")
    confidence: float = Field(description="of the two-sided interval, over all tests together")
    tests: int = Field(description="that share the error (Bonferroni)")
    trials: int = Field(description="independent trials: one target image a message")
    successes: int = Field(description="trials in which the event occurred")
    lower: float | None = Field(description="limit of the success rate (Clopper-Pearson); null without a trial")
    upper: float | None = Field(description="the other limit; to be quoted only where `unsuccessful`")
    proved: int = Field(description="private images that were recovered and verified: facts at any n")
    gamma: float | None = Field(description="highest success that is proved or claimed for this event; null: none is")
    gamma_total: float | None = Field(description="the same over all releases that are claimed")
    basis: str | None = Field(description="what gamma rests on")
    assumptions: list[str] = Field(description="of gamma")
    unsuccessful: bool = Field(description="it may be said that this attack did not succeed, and `upper` be quoted")
    lacking: list[str] = Field(description="what such a statement still needs")


class AuditVerdict(_Strict):
    """Of the whole audit: a violation anywhere counts, and BOUNDED only where every test is bounded."""

    verdict: Literal["BROKEN CLAIM", "VIOLATED", "BOUNDED", "INCONCLUSIVE"] = Field(description="over all tests")
    text: str = Field(description="one sentence")
    exit_code: int = Field(description="of `frostglass audit --gate`: 0, 10, 11 or 12 in the order BOUNDED, VIOLATED, "
        "INCONCLUSIVE, BROKEN CLAIM")  # fmt: skip
    tests: int = Field(description="cells that count")


class PitfallCheck(_Strict):
    """Whether a cell walks into a known mistake of such evaluations."""

    number: int = Field(description="1 to 14, as in docs/verdicts.md")
    about: str = Field(description="the mistake")
    status: Literal["ok", "warning", "not_applicable"] = Field(description="warning: the cell does not rule it out")
    found: str = Field(description="what is the case here")


class Cell(_Strict):
    """One combination of scenario, defence and attack."""

    id: str = Field(description="of the cell, in file names and events")
    title: str = Field(description='for a person; says "upper bound" where the grants exceed reality')
    scenario: str = Field(description="its name")
    attack: str = Field(description="its name")
    defense: str = Field(description="its name, or those of a stack joined by +")
    defense_claim: str = Field(description="what stands behind the defence: none, heuristic or proof")
    model: str = Field(description="as in the plan; python:CLASS if it was given from Python")
    mode: str = Field(description="of the client's model: train or eval")
    threat: str = Field(description="name of the threat model")
    grants: list[str] = Field(description="all that the attacker knew, sorted")
    upper_bound: bool = Field(description="the grants exceed what such a client really sends")
    batch: int = Field(description="images in one message")
    batches: int = Field(description="messages that were to be attacked")
    update: str = Field(description="gradient or delta")
    status: Literal["done", "failed", "skipped"] = Field(
        description="of a failed cell only finished batches are scored"
    )
    error: str | None = Field(None, description="why it failed, one sentence")
    seconds: float = Field(
        0.0, description="of the attack, all batches; with the evidence's date, all that differs between equal runs"
    )
    iterations: int = Field(0, description="steps of the longest attack")
    objective: float | None = Field(
        None, description="the attack's own final loss, mean over batches; never a similarity"
    )
    objective_at_truth: float | None = Field(
        None, description="the same loss at what was trained on: far below `objective`, the optimiser failed"
    )
    labels: Labels = Field(description="how right the labels were")
    images: list[ImageScore] = Field(default_factory=list, description="one for each private image, batch after batch")
    summary: Summary | None = Field(None, description="over `images`; null if none was scored")
    encoding_images: list[ImageScore] = Field(
        default_factory=list, description="the same against the encodings that were trained on"
    )
    encoding_summary: Summary | None = Field(None, description="over `encoding_images`; null without an encoding")
    privacy_spent: dict[str, Any] | None = Field(
        None, description="(epsilon, delta) of one message, with its assumptions"
    )
    info: dict[str, Any] = Field(default_factory=dict, description="the attack's own account of the first batch")
    warnings: list[str] = Field(default_factory=list, description="how this set-up can mislead, a sentence each")
    metric_notes: dict[str, str] = Field(
        default_factory=dict, description="by metric: what belongs beside it (pool, chance level), or why it is n/a"
    )
    settings: dict[str, Any] = Field(default_factory=dict, description="every parameter, defaults included")
    pool: int | None = Field(
        None, description="private images that reconstructions were matched to, where the message holds some of them"
    )
    rows: int | None = Field(
        None, description="most reconstructions of one message, where an attack returned more than it holds images"
    )
    batchnorm: bool | None = Field(None, description="whether the network has BatchNorm; null: not recorded")
    verdict: Verdict | None = Field(None, description="on the success event; null: none was given")
    pitfalls: list[PitfallCheck] = Field(default_factory=list, description="the 14 checks, in their order")


class Scorecard(_Strict):
    """All cells of a run with what made them."""

    schema_version: Literal["1.0"] = Field(SCHEMA_VERSION, description="of this file; another one means other fields")
    name: str = Field(description="of the audit")
    seed: int = Field(description="of everything random")
    headline: str = Field(description="one sentence: the worst that was shown, under which grants")
    frostglass: str = Field(description="version that ran")
    environment: dict[str, str] = Field(
        description='python, torch, device, system, threads; "a, then b" of a run that went on elsewhere'
    )
    plan_sha256: str = Field(description="of the resolved plan.toml")
    show_images: bool = Field(description="whether the report may hold private images")
    cells: list[Cell] = Field(description="one for each scenario x defence x attack, in the plan's order")
    limits: list[str] = Field(description="what a run like this cannot show")
    verdict: AuditVerdict | None = Field(None, description="over all cells that are tests; null: none was given")
    recorded: dict[str, Any] | None = Field(
        None, description="of recorded updates: source, every update with what was found in it, pooled trials"
    )
    standards: dict[str, Any] = Field(
        default_factory=dict, description="fields that standards ask for: threat letters, NIST, ISO/IEC 27559, evidence"
    )

    @property
    def failed(self) -> list[Cell]:
        """Cells that broke."""
        return [c for c in self.cells if c.status == "failed"]


class AuditReport:
    """What `frostglass.audit` returns: the scorecard, and where everything was written."""

    def __init__(self, scorecard: Scorecard, folder: Path) -> None:
        self.scorecard = scorecard
        self.folder = folder

    @property
    def cells(self) -> list[Cell]:
        """One per scenario x defence x attack."""
        return self.scorecard.cells

    @property
    def headline(self) -> str:
        """One sentence: what was recovered, under which grants."""
        return self.scorecard.headline

    @property
    def html(self) -> Path:
        """The report page."""
        return self.folder / "report.html"

    def __str__(self) -> str:
        from frostglass.auditing.table import table_text, verdict_text

        parts = [self.headline, verdict_text(self.scorecard), table_text(self.scorecard), f"Report: {self.html}"]
        return "\n\n".join(part for part in parts if part)

    def __repr__(self) -> str:
        return f"AuditReport({len(self.cells)} cells, {self.folder})"


def load_scorecard(path: Path) -> Scorecard:
    """Reads and checks `scorecard.json`.

    Raises:
        BadInput: it cannot be read, or is no scorecard of this version.
    """
    try:
        return Scorecard.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as wrong:
        raise BadInput(f"{path}: cannot be read ({wrong.strerror or wrong}).") from None
    except ValueError as wrong:  # no UTF-8, no JSON, or no scorecard
        what = str(wrong).splitlines()[0]
        raise BadInput(f"{path}: is no scorecard of version {SCHEMA_VERSION} ({what}).") from None
