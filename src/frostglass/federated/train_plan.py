"""The plan of a training run: what `frostglass train` reads."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field

from frostglass.core.errors import BadInput
from frostglass.numerics.key_rows import Law, MixLaw
from frostglass.numerics.mixing import Labels, Mask

Sees = Literal["pixels", "magnitudes"]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, validate_default=True)


class DataPlan(_Strict):
    """Images to train on and to test with. `$NAME` in a path is taken from the environment."""

    source: str = Field("digits", description='"digits", "folder:PATH" or "parquet:FILE"')
    test: str | None = Field(None, description="another source to test with; none: a fifth of the images, by the seed")
    size: int | None = Field(None, ge=4, le=4096, description="pixels a side, after a centre crop; none: as they are")
    channels: Literal[1, 3] | None = Field(None, description="1 grey, 3 colour; none: as they are")
    limit: int | None = Field(None, ge=2, description="train on the first so many images")
    test_limit: int | None = Field(None, ge=1, description="test on the first so many images")


class ModelPlan(_Strict):
    """The network."""

    name: str = Field("small_bn_cnn", description="a built-in, torchvision:NAME, or package.module:factory")
    options: dict[str, Any] = Field(default_factory=dict, description="parameters of the network's maker")


class MethodPlan(_Strict):
    """One way to train; parameters of the encoding as in `InstaHide`."""

    kind: Literal["plain", "mixup", "instahide"] = Field("plain", description="what becomes of an image first")
    name: str = Field("", pattern=r"^[\w.+-]*$", description="of its folder; none: made of the parameters")
    k: int = Field(4, ge=1, description="images in one encoding")
    private: int | None = Field(
        None, ge=1, description="private ones; none: k, or 2 with a public pool (cross-dataset)"
    )
    public: str | None = Field(None, description="folder of a public pool")
    c1: float = Field(0.65, gt=0, le=1, description="no coefficient exceeds it")
    c2: float = Field(0.3, ge=0, le=1, description="least private share, with a pool")
    law: Law = Field("folded_normal", description='of the coefficients: "folded_normal" or "dirichlet"')
    mask: Mask = Field("sign", description='"sign", "abs" or "none"; mixup has none')
    sees: Sees = Field(
        "pixels", description='"magnitudes": the network takes 2 |x| - 1, as the sign of a masked pixel is a fair coin'
    )
    labels: Labels = Field("exact", description='"exact", "quantised" or "renormalised"')
    partners: Literal["iid", "permutation"] = Field("iid", description="how partners are drawn")
    rounds: int | None = Field(
        None, ge=1, description="fresh encodings of the set; none: one each epoch, as in the paper"
    )
    reuse: bool = Field(False, description="train on the encodings of those rounds again and again")
    max_exposure: int | None = Field(None, ge=1, description="encodings that no image may exceed")
    augment: Literal["per_epoch", "per_use"] = Field("per_epoch", description="when an image is augmented")
    insecure_seed: int | None = Field(None, description="keys that repeat, for tests; outputs are marked")

    @property
    def label(self) -> str:
        """Its name, or kind and parameters."""
        if self.name or self.kind == "plain":
            return self.name or "plain"
        return f"{self.kind}-{'cross' if self.public else 'inside'}-k{self.k}"

    @property
    def takes(self) -> str:
        """What the trained network takes as pixels."""
        if self.kind == "plain":
            return "[0, 1], normalised inside"
        return "2 |x| - 1 of x in [-1, 1]" if self.sees == "magnitudes" else "[-1, 1]"


class TrainingPlan(_Strict):
    """SGD and its schedule; the same for all methods."""

    epochs: int = Field(10, ge=1, description="passes over the images")
    batch: int = Field(128, ge=1, description="images in a step")
    lr: float = Field(0.1, gt=0, description="greatest learning rate")
    momentum: float = Field(0.9, ge=0, lt=1, description="of SGD")
    weight_decay: float = Field(1e-4, ge=0, description="of SGD")
    schedule: Literal["one_cycle", "steps", "constant"] = Field("one_cycle", description="of the learning rate")
    milestones: list[int] = Field(
        default_factory=lambda: [100, 150], description="epochs at which steps multiplies by gamma"
    )
    gamma: float = Field(0.1, gt=0, le=1, description="factor of the schedule steps")
    augmentation: Literal["none", "crop", "crop_flip"] = Field("none", description="random crop (pad 4), and flip")


class EvaluationPlan(_Strict):
    """How it is tested: plain images after every epoch, encodings of test images at the end."""

    encodings: list[int] = Field(
        default_factory=lambda: [10, 20], description="encodings of a test image to average over"
    )
    min_private: float = Field(0.5, ge=0, le=1, description="least coefficient of the test image in its encodings")


class TrainPlan(_Strict):
    """Every method with every seed is one run."""

    name: str = Field("training", min_length=1, max_length=200, description="for logs and tables")
    seeds: list[Seed] = Field(
        default_factory=lambda: [0], min_length=1, description="of weights, splits and plain order"
    )
    data: DataPlan = Field(default_factory=DataPlan, description="the images")
    model: ModelPlan = Field(default_factory=ModelPlan, description="the network")
    method: list[MethodPlan] = Field(min_length=1, description="what is compared")
    training: TrainingPlan = Field(default_factory=TrainingPlan, description="how it is trained")
    evaluation: EvaluationPlan = Field(default_factory=EvaluationPlan, description="how it is tested")

    def check(self) -> None:
        """Raises BadInput with every sentence on what cannot be run."""
        found = []
        labels = [m.label for m in self.method]
        found += [
            f"method: two are called {x!r}; give them names."
            for x in sorted({x for x in labels if labels.count(x) > 1})
        ]
        for m in self.method:
            short = m.rounds is not None and m.rounds < self.training.epochs and not m.reuse
            if m.kind != "plain" and short:
                found.append(f"method.rounds: {m.rounds} do not last {self.training.epochs} epochs; set reuse = true.")
            if m.kind != "plain" and self.evaluation.encodings:  # seen now, and not when all has been trained
                try:
                    MixLaw(m.k, 1, m.c1, 0.0, m.law, self.evaluation.min_private).check()
                except BadInput as wrong:
                    found += [f"evaluation, method {m.label}: {sentence}" for sentence in wrong.problems]
        if any(n < 1 for n in self.evaluation.encodings):
            found.append("evaluation.encodings: give whole numbers from 1.")
        if len(set(self.seeds)) < len(self.seeds):
            found.append("seeds: one occurs twice.")
        if found:
            raise BadInput(found)

    def to_toml(self) -> str:
        """The resolved plan."""
        return tomli_w.dumps(_without_none(self.model_dump()))


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return [_without_none(v) for v in value] if isinstance(value, list) else value
