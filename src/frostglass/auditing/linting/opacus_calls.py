"""Opacus calls: PrivacyEngine(...).make_private(...) and make_private_with_epsilon(...)."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from frostglass.auditing.linting.facts import Facts, as_number
from frostglass.guarantees.accounting import noise_for_epsilon

if TYPE_CHECKING:
    from frostglass.auditing.linting.python_source import Scope

CALLS = ("make_private", "make_private_with_epsilon")
NORMALISED = re.compile(r"^(BatchNorm[123]d|SyncBatchNorm|resnet\d+|vgg\d+_bn|densenet\d+|mobilenet\w+)$")
MIXING = re.compile(r"^(mixup|cutmix|instahide|InstaHide\w*|Mixup|MixUp|CutMix)$")


def opacus_facts(name: str, held: Mapping[str, Any], lines: Mapping[str, int], tree: ast.Module, scope: Scope) -> Facts:
    """One call, with what the rest of the module says about model, sampling and randomness."""
    names = {
        n.id if isinstance(n, ast.Name) else n.attr for n in ast.walk(tree) if isinstance(n, ast.Name | ast.Attribute)
    }
    names |= {alias.asname or alias.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for alias in n.names}
    seed_line, seed = _seed(tree, scope, "noise_generator" in held)
    secure = any(_flag(n, "PrivacyEngine", "secure_mode", scope) for n in _calls(tree))
    fixed = "ModuleValidator" in names and not names.isdisjoint(("fix", "fix_and_validate"))
    asked = [
        *(n.args[0] for n in _calls(tree, "get_epsilon") if n.args),
        *(k.value for n in _calls(tree, "get_epsilon") for k in n.keywords if k.arg == "delta"),
    ]
    spent = next((scope.value(node) for node in asked), None)
    target, delta = as_number(held.get("target_epsilon")), as_number(held.get("target_delta", spent))
    noise = as_number(held.get("noise_multiplier"))
    poisson = held.get("poisson_sampling", True)
    rate, steps = _schedule(held, scope)
    return Facts(
        framework="Opacus",
        name=name,
        lines={
            **{_FACT.get(k, k): v for k, v in lines.items()},
            **({"seed": seed_line} if seed_line else {}),
            "name": lines["name"],
        },
        clip=as_number(held.get("max_grad_norm")),
        noise_multiplier=_noise_for(target, delta, rate, steps) if noise is None else noise,
        epsilon=target,
        delta=delta,
        epsilon_is="total" if "target_epsilon" in held else None,
        clip_unit="image",
        claim_unit="image",
        sampling="shuffle" if poisson is False else "poisson",
        rate=rate,
        steps=steps,
        accounted=True,
        seed=seed if not secure else None,
        secure_generator=secure,
        batchnorm=any(NORMALISED.match(n) for n in names - _with_own_norm(tree)) and not fixed,
        mixing=any(MIXING.match(n) for n in names),
    )  # fmt: skip


_FACT = {
    "max_grad_norm": "clip", "target_epsilon": "epsilon", "target_delta": "delta", "poisson_sampling": "sampling",
}  # fmt: skip


def _calls(tree: ast.AST, name: str | None = None) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            spelled = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name is None or spelled == name:
                yield node


def _flag(node: ast.Call, name: str, key: str, scope: Scope) -> bool:
    spelled = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    return spelled == name and any(k.arg == key and scope.value(k.value) is True for k in node.keywords)


def _seed(tree: ast.Module, scope: Scope, own_generator: bool) -> tuple[int | None, int | None]:
    """A constant seed of torch's global generators, from which Opacus draws its noise unless secure_mode is on.

    A generator of its own, of a split or a loader say, counts only where the call is given one for the noise.
    """
    assigned = [n for n in ast.walk(tree) if isinstance(n, ast.Assign) and _is_generator(n.value)]
    generators = {t.id for n in assigned for t in n.targets if isinstance(t, ast.Name)}
    for name in ("manual_seed", "seed_everything", "set_seed"):
        for node in _calls(tree, name):
            of = node.func.value if isinstance(node.func, ast.Attribute) else None
            if not own_generator and (_is_generator(of) or (isinstance(of, ast.Name) and of.id in generators)):
                continue
            value = scope.value(node.args[0]) if node.args else None
            if isinstance(value, int) and not isinstance(value, bool):
                return node.lineno, value
    return None, None


def _with_own_norm(tree: ast.Module) -> set[str]:
    """Networks that are built with a `norm_layer` wherever they are built; a BatchNorm there has its own name."""
    built = [(c.func.attr if isinstance(c.func, ast.Attribute) else getattr(c.func, "id", ""), c) for c in _calls(tree)]
    given = {name: [any(k.arg == "norm_layer" for k in c.keywords) for n, c in built if n == name] for name, _ in built}
    return {name for name, norms in given.items() if all(norms)}


def _is_generator(node: ast.expr | None) -> bool:
    """`torch.Generator(...)`, seeded at once or not."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "manual_seed":
        return _is_generator(node.func.value)
    return isinstance(node, ast.Call) and any(node is n for n in _calls(node, "Generator"))


def _schedule(held: Mapping[str, Any], scope: Scope) -> tuple[float | None, int | None]:
    """(sampling rate, steps) from constants named as everybody names them; None where they are not there."""
    known = {k.lower(): v for k, v in scope.constants.items()}
    batch = as_number(known.get("batch_size", known.get("logical_batch_size")))
    size = next(
        (as_number(known[k]) for k in ("dataset_size", "num_examples", "n_train", "train_size") if k in known), None
    )
    epochs = as_number(held.get("epochs", known.get("epochs", known.get("num_epochs"))))
    if not batch or not size or batch > size:
        return None, None
    return batch / size, None if epochs is None else max(1, round(epochs * size / batch))


def _noise_for(epsilon: float | None, delta: float | None, rate: float | None, steps: int | None) -> float | None:
    """What Opacus itself would choose; None where the source does not say enough."""
    if not rate or not steps or not (epsilon and 0 < epsilon < math.inf) or not (delta and 0 < delta < 1):
        return None  # impossible ones are the rules' business
    return noise_for_epsilon(epsilon, steps=steps, rate=rate, delta=delta)
