"""The encoder's Triton kernel: interpreted on the CPU it encodes as torch does; it compiles for GPUs without one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from frostglass.core.errors import BadInput
from frostglass.core.randomness import Insecure
from frostglass.defenses.instahide import InstaHide
from frostglass.numerics import device_mixing, mixing
from frostglass.numerics.key_rows import KeyRows, MixLaw, draw_coefficients, draw_distinct, draw_mask
from frostglass.numerics.keystream import Secret

triton = pytest.importorskip("triton", reason="Triton is not installed (it is for Linux on x86-64 only)")


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton runs kernels in Python, on tensors of the CPU."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    device_mixing.compiled.cache_clear()
    yield
    device_mixing.compiled.cache_clear()


def keys_of(b: int, k: int, inside: int, private: int, public: int, d: int) -> KeyRows:
    stream = Secret.draw(Insecure(k)).stream("device")
    parts = [draw_distinct(stream, private, inside, b)]
    parts += [draw_distinct(stream, public, k - inside, b)] if k > inside else []
    weights = draw_coefficients(stream, MixLaw(k, inside), b) if k > 1 else np.ones((b, 1), np.float32)
    return KeyRows(np.concatenate(parts, 1), weights, draw_mask(stream, b, d))


def table(rows: int, d: int, dtype: torch.dtype) -> Tensor:
    made = torch.randint(0, 256, (rows, d), dtype=torch.uint8)
    return made if dtype == torch.uint8 else made.float() / 255


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("mask", ["sign", "abs", "none"])
@pytest.mark.parametrize(("k", "inside"), [(1, 1), (2, 2), (4, 2), (6, 2), (7, 7)])
@pytest.mark.parametrize("d", [5, 8, 243, 1500])
def test_it_encodes_as_torch_does(
    interpreted: None, dtype: torch.dtype, mask: Any, k: int, inside: int, d: int
) -> None:
    private, public, keys = table(20, d, dtype), table(15, d, dtype), keys_of(5, k, inside, 20, 15, d)
    before = [part.copy() for part in (keys.indices, keys.coefficients, keys.bits)]
    want = mixing.mix_torch(private, public, inside, keys, mask, torch.device("cpu"))
    for out in (torch.full((5, d), torch.nan), torch.full((5, d), torch.nan, dtype=torch.bfloat16)):
        mixing.mix_on_device(private, public, inside, keys, mask, out)
        near = 1e-5 if out.dtype == torch.float32 else 2**-8  # of bfloat16: half a step below 1
        assert torch.allclose(out.float(), want, atol=near, rtol=0)
    assert all(np.array_equal(a, b) for a, b in zip(before, (keys.indices, keys.coefficients, keys.bits), strict=True))


def test_a_pool_elsewhere_gives_its_rows_alone(interpreted: None, tmp_path: Any) -> None:
    private, public, keys = table(20, 48, torch.uint8), table(15, 48, torch.uint8), keys_of(6, 4, 2, 20, 15, 48)
    np.save(tmp_path / "pool.npy", public.numpy())
    mapped, out = np.load(tmp_path / "pool.npy", mmap_mode="r"), torch.empty(6, 48)
    mixing.mix_on_device(private, mapped, 2, keys, "sign", out)
    want = mixing.mix_torch(private, public, 2, keys, "sign", torch.device("cpu"))
    assert torch.allclose(out, want, atol=1e-5)
    mixing.mix_on_device(
        private[:0], mapped, 2, KeyRows(keys.indices[:0], keys.coefficients[:0], keys.bits), "none", out[:0]
    )


def test_mix_uses_it_where_it_can_be_had(interpreted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[int] = []
    launch = device_mixing.launch
    monkeypatch.setattr(mixing, "kernel", lambda _: None)
    monkeypatch.setattr(mixing, "device_kernel", lambda device: True)
    monkeypatch.setattr(device_mixing, "launch", lambda *a: (launched.append(1), launch(*a)))
    images, labels = torch.rand(12, 3, 8, 8), torch.arange(12) % 3
    made = {}
    for backend in ("fused", "auto", "torch"):
        encoder = InstaHide(k=4, insecure_seed=1, backend=backend)
        made[backend] = encoder.encode_rows(images, labels, range(12), num_classes=3).images
    assert len(launched) == 2
    assert all(torch.allclose(m, made["torch"], atol=1e-5) for m in made.values())
    with pytest.raises(BadInput, match="Triton"):  # no float64 there
        mixing.mix(
            images.flatten(1), None, 4, keys_of(2, 4, 4, 12, 0, 192), "sign", torch.empty(2, 192).double(), "fused"
        )


def test_it_is_not_used_without_a_cuda_device() -> None:
    assert not mixing.device_kernel(torch.device("cpu"))
    if not torch.cuda.is_available():
        assert not mixing.device_kernel(torch.device("cuda", 0))


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    ("source", "out", "wide"), [("u8", "bf16", "v2.b32"), ("u8", "fp32", "v2.b32"), ("fp32", "fp32", "v4.b32")]
)
@pytest.mark.parametrize("mask", device_mixing.MASKS.values())
def test_it_compiles_for_gpus_and_reads_in_wide_pieces(arch: int, source: str, out: str, wide: str, mask: int) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kinds = [f"*{source}", f"*{source}", "*i64", "*fp32", "*u8", f"*{out}", "i32", "i32", "fp32", "fp32"]
    names = ["private", "public", "indices", "coefficients", "bits", "out", "pixels", "width", "scale", "shift"]
    fixed = {"k": 4, "inside": 2, "mask": mask, "block": device_mixing.BLOCK}
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(8)}  # as any launch at 32 px or 224 px has them
    device_mixing.compiled.cache_clear()
    signature = dict(zip(names, kinds, strict=True)) | dict.fromkeys(fixed, "constexpr")
    made = triton.compile(
        ASTSource(device_mixing.compiled(), signature=signature, constexprs=fixed, attrs=aligned),
        target=GPUTarget("cuda", arch, 32),
    )
    assert made.asm["cubin"]
    loads = re.findall(r"ld\.global\.([\w.]+)", made.asm["ptx"])
    assert loads.count(wide) >= 4  # one a source


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_encodes_as_the_cpu_does(dtype: torch.dtype) -> None:
    images, labels = torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8), torch.arange(40) % 10
    assert mixing.device_kernel(torch.device("cuda", 0))
    made = [
        InstaHide(k=4, insecure_seed=1, dtype=dtype).encode_rows(x, labels, range(40), num_classes=10).images.cpu()
        for x in (images, images.cuda())
    ]
    assert torch.allclose(made[0].float(), made[1].float(), atol=1e-5 if dtype == torch.float32 else 2**-7)
