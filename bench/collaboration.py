"""The collaborative training demonstration: digits, four clients, without a defence, with InstaHide, with DP-SGD.

    python bench/collaboration.py [--run DIR]          (about a quarter of an hour on one core)

Runs `frostglass collaborate` and keeps what is quoted: accuracy by round for every seed, and the overview of leakage.
`--run` reads a finished run of the bundled plan instead of making one.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from frostglass.auditing.collaboration import run_collaboration
from frostglass.auditing.collaboration_plan import digits
from frostglass.auditing.collaboration_report import RESULTS as VALUE
from frostglass.auditing.collaboration_report import best, summary
from harness import parser, save


def rows_of(value: dict[str, Any]) -> list[dict[str, Any]]:
    """One a method."""
    kept = []
    for method in value["methods"]:
        about = summary(method)
        about.pop("said")
        by_seed = {str(run["seed"]): [round(best(row), 4) for row in run["rounds"]] for run in method["runs"]}
        kept.append({**about, "accuracy by round": by_seed})
    return kept


def main() -> None:
    made = parser(__doc__ or "")
    made.add_argument("--run", type=Path, help="folder of a finished run of the bundled plan")
    options = made.parse_args()
    torch.set_num_threads(options.threads)
    if options.run:
        value = json.loads((options.run / VALUE).read_text())
    else:
        with tempfile.TemporaryDirectory() as folder:
            value = run_collaboration(digits(), Path(folder) / "run", tell=lambda t: print(t, file=sys.stderr))
    assert value["plan_sha256"] == digits().digest(), "a run of another plan"
    save(
        "collaboration",
        options.threads,
        rows_of(value),
        options.out,
        seeds=value["seeds"],
        leakage_of_seed=value["seeds"][0],
    )


if __name__ == "__main__":
    main()
