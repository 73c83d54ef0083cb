"""Memory of tiles and of their products (`tile_products`), and the compiled loops over it on several threads."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from frostglass.numerics.compiled import RUN, kernel

GAP = 48
"""Numbers between one point's matrix and the next: at a distance of a power of two all would share a cache's lines."""


def matrices(like: Tensor, points: int, rows: int, columns: int) -> Float[Tensor, "points panels rows 32"]:
    """A matrix for each point, to be written; `GAP` apart. What fills up a panel is 0.

    Args:
        like: of what type and where.
        points, rows, columns: how many.
    """
    panels, left = -(-columns // RUN), columns % RUN
    step = panels * rows * RUN + GAP
    made = like.new_empty(points * step).as_strided((points, panels, rows, RUN), (step, rows * RUN, RUN, 1))
    if left:
        made[:, -1, :, left:] = 0
    return made


def numbers(made: Float[Tensor, "points panels rows 32"]) -> tuple[NDArray[np.float32], int]:
    """Of `matrices`: all one after another, with what lies between them; and from one point to the next."""
    step = made.stride(0)
    reach = step * (len(made) - 1) + made[0].numel()
    flat: NDArray[np.float32] = made.detach().as_strided((reach,), (1,)).numpy()
    return flat, step


def flat(x: Tensor) -> NDArray[np.float32]:
    """All numbers of a contiguous tensor, the same memory."""
    found: NDArray[np.float32] = x.detach().reshape(-1).numpy()
    return found


def run(function: Callable[..., None], *args: Any) -> None:
    """function(*args), compiled."""
    compiled = kernel(function)
    assert compiled is not None
    compiled(*args)


def over(count: int, step: int, work: Callable[[int, int], None]) -> None:
    """work(first, last) for parts of range(count), of whole steps, on as many threads as PyTorch uses."""
    threads = min(torch.get_num_threads(), count // step)
    ends = [count // step * t // threads * step for t in range(threads + 1)]
    others = [_threads(os.getpid(), threads - 1).submit(work, *ends[t : t + 2]) for t in range(1, threads)]
    work(*ends[:2])
    for other in others:
        other.result()


@functools.lru_cache(maxsize=2)
def _threads(process: int, count: int) -> ThreadPoolExecutor:  # noqa: ARG001 - threads do not survive a fork
    return ThreadPoolExecutor(count, "tiles")
