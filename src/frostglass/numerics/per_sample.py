"""Inner products and norms of the gradients of single images, without ever holding those gradients all at once.

Of a linear layer, image i's gradient is the outer product of its error e_i and its input a_i, so that <g_i, V> =
e_i^T V a_i and ||g_i||^2 = ||e_i||^2 ||a_i||^2 (ghost norms, Goodfellow 2015). A convolution's is built for a few
images of one layer and dropped again. One forward and one backward pass serve all of a chunk's images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from frostglass.core.update import Gradients, LocalPlan
from frostglass.numerics.called import activations_kept, copied
from frostglass.numerics.local_update import a_row_each, in_mode, local_update, trainable

BUDGET = 2**25
"""Entries of one layer's single gradients that are held at a time."""

CLOSE = 1e-3
"""Part of the norms by which `agrees` lets products differ: float32 leaves about 1e-6, a wrong form far more."""

_Captured = list[tuple[nn.Module, Tensor, Tensor]]


def streamable(model: nn.Module, mode: str, *, alone: bool) -> bool:
    """Whether `products` can do this network: its images do not mix, and each weight is of a layer that it knows.

    Args:
        model: in any mode.
        mode: that the gradients are taken in.
        alone: whether each image is a batch of its own, so that BatchNorm normalises it by itself.
    """
    ready = _by_itself(model) if alone and mode == "train" else model
    owners: dict[int, int] = {}
    for module in ready.modules():
        own = [p for p in module.parameters(recurse=False) if p.requires_grad]
        for p in own:
            owners[id(p)] = owners.get(id(p), 0) + 1
        if own and not isinstance(module, nn.Linear | nn.Conv2d | nn.GroupNorm | nn.LayerNorm | nn.BatchNorm2d):
            return False
        if isinstance(module, nn.Conv2d) and (isinstance(module.padding, str) or module.padding_mode != "zeros"):
            return False
        if mode == "train" and isinstance(module, nn.modules.batchnorm._BatchNorm | nn.modules.dropout._DropoutNd):
            return False
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            return False  # it normalises by the batch in eval mode too
    return all(count == 1 for count in owners.values())


def agrees(
    model: nn.Module,
    images: Float[Tensor, "n c h w"],
    targets: Float[Tensor, "n k"],
    mode: str,
    *,
    alone: bool,
) -> bool:
    """Whether `products` finds on these few images what autograd finds for each by itself, up to rounding.

    What `streamable` cannot see: a weight that is used outside of its layer too, a layer whose forward is its own, or
    images that a network compares with each other.
    """
    plan = LocalPlan(mode="train" if mode == "train" else "eval")
    pairs = zip(images.split(1), targets.split(1), strict=True)
    single = [local_update(model, x, y, plan, statistics=False).gradients for x, y in pairs]
    exact = images.new_zeros(len(images), len(images), dtype=torch.float64)
    for name in single[0]:
        rows = torch.stack([own[name].flatten() for own in single]).double()
        exact += rows @ rows.T
    dots, squares = products(model, images, targets, single, mode, alone=alone)
    sizes = exact.diagonal().sqrt()
    dots_off, squares_off = (dots - exact).abs(), (squares - exact.diagonal()).abs()
    return bool((dots_off <= CLOSE * sizes[:, None] * sizes).all() and (squares_off <= CLOSE * sizes.square()).all())


def products(
    model: nn.Module,
    images: Float[Tensor, "n c h w"],
    targets: Float[Tensor, "n k"],
    along: Sequence[Gradients],
    mode: str,
    *,
    alone: bool,
) -> tuple[Float[Tensor, "n d"], Float[Tensor, " n"]]:
    """(<g_i, v> for each direction v, ||g_i||^2), g_i being the gradient of image i's cross entropy by itself.

    Args:
        model: for which `streamable` holds; left as it is.
        images: of one chunk: memory grows with it as in training.
        targets: rows of mass at most 1.
        along: directions by parameter name; what is missing in one counts as 0.
        mode, alone: as in `streamable`.
    """
    ready = _by_itself(model) if alone and mode == "train" else model
    names = {id(p): name for name, p in trainable(ready).items()}
    captured: _Captured = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        captured.append((module, inputs[0].detach(), output))
        return output.clone()  # what comes next may work in place

    known = [m for m in ready.modules() if any(id(p) in names for p in m.parameters(recurse=False))]
    handles = [m.register_forward_hook(keep) for m in known]
    try:
        with torch.enable_grad(), in_mode(ready, mode):
            with activations_kept():
                logits = a_row_each(ready(images), len(images))
            loss = -(targets * torch.log_softmax(logits, dim=1)).sum()
            errors = torch.autograd.grad(loss, [out for _, _, out in captured], allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    dots = images.new_zeros(len(images), len(along), dtype=torch.float64)
    squares = images.new_zeros(len(images), dtype=torch.float64)
    for module in known:
        passes = [(x, e) for (m, x, _), e in zip(captured, errors, strict=True) if m is module and e is not None]
        if passes:
            _add_layer(module, passes, names, along, dots, squares)
    return dots, squares


def _by_itself(model: nn.Module) -> nn.Module:
    """A copy in which BatchNorm normalises every image by its own statistics, as it does in a batch of one."""
    made = copied(model)
    for parent in list(made.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                alone = nn.GroupNorm(child.num_features, child.num_features, child.eps, affine=child.affine)
                if child.affine:
                    alone.weight, alone.bias = child.weight, child.bias
                setattr(parent, name, alone)
    return made


def _add_layer(
    module: nn.Module,
    passes: Sequence[tuple[Tensor, Tensor]],
    names: dict[int, str],
    along: Sequence[Gradients],
    dots: Tensor,
    squares: Tensor,
) -> None:
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if bias is not None and id(bias) in names:
        total = sum((_summed_error(module, e) for _, e in passes), passes[0][1].new_zeros(()))
        _add(total, names[id(bias)], along, dots, squares)
    if weight is None or id(weight) not in names:
        return
    name = names[id(weight)]
    if isinstance(module, nn.Linear) and len(passes) == 1 and passes[0][0].ndim == 2:
        x, e = passes[0]
        for d, v in enumerate(along):
            if name in v:
                dots[:, d] += ((e @ v[name].to(e)) * x).sum(1).double()
        squares += e.double().square().sum(1) * x.double().square().sum(1)
        return
    make = _weight_gradients(module)
    step = max(1, BUDGET // weight.numel())
    for start in range(0, len(dots), step):
        rows = slice(start, start + step)
        total = sum((make(x[rows], e[rows]) for x, e in passes), weight.new_zeros(()))
        _add(total, name, along, dots[rows], squares[rows])


def _add(single: Tensor, name: str, along: Sequence[Gradients], dots: Tensor, squares: Tensor) -> None:
    """[n, ...] gradients of one tensor: what they add to the products."""
    flat = single.flatten(1)
    for d, v in enumerate(along):
        if name in v:
            dots[:, d] += (flat @ v[name].to(flat).flatten()).double()
    squares += flat.square().sum(1).double()


def _summed_error(module: nn.Module, e: Tensor) -> Tensor:
    """[n, ...] gradients of the bias."""
    if isinstance(module, nn.Conv2d | nn.GroupNorm | nn.BatchNorm2d):
        return e.flatten(2).sum(2) if e.ndim > 2 else e
    inner = module.normalized_shape if isinstance(module, nn.LayerNorm) else e.shape[-1:]
    return e.flatten(1, e.ndim - len(inner) - 1).sum(1) if e.ndim > len(inner) + 1 else e


def _weight_gradients(module: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """(inputs [n, ...], errors of the outputs [n, ...]) -> [n, ...] gradients of the weight."""
    if isinstance(module, nn.Linear):
        return lambda x, e: torch.einsum("nto,nti->noi", _vectors(e), _vectors(x))
    if isinstance(module, nn.Conv2d):
        return lambda x, e: _conv_gradients(module, x, e)
    if isinstance(module, nn.GroupNorm):
        plain = nn.functional.group_norm
        return lambda x, e: (plain(x, module.num_groups, eps=module.eps) * e).flatten(2).sum(2)
    if isinstance(module, nn.LayerNorm):
        shape = module.normalized_shape
        return lambda x, e: _summed_error(module, nn.functional.layer_norm(x, shape, eps=module.eps) * e)
    assert isinstance(module, nn.BatchNorm2d)
    return lambda x, e: (_frozen_norm(module, x) * e).flatten(2).sum(2)


def _vectors(t: Tensor) -> Tensor:
    """[n, ..., d] -> [n, t, d]: one vector an image has t = 1."""
    return t.reshape(len(t), -1, t.shape[-1])


def _conv_gradients(module: nn.Conv2d, x: Tensor, e: Tensor) -> Tensor:
    n, groups = len(x), module.groups
    columns = nn.functional.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)  # type: ignore[arg-type]
    patches = columns.reshape(n * groups, -1, columns.shape[-1])
    errors = e.reshape(n * groups, module.out_channels // groups, -1)
    return torch.bmm(errors, patches.transpose(1, 2)).reshape(n, *module.weight.shape)


def _frozen_norm(module: nn.BatchNorm2d, x: Tensor) -> Tensor:
    if module.running_mean is None or module.running_var is None:  # then eval mode normalises by the batch
        raise ValueError("a BatchNorm without running statistics mixes images in eval mode too")
    return nn.functional.batch_norm(x, module.running_mean, module.running_var, eps=module.eps)
