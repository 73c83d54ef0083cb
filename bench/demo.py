"""The demonstration: wall time and peak memory of the whole command, in a process of its own, several times."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness import parser, save, spread


def main() -> None:
    options = parser(__doc__).parse_args()
    seconds, cells = [], []
    for _ in range(1 if options.quick else 3):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "demo"
            begun = time.perf_counter()
            subprocess.run([sys.executable, "-m", "frostglass", "demo", "--out", str(out)], check=True)
            seconds.append(time.perf_counter() - begun)
            card = json.loads((out / "scorecard.json").read_text())
            cells = [{k: c[k] for k in ("title", "seconds", "summary", "encoding_summary")} for c in card["cells"]]
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024
    save("demo", options.threads, cells, options.out, wall_seconds=spread(seconds), peak_resident_mib=peak)


if __name__ == "__main__":
    main()
