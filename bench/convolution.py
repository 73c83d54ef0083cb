"""3 x 3 convolutions by tiles beside PyTorch's (oneDNN): time and error of a layer's results and derivatives.

    python bench/convolution.py  # three minutes on one thread

Layers are those of a ResNet-18 and a ResNet-20 at 32 px. "forward" is conv(x, w); "slopes" both gradients; "second"
what double backward adds: conv(a, w) + conv(x, b) and the input gradient for b. Sides take turns, in the layout that
each likes best; several inputs take turns too, so that they are not in the nearest cache. Errors are to float64.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from frostglass.core.memory import freed_memory_kept
from frostglass.numerics import tiled_convolution as tiles
from frostglass.numerics.tile_weights import Kept
from harness import parser, save

LAYERS = ((64, 32), (128, 16), (256, 8), (512, 4), (32, 16), (64, 8))
"""(channels, size)"""
INPUTS = 12
FORM = ((1, 1), (1, 1), (1, 1), False, (0, 0), 1)


def tiling(x: Tensor, w: Tensor) -> tiles.Tiling:
    """What an inversion takes; small tiles where it takes none."""
    return tiles.tiling(x, w, *FORM[:3], 1) or tiles.Tiling(1, 2)


def forward(x: Tensor, w: Tensor) -> Tensor:
    y: Tensor = torch.ops.aten.convolution(x, w, None, *FORM)
    return y


def slopes(g: Tensor, x: Tensor, w: Tensor, of_x: bool, of_w: bool) -> tuple[Tensor, Tensor]:
    of = torch.ops.aten.convolution_backward(g, x, w, None, *FORM, (of_x, of_w, False))
    return of[0], of[1]


def second(g: Tensor, x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return forward(a, w) + forward(x, b), slopes(g, x, b, True, False)[0]


def sides(channels: int, size: int, images: int) -> dict[str, dict[str, Callable[[int], Any]]]:
    """What is timed, by job and side; each takes the number of its turn."""
    made = torch.Generator().manual_seed(0)
    x, g, a = ([torch.randn(images, channels, size, size, generator=made) for _ in range(INPUTS)] for _ in range(3))
    w, b = (torch.randn(channels, channels, 3, 3, generator=made) for _ in range(2))
    last = [[t.contiguous(memory_format=torch.channels_last) for t in part] for part in (x, g, a)]
    kept, how = Kept(), tiling(x[0], w)
    return {
        "forward": {
            "torch": lambda t: forward(x[t], w),
            "torch, channels last": lambda t: forward(last[0][t], w),
            "tiles": lambda t: tiles.convolved(last[0][t], kept.of(w, how.edge), how),
        },
        "slopes": {
            "torch": lambda t: slopes(g[t], x[t], w, True, True),
            "torch, channels last": lambda t: slopes(last[1][t], last[0][t], w, True, True),
            "tiles": lambda t: tiles.slopes(last[1][t], last[0][t], kept.of(w, how.edge), how, True),
        },
        "second": {
            "torch": lambda t: second(g[t], x[t], w, a[t], b),
            "torch, channels last": lambda t: second(last[1][t], last[0][t], w, last[2][t], b),
            "tiles": lambda t: tiles.second_slopes(last[1][t], last[0][t], kept.of(w, how.edge), last[2][t], b, how),
        },
    }


def off(found: Any, wanted: Any) -> float:
    if isinstance(found, tuple):
        return max(off(x, y) for x, y in zip(found, wanted, strict=True))
    return float((found.double() - wanted).norm() / wanted.norm())


def errors(channels: int, size: int, images: int) -> dict[str, float]:
    made = torch.Generator().manual_seed(0)
    x, g, a = (torch.randn(images, channels, size, size, generator=made) for _ in range(3))
    w, b = (torch.randn(channels, channels, 3, 3, generator=made) for _ in range(2))
    exact = [t.double() for t in (g, x, w, a, b)]
    how = tiling(x, w)
    weights = Kept().of(w, how.edge)
    return {
        "forward": off(tiles.convolved(x, weights, how), forward(exact[1], exact[2])),
        "slopes": off(tiles.slopes(g, x, weights, how, True), slopes(*exact[:3], True, True)),
        "second": off(tiles.second_slopes(g, x, weights, a, b, how), second(*exact)),
        "forward, torch": off(forward(x, w), forward(exact[1], exact[2])),
    }


def measure(jobs: dict[str, Callable[[int], Any]], turns: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for t in range(turns + 2):
        for name, run in jobs.items():
            start = time.process_time()
            run(t % INPUTS)
            times[name].append(time.process_time() - start)
    return {name: statistics.median(taken[2:]) for name, taken in times.items()}


def main() -> None:
    made = parser(" ".join(__doc__.split()))
    made.set_defaults(threads=1)
    options = made.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    with freed_memory_kept():
        for channels, size in LAYERS[:1] if options.quick else LAYERS:
            for images in (1, 8, 32):
                row: dict[str, Any] = {"channels": channels, "size": size, "images": images}
                x, w = torch.empty(images, channels, size, size), torch.empty(channels, channels, 3, 3)
                row |= {"used": tiles.tiling(x, w, *FORM[:3], 1) is not None, "edge": tiling(x, w).edge}
                for job, jobs in sides(channels, size, images).items():
                    seconds = measure(jobs, 5 if options.quick else 25)
                    best = min(s for name, s in seconds.items() if name != "tiles")
                    row[job] = {"cpu_ms": {name: round(1e3 * s, 3) for name, s in seconds.items()}}
                    row[job]["times_less_than_the_better_torch"] = round(best / seconds["tiles"], 2)
                row["relative_error"] = errors(channels, size, images)
                rows.append(row)
                print(channels, size, images, [row[j]["times_less_than_the_better_torch"] for j in sides(8, 8, 1)])
    note = "medians of 25 turns; `used`: whether an inversion takes this layer by tiles"
    save("convolution", options.threads, rows, options.out, note=note)


if __name__ == "__main__":
    main()
