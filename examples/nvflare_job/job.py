"""NVFlare's FedAvg on digits: pruning and a gate on each client, a record of all updates on the server; simulated.

    python examples/nvflare_job/job.py FOLDER [ROUNDS]

FOLDER must be new and without spaces. It then holds workspace/ (NVFlare's), record/ and a journal of each client's
gate, which only warns here: labels of an update leak whatever is pruned. To audit the record, in this script's folder:

    frostglass audit-updates FOLDER/record --model task:Net --out AUDIT
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from nvflare.app_opt.pt.job_config.fed_avg import FedAvgJob  # noqa: E402
from nvflare.job_config.defs import FilterType  # noqa: E402
from nvflare.job_config.script_runner import ScriptRunner  # noqa: E402
from task import PLAN, WHAT, Net  # noqa: E402

from frostglass.federated.nvflare.defence_filter import DefenceFilter  # noqa: E402
from frostglass.federated.nvflare.gate_filter import GateFilter  # noqa: E402
from frostglass.federated.nvflare.record_filter import RecordFilter  # noqa: E402

SITES = ("site-1", "site-2")


def job(folder: Path, rounds: int, last: Any = None) -> FedAvgJob:
    """The job with its filters.

    Args:
        folder: of record and journals.
        rounds: of FedAvg.
        last: a further filter of every client, behind all others; None for none.
    """
    made = FedAvgJob(name="audited", n_clients=len(SITES), num_rounds=rounds, initial_model=Net())
    made.set_app_packages(["frostglass"])  # installed everywhere: NVFlare must not copy parts of it into the job
    checks = {"label_leakage": 0.8, "exact_recovery": True}
    for site in SITES:
        # left out, tasks are "*": the client would answer tasks, too, that no filter below is on
        made.to(ScriptRunner(script=str(HERE / "client.py")), site, tasks=["train"])
        gate = GateFilter(
            "frostglass.auditing.outgoing:outgoing_checks", "task:private", **WHAT, plan=PLAN, settings=checks,
            defence="pruning", action="warn", journal=str(folder / "gate-{site}.jsonl"),
        )  # fmt: skip
        for filter in (DefenceFilter("pruning", **WHAT, settings={"fraction": 0.9}), gate, last):
            if filter is not None:
                made.to(filter, site, tasks=["train"], filter_type=FilterType.TASK_RESULT)
    made.to(
        RecordFilter(str(folder / "record"), **WHAT, plan=PLAN), "server", tasks=["train"],
        filter_type=FilterType.TASK_RESULT,
    )  # fmt: skip
    return made


def main(folder: Path, rounds: int, last: Any = None) -> None:
    """Runs the job in NVFlare's simulator, where server and clients are processes of this machine."""
    paths = [str(HERE), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)  # clients import task.py
    folder.mkdir(parents=True, exist_ok=True)
    job(folder, rounds, last).simulator_run(str(folder / "workspace"), threads=len(SITES))


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3) or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    main(Path(sys.argv[1]).resolve(), int(sys.argv[2]) if len(sys.argv) > 2 else 2)
