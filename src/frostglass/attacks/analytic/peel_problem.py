"""What `peel` reads of an observation: the network as tensors, its gradients, and which labels are possible."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from frostglass.attacks.analytic.chain import Chain, as_layer, find_chain
from frostglass.attacks.inversion.restore import by_counts, targets_of
from frostglass.attacks.inversion.target import update_problems
from frostglass.core.batch import Domain
from frostglass.core.errors import BadInput
from frostglass.core.randomness import Rng
from frostglass.core.runtime import Runtime
from frostglass.core.threat import GradientMessage, Observation
from frostglass.numerics import head
from frostglass.numerics.conv_fit import ConvFit
from frostglass.numerics.conv_layer import ConvLayer
from frostglass.numerics.conv_peel import PeelProblem, determined
from frostglass.numerics.labels import counts_to_targets

COUNTS = by_counts()
"""How labels are restored; one value, so that a restoration is done once an observation."""

MOST_IMAGES = 32
"""The solve for the classifier's inputs costs images^6."""


@dataclass(frozen=True, eq=False)
class Problem:
    """An observation laid out for the three stages.

    Args:
        domain, image_shape: of the images.
        chain: the network.
        exact: its convolutions in float64 on the CPU, for the algebra.
        layers: the same on the attack's device and in its dtype.
        gradients: by parameter name, in float64 on the CPU.
        head: the equations of the classifier, for the first of `targets`.
        targets: [b, k] each: granted, or every order of restored counts that is worth trying, the likeliest first.
        granted: True if the labels were granted.
    """

    domain: Domain
    image_shape: tuple[int, int, int]
    chain: Chain
    exact: tuple[ConvLayer, ...]
    layers: tuple[ConvLayer, ...]
    gradients: Mapping[str, Tensor]
    head: head.HeadProblem
    targets: tuple[Tensor, ...]
    granted: bool

    def heads(self, choice: int) -> head.HeadProblem:
        """The equations of the classifier for `targets[choice]`."""
        return replace(self.head, targets=self.targets[choice].double().cpu())

    def last_convolution(self, targets: Tensor, mixing: Tensor, rng: Rng) -> PeelProblem:
        """The equations of the last convolution, given the classifier's inputs as M = `mixing` [b, b]."""
        heads = replace(self.head, targets=targets.double().cpu())
        shape = (len(targets), *self.chain.features)
        above = heads.error(mixing) / len(targets) @ self.chain.head.weight.detach().double().cpu()
        block = self.chain.blocks[-1]
        return PeelProblem(
            self.exact[-1],
            head.inputs_of(heads, mixing).view(shape),
            above.view(shape),
            self.gradients[f"{block.name}.weight"],
            block.size,
            rectified=len(self.chain.blocks) > 1,
            deviation=self._typical_deviation(len(targets), rng),
        )

    def _typical_deviation(self, examples: int, rng: Rng) -> Tensor | None:
        """[b, groups] 1 / deviation that the last GroupNorm finds for random coarse images, None for other norms."""
        last = self.exact[-1]
        if last.norm != "group":
            return None
        c, h, w = self.image_shape
        coarse = rng.uniform((16, c, 4, 4)).double()
        images = functional.interpolate(coarse, (h, w)) * (self.domain.high - self.domain.low) + self.domain.low
        x = self.to_input(images)
        for layer in self.exact[:-1]:
            x = layer.scaled(layer.standardise(layer.conv(x))).relu()
        return last.statistics(last.conv(x))[1].mean(0, keepdim=True).expand(examples, -1)

    @property
    def free_contrast(self) -> str:
        """Whose contrast is not in the gradient, as the first norm undoes it: "image", "batch", or "" (nobody's)."""
        first = self.layers[0]
        return {"group": "image", "own": "batch"}.get(first.norm, "") if first.bias is None else ""

    def fit(self, activations: Tensor, above: Tensor) -> ConvFit:
        """What pixels are fitted to, on the attack's device."""
        name = f"{self.chain.blocks[-2].name}.weight"
        sent = self.gradients.get(name)
        active = activations > 1e-5 * activations.max()
        return ConvFit(
            self.layers[:-1], activations, active, above * active, None if sent is None else sent.to(activations)
        )

    def to_input(self, images: Tensor) -> Tensor:
        """Images in the bounds of the domain -> what the first convolution reads."""
        return images * self.chain.scale.to(images) + self.chain.offset.to(images)

    def to_images(self, inputs: Tensor) -> Tensor:
        """The inverse of `to_input`."""
        return (inputs - self.chain.offset.to(inputs)) / self.chain.scale.to(inputs)


def problems_of(seen: Observation) -> list[str]:
    """Why this observation cannot be peeled, a sentence each; the first kind that applies."""
    problems = update_problems(seen)
    chain, misfit = find_chain(seen)
    if problems or chain is None:
        return [*problems, *([misfit] if misfit else [])]
    problems = [*_message_problems(seen), *_unsent(seen, chain), *_size_problems(seen, chain)]
    if not problems:
        try:
            targets_of(seen, COUNTS)
        except BadInput as wrong:
            problems += wrong.problems
    return problems


def lay_out(seen: Observation, run: Runtime) -> Problem:
    """The observation as a `Problem`.

    Raises:
        BadInput: it does not fit.
    """
    problems = problems_of(seen)
    if problems:
        raise BadInput(problems)
    chain, _ = find_chain(seen)
    assert chain is not None
    layers = chain.layers(seen.mode, seen.bn_batch or {})
    gradients = _as_gradients(seen)
    name = chain.head_name
    bias = gradients[f"{name}.bias"]
    targets = _possible_targets(seen, bias)
    heads = head.prepare(
        chain.head.weight, chain.head.bias, gradients[f"{name}.weight"], bias, targets[0], run.rng.at("columns")
    )
    cpu = torch.device("cpu")
    return Problem(
        seen.domain,
        seen.image_shape,
        chain,
        tuple(layer.to(cpu, torch.float64) for layer in layers),
        tuple(layer.to(run.device, run.dtype) for layer in layers),
        gradients,
        heads,
        targets,
        seen.labels is not None,
    )


def _message_problems(seen: Observation) -> list[str]:
    kinds = {m.kind for m in seen.messages if isinstance(m, GradientMessage)}
    plan = seen.local_plan
    if kinds == {"delta"} and (plan is None or not plan.one_sgd_step(seen.examples or 1) or plan.lr == 0):
        return [
            "update: a weight difference is read as a gradient only if 'local_plan' is granted and is one step of SGD."
        ]
    if seen.cohort is not None and seen.cohort > 1:
        return [f"update: {seen.cohort} clients are summed in it, and this attack reads the gradient of one."]
    return []


def _unsent(seen: Observation, chain: Chain) -> list[str]:
    last = chain.blocks[-1].name
    wanted = [f"{chain.head_name}.weight", f"{chain.head_name}.bias", f"{last}.weight"]
    absent = [n for n in wanted if n not in seen.gradients]
    return [f"update: the gradient of {n!r} was not sent; this attack needs it." for n in absent]


def _size_problems(seen: Observation, chain: Chain) -> list[str]:
    b, block = seen.examples, chain.blocks[-1]
    if b is None:
        return ["threat.grants: this attack needs to know how many images there are; grant 'examples'."]
    found = []
    most = min(seen.classes - 1, MOST_IMAGES)
    if b > most:
        found.append(
            f"client.batch: {b} images are more than {most}, up to which the classifier's inputs can be solved for "
            f"with {seen.classes} classes."
        )
    layer = as_layer(block, None, False)
    if not determined(layer, b, block.size):
        o, _, kh, kw = layer.weight.shape
        found.append(
            f"client.batch: {b} images of {block.size[0]} x {block.size[1]} values a channel are more than the "
            f"gradient of {block.name!r} determines, with {o * kh * kw} equations at a stride of {layer.stride[0]}."
        )
    return found


def _as_gradients(seen: Observation) -> dict[str, Tensor]:
    """In float64 on the CPU; one step of SGD from rest sends lr (g + weight_decay w)."""
    plan = seen.local_plan
    sent = {n: g.detach().double().cpu() for n, g in seen.gradients.items()}
    if plan is None or plan.kind == "gradient":
        return sent
    weights = {n: w.detach().double().cpu() for n, w in seen.model.named_parameters()}
    return {n: g / plan.lr - plan.weight_decay * weights[n] for n, g in sent.items()}


def _possible_targets(seen: Observation, grad_bias: Tensor) -> tuple[Tensor, ...]:
    targets, counts = targets_of(seen, COUNTS)
    if counts is None:
        return (targets,)
    others = [n for n in head.label_candidates(grad_bias, len(targets)) if not torch.equal(n, counts.double().cpu())]
    return (targets, *(counts_to_targets(n).to(targets) for n in others))
