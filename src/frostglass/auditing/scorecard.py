"""The versioned schema of `scorecard.json`: what was found, under which grants, with which limits.

Documented in docs/scorecard.md. A reader may rely on every field here within one `schema_version`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from frostglass.core.errors import BadInput

SCHEMA_VERSION = "1.0"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Labels(_Strict):
    """How the attack came by the labels, and how right it was.

    `source` is "granted", "restored" or "unused". Accuracies are shares in [0, 1]; None when nothing was restored.
    """

    source: str
    restored: list[int] | None = None
    set_accuracy: float | None = None
    count_accuracy: float | None = None
    no_gradient_guess: float | None = None


class ImageScore(_Strict):
    """One private image and the reconstruction matched to it (None: nothing was matched).

    `extra` holds every further metric by name. `sha256` identifies the private image without showing it.
    """

    id: str
    sha256: str
    psnr: float | None
    ssim: float | None
    proved: bool
    target: str = Field("private", description='"private" or "encoding": what it was compared with')
    extra: dict[str, float | None] = Field(default_factory=dict)


class OverThreshold(_Strict):
    """How many images reach a score that a person calls recognisable; fixed in the plan before the run."""

    metric: str
    value: float
    count: int


class Summary(_Strict):
    """Over the images of one cell (all its batches).

    Means are over the matched images; in medians, worst values and counts the unmatched are below every score (None).
    """

    images: int
    matched: int
    batches: int
    psnr_mean: float | None
    psnr_median: float | None
    psnr_worst: float | None
    psnr_best: float | None
    ssim_mean: float | None
    ssim_median: float | None
    ssim_worst: float | None
    ssim_best: float | None
    proved: int
    over_threshold: OverThreshold
    psnr_batch_means: list[float] = Field(
        default_factory=list, description="one mean per independent batch: the spread"
    )


class Cell(_Strict):
    """One combination of scenario, defence and attack.

    `status` is "done", "failed" (see `error`) or "skipped". `objective` is the attack's own loss, never a similarity.
    `objective_at_truth` is the same loss at the private batch, computed by scoring: if it is far below `objective`,
    the optimiser failed, and no privacy was shown. `encoding_summary` compares with the encodings that were trained
    on, where a defence encodes.
    """

    id: str
    title: str
    scenario: str
    attack: str
    defense: str
    defense_claim: str
    model: str
    mode: str
    threat: str
    grants: list[str]
    upper_bound: bool
    batch: int
    batches: int
    update: str
    status: str
    error: str | None = None
    seconds: float = 0.0
    iterations: int = 0
    objective: float | None = None
    objective_at_truth: float | None = None
    labels: Labels
    images: list[ImageScore] = Field(default_factory=list)
    summary: Summary | None = None
    encoding_images: list[ImageScore] = Field(default_factory=list)
    encoding_summary: Summary | None = None
    privacy_spent: dict[str, Any] | None = None
    info: dict[str, Any] = Field(default_factory=dict)
    warnings: list[str] = Field(default_factory=list)
    settings: dict[str, Any] = Field(default_factory=dict)


class Scorecard(_Strict):
    """All cells of a run with what made them."""

    schema_version: str = SCHEMA_VERSION
    name: str
    seed: int
    headline: str
    frostglass: str
    environment: dict[str, str]
    plan_sha256: str
    show_images: bool
    cells: list[Cell]
    limits: list[str]

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
        from frostglass.auditing.table import table_text

        return f"{self.headline}\n\n{table_text(self.scorecard)}\n\nReport: {self.html}"

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
