"""The demonstration sweep: what defences hide on digits and what they cost, with the picture for the README."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

from frostglass.auditing.sweep import Sweep
from frostglass.auditing.sweep_plan import load_sweep
from frostglass.auditing.sweep_report import table, write_sweep
from harness import parser, save

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--run", type=Path, default=None, help="folder of the sweep; finished points in it are kept")
    made.add_argument("--picture", type=Path, default=ROOT / "docs" / "images" / "sweep-digits.png")
    options = made.parse_args()
    torch.set_num_threads(options.threads)
    quick = ["trials=10", "training.rounds=30", "training.seeds=[0]"] if options.quick else []
    plan = load_sweep(ROOT / "plans" / "sweep-digits.toml", quick)
    folder = options.run or Path(tempfile.mkdtemp(prefix="frostglass-sweep-"))
    rows = Sweep(plan, folder, torch.device("cpu"), tell=lambda text: print(text, file=sys.stderr))()
    write_sweep(plan, rows, folder)
    print(table(rows), file=sys.stderr)
    if not options.quick:
        options.picture.write_bytes((folder / "frontier.png").read_bytes())
    seconds = round(sum(row["seconds"] for row in rows), 1)
    note = "Exact 95 % intervals; bounds hold for one message; DP-SGD is trained with Poisson sampling."
    save("sweep", options.threads, rows, options.out, note=note, seconds=seconds)


if __name__ == "__main__":
    main()
