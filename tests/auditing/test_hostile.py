"""What users really have: broken pictures, wrong files, networks that misbehave. One sentence, nothing written."""

from __future__ import annotations

import struct
import sys
import types
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from frostglass.auditing.plan import parse_plan
from frostglass.auditing.run import run_plan
from frostglass.auditing.scorecard import AuditReport
from frostglass.core.errors import BadInput
from scenes import small

Make = Callable[[Path], None]


def picture(path: Path, mode: str = "RGB", size: tuple[int, int] = (12, 10), **more: Any) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size[::-1], 4), np.uint8), "RGBA").convert(mode).save(
        path, **more
    )


def bomb(path: Path) -> None:
    """A PNG of a few bytes whose header promises 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    )


def run(tmp_path: Path, **parts: Any) -> AuditReport:
    plan = parse_plan(small({"name": "thaw", "steps": 2, "every": 1}, **parts))
    return run_plan(plan, tmp_path / "run", device=torch.device("cpu"))


def refused(tmp_path: Path, sentence: str, **parts: Any) -> None:
    with pytest.raises(BadInput, match=sentence) as wrong:
        run(tmp_path, **parts)
    assert all("\n" not in p and p.endswith((".", ").")) for p in wrong.value.problems), wrong.value.problems
    assert not (tmp_path / "run").exists(), "something was written"


def folder(tmp_path: Path, *makes: Make) -> dict[str, Any]:
    held = tmp_path / "photos"
    held.mkdir()
    for make in makes:
        make(held)
    return {"source": f"folder:{held}", "size": 8}


def two(held: Path) -> None:
    picture(held / "a.png")
    picture(held / "b.png")


FOLDERS: list[tuple[list[Make], str]] = [
    ([], "holds no image"),
    ([lambda d: (d / "notes.txt").write_text("x") and None], "holds no image"),  # type: ignore[func-returns-value]
    ([two, lambda d: (d / "c.png").write_bytes(b"")], r"c\.png"),  # type: ignore[list-item, func-returns-value, return-value]
    ([two, lambda d: (d / "c.png").write_bytes(b"no image")], r"c\.png is not an image"),  # type: ignore[list-item, return-value]
    ([two, lambda d: (d / "c.png").write_bytes((d / "a.png").read_bytes()[:90])], r"c\.png is (truncated|damaged|not)"),  # type: ignore[list-item, return-value]
    ([two, lambda d: bomb(d / "c.png")], r"c\.png is larger than the limit"),
    ([lambda d: picture(d / "a.png")], "more than the 1 images"),
]  # fmt: skip


@pytest.mark.parametrize(("makes", "sentence"), FOLDERS, ids=range(len(FOLDERS)))
def test_folders_that_cannot_be_used(tmp_path: Path, makes: list[Make], sentence: str) -> None:
    refused(tmp_path, sentence, data=folder(tmp_path, *makes))


def test_sizes_that_differ_need_a_size(tmp_path: Path) -> None:
    data = folder(tmp_path, two, lambda d: picture(d / "c.png", size=(20, 20)))
    refused(tmp_path, "give a size", data={"source": data["source"], "size": None}, client={"batch": 3})


def test_modes_are_mixed_converted_and_said(tmp_path: Path) -> None:
    def turned(held: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        picture(held / "turned.jpg", exif=exif)

    def deep(held: Path) -> None:
        Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save(held / "deep.png")

    data = folder(
        tmp_path, lambda d: picture(d / "grey.png", "L"), lambda d: picture(d / "clear.png", "RGBA"),
        lambda d: picture(d / "palette.gif", "P"), turned, deep, lambda d: picture(d / "wide.webp", size=(31, 9)),
    )  # fmt: skip
    (cell,) = run(tmp_path, data=data, client={"batch": 6, "batches": 1}).cells
    text = " ".join(cell.warnings)
    for words in ("grey", "transparent", "palette", "EXIF", "16 bits", "cropped", "labels are arbitrary"):
        assert words in text, words


@pytest.fixture
def factories(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType("users_models")
    monkeypatch.setitem(sys.modules, "users_models", module)

    def make(scale: float = 1.0) -> Callable[..., nn.Module]:
        def factory(classes: int) -> nn.Module:
            net = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, classes))
            with torch.no_grad():
                for p in net.parameters():
                    p.mul_(scale)
            return net

        return factory

    module.fine = make()  # type: ignore[attr-defined]
    module.huge = make(1e30)  # type: ignore[attr-defined]
    module.nothing = lambda classes: None  # type: ignore[attr-defined]
    module.greedy = lambda classes: torch.empty(2**50)  # type: ignore[attr-defined]
    module.no_layer = lambda classes: nn.Sequential(  # type: ignore[attr-defined]
        nn.Conv2d(3, classes, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    return module


MODELS = [
    ("users_models:nets", "has no 'nets'"),
    ("users_model:fine", "does not import"),
    ("users_models:nothing", "returned NoneType"),
    ("users_models:greedy", "can't allocate memory"),
    ("torchvision:resnet19", "did you mean"),
]


@pytest.mark.parametrize(("name", "sentence"), MODELS)
def test_models_that_cannot_be_built(tmp_path: Path, factories: Any, name: str, sentence: str) -> None:
    refused(tmp_path, sentence, model={"name": name, "options": {}})


def test_a_module_that_breaks_while_it_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_models.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(str(tmp_path))
    refused(tmp_path, "does not import .*ZeroDivisionError", model={"name": "broken_models:net", "options": {}})


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    def weights(sentence: str, **tensors: torch.Tensor) -> None:
        path = tmp_path / "w.safetensors"
        save_file(tensors, path)
        refused(tmp_path, sentence, model={"weights": str(path)})

    weights("weights")
    weights(r"shape|fit", **{"0.weight": torch.zeros(1, 2)})
    refused(tmp_path, "does not exist", model={"weights": str(tmp_path / "none.safetensors")})
    (tmp_path / "text.pt").write_text("x")
    refused(tmp_path, "damaged", model={"weights": str(tmp_path / "text.pt")})


def test_weights_of_another_shape_name_parameter_and_both_shapes(tmp_path: Path) -> None:
    from frostglass.core.randomness import Rng
    from frostglass.vision import networks

    net = networks.build("mlp", classes=10, channels=3, size=8, options={"hidden": [32]}, rng=Rng.from_seed(0))
    save_file({k: v.clone() for k, v in net.state_dict().items()}, tmp_path / "w.safetensors")
    refused(tmp_path, r"192.*16|16.*192", model={"weights": str(tmp_path / "w.safetensors")})


def test_a_model_without_the_layer_an_attack_needs(tmp_path: Path, factories: Any) -> None:
    plan = small({"name": "spear"}, model={"name": "users_models:no_layer", "options": {}})
    with pytest.raises(BadInput, match=r"small: spear against no defence: .*no Linear layer"):
        run_plan(parse_plan(plan), tmp_path / "run", device=torch.device("cpu"))
    labels = small(
        {"name": "thaw"}, model={"name": "users_models:no_layer", "options": {}}, threat={"grants": ["examples"]}
    )
    with pytest.raises(BadInput, match="grant 'labels'"):
        run_plan(parse_plan(labels), tmp_path / "run", device=torch.device("cpu"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("grants", [["examples"], ["examples", "labels"]])
def test_gradients_that_are_not_finite_fail_their_cells_and_the_others_go_on(
    tmp_path: Path, factories: Any, grants: list[str]
) -> None:
    quick = {"name": "thaw", "steps": 2, "every": 1}
    scenario = small([quick, {"name": "spear"}])["scenario"][0]
    broken = scenario | {"name": "broken", "model": {"name": "users_models:huge", "options": {}}}
    plan = parse_plan({"scenario": [broken, scenario], "threat": {"grants": grants}})
    report = run_plan(plan, tmp_path / "run", device=torch.device("cpu"))
    assert [c.status for c in report.cells] == ["failed", "failed", "done", "done"]
    for cell in report.cells[:2]:
        assert "holds values that are not finite" in (cell.error or "")
        assert cell.images == []
    assert "small" in report.headline or "None of" in report.headline


def test_a_learning_rate_too_high_fails_the_cell(tmp_path: Path) -> None:
    client = {"update": "delta", "local_steps": 30, "lr": 1e30, "momentum": 0.9}
    report = run(tmp_path, client=client)
    assert report.cells[0].status == "failed"
    assert "lower client.lr" in (report.cells[0].error or "")
