"""The built-in networks. Images [b, c, h, w] in [0, 1] go in, logits [b, classes] come out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from frostglass.core.errors import BadInput
from frostglass.vision.networks import MODELS
from frostglass.vision.normalise import Normalise, usual_constants

_ACTIVATIONS: dict[str, type[nn.Module]] = {"sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "relu": nn.ReLU}


class _Sequence(nn.Module):
    """Normalise, body, flatten, head."""

    def __init__(self, normalise: Normalise, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.normalise, self.body, self.head = normalise, body, head

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        features: Tensor = self.body(self.normalise(images))
        logits: Tensor = self.head(features.flatten(1))
        return logits


@MODELS.register()
def mlp(*, classes: int, channels: int, size: int, hidden: Sequence[int] = (512, 128)) -> nn.Module:
    """Fully connected layers with ReLU between them; its first layer gives its inputs away exactly.

    Args:
        classes, channels, size: of the images.
        hidden: outputs of the hidden layers; empty for a linear model.
    """
    if any(width < 1 for width in hidden):
        raise BadInput(f"model.hidden: {list(hidden)} must hold whole numbers from 1.")
    widths = [channels * size * size, *hidden]
    body: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(widths):
        body += [nn.Linear(inputs, outputs), nn.ReLU()]
    return _Sequence(Normalise(*usual_constants(channels)), nn.Sequential(*body), nn.Linear(widths[-1], classes))


@MODELS.register(paper="Zhu et al. 2019, NeurIPS (DLG)")
def lenet(
    *,
    classes: int,
    channels: int,
    size: int,
    activation: Literal["sigmoid", "tanh", "relu"] = "sigmoid",
    init_range: float | None = 0.5,
) -> nn.Module:
    """The smooth network on which gradient leakage was first shown: three 5 x 5 convolutions and a linear layer.

    It does not normalise (mean 0, std 1), as in the paper.

    Args:
        classes, channels, size: of the images.
        activation: after each convolution.
        init_range: all weights and biases uniform in [-init_range, init_range]; None for torch's own initialisation.
    """
    if init_range is not None and not (math.isfinite(init_range) and init_range > 0):
        raise BadInput(f"model.init_range: {init_range} must be positive, or left out for 0.5.")
    stages = [(channels, 12, 2), (12, 12, 2), (12, 12, 1)]
    body = [
        layer
        for inputs, outputs, stride in stages
        for layer in (nn.Conv2d(inputs, outputs, 5, stride, 2), _ACTIVATIONS[activation]())
    ]
    side = -(-size // 4)  # two strides of 2, each rounding up
    network = _Sequence(Normalise((0.0,), (1.0,)), nn.Sequential(*body), nn.Linear(12 * side * side, classes))
    if init_range is not None:
        for parameter in network.parameters():
            nn.init.uniform_(parameter, -init_range, init_range)
    return network


def _norm(kind: str, channels: int) -> list[nn.Module]:
    if kind == "batch":
        return [nn.BatchNorm2d(channels)]
    if kind == "group":  # the number of groups is Opacus' choice, so that its fix gives the same network
        return [nn.GroupNorm(math.gcd(32, channels), channels)]
    return []


@MODELS.register()
def small_bn_cnn(
    *,
    classes: int,
    channels: int,
    size: int,
    width: int = 32,
    norm: Literal["batch", "group", "none"] = "batch",
) -> nn.Module:
    """Four 3 x 3 convolutions with batch norm and ReLU, and a linear layer: small enough for attacks on a CPU.

    Args:
        classes, channels: of the images.
        size: of the images; a multiple of 4.
        width: outputs of the first two convolutions; the last two have twice as many.
        norm: after each convolution; "group" is what Opacus makes of "batch".
    """
    problems = []
    if size % 4:
        problems.append(f"model.size: {size} must be a multiple of 4 for 'small_bn_cnn'; set the data's size to one.")
    if width < 1:
        problems.append(f"model.width: {width} must be a whole number from 1.")
    if problems:
        raise BadInput(problems)
    stages = [(channels, width, 1), (width, width, 2), (width, 2 * width, 2), (2 * width, 2 * width, 1)]
    body: list[nn.Module] = []
    for inputs, outputs, stride in stages:
        body += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=norm == "none"), *_norm(norm, outputs), nn.ReLU()]
    return _Sequence(
        Normalise(*usual_constants(channels)), nn.Sequential(*body), nn.Linear(2 * width * (size // 4) ** 2, classes)
    )


class _Residual(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut without parameters (option A of He et al.)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.more = stride, outputs - inputs

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.beside(x))

    def beside(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        before = self.more // 2
        short = x[:, :, :: self.stride, :: self.stride]
        return nn.functional.pad(short, (0, 0, 0, 0, before, self.more - before))


class _Projected(_Residual):
    """The same beside a shortcut that is a 1 x 1 convolution where the shape changes (option B)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__(inputs, outputs, stride)
        projection = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut: nn.Module = projection if stride != 1 or self.more else nn.Identity()

    def beside(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        made: Tensor = self.shortcut(x)
        return made


class _CifarResNet(nn.Module):
    """Depth 6 n + 2: three stages of n residual blocks with 16, 32 and 64 channels."""

    def __init__(self, depth: int, classes: int, channels: int) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.normalise = Normalise(*usual_constants(channels))
        self.conv1 = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, 1, blocks)
        self.layer2 = self._stage(16, 32, 2, blocks)
        self.layer3 = self._stage(32, 64, 2, blocks)
        self.linear = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    @staticmethod
    def _stage(inputs: int, outputs: int, stride: int, blocks: int) -> nn.Sequential:
        first = _Residual(inputs, outputs, stride)
        return nn.Sequential(first, *(_Residual(outputs, outputs, 1) for _ in range(blocks - 1)))

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        x = torch.relu(self.bn1(self.conv1(self.normalise(images))))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


def _cifar_resnet(depth: int, classes: int, channels: int, size: int) -> nn.Module:
    if size < 4:
        raise BadInput(f"model.size: {size} must be at least 4 for 'resnet{depth}'; give the data a larger size.")
    return _CifarResNet(depth, classes, channels)


_RESNET_PAPER = "He et al. 2016, CVPR (section 4.2, option A)"


@MODELS.register(paper=_RESNET_PAPER)
def resnet20(*, classes: int, channels: int, size: int) -> nn.Module:
    """Residual network of 20 layers for small images; parameters are named as in the published CIFAR-10 weights."""
    return _cifar_resnet(20, classes, channels, size)


@MODELS.register(paper=_RESNET_PAPER)
def resnet32(*, classes: int, channels: int, size: int) -> nn.Module:
    """Residual network of 32 layers for small images; parameters are named as in the published CIFAR-10 weights."""
    return _cifar_resnet(32, classes, channels, size)


@MODELS.register(paper=_RESNET_PAPER)
def resnet56(*, classes: int, channels: int, size: int) -> nn.Module:
    """Residual network of 56 layers for small images; parameters are named as in the published CIFAR-10 weights."""
    return _cifar_resnet(56, classes, channels, size)


class _SmallStemResNet18(nn.Module):
    """Four stages of two blocks behind a 3 x 3 convolution."""

    def __init__(self, classes: int, channels: int, width: int) -> None:
        super().__init__()
        self.normalise = Normalise(*usual_constants(channels))
        self.conv1 = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        widths = [width << max(stage - 1, 0) for stage in range(5)]
        self.stages = nn.ModuleList(
            nn.Sequential(_Projected(inputs, outputs, 1 if stage == 0 else 2), _Projected(outputs, outputs, 1))
            for stage, (inputs, outputs) in enumerate(pairwise(widths))
        )
        self.linear = nn.Linear(widths[-1], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        x = torch.relu(self.bn1(self.conv1(self.normalise(images))))
        for stage in self.stages:
            x = stage(x)
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


@MODELS.register(paper="He et al. 2016, CVPR")
def resnet18(*, classes: int, channels: int, size: int, width: int = 64) -> nn.Module:
    """ResNet-18 with a 3 x 3 first convolution and no pooling behind it, as usual for CIFAR and Tiny ImageNet.

    ImageNet's, with its 7 x 7 convolution, is "torchvision:resnet18".

    Args:
        classes: outputs.
        channels: of the images.
        size: of the images, at least 8.
        width: channels of the first stage; the last has eight times as many.

    Raises:
        BadInput: images too small, or no positive width.
    """
    if size < 8:
        raise BadInput(f"model.size: {size} must be at least 8 for 'resnet18'; give the data a larger size.")
    if width < 1:
        raise BadInput(f"model.width: {width} must be at least 1; 64 is usual.")
    return _SmallStemResNet18(classes, channels, width)
