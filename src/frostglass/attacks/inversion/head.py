"""The classifier's part of an observation: its layer, its gradient as of one step, and features of other images."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from frostglass.core.draws import kept_draws
from frostglass.core.errors import BadInput
from frostglass.core.threat import GradientMessage, Observation
from frostglass.core.update import LocalPlan
from frostglass.numerics.called import called_with
from frostglass.numerics.label_counts import Head, bias_gradient
from frostglass.numerics.labels import classifier_layer
from frostglass.numerics.local_update import in_mode

UNEVEN = 1.5
"""How much more than another one image may weigh in a FedAvg difference from which labels are counted."""

_GROUPS, _GROUP = 16, 48
"""Groups of dummy images that simulated batches are drawn from, and images in a group (at least a batch)."""

_SCALES = (1, 2, 4, 8, 16, 32)  # sides of the noise grids that dummy images are summed from


def examples_of(seen: Observation) -> int:
    """How many images the update holds.

    Raises:
        BadInput: not granted, or not positive.
    """
    if seen.examples is None:
        raise BadInput("attack: restoring labels needs the number of images; grant 'examples'.")
    if seen.examples < 1:
        raise BadInput(f"attack: labels of {seen.examples} images cannot be restored; 'examples' must be at least 1.")
    return seen.examples


def classifier_of(seen: Observation) -> tuple[str, Tensor, Tensor | None]:
    """(layer name, weight gradient [k, d], bias gradient [k] or None), as sent, in float64 on the CPU.

    Raises:
        BadInput: no final Linear layer, or its gradient was not sent.
    """
    layer = classifier_layer(seen.model, seen.classes, seen.image_shape)
    if layer is None or _parameter(layer, "weight") not in seen.gradients:
        raise BadInput(
            "attack: labels can be restored only from the gradient of a final Linear layer that reads one vector an "
            "image, which this update does not hold; grant 'labels'."
        )
    bias = seen.gradients.get(_parameter(layer, "bias"))
    weight = seen.gradients[_parameter(layer, "weight")]
    return layer, weight.detach().double().cpu(), None if bias is None else bias.detach().double().cpu()


def head_of(seen: Observation, feature_sum: float | None = None) -> Head:
    """The layer with the gradient of one step.

    A FedAvg difference of T steps is divided by the learning rate times the steps (each counted as often as momentum
    repeats it), weight decay is taken off, and the posteriors are taken at the middle of the way, W - delta / 2: to
    first order the steps' gradients sum to T times the gradient there (interpolation as in Dimitrov et al. 2022).

    Args:
        seen: the observation.
        feature_sum: typical sum of a feature vector, to replace a missing bias gradient; its sign and size matter only
            then.

    In minibatches of one size the steps of an epoch are means over all images together, so the same scale holds; where
    momentum or a smaller last step makes images weigh unequally, the labels cannot be counted.

    Raises:
        BadInput: no classifier gradient; a FedAvg difference whose learning rate is not granted; of Adam; or of
            minibatches that weigh images too unequally.
    """
    layer, grad_weight, grad_bias = classifier_of(seen)
    module = seen.model.get_submodule(layer)
    assert isinstance(module, nn.Linear)
    weight = module.weight.detach().double().cpu()
    bias = torch.zeros(len(weight), dtype=torch.float64) if module.bias is None else module.bias.detach().double().cpu()
    plan = _delta_plan(seen)
    if plan is not None:
        effective = plan.lr * sum(_step_weights(plan, examples_of(seen)))
        moved = weight - grad_weight / 2, bias - (0 if grad_bias is None else grad_bias / 2)
        grad_weight = grad_weight / effective - plan.weight_decay * moved[0]
        grad_bias = None if grad_bias is None else grad_bias / effective - plan.weight_decay * moved[1]
        weight, bias = moved
    if grad_bias is None:
        grad_bias = bias_gradient(grad_weight, feature_sum or 1.0)
    return Head(weight, bias, grad_weight, grad_bias, examples_of(seen))


def coupled(seen: Observation) -> bool:
    """Whether the images of a batch see each other: BatchNorm in train mode."""
    norms = (m for m in seen.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    return seen.mode == "train" and any(True for _ in norms)


def fresh(seen: Observation) -> bool:
    """Whether the network looks as before the first step of training.

    Every normalisation layer's weight is 1 and bias 0, and no weight of the classifier is beyond what is drawn at the
    start (five standard deviations of He's normal, the widest usual one). False where no layer normalises.
    """
    layer = classifier_layer(seen.model, seen.classes, seen.image_shape)
    kinds = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)
    norms = [m for m in seen.model.modules() if isinstance(m, kinds) and m.weight is not None and m.bias is not None]
    if layer is None or not norms:
        return False
    weight = seen.model.get_submodule(layer).weight
    assert isinstance(weight, Tensor)
    if float(weight.detach().abs().max()) > 5 * (2 / weight.shape[1]) ** 0.5:
        return False
    return all(bool((m.weight == 1).all()) and not bool(m.bias.any()) for m in norms)


def answers_plainly(seen: Observation) -> bool:
    """Whether the network answers what the classifier gives, up to a shift of each image, so that p - y holds there.

    Not under a temperature, nor where a softmax is part of the network. A classifier that begins with zeros gives what
    no temperature changes; there it is made to give random numbers.
    """
    layer = classifier_layer(seen.model, seen.classes, seen.image_shape)
    assert layer is not None
    kept: list[Tensor] = []

    def give(_: nn.Module, __: object, made: Tensor) -> Tensor:
        if bool((made == made[:, :1]).all()):
            made = torch.randn(made.shape, generator=torch.Generator().manual_seed(0)).to(made)
        kept.append(made)
        return made

    buffers = {n: b.clone() for n, b in seen.model.named_buffers()}
    where = next(seen.model.parameters())
    watch = seen.model.get_submodule(layer).register_forward_hook(give)
    try:
        with in_mode(seen.model, seen.mode), torch.no_grad(), kept_draws():
            answer = called_with(seen.model, buffers, dummy_images(seen, 8).to(where.device, where.dtype))
    finally:
        watch.remove()
    given, made = (x.double() - x.double().mean(1, keepdim=True) for x in (answer, kept[0]))
    return float((given - made).norm()) <= 1e-3 * float(given.norm())


def features_of(seen: Observation, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "m d"] | None:
    """Inputs of the classifier on `images`, in the client's mode and in batches of the client's size.

    The model and its buffers are left unchanged. None if the network refuses such a batch (batch statistics of one
    image).
    """
    layer = classifier_layer(seen.model, seen.classes, seen.image_shape)
    assert layer is not None
    kept: list[Tensor] = []
    per = min(examples_of(seen), len(images)) if seen.mode == "train" else min(64, len(images))
    constants = {n: v.detach() for n, v in (*seen.model.named_parameters(), *seen.model.named_buffers())}
    where = next(iter(constants.values()))
    watch = seen.model.get_submodule(layer).register_forward_pre_hook(
        lambda _, given: kept.append(given[0].detach().double().cpu())
    )
    try:
        with in_mode(seen.model, seen.mode), torch.no_grad(), kept_draws():
            # in train mode a batch of another size would have other statistics: leave the rest out
            end = len(images) - (len(images) % per if seen.mode == "train" else 0)
            for first in range(0, end, per):
                batch = images[first : first + per].to(where.device, where.dtype)
                # train mode writes running statistics: into copies
                own = {n: b.clone() for n, b in seen.model.named_buffers()}
                called_with(seen.model, {**constants, **own}, batch)
    except ValueError:
        return None
    finally:
        watch.remove()
    return torch.cat(kept)


def dummy_images(seen: Observation, count: int, seed: int = 0) -> Float[Tensor, "n c h w"]:
    """Noise on several scales with random contrast: how features vary on this network, where no image is granted."""
    made = torch.Generator().manual_seed(seed)
    channels, height, width = seen.image_shape
    total = torch.zeros(count, channels, height, width)
    for side in (s for s in _SCALES if s <= max(height, width)):
        strength = 0.6 * torch.rand(count, 1, 1, 1, generator=made) * min(1.0, 4 / side)
        grid = strength * torch.randn(count, channels, side, side, generator=made)
        grid = 0.3 * grid + 0.7 * grid.mean(1, keepdim=True)  # channels of natural images agree
        total += torch.nn.functional.interpolate(grid, size=(height, width), mode="bilinear", align_corners=False)
    low, high = seen.domain.low, seen.domain.high
    return low + (high - low) * (0.5 + 0.7 * total).clamp(0, 1)


def varied_images(seen: Observation, count: int, seed: int) -> Float[Tensor, "n c h w"]:
    """Noise with the spectrum of photographs: steepness, contrast, brightness and colour are those of one group.

    Power falls as f^-2 slope with a slope of 0.8 to 1.6 (Field 1987 found about 1 for photographs' amplitudes).
    """
    made = torch.Generator().manual_seed(seed)
    channels, height, width = seen.image_shape

    def between(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=made))

    def noise(planes: int) -> Tensor:
        flat = torch.fft.rfft2(torch.randn(count, planes, height, width, generator=made)) / frequency**slope
        flat[..., 0, 0] = 0
        shaped = torch.fft.irfft2(flat, s=(height, width))
        return shaped / shaped.std((1, 2, 3), keepdim=True).clamp_min(1e-6)

    rows, columns = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None]
    frequency = (rows.square() + columns.square()).sqrt().clamp_min(1 / max(height, width))
    slope, agree = between(0.8, 1.6), between(0.5, 0.95)
    images = math.sqrt(1 - agree) * noise(channels) + math.sqrt(agree) * noise(1)  # channels of photographs agree
    each = torch.randn(count, channels + 2, 1, 1, generator=made)
    contrast = between(0.15, 0.3) * torch.exp(0.3 * each[:, :1])
    brightness = between(0.35, 0.6) + between(0.05, 0.2) * each[:, 1:2] + between(0, 0.08) * each[:, 2:]
    low, high = seen.domain.low, seen.domain.high
    return low + (high - low) * (brightness + contrast * images).clamp(0, 1)


def feature_groups(seen: Observation, auxiliary: Float[Tensor, "n d"] | None) -> list[Tensor]:
    """Features to simulate batches from: of the granted images, else of dummies, by groups that belong together.

    In train mode a group is one batch of the client's size, since its statistics tie its images together.

    Args:
        seen: the observation.
        auxiliary: features of granted images in the client's mode, if there are enough of them.
    """
    examples = examples_of(seen)
    size = examples * -(-_GROUP // examples)
    if auxiliary is None:
        noise = dummy_images(seen, _GROUPS * size // 2, seed=1)
        images = torch.cat([noise, *(varied_images(seen, size, seed) for seed in range(_GROUPS))])
        features = features_of(seen, images)
        assert features is not None  # asked for only where other dummies went through
    else:
        features, size = auxiliary, len(auxiliary)
    per = examples if seen.mode == "train" else size
    return [group for group in features.split(per) if len(group) == per]


def _parameter(layer: str, name: str) -> str:
    return f"{layer}.{name}" if layer else name


def _delta_plan(seen: Observation) -> LocalPlan | None:
    """The client's plan if it sent a weight difference, None if it sent a gradient."""
    kind = next((m.kind for m in seen.messages if isinstance(m, GradientMessage)), "gradient")
    if kind != "delta":
        return None
    if seen.local_plan is None:
        raise BadInput(
            "attack: label counts from a weight difference need the client's learning rate and steps; grant "
            "'local_plan', or restore by 'row_minimum', which needs no scale."
        )
    if seen.local_plan.lr <= 0:
        raise BadInput("attack: a weight difference at learning rate 0 holds no gradient.")
    if seen.local_plan.optimizer != "sgd":
        raise BadInput(
            "attack: Adam's weight difference does not keep the size of the gradient, so labels cannot be restored "
            "from it; grant 'labels'."
        )
    least, most = _weights_of_images(seen.local_plan, examples_of(seen))
    if most > UNEVEN * least:
        raise BadInput(
            f"attack: in minibatches of {seen.local_plan.minibatch} out of {seen.examples} with momentum "
            f"{seen.local_plan.momentum:g}, one image enters the difference up to {most / least:.1f} times as much as "
            "another, so labels cannot be counted from it; grant 'labels', or restore by 'row_minimum'."
        )
    return seen.local_plan


def _step_weights(plan: LocalPlan, examples: int) -> list[float]:
    """How often each step's gradient enters the difference: once, and again in each later step through momentum."""
    steps = plan.steps_for(examples)
    return [float(sum(plan.momentum**k for k in range(steps - t))) for t in range(steps)]


def _weights_of_images(plan: LocalPlan, examples: int) -> tuple[float, float]:
    """(least, greatest) weight in the difference that one image can have, whatever the order of minibatches."""
    weights = _step_weights(plan, examples)
    if plan.whole_batches(examples):
        return 1.0, 1.0
    assert plan.minibatch is not None
    per_epoch = len(weights) // plan.epochs
    sizes = [min(plan.minibatch, examples - step * plan.minibatch) for step in range(per_epoch)]
    shares = [weight / sizes[t % per_epoch] for t, weight in enumerate(weights)]
    epochs = [shares[first : first + per_epoch] for first in range(0, len(shares), per_epoch)]
    return sum(map(min, epochs)), sum(map(max, epochs))
