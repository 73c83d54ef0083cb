"""Trains one job together under several defences, audits what the clients sent, and sets both side by side."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from frostglass._version import __version__
from frostglass.auditing.collaboration_games import games
from frostglass.auditing.collaboration_plan import BUNDLED_POOL, CollaborationPlan, MethodPlan, slug
from frostglass.auditing.collaboration_report import RESULTS, write_collaboration
from frostglass.auditing.recorded_api import audit_updates
from frostglass.auditing.report import write_report
from frostglass.auditing.rows import environment_of
from frostglass.auditing.store import refuse_other_data
from frostglass.core.errors import BadInput
from frostglass.core.files import claimed, clear_left_over, left_over, write_json, write_text
from frostglass.core.randomness import Rng
from frostglass.defenses.public_pool import POOL as POOL_FILE
from frostglass.defenses.public_pool import PoolSettings, make_pool
from frostglass.federated.federate_plan import FederatePlan
from frostglass.federated.federation import Federation, federation_of
from frostglass.federated.history import HISTORY
from frostglass.federated.recorded import read_record

PLAN, RUNS, POOL, GAMES, DATA = "plan.toml", "runs", "public-pool", "games.json", "data.json"
PAGE = "report.html"
WHOLE = ".whole"
"""Stands in a federation's folder once its record and model are written too, which the history comes before."""
PATCHES = 1000

Tell = Callable[[str], object]


def run_collaboration(plan: CollaborationPlan, out: Path, *, tell: Tell, resume: bool = False) -> dict[str, Any]:
    """Every method with every seed on the local engine, the audit of the first seed's updates, and the report.

    Args:
        plan: checked.
        out: new or empty, or of this plan with `resume`.
        tell: told of each round and each audit in words.
        resume: keeps the federations and audits that are whole, goes on with an interrupted federation behind its last
            whole round, and does the others anew.

    Returns:
        what is in `collaboration.json`: accuracy by method, seed and round; leakage by method, round and client.

    Raises:
        BadInput: the plan cannot be run, Flower is missing, or the folder holds something else.
    """
    import frostglass.federated.flower  # noqa: F401 - says in one sentence what is missing

    _claim(plan, out, resume)
    with claimed(out, PLAN, plan.to_toml()):  # at once, so that `resume` can go on from there
        clear_left_over(out)
        texts, sha256 = _texts(plan, out)
        _same_images(out, {"sha256": sha256})
        return _compared(plan, out, texts, tell)


def _same_images(out: Path, value: dict[str, str]) -> None:
    """Federations that are kept, their audits and those to come would be of other images, and stand side by side."""
    path = out / DATA
    if path.exists():
        refuse_other_data(out, path, value)
    write_json(path, value)


def _compared(plan: CollaborationPlan, out: Path, texts: dict[tuple[str, int], str], tell: Tell) -> dict[str, Any]:
    methods = []
    for method in plan.method:
        runs = [_trained(texts[method.name, s], _folder(out, method, s), tell) for s in plan.seeds]
        audited = _audited(plan, method, texts[method.name, plan.seeds[0]], out, tell)
        methods.append({"name": method.name, "defence": runs[0]["defence"], "runs": runs, **audited})
        value = {
            "name": plan.name, "frostglass": __version__, "environment": environment_of(torch.device("cpu")),
            "plan_sha256": plan.digest(), "seeds": plan.seeds, "whole": len(methods) == len(plan.method),
            "methods": methods,
        }  # fmt: skip
        write_json(out / RESULTS, value)
    write_collaboration(out)
    return value


def _claim(plan: CollaborationPlan, out: Path, resume: bool) -> None:
    held = out / PLAN
    others = [p for p in out.iterdir() if p.name != POOL] if out.is_dir() else []
    if others and all(left_over(p, f"{PLAN}.") for p in others):
        return  # killed before its plan was whole
    if resume and (others or out.is_file()):  # else nothing has been begun
        if not held.is_file() or hashlib.sha256(held.read_bytes()).hexdigest() != plan.digest():
            raise BadInput(f"--resume: {out} holds no comparison of this plan; choose an empty folder, or its plan.")
    elif others or (out.exists() and not out.is_dir()):
        raise BadInput(f"--out: {out} is not empty; choose another folder, or go on with --resume.")


def _texts(plan: CollaborationPlan, out: Path) -> tuple[dict[tuple[str, int], str], str]:
    """The plan of each method and seed, and a SHA-256 of their images; all are built once before anything is trained.

    Of a refused one the pool that was cut for it goes again.
    """
    cut, data = not (out / POOL).exists(), hashlib.sha256()
    try:
        texts = {(m.name, s): _text(plan, m, s, out) for m in plan.method for s in plan.seeds}
        for text in texts.values():
            data.update(federation_of(text).digest().encode())
    except BadInput:
        if cut:
            shutil.rmtree(out / POOL, ignore_errors=True)
        raise
    return texts, data.hexdigest()


def _folder(out: Path, method: MethodPlan, seed: int) -> Path:
    return out / RUNS / f"{slug(method.name)}-{seed}"


def _text(plan: CollaborationPlan, method: MethodPlan, seed: int, out: Path) -> str:
    """The federation's plan as all of its processes read it; a bundled pool is cut first."""
    made = plan.federation(method, seed)
    for part in made.defense:
        if part.settings.get("public") == BUNDLED_POOL:
            part.public = _pool(made, out).as_posix()  # type: ignore[attr-defined]
    made.server.folder = _folder(out, method, seed).resolve().as_posix()
    return made.to_toml()


def _pool(plan: FederatePlan, out: Path) -> Path:
    """Patches of the bundled photographs in the size and channels of the job's images."""
    without = plan.model_copy(update={"defense": []})
    channels, _, size = federation_of(without.to_toml()).image_shape
    folder = out.resolve() / POOL
    if not (folder / POOL_FILE).exists():  # which is written last
        settings = PoolSettings(size, PATCHES, 4 * size, -1, channels, 50, "stop")
        make_pool("photos", folder, settings, Rng.from_seed(0, "bundled public pool"))
    return folder


def _trained(text: str, folder: Path, tell: Tell) -> dict[str, Any]:
    """The history of one federation: read, or made."""
    from frostglass.federated.flower.engines import on_local
    from frostglass.federated.flower.unfinished import Unfinished

    made = federation_of(text)
    held = _history(folder)
    if held is None or not (folder / WHOLE).exists():
        begun = Unfinished(folder).begun
        if folder.exists() and not begun:
            shutil.rmtree(folder)  # a part of a run without a whole round
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / PLAN, text)
        tell(f"{made.plan.name}, seed {made.plan.seed}")
        on_local(text, folder, lambda words: tell(f"  {words}"), resume=begun)
        held = _history(folder)
        if held is not None and len(held["rounds"]) == made.plan.server.rounds + 1:
            write_text(folder / WHOLE, "")
    if held is None:
        raise BadInput(f"{folder}: the federation left no {HISTORY}.")
    return held


def _history(folder: Path) -> dict[str, Any] | None:
    try:
        held: dict[str, Any] = json.loads((folder / HISTORY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return held


def _audited(plan: CollaborationPlan, method: MethodPlan, text: str, out: Path, tell: Tell) -> dict[str, Any]:
    """What the updates of the first seed give away, client by client."""
    made = federation_of(text)
    folder = _folder(out, method, plan.seeds[0])
    record = folder / (made.record_folder or "")
    if made.record_folder is None or not record.is_dir():
        return {"leakage": [], "verdict": None, "said": "nothing was recorded"}
    done = folder / "audit" / "scorecard.json"
    if not done.exists():
        tell(f"{made.plan.name}: audit of the recorded updates")
        if done.parent.exists():
            shutil.rmtree(done.parent)
        rounds = plan.leakage.rounds or sorted({1, made.plan.server.rounds})
        known = {
            "rounds": rounds, "gallery": plan.leakage.candidates, "budget": plan.leakage.budget,
            "most": len(made.rows) * len(rounds),
        }  # fmt: skip
        name = made.plan.model.name  # this very plan's, so that the record may name it
        audit_updates(record, model=name, truth=_truth(made), known=known, out=done.parent, device="cpu")
    elif not done.with_name(PAGE).exists():  # killed between the two
        write_report(done.parent)
    found = leakage_of(json.loads(done.read_text(encoding="utf-8")))
    kept = folder / GAMES
    if not kept.exists():
        tell(f"{made.plan.name}: identification games")
        which = {(row["round"], row["client"]) for row in found["leakage"]}
        write_json(kept, games(made, read_record(record), which, plan.leakage))
    held = json.loads(kept.read_text(encoding="utf-8"))
    for row in found["leakage"]:
        row["game"] = held.get(f"{row['round']}/{row['client']}")
    return found


def _truth(made: Federation) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The images of every client, which this simulation holds; for scoring alone."""
    return {
        str(i): (made.train.images[rows].float() / 255, made.train.labels[rows]) for i, rows in enumerate(made.rows)
    }


def leakage_of(card: dict[str, Any]) -> dict[str, Any]:
    """{leakage: a row for each update, verdict, said} out of the scorecard of recorded updates."""
    cells = {c["id"]: c for c in card["cells"]}
    rows = []
    for update in card["recorded"]["updates"]:
        if update["status"] == "passed over":
            continue
        broken = [c for i in update["cells"] if (c := cells.get(i, {})).get("status") == "failed"]
        own = [cells[i] for i in update["cells"] if i in cells and cells[i]["summary"]]
        rows.append({
            "round": update["round"], "client": update["client"], "examples": update["examples"],
            "labels": update["labels"], "linter": update["linter"],
            "images": [_images(c) for c in own if not c["summary"].get("asked")],
            "not_attacked": update["reason"], "broken": [f"{c['attack']} failed: {c['error']}" for c in broken],
        })  # fmt: skip
    verdict = card.get("verdict") or {}
    return {"leakage": rows, "verdict": verdict.get("verdict"), "said": verdict.get("text") or card["headline"]}


def _images(cell: dict[str, Any]) -> dict[str, Any]:
    s = cell["summary"]
    return {
        "attack": cell["attack"], "images": s["images"], "proved": s["proved"], "ssim": s["ssim_median"],
        "recognisable": s["over_threshold"]["count"],
    }  # fmt: skip
