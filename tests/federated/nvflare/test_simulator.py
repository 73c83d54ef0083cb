"""The example's job in NVFlare's simulator: every update is recorded as the client sent it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import frostglass
from frostglass.federated.exchange import misfits
from frostglass.federated.recorded import read_record

pytest.importorskip("nvflare", reason="nvflare is not installed; pip install 'frostglass[nvflare]'")

SOURCE = Path(frostglass.__file__).parents[1]
EXAMPLE = Path(__file__).parents[3] / "examples" / "nvflare_job"
HERE = Path(__file__).parent
LIMIT = 300
MARK = "FROSTGLASS_TEST_MARK"

RUN = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
import job
from nets import KeepSent
folder = Path(sys.argv[1])
(folder / "kept").mkdir()
job.main(folder, 2, last=KeepSent(str(folder / "kept")))
"""


@pytest.mark.slow
def test_two_clients_and_two_rounds_are_recorded_as_they_were_sent(tmp_path: Path) -> None:
    paths = [str(EXAMPLE), str(HERE)]
    running = subprocess.Popen(
        [sys.executable, "-c", RUN, str(tmp_path), *paths], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(SOURCE), *paths]), MARK: str(tmp_path)},
    )  # fmt: skip
    try:
        said = running.communicate(timeout=LIMIT)[0]
    finally:
        left = started(str(tmp_path))
        for process in left:
            process.kill()
        running.wait()
    assert running.returncode == 0, said
    assert not left, "NVFlare left processes behind"
    held = read_record(tmp_path / "record")
    assert not held.problems
    assert {(u.header.client, u.header.round) for u in held.updates} == {
        (site, number) for site in ("site-1", "site-2") for number in (0, 1)
    }, said[-3000:]
    sys.path.insert(0, str(EXAMPLE))
    try:
        from task import Net
    finally:
        sys.path.remove(str(EXAMPLE))
    model = Net()
    for got in held.updates:
        h = got.header
        assert (h.kind, h.examples, h.defence, h.metrics["kind"]) == ("delta", 750, "pruning", "WEIGHT_DIFF")
        with np.load(tmp_path / "kept" / f"{h.client}-{h.round}.npz") as kept:
            update, buffers = got.payload()
            assert all(np.array_equal(g.numpy(), -kept[n]) for n, g in update.items())
            assert set(kept) == set(update) | set(buffers)
        values = torch.cat([g.flatten() for g in update.values()])
        assert float((values == 0).float().mean()) == pytest.approx(0.9, abs=0.01)
        assert float(values.norm()) > 0
        assert not misfits(got.sent(), model)
        assert int(buffers["net.5.num_batches_tracked"]) >= 25
    first, second = (next(u for u in held.updates if u.header.round == r) for r in (0, 1))
    assert first.header.sent_sha256 != second.header.sent_sha256
    for site in ("site-1", "site-2"):
        rows = [json.loads(line) for line in (tmp_path / f"gate-{site}.jsonl").read_text().splitlines()]
        assert [(row["round"], row["passed"]) for row in rows] == [(0, True), (1, True)]
        assert all(f["check"] == "label_leakage" for row in rows for f in row["findings"])
        assert all(row["findings"] for row in rows)


def started(mark: str) -> list[Any]:
    """Processes that this test started: NVFlare puts them into sessions of their own, their environment stays."""
    import psutil  # NVFlare needs it

    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found
