"""Numbers that README and docs quote from bench/results are those in the files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def result(name: str) -> dict[str, Any]:
    held: dict[str, Any] = json.loads((ROOT / "bench" / "results" / name).read_text(encoding="utf-8"))
    return held


def flat(path: str) -> str:
    return " ".join((ROOT / path).read_text(encoding="utf-8").split())


def test_times_beside_breaching() -> None:
    ratios = [row["breaching_over_frostglass"] for row in result("vs_breaching.json")["rows"]]
    told = re.search(
        r"takes ([\d.]+) to ([\d.]+) times less CPU time than breaching's, and ([\d.]+) to ([\d.]+) times with",
        flat("README.md"),
    )
    assert told is not None
    for engine, quoted in (("double_backward", told.groups()[:2]), ("frozen_fd", told.groups()[2:])):
        times = sorted(r[engine]["cpu_s_per_iteration"] for r in ratios)
        assert [float(q) for q in quoted] == [round(times[0], 1), round(times[-1], 1)], engine
    table = [
        " | ".join([
            f"{r['double_backward']['cpu_s_per_iteration']:.2f}", f"{r['frozen_fd']['cpu_s_per_iteration']:.2f}",
            f"{r['double_backward']['peak_mib']:.2f}, {r['frozen_fd']['peak_mib']:.2f}",
        ])
        for r in ratios
    ]  # fmt: skip
    assert all(row in flat("docs/gradient-inversion.md") for row in table)


def test_labels_that_are_read_off_gradients() -> None:
    """The table of docs/gradient-inversion.md, and README's line about it."""
    rows = [r for r in result("labels.json")["rows"] if r["victim"].endswith("random") and "counts" in r["rule"]]
    own = [r for r in rows if r["rule"] == "counts"]
    least = min(r["multiset"][0] for r in own)
    told = f"all right in {sum(r['exact'] == 1 for r in own)} of {len(own)} cells; least {least:.3f} of the labels"
    assert told.replace(" 0.", " .") in flat("README.md")
    for victim, name in (("small_bn_cnn random", "small CNN"), ("resnet20 random", "ResNet-20")):
        for mode in ("eval", "train"):
            for rule, added in (("counts", ""), ("counts, auxiliary", ", granted")):
                found = {
                    r["K"]: r["multiset"][0]
                    for r in rows
                    if (r["victim"], r["mode"], r["rule"], r["labels"]) == (victim, mode, rule, "repeated")
                }
                shown = ["1" if v == 1 else f"{v:.3f}".removeprefix("0") for _, v in sorted(found.items())]
                line = f"| {name}, {mode}{added} | {' | '.join(shown)} |"
                if set(shown) != {"1"}:  # rows that are right throughout stand there once
                    assert line in flat("docs/gradient-inversion.md")
