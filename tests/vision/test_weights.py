"""Facts about weights on disk."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from frostglass.core.errors import BadInput
from frostglass.core.randomness import Rng
from frostglass.vision.datasets import load
from frostglass.vision.networks import Normalised, build
from frostglass.vision.weights import load_weights, save_weights


def network(seed: int = 0, **options) -> nn.Module:
    return build("small_bn_cnn", classes=10, channels=3, size=8, options=options, rng=Rng.from_seed(seed))


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return list(left) == list(right) and all(torch.equal(left[key], right[key]) for key in left)


def refused(model: nn.Module, path: Path, *words: str, problems: int = 1) -> None:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(BadInput) as caught:
        load_weights(model, path)
    assert len(caught.value.problems) == problems, str(caught.value)
    for word in (str(path), *words):
        assert word in str(caught.value), str(caught.value)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items()), "model half changed"


def test_saved_and_loaded(tmp_path):
    path = save_weights(network(0), tmp_path / "new" / "a.safetensors")
    assert [p.name for p in path.parent.iterdir()] == ["a.safetensors"]
    assert not same(network(1), network(0))
    assert same(load_weights(network(1), path), network(0))


@pytest.mark.parametrize("ending", [".pt", ".pth"])
@pytest.mark.parametrize("prefix", ["", "module.", "_module.", "_orig_mod."])
@pytest.mark.parametrize("nested", [False, True])
def test_torch_files(tmp_path, ending, prefix, nested):
    state = {prefix + key: value for key, value in network(0).state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3} if nested else state, tmp_path / f"a{ending}")
    assert same(load_weights(network(1), tmp_path / f"a{ending}"), network(0))


def test_batch_counters_may_be_absent(tmp_path):
    state = {k: v for k, v in network(0).state_dict().items() if not k.endswith("num_batches_tracked")}
    save_file(state, tmp_path / "a.safetensors")
    assert same(load_weights(network(1), tmp_path / "a.safetensors"), network(0))


def test_a_normalised_network_loads_files_of_the_network_inside(tmp_path):
    def wrapped(seed: int) -> Normalised:
        torch.manual_seed(seed)
        return Normalised(nn.Linear(3, 2), (0.5,), (0.5,))

    save_weights(wrapped(0), tmp_path / "whole.safetensors")
    save_weights(wrapped(0).model, tmp_path / "inside.safetensors")
    for name in ("whole", "inside"):
        assert same(load_weights(wrapped(1), tmp_path / f"{name}.safetensors"), wrapped(0))


def test_tied_weights_can_be_saved(tmp_path):
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    path = save_weights(tied, tmp_path / "a.safetensors")
    assert torch.equal(load_file(path)["0.weight"], load_file(path)["1.weight"])


class TestRefusals:
    def test_missing(self, tmp_path):
        refused(network(), tmp_path / "a.safetensors", "does not exist")

    def test_a_name_that_no_file_can_have(self, tmp_path):
        refused(network(), tmp_path / f"{'n' * 300}.pt", "too long", "correct the path")

    def test_folder_and_other_extensions(self, tmp_path):
        refused(network(), tmp_path, "not a file")
        (tmp_path / "a.bin").write_bytes(b"x")
        refused(network(), tmp_path / "a.bin", "convert or rename")

    @pytest.mark.parametrize("ending", [".safetensors", ".pt", ".pth"])
    @pytest.mark.parametrize("content", [b"", b"garbage", b"\xff" * 64, b"PK\x03\x04 zip"])
    def test_damaged(self, tmp_path, ending, content):
        (tmp_path / f"a{ending}").write_bytes(content)
        refused(network(), tmp_path / f"a{ending}", "damaged")

    def test_truncated(self, tmp_path):
        path = save_weights(network(), tmp_path / "a.safetensors")
        path.write_bytes(path.read_bytes()[:-100])
        refused(network(), path, "damaged")

    def test_code_in_a_torch_file_is_never_run(self, tmp_path):
        marker = tmp_path / "ran"

        class Evil:
            def __reduce__(self):
                return (Path.touch, (marker,))

        torch.save({"a": Evil()}, tmp_path / "a.pt")
        refused(network(), tmp_path / "a.pt", "never run")
        (tmp_path / "b.pt").write_bytes(pickle.dumps(Evil(), protocol=2))
        refused(network(), tmp_path / "b.pt")
        assert not marker.exists()

    def test_no_state_dict(self, tmp_path):
        torch.save([torch.zeros(2)], tmp_path / "a.pt")
        refused(network(), tmp_path / "a.pt", "no state dict")

    def test_keys_missing_and_too_many(self, tmp_path):
        state = {("x" + key if key.startswith("body") else key): v for key, v in network().state_dict().items()}
        save_file(state, tmp_path / "a.safetensors")
        words = (
            "lacks body.0.weight; body.1.weight; body.1.bias and ",
            "beyond",
            "xbody.1.num_batches_tracked",
            "21 more",
        )
        refused(network(), tmp_path / "a.safetensors", *words, problems=2)

    def test_shapes(self, tmp_path):
        path = save_weights(network(width=16), tmp_path / "a.safetensors")
        refused(network(), path, "body.0.weight (16, 3, 3, 3), not (32, 3, 3, 3)", "more")

    def test_values(self, tmp_path):
        state = network().state_dict()
        state["head.bias"][3] = float("nan")
        save_file(state, tmp_path / "a.safetensors")
        refused(network(), tmp_path / "a.safetensors", "not finite in head.bias")
        save_file(
            network().state_dict() | {"head.bias": torch.zeros(10, dtype=torch.int64)}, tmp_path / "b.safetensors"
        )
        refused(network(), tmp_path / "b.safetensors", "head.bias torch.int64, not torch.float32")

    def test_places_that_cannot_be_written(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(BadInput, match="cannot be written"):
            save_weights(network(), tmp_path / "file" / "a.safetensors")
        with pytest.raises(BadInput, match=r"must end in \.safetensors"):
            save_weights(network(), tmp_path / "a.pt")


@pytest.mark.data
class TestPublishedWeights:
    @pytest.mark.parametrize("depth", [20, 32, 56])
    def test_they_fit(self, data_root, depth):
        model = build(f"resnet{depth}", classes=10, channels=3, size=32, rng=Rng.from_seed(0))
        load_weights(model, data_root.parent / "models" / "cifar10" / f"resnet{depth}.safetensors")

    def test_resnet20_recognises_the_test_images(self, data_root):
        """About 92 % on the originals; these are JPEG re-encodings, on which .820 of the first 2,000 were measured."""
        model = build("resnet20", classes=10, channels=3, size=32, rng=Rng.from_seed(0)).eval()
        load_weights(model, data_root.parent / "models" / "cifar10" / "resnet20.safetensors")
        test = load(f"parquet:{data_root}/cifar10/test-00000-of-00001.parquet", size=None, limit=1000)
        with torch.no_grad():
            right = torch.cat([model(part) for part in test.images.split(250)]).argmax(1) == test.labels
        assert 0.78 < float(right.float().mean()) < 0.87
