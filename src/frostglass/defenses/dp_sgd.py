"""Differentially private SGD: per-example clipping and Gaussian noise, both by Opacus."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from frostglass.core.batch import Batch
from frostglass.core.defense import Defense, Mechanism
from frostglass.core.errors import BadInput
from frostglass.core.opacus_import import import_opacus
from frostglass.core.randomness import Randomness, Rng
from frostglass.core.update import LocalPlan, PrivacySpent, Update
from frostglass.defenses.accounting import Accountant, epsilon_of, opacus_quiet
from frostglass.defenses.registry import DEFENSES
from frostglass.numerics.called import activations_kept, copied
from frostglass.numerics.compress import clipped
from frostglass.numerics.local_update import a_row_each, in_mode, soft_cross_entropy, trainable


@DEFENSES.register(paper="Abadi et al. 2016, CCS (DP-SGD); Opacus")
def dp_sgd(
    *,
    clipping_norm: float = 1.0,
    noise_multiplier: float = 1.0,
    delta: float = 1e-5,
    accountant: Accountant = "rdp",
    expected_batch: int | None = None,
) -> Defense:
    """Per-example clipping and Gaussian noise: the only defence here with a proof for every image, by Opacus.

    Each example's gradient is clipped to `clipping_norm` C, N(0, (noise_multiplier C)^2) is added to the sum, which is
    divided by the batch size. The privacy spent is accounted for the steps of this update alone, for adding or removing
    one image. With minibatches every step draws each image by its own coin (Poisson, by Opacus), with probability
    minibatch / images, and the accountant counts that amplification; without them every step sees all images.

    Args:
        clipping_norm: C, in the units of a gradient's L2 norm; above 0.
        noise_multiplier: sigma; 0 clips only and proves nothing.
        delta: of (epsilon, delta).
        accountant: Opacus' "rdp", or the tighter "prv".
        expected_batch: the sum is divided by this instead of the images that are there: for Poisson sampling, whose
            batches differ in size and may be empty (then noise alone is sent).
    """
    bad_batch = expected_batch is not None and expected_batch < 1
    if clipping_norm <= 0 or noise_multiplier < 0 or not 0 < delta < 1 or bad_batch:
        raise BadInput(
            f"dp_sgd: clipping_norm = {clipping_norm} must be above 0, noise_multiplier = {noise_multiplier} at least "
            f"0, delta = {delta} between 0 and 1, and expected_batch = {expected_batch} from 1."
        )

    def gradient(model: nn.Module, batch: Batch, plan: LocalPlan, randomness: Randomness) -> Update:
        steps = plan.steps_for(len(batch)) if plan.kind == "delta" else 1
        _refuse_unsuitable(model, batch, plan, expected_batch)
        divisor = expected_batch or (len(batch) if plan.whole_batches(len(batch)) else plan.minibatch or 1)
        rng = randomness.rng().at("dp_sgd")
        if len(batch):
            sent = _private_update(model, batch, plan, rng, clipping_norm, noise_multiplier, divisor)
        else:
            sent = _noise_alone(model, plan, rng, noise_multiplier * clipping_norm / divisor)
        spent = _accounted(noise_multiplier, clipping_norm, delta, steps, accountant, plan.sampling_rate(len(batch)))
        return Update(sent, {}, len(batch), plan, spent)

    return Defense(
        "dp_sgd",
        gradient=gradient,
        claim="proof" if noise_multiplier > 0 else "heuristic",
        settings={
            "clipping_norm": clipping_norm,
            "noise_multiplier": noise_multiplier,
            "delta": delta,
            "accountant": accountant,
            "expected_batch": expected_batch,
        },
        adaptive=("gallery", "learned_inverter"),
        # exact for one image; for more, the sum of clipped gradients is at most as long, and only its direction is used
        simulate=lambda own, observed: clipped(own, clipping_norm),
        mechanism=Mechanism("image", clipping_norm, noise_multiplier * clipping_norm, expected_batch),
    )


def _private_update(
    model: nn.Module, batch: Batch, plan: LocalPlan, rng: Rng, clip: float, sigma: float, divisor: int
) -> dict[str, Tensor]:
    import_opacus()
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    inner = _recorded_by_opacus(copied(model), plan.mode)
    names = list(trainable(inner))
    before = {n: p.detach().clone() for n, p in trainable(inner).items()}
    with opacus_quiet():
        wrapped = GradSampleModule(inner, loss_reduction="mean", strict=False)
        sgd = torch.optim.SGD(
            [p for p in wrapped.parameters() if p.requires_grad],
            lr=plan.lr, momentum=plan.momentum, weight_decay=plan.weight_decay,
        )  # fmt: skip
        optimizer = DPOptimizer(
            sgd,
            noise_multiplier=sigma,
            max_grad_norm=clip,
            expected_batch_size=divisor,
            loss_reduction="mean",
            generator=rng.generator(batch.images.device),
        )
        for rows in _draws(plan, len(batch), rng):
            optimizer.zero_grad()
            images, targets = (
                (batch.images, batch.targets) if rows is None else (batch.images[rows], batch.targets[rows])
            )
            if len(images):
                with activations_kept():  # Opacus would meet each layer twice
                    logits = a_row_each(wrapped(images), len(images))
                soft_cross_entropy(logits, targets).backward()
            else:  # a Poisson draw of nobody: noise alone, as leaving it out would tell
                for p in optimizer.params:
                    p.grad_sample = p.new_zeros(0, *p.shape)
            if plan.kind == "delta":
                optimizer.step()
            else:
                optimizer.pre_step()
    after = trainable(inner)
    if plan.kind == "delta":
        return {n: before[n] - after[n].detach() for n in names}
    return {n: after[n].grad.detach().clone() for n in names}  # type: ignore[union-attr]


def _draws(plan: LocalPlan, examples: int, rng: Rng) -> Iterator[list[int] | None]:
    """Rows of every step: None for all of them, else Opacus' Poisson draws."""
    import_opacus()
    from opacus.utils.uniform_sampler import UniformWithReplacementSampler

    rate, steps = plan.sampling_rate(examples), plan.steps_for(examples) if plan.kind == "delta" else 1
    if rate == 1.0:
        yield from [None] * steps
        return
    coins = rng.at("poisson").generator()
    yield from UniformWithReplacementSampler(num_samples=examples, sample_rate=rate, generator=coins, steps=steps)


def _recorded_by_opacus(model: nn.Module, mode: str) -> nn.Module:
    """In `mode`: Opacus records modules in train mode alone, and only dropout is another without BatchNorm."""
    model.train()
    for module in model.modules():
        if mode == "eval" and isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()
    return model


def _noise_alone(model: nn.Module, plan: LocalPlan, rng: Rng, std: float) -> dict[str, Tensor]:
    """What an empty Poisson batch sends: leaving it out would tell that nobody was sampled."""
    scale = plan.lr if plan.kind == "delta" else 1.0
    return {n: scale * std * rng.at("empty", n).normal(p.shape, like=p) for n, p in trainable(model).items()}


def _refuse_unsuitable(model: nn.Module, batch: Batch, plan: LocalPlan, expected: int | None) -> None:
    import_opacus()
    from opacus.validators import ModuleValidator

    if plan.kind == "delta" and plan.optimizer != "sgd":
        raise BadInput("defense dp_sgd: takes SGD steps; leave out client.optimizer.")
    if not len(batch) and (expected is None or (plan.kind == "delta" and plan.steps_for(1) > 1)):
        raise BadInput(
            "defense dp_sgd: an empty batch sends noise alone, whose size follows from expected_batch; set it to "
            "sampling rate x images, with one local step."
        )
    with in_mode(model, "train"):  # Opacus reports eval mode as an error of its own
        errors = ModuleValidator.validate(model, strict=False)
    if errors:
        layers = [n for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        named = f": layer {layers[0]!r} is BatchNorm, which mixes the images of a batch" if layers else ""
        raise BadInput(
            f"defense dp_sgd: Opacus refuses this model ({_first_sentence(errors[0])}){named}; set model.fix = "
            '"opacus" to replace such layers (BatchNorm becomes GroupNorm).'
        )
    for name, module in model.named_modules():
        anew = _made_anew(module)
        if anew:
            raise BadInput(
                f"defense dp_sgd: {anew!r} of layer {name!r} is made anew in each pass (by weight_norm, spectral_norm "
                "or prune of torch.nn.utils), and Opacus follows no such weights; remove that from model (as by "
                "remove_weight_norm), or use torch.nn.utils.parametrizations.weight_norm."
            )


def _made_anew(module: nn.Module) -> str | None:
    """A weight that a hook computes before each pass from parameters that are trained in its place, None if none is."""
    trained = [n for n, p in module._parameters.items() if p is not None and p.requires_grad]
    made = [n for n, value in vars(module).items() if isinstance(value, Tensor)]
    return next((n for n in made if any(t.startswith(f"{n}_") for t in trained)), None)


def _first_sentence(error: object) -> str:
    return str(error).splitlines()[0].partition(". ")[0].rstrip(".")


def _accounted(
    sigma: float, clip: float, delta: float, steps: int, accountant: Accountant, rate: float
) -> PrivacySpent | None:
    if sigma == 0:
        return None
    epsilon = epsilon_of(sigma, delta, steps, accountant, rate)
    sampling = "no sampling amplification" if rate == 1 else f"{steps} Poisson draws at rate {rate:.4g}"
    about = f"Opacus {accountant.upper()}, {sampling}, add/remove one image"
    return PrivacySpent(epsilon, delta, sigma, clip, about)
