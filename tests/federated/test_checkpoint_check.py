"""Checkpoints that hold RNG state are flagged without being executed; clean ones are not."""

from __future__ import annotations

import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from frostglass.core.errors import BadInput
from frostglass.defenses.instahide import InstaHide
from frostglass.federated.checkpoint_check import check_checkpoint


def generator_states(path: Path) -> list[str]:
    return [found.where for found in check_checkpoint(path) if found.state]


def clean() -> dict[str, object]:
    net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8))
    opt = torch.optim.Adam(net.parameters())
    net(torch.ones(4, 8)).sum().backward()
    opt.step()
    return {
        "net": net.state_dict(),
        "opt": opt.state_dict(),
        "epoch": 3,
        "random_crop": True,
        "steps": list(range(300)),
    }


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize(
    "state",
    [
        {"rng_state": torch.zeros(3)},
        {"a": torch.get_rng_state()},  # under an innocent name
        {"a": {"b": [random.getstate()]}},
        {"a": np.random.get_state()},
        {"a": np.random.default_rng()},
        {"a": random.Random(3)},
        {"torch_rng": 1},
        {"cuda_rng_state_all": []},
        # under an innocent name, in every shape that a saver may give it
        {"x": torch.get_rng_state().numpy()},
        {"x": torch.get_rng_state().numpy().tobytes()},
        {"x": torch.get_rng_state().tolist()},
        {"x": torch.get_rng_state().numpy().astype(np.int64)},
        {"x": torch.get_rng_state().long()},
        {"x": torch.stack([torch.get_rng_state()] * 3)},
        {"x": torch.stack([torch.get_rng_state()] * 3).numpy()},
        {"x": np.random.get_state()[1]},
        {"x": np.random.get_state()[1].tobytes()},
        {"x": np.random.RandomState(3).get_state()[1]},
        {"x": torch.from_numpy(np.random.get_state()[1].astype(np.int64))},
        {"x": torch.get_rng_state().numpy(), "y": np.random.default_rng()},
        {"generator": torch.Generator()},
    ],
)
def test_generator_states_are_flagged(tmp_path, state, old) -> None:
    torch.save(clean() | state, tmp_path / "x.pt", _use_new_zipfile_serialization=not old)
    assert generator_states(tmp_path / "x.pt")


def test_other_formats(tmp_path) -> None:
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"x": random.getstate()}))
    np.savez(tmp_path / "b.npz", rng_state=np.zeros(3), w=np.ones(2))
    save_file({"w": torch.ones(2), "rng_state": torch.ones(2)}, tmp_path / "c.safetensors")
    for name in ("a.pkl", "b.npz", "c.safetensors"):
        assert generator_states(tmp_path / name)
    save_file({"w": torch.ones(2)}, tmp_path / "d.safetensors")
    assert generator_states(tmp_path / "d.safetensors") == []
    (tmp_path / "upper").mkdir()
    for name in ("b.npz", "c.safetensors"):
        (tmp_path / name).rename(tmp_path / "upper" / name.upper())
    assert len(generator_states(tmp_path / "upper")) == 2


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.filterwarnings("ignore::frostglass.defenses.honesty.PrivacyCaution")
def test_clean_checkpoints_are_not_flagged(tmp_path, old) -> None:
    """An encoder that is saved with the model brings no generator state."""
    enc = InstaHide()
    enc.encode_rows(torch.zeros(9, 1, 2, 2), range(9), range(9), num_classes=9)
    torch.save(clean() | {"encoder": enc}, tmp_path / "x.pt", _use_new_zipfile_serialization=not old)
    assert generator_states(tmp_path / "x.pt") == []


class Bomb:
    def __reduce__(self) -> tuple[object, ...]:
        return (pytest.fail, ("the checkpoint was executed",))


def test_nothing_is_executed(tmp_path) -> None:
    torch.save({"x": Bomb(), "rng_state": 1}, tmp_path / "x.pt")
    assert generator_states(tmp_path / "x.pt")


def test_bad_files(tmp_path) -> None:
    with pytest.raises(BadInput, match="does not exist"):
        generator_states(tmp_path / "none.pt")
    (tmp_path / "text").write_text("hello there, this is text")
    (tmp_path / "cut").write_bytes(pickle.dumps(list(range(1000)))[:100])
    (tmp_path / "z.npz").write_bytes(b"PK nothing")
    (tmp_path / "st.safetensors").write_bytes((20).to_bytes(8, "little") + b"{broken" + bytes(40))
    np.savez_compressed(tmp_path / "deflated.npz", a=np.arange(5000))
    damaged = bytearray((tmp_path / "deflated.npz").read_bytes())
    damaged[60:400] = bytes(range(170)) * 2
    (tmp_path / "deflated.npz").write_bytes(damaged)
    torch.save({"x": Bomb()}, tmp_path / "newer.pt")  # an archive that asks for a later zip than Python reads
    archive = bytearray((tmp_path / "newer.pt").read_bytes())
    for at in (i for i in range(len(archive)) if archive[i : i + 4] == b"PK\x01\x02"):
        archive[at + 6] = 200
    (tmp_path / "newer.pt").write_bytes(archive)
    for name in ("text", "cut", "st.safetensors", "z.npz", "deflated.npz", "newer.pt"):
        with pytest.raises(BadInput):
            generator_states(tmp_path / name)


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize(
    "beside",
    [
        {"bits": torch.zeros(2, 5056, dtype=torch.uint8)},
        # arrays, which only the scan of opcodes sees
        {"numbers": np.arange(5000), "floats": np.random.default_rng(0).standard_normal(624).astype(np.float32)},
    ],
)
def test_networks_with_the_names_of_generators_are_not_flagged(tmp_path, old, beside) -> None:
    gan = torch.nn.ModuleDict({"generator": torch.nn.Linear(26, 24), "rng_head": torch.nn.BatchNorm1d(8)})
    held = {
        "gan": gan.state_dict(),
        "generator": gan["generator"].state_dict(),
        "generator_state_dict": gan["generator"].state_dict(),
        "generators": {"a": gan.state_dict(), "lr": 0.1},
        "steps": list(range(5056)),
        "counts": torch.arange(5056),
    } | beside
    torch.save(clean() | held, tmp_path / "x.pt", _use_new_zipfile_serialization=not old)
    assert generator_states(tmp_path / "x.pt") == []
    weights = {f"generator_state_dict.{k}": v.contiguous() for k, v in gan.state_dict().items()}
    save_file(weights, tmp_path / "y.safetensors")
    assert generator_states(tmp_path / "y.safetensors") == []
    save_file(weights | {"x": torch.stack([torch.get_rng_state()] * 2)}, tmp_path / "z.safetensors")
    assert generator_states(tmp_path / "z.safetensors") == ["x"]
