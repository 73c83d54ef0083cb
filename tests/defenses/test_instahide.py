"""Every row of the table of released defects (instahide.md section 2) and what GradAttack got wrong, as tests."""

from __future__ import annotations

import copy
import io
import os
import pickle
import random
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, TensorDataset

from frostglass.core.batch import Batch, Domain, one_hot
from frostglass.core.defense import Defense
from frostglass.core.errors import BadInput
from frostglass.core.randomness import Insecure, OsKey
from frostglass.defenses import encoder as encoder_module
from frostglass.defenses import exposure, key_ring, sources
from frostglass.defenses.cost import cost_of
from frostglass.defenses.honesty import PrivacyCaution, claimed_work
from frostglass.defenses.instahide import InstaHide, average_predictions
from frostglass.defenses.registry import DEFENSES
from frostglass.defenses.sources import PublicPool
from frostglass.numerics.keystream import Keystream, Secret

pytestmark = pytest.mark.filterwarnings("ignore::frostglass.defenses.honesty.PrivacyCaution")


def photos(n: int = 40, c: int = 3, h: int = 4, w: int = 4, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    made = torch.randint(0, 256, (n, c, h, w), dtype=torch.uint8, generator=torch.Generator().manual_seed(n + c))
    return made if dtype == torch.uint8 else made.to(dtype) / 255


def unit(images: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1], in float64."""
    return images.double() * (1 / 127.5 if images.dtype == torch.uint8 else 2.0) - 1


def own_class(n: int) -> torch.Tensor:
    """Each image a class of its own: exact labels then show which images were mixed, and how."""
    return torch.arange(n)


class Recorder:
    """Collects the one-time keys that reach the mixer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.indices: list[np.ndarray] = []
        self.coefficients: list[bytes] = []
        self.masks: list[bytes] = []
        real = encoder_module.mix

        def spy(private, public, inside, keys, *rest):
            self.indices += list(keys.indices)
            self.coefficients += [row.tobytes() for row in keys.coefficients]
            self.masks += [] if keys.bits is None else [row.tobytes() for row in keys.bits]
            return real(private, public, inside, keys, *rest)

        monkeypatch.setattr(encoder_module, "mix", spy)


@pytest.fixture
def recorder(monkeypatch) -> Recorder:
    return Recorder(monkeypatch)


# ---- row 1: all three parts of a key from the OS, through AES-CTR, in separate streams


def test_keys_do_not_follow_any_seed(recorder: Recorder) -> None:
    for _ in range(2):
        torch.manual_seed(0), np.random.seed(0), random.seed(0)
        InstaHide().encode_rows(photos(), own_class(40), range(20), num_classes=40)
    a, b = slice(0, 20), slice(20, 40)
    assert not set(recorder.coefficients[a]) & set(recorder.coefficients[b])
    assert not set(recorder.masks[a]) & set(recorder.masks[b])
    assert (np.stack(recorder.indices[a])[:, 1:] != np.stack(recorder.indices[b])[:, 1:]).any()


def test_each_part_of_a_key_is_read_from_its_own_stream(monkeypatch) -> None:
    read: dict[int, int] = {}
    real = Keystream.fill

    def counting(self: Keystream, out) -> None:
        read[id(self)] = read.get(id(self), 0) + out.nbytes
        real(self, out)

    monkeypatch.setattr(Keystream, "fill", counting)
    enc = InstaHide(k=4, private=2, public=photos(30))
    enc.encode_rows(photos(), own_class(40), range(20), num_classes=40)
    streams = enc._ring[1].streams
    used = {name for name, stream in streams.items() if read.get(id(stream))}
    assert used == {"indices", "public", "coefficients", "mask"}
    assert len({id(s) for s in streams.values()}) == len(streams)


def test_insecure_output_repeats_and_is_marked() -> None:
    x, y = photos(), own_class(40)
    outs = [InstaHide(insecure_seed=s).encode_rows(x, y, range(9), num_classes=40) for s in (5, 5, 5 + 2**32)]
    assert torch.equal(outs[0].images, outs[1].images)
    assert not torch.equal(outs[0].images, outs[2].images)  # row 3: torch's generator keeps 32 bits of a seed
    assert all(o.insecure for o in outs)
    enc = InstaHide(insecure_seed=5)
    assert enc.manifest()["insecure"] is True
    assert "INSECURE" in enc.report()
    assert "INSECURE" in repr(enc)
    safe = InstaHide()
    assert safe.encode_rows(x, y, [0], num_classes=40).insecure is False
    assert safe.manifest()["insecure"] is False


# ---- row 2: nothing of a key in anything that can be saved


def test_no_key_in_pickles_copies_or_text() -> None:
    enc = InstaHide(insecure_seed=77)
    enc.encode_rows(photos(), own_class(40), range(9), num_classes=40)
    ring = enc._ring[1]
    drawn = ring._blocks["weights"][:4].tobytes(), ring._blocks["partners"][:4].tobytes()
    saved = io.BytesIO()
    torch.save(enc, saved)
    leaks = [
        pickle.dumps(enc),
        saved.getvalue(),
        repr(enc).encode(),
        enc.report().encode(),
        str(enc.manifest()).encode(),
    ]
    for text in leaks:
        assert not any(part in text for part in drawn)
        assert photos().numpy().tobytes()[:64] not in text
    for secret in (ring, ring.streams["mask"]):
        with pytest.raises(TypeError, match="key material"):
            pickle.dumps(secret)
    assert not any(isinstance(v, torch.Generator | np.random.Generator) for v in vars(enc).values())
    assert not {"_ring", "_set"} & set(enc.__getstate__())


@pytest.mark.parametrize("partners", ["iid", "permutation"])
def test_used_key_rows_and_wiped_ones_are_overwritten(partners) -> None:
    enc = InstaHide(private=3, partners=partners, public=photos(30), insecure_seed=1)
    x, y = photos(), own_class(40)
    enc.encode_rows(x, y, range(9), num_classes=40)
    ring = enc._ring[1]
    whole = {name: block.base for name, block in ring._blocks.items()}
    assert set(whole) == {"weights", "public"} | ({"partners"} if partners == "iid" else set())
    for block in whole.values():
        assert len(block) >= 4096
        assert not block[:9].any(), "used once, and still there"
        assert block[9:].any(1).mean() > 0.9
    permutations = [] if ring._permutations is None else [ring._permutations]
    ring.ahead = 10
    enc.encode_rows(x, y, [0] * 4090, num_classes=40)  # more than is left of each block
    assert not any(block[:4096].any() for block in whole.values()), "rows moved, and the old block still holds them"
    held = [*(block.base for block in ring._blocks.values()), *permutations]
    assert all(block.any() for block in held)
    enc.encode_rows(x, y, [0], epoch=1, num_classes=40)  # a new epoch wipes the ring of the last one
    assert not any(block.any() for block in held)
    with pytest.raises(RuntimeError, match="wiped"):
        ring.mask(1, 8)


@pytest.mark.parametrize("again", [copy.deepcopy, copy.copy, lambda e: pickle.loads(pickle.dumps(e))])
@pytest.mark.parametrize("seed", [None, 3])
def test_resume_draws_a_new_key_and_keeps_the_ledger(again, seed, recorder: Recorder) -> None:
    enc = InstaHide(insecure_seed=seed, max_exposure=900)
    enc.encode_rows(photos(), own_class(40), range(40), num_classes=40)
    other = again(enc)
    for e in (enc, other, again(other)):
        e.encode_rows(photos(), own_class(40), range(40), num_classes=40)
    assert len(set(recorder.coefficients)) == len(recorder.coefficients) == 160
    assert len(set(recorder.masks)) == 160
    assert int(other.ledger.first.min()) >= 2


# ---- rows 4 and 5: distinct sources, and public partners from the whole pool


@given(st.integers(2, 7), st.integers(0, 3), st.sampled_from(["iid", "permutation"]), st.integers(0, 99))
@settings(max_examples=40)
def test_sources_are_distinct_in_every_encoding(k: int, spare: int, partners: str, seed: int) -> None:
    n = k + spare  # N == k forces every collision there can be
    with pytest.MonkeyPatch.context() as patch:
        recorder = Recorder(patch)
        enc = InstaHide(k=k, partners=partners, c1=1.0, insecure_seed=seed)
        enc.encode_rows(photos(n), own_class(n), list(range(n)) * 3, num_classes=n)
    assert len(recorder.indices) == 3 * n
    assert all(len(set(row)) == k for row in recorder.indices)  # a coefficient may be 0, a source is not left out


def test_public_partners_come_unbiased_from_the_whole_pool(recorder: Recorder) -> None:
    """A pool smaller than the set works, and one larger is used to its end."""
    for size in (4, 1000):
        enc = InstaHide(k=6, private=2, public=photos(size))
        enc.encode_rows(photos(), own_class(40), [0] * 3000, num_classes=40)
        drawn = np.stack(recorder.indices)[-3000:, 2:]
        counts = np.bincount(drawn.ravel(), minlength=size)
        assert counts.sum() == 12_000
        assert abs(counts / 12_000 * size - 1).max() < (0.01 if size == 4 else 2.2)
        assert all(len(set(row)) == 4 for row in drawn.tolist())


# ---- rows 6, 7, 9: pools of any size from disk, one normalisation, any size and channels


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_private_and_public_images_may_stay_on_disk(tmp_path, dtype) -> None:
    kind = torch.uint8 if dtype is np.uint8 else torch.float32
    x, pool = photos(dtype=kind), photos(60, dtype=kind)
    np.save(tmp_path / "x.npy", x.numpy())
    np.save(tmp_path / "pool.npy", pool.numpy())
    on_disk = [np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in ("x", "pool")]
    outs = []
    for images, public in ((x, pool), on_disk):
        enc = InstaHide(k=4, private=2, public=public, insecure_seed=1)
        outs.append(enc.encode_rows(images, own_class(40), range(7), num_classes=40).images)
    assert torch.allclose(*outs, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_images_that_are_not_contiguous_are_copied_once_and_maps_not_at_all(tmp_path, dtype, monkeypatch) -> None:
    kind = torch.uint8 if dtype is np.uint8 else torch.float32
    x, pool = photos(dtype=kind), photos(60, dtype=kind)
    turned = [t.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2) for t in (x, pool)]  # NHWC in memory
    for name, t in (("x", x), ("pool", pool)):
        np.save(tmp_path / f"{name}.npy", t.permute(0, 2, 3, 1).contiguous().numpy())
    maps = [np.load(tmp_path / f"{name}.npy", mmap_mode="r").transpose(0, 3, 1, 2) for name in ("x", "pool")]
    assert all(isinstance(m, np.memmap) and not m.flags.c_contiguous for m in maps)
    outs = []
    for images, public in ((x, pool), turned, maps):
        enc = InstaHide(k=4, private=2, public=public, insecure_seed=1)
        outs += [enc.encode_rows(images, own_class(40), range(7), num_classes=40).images for _ in range(2)][:1]
        table, _ = enc.public.rows_for(np.zeros((2, 2), np.int64), (3, 4, 4), enc._ring[1].streams["crops"])
        again, _ = enc.public.rows_for(np.zeros((2, 2), np.int64), (3, 4, 4), enc._ring[1].streams["crops"])
        assert len(table) == 4 if isinstance(public, np.memmap) else table.data_ptr() == again.data_ptr()
    assert enc._set[3].table is None
    assert torch.allclose(outs[0], outs[1], atol=1e-6)
    assert torch.allclose(outs[0], outs[2], atol=1e-6)


def test_images_made_in_inference_mode_are_taken() -> None:
    with torch.inference_mode():
        x = photos() // 2
    assert len(InstaHide().encode_rows(x, own_class(40), range(4), num_classes=40).images) == 4


def test_float_memory_maps_are_checked_as_they_are_read(tmp_path) -> None:
    np.save(tmp_path / "x.npy", photos(dtype=torch.float32).numpy() * 2)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    with pytest.raises(BadInput, match="must lie in"):
        InstaHide().encode_rows(mapped, own_class(40), range(40), num_classes=40)


def test_crops_are_streamed_from_larger_public_images() -> None:
    """Every position of a 2 x 2 crop of a 3 x 3 picture is drawn, anew at each use."""
    pool = torch.arange(9, dtype=torch.uint8).view(1, 1, 3, 3) * 20
    enc = InstaHide(k=2, private=1, c1=1.0, c2=0.0, mask="none", public=PublicPool(pool, crop=True))
    x = torch.zeros(1, 1, 2, 2, dtype=torch.uint8)
    out, y = enc.encode_rows(x, [0], [0] * 400, num_classes=1)
    corner = (((out[:, 0, 0, 0] + 1) * 127.5) / (1 - y[:, 0]) / 20).round()
    assert set(corner.tolist()) == {0.0, 1.0, 3.0, 4.0}


@pytest.mark.parametrize("stored", ["tensor", "array", "map"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.data())
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_crops_are_slices(tmp_path, stored: str, dtype: torch.dtype, c: int, full_h: int, full_w: int, data) -> None:
    """From one pixel to the whole image, wherever the pool is kept, and none at all."""
    h, w = data.draw(st.integers(1, full_h)), data.draw(st.integers(1, full_w))
    images: Any = photos(5, c, full_h, full_w, dtype)
    rows, top, left = (
        np.array(data.draw(st.lists(st.integers(0, last), min_size=4, max_size=4)), np.int64)
        for last in (4, full_h - h, full_w - w)
    )
    want = [images[i, :, y : y + h, x : x + w] for i, y, x in zip(rows, top, left, strict=True)]
    if stored != "tensor":
        images = images.numpy()
    if stored == "map":
        images.tofile(tmp_path / "pool")
        images = np.memmap(tmp_path / "pool", images.dtype, "r", shape=images.shape)
    assert torch.equal(sources.crops(images, rows, top, left, h, w), torch.stack(want))
    assert sources.crops(images, rows[:0], top[:0], left[:0], h, w).shape == (0, c, h, w)
    with pytest.raises(IndexError):
        sources.crops(images, rows, top + full_h - h + 1, left, h, w)


def test_a_crop_is_drawn_as_it_always_was() -> None:
    """Rows first, then all upper edges, then all left ones: a set can be made again from its secret."""
    pool, shape = PublicPool(photos(6, 2, 7, 9), crop=True), (2, 4, 5)
    table, place = pool.rows_for(np.array([[0, 5], [3, 1]]), shape, Secret.draw(Insecure(3)).stream("crops"))
    stream = Secret.draw(Insecure(3)).stream("crops")
    top, left = stream.integers(4, 4), stream.integers(5, 4)
    want = [pool.images[i, :, y : y + 4, x : x + 5] for i, y, x in zip((0, 5, 3, 1), top, left, strict=True)]
    assert torch.equal(table, torch.stack(want).flatten(1))
    assert place.tolist() == [[0, 1], [2, 3]]


@pytest.mark.parametrize("shape", [(1, 5, 7), (3, 4, 4), (2, 9, 3)])
@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_normalisation_and_any_size(shape, kind, dtype) -> None:
    """The encodings are the stated sum in [-1, 1], private and public treated alike."""
    x, pool, n = photos(12, *shape, dtype=kind), photos(12, *shape, dtype=kind), 12
    enc = InstaHide(k=4, private=4, mask="none", dtype=dtype)
    out = enc.encode_rows(x, own_class(n), range(n), num_classes=n)
    want = torch.einsum("bn,nchw->bchw", out.targets.double(), unit(x))
    assert torch.allclose(out.images.double(), want, atol=1e-5 if dtype == torch.float32 else 1e-2)
    assert out.images.dtype == dtype
    assert (out.domain.low, out.domain.high) == (-1.0, 1.0)
    assert out.domain.mean == (0.0,) * shape[0]
    assert torch.equal(out.domain.normalise(out.images), out.images)
    white = torch.full_like(x, 255 if kind == torch.uint8 else 1)
    cross = InstaHide(k=4, private=2, mask="none", public=torch.full_like(pool, white.max()))
    assert torch.allclose(cross.encode_rows(white, own_class(n), [1], num_classes=n).images, torch.ones(()), atol=1e-6)


# ---- row 8: independent partners as well as permutations


def test_permutations_use_each_image_once_per_slot_and_independent_draws_do_not() -> None:
    x, y = photos(64), own_class(64)
    exact, free = InstaHide(partners="permutation"), InstaHide(partners="iid")
    for enc in (exact, free):
        list(enc.epoch((x, y), 10, 64))
    assert exact.ledger.histogram() == {4: 64}
    assert len(free.ledger.histogram()) > 2
    assert "exact counts" in InstaHide.__doc__


def test_permutations_give_no_row_the_same_partners_twice_where_no_epoch_is_named() -> None:
    """Nor in one batch: each encoding of an image would hold the same sources, and a few of them their images."""
    x, y = photos(64), own_class(64)
    enc = InstaHide(partners="permutation", insecure_seed=1)
    batches = [*(range(i, i + 16) for i in range(0, 64, 16)), range(64), [5] * 64, range(64)]
    held = [enc.encode_rows(x, y, rows, num_classes=64).targets > 0 for rows in batches]
    assert enc.ledger.partner.sum() == 3 * sum(map(len, batches))
    sources = torch.cat(held).unique(dim=0)
    assert len(sources) > 0.98 * sum(map(len, batches)), "hardly two agree by chance"
    exact = torch.cat(held[:4]).sum(0)
    assert exact.tolist() == [4] * 64, "the first time round the counts are exact"


# ---- rows 10 and 12: headless, one batch, partners from the whole set


def test_partners_come_from_the_whole_set_not_from_the_batch() -> None:
    enc = InstaHide()
    seen = torch.zeros(40)
    for _ in range(30):
        seen += (enc.encode_rows(photos(), own_class(40), [3, 4], num_classes=40).targets > 0).float().sum(0)
    assert (seen > 0).sum() > 30
    one_batch = list(InstaHide().epoch((photos(6), own_class(6)), batch_size=100, num_classes=6))
    assert [len(x) for x, _ in one_batch] == [6]


# ---- GradAttack: rows belong to the indices asked for, any N and batch size, no key row twice


@given(st.lists(st.integers(0, 39), max_size=30))
@settings(max_examples=30)
def test_encodings_belong_to_the_rows_asked_for(rows: list[int]) -> None:
    enc = InstaHide(mask="none", insecure_seed=1)
    out = enc.encode_rows(photos(), own_class(40), rows, num_classes=40)
    assert out.images.shape == (len(rows), 3, 4, 4)
    assert (out.targets[torch.arange(len(rows)), torch.tensor(rows, dtype=torch.long)] > 0).all()
    want = torch.einsum("bn,nchw->bchw", out.targets.double(), unit(photos()))
    assert torch.allclose(out.images.double(), want, atol=1e-5)
    assert np.bincount(rows, minlength=40).tolist() == enc.ledger.first.tolist()


@given(
    n=st.integers(4, 30),
    batch=st.integers(1, 33),
    epochs=st.integers(1, 3),
    ranks=st.integers(1, 3),
    workers=st.integers(0, 2),
    partners=st.sampled_from(["iid", "permutation"]),
    seed=st.sampled_from([None, 7]),
)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_key_row_is_ever_used_twice(n, batch, epochs, ranks, workers, partners, seed) -> None:
    """Over epochs, ranks, workers and short last batches; even where one seed is shared by all of them."""
    with pytest.MonkeyPatch.context() as patch:
        recorder = Recorder(patch)
        worker = [None]
        patch.setattr(key_ring, "get_worker_info", lambda: worker[0])
        for rank in range(ranks):
            patch.setenv("RANK", str(rank))
            parent = InstaHide(partners=partners, insecure_seed=seed)
            shard = photos(n)
            parent.begin(shard, own_class(n), n)
            for epoch in range(epochs):
                # workers are born anew in every epoch, each with a copy of the parent
                for w in range(max(1, workers)):
                    worker[0] = type("W", (), {"id": w, "seed": 1000 + epoch})() if workers else None
                    enc = pickle.loads(pickle.dumps(parent)) if workers else parent
                    mine = np.arange(n)[w :: max(1, workers)]
                    for i in range(0, len(mine), batch):
                        enc.encode_rows(shard, own_class(n), mine[i : i + batch], epoch, n)
    assert len(recorder.coefficients) == n * epochs * ranks
    assert len(set(recorder.coefficients)) == len(recorder.coefficients)
    assert len(set(recorder.masks)) == len(recorder.masks)


class Encoding(Dataset):
    """What a loader worker does: encodes one batch of rows of the set."""

    def __init__(self, enc: InstaHide) -> None:
        self.enc, self.x, self.y = enc, photos(), own_class(40)

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.enc.encode_rows(self.x, self.y, range(5 * i, 5 * i + 5), num_classes=40).targets


@pytest.mark.parametrize("seed", [None, 3])
def test_forked_workers_do_not_share_keys(seed) -> None:
    enc = InstaHide(insecure_seed=seed)
    data = Encoding(enc)
    enc.begin(data.x, data.y, 40)
    enc.share(2)
    own = enc.encode_rows(data.x, data.y, range(5), num_classes=40).targets  # the parent has keys when it forks
    rows = [own.numpy().tobytes()]
    for _ in range(2):
        loader = DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context="fork")
        rows += [row.numpy().tobytes() for batch in loader for row in batch]
    assert len(set(rows)) == len(rows) == 81
    assert enc.ledger.first.tolist() == [3] * 5 + [2] * 35  # workers count in the ledger of their parent
    assert int(enc.ledger.partner.sum()) == 3 * 85


class Remembered(Encoding):
    """What a worker has of its parent's encoder: keys, and the set as it was checked."""

    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.tensor([self.enc._ring is not None, self.enc._set is not None])


def test_forked_workers_need_not_read_the_set_again_and_have_no_keys() -> None:
    data = Remembered(InstaHide())
    data.enc.encode_rows(data.x, data.y, range(5), num_classes=40)
    assert data[0].tolist() == [True, True]
    loader = DataLoader(data, batch_size=None, num_workers=1, multiprocessing_context="fork")
    assert all(row.tolist() == [False, True] for row in loader)


def test_workers_that_cannot_count_are_refused() -> None:
    data = Encoding(InstaHide())
    loader = DataLoader(data, batch_size=None, num_workers=1, multiprocessing_context="fork")
    with pytest.raises(Exception, match="cannot reach the ledger"):
        list(loader)


# ---- rows 11 and 13: every path gives the same encodings; half precision; the ledger


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cross", [False, True])
def test_paths_give_the_same_encodings(dtype, cross) -> None:
    more = {"private": 2, "public": photos(30)} if cross else {}
    outs = [
        InstaHide(k=6, insecure_seed=2, dtype=dtype, backend=b, **more).encode_rows(
            photos(), own_class(40), range(40), num_classes=40
        )
        for b in ("fused", "torch", "reference")
    ]
    for other in outs[1:]:
        assert torch.allclose(
            outs[0].images.float(), other.images.float(), atol=1e-5 if dtype == torch.float32 else 8e-3
        )
        assert torch.equal(outs[0].targets, other.targets)
        clear = outs[0].images.abs() > 1e-2
        assert torch.equal(outs[0].images[clear].signbit(), other.images[clear].signbit())


def test_floats_that_are_bytes_are_mixed_as_bytes() -> None:
    made, floats = photos(), photos(dtype=torch.float32)

    def encoded(images, **more) -> torch.Tensor:
        return InstaHide(insecure_seed=2, **more).encode_rows(images, own_class(40), range(40), num_classes=40).images

    assert torch.equal(encoded(floats), encoded(made))
    assert torch.allclose(encoded(floats), encoded(floats, backend="torch"), atol=1e-6)
    others = floats.clone()
    others[7, 0, 0, 0] = 0.5  # no multiple of 1 / 255
    assert torch.allclose(encoded(others), encoded(others, backend="torch"), atol=1e-6)
    assert not torch.equal(encoded(others), encoded(floats))


def test_a_set_that_was_changed_in_place_is_read_again() -> None:
    images, encoder = photos(dtype=torch.float32), InstaHide(k=1, c1=1.0, mask="none")
    for change in (0.0, 1.0, 0.3):  # bytes, bytes again, no bytes
        images.mul_(1 - change / 2)
        made = encoder.encode_rows(images, own_class(40), range(40), num_classes=40).images
        assert torch.allclose(made.double(), unit(images), atol=1e-6)


def test_long_calls_equal_short_ones(monkeypatch) -> None:
    whole = InstaHide(insecure_seed=2).encode_rows(photos(), own_class(40), range(40), num_classes=40)
    monkeypatch.setattr(encoder_module, "_MASK_BYTES", 20)
    parts = InstaHide(insecure_seed=2).encode_rows(photos(), own_class(40), range(40), num_classes=40)
    assert torch.equal(whole.images, parts.images)


def test_out_is_written_in_place() -> None:
    out = torch.empty(5, 3, 4, 4)
    got = InstaHide().encode_rows(photos(), own_class(40), range(5), num_classes=40, out=out)
    assert got.images is out
    with pytest.raises(BadInput, match="out"):
        InstaHide().encode_rows(photos(), own_class(40), range(4), num_classes=40, out=out)


def test_abs_mode_is_the_absolute_value_of_sign_mode_and_mixup_has_no_mask() -> None:
    sign, mag, none = (
        InstaHide(mask=m, insecure_seed=4).encode_rows(photos(), own_class(40), range(40), num_classes=40).images
        for m in ("sign", "abs", "none")
    )
    assert torch.equal(sign.abs(), mag)
    assert torch.equal(none.abs(), mag)
    assert 0.45 < (sign == none).float().mean() < 0.55


def test_ledger_counts_both_roles_and_refuses_to_go_on() -> None:
    enc = InstaHide(max_exposure=30)
    x, y = photos(), own_class(40)
    appeared = torch.zeros(40, dtype=torch.long)
    refusals: list[str] = []
    for _ in range(40):
        try:
            appeared += (enc.encode_rows(x, y, range(10), num_classes=40).targets > 0).sum(0)
        except BadInput as refused:
            refusals.append(str(refused))
    assert len(refusals) > 5
    assert all("max_exposure" in text for text in refusals)
    assert torch.equal(enc.ledger.total, appeared)  # what was refused is not counted
    assert int(enc.ledger.total.max()) <= 30
    assert torch.equal(enc.ledger.total, enc.ledger.first + enc.ledger.partner)
    assert sum(enc.ledger.histogram().values()) == 40
    assert sum(n * images for n, images in enc.ledger.histogram().items()) == int(appeared.sum())
    assert enc.manifest()["exposure_histogram"] == {str(k): v for k, v in enc.ledger.histogram().items()}
    assert "ledger" not in enc.manifest()


@pytest.mark.parametrize("outside", [-1, 40])
def test_the_ledger_counts_nothing_outside_its_set(outside: int) -> None:
    enc = InstaHide()
    enc.begin(photos(), own_class(40), 40)
    inside = np.arange(3)
    for first, partners in ((np.array([1, outside]), inside[:, None]), (inside, np.array([[1, 2], [outside, 3]]))):
        with pytest.raises(BadInput, match="not in the set of 40"):
            enc.ledger.add(first, partners)
    assert not enc.ledger.total.any()


def test_without_numba_the_same_keys_are_drawn_and_counted(monkeypatch) -> None:
    made = []
    for partners in ("iid", "permutation"):
        for compiles in (True, False):
            if not compiles:
                monkeypatch.setattr(key_ring, "fastest", lambda function: function)
                monkeypatch.setattr(exposure, "fastest", lambda function: function)
                monkeypatch.setattr(sources, "fastest", lambda function: function)
            enc = InstaHide(private=3, public=photos(30), partners=partners, insecure_seed=4)
            out, y = enc.encode_rows(photos(), own_class(40), [3, 0, 0, 39], num_classes=40)
            made.append((out, y, enc.ledger.first, enc.ledger.partner))
        monkeypatch.undo()
        assert all(torch.equal(a, b) for a, b in zip(*made[-2:], strict=True))


def test_the_ledger_belongs_to_one_set() -> None:
    enc = InstaHide()
    enc.encode_rows(photos(), own_class(40), [0], num_classes=40)
    with pytest.raises(BadInput, match="its own InstaHide"):
        enc.encode_rows(photos(41), own_class(41), [0], num_classes=41)


def test_rounds_are_explicit_and_reuse_trains_on_what_exists() -> None:
    x, y = photos(), own_class(40)
    strict = InstaHide(rounds=2)
    for _ in range(2):
        list(strict.epoch((x, y), 16, 40))
    with pytest.raises(BadInput, match="rounds"):
        strict.epoch((x, y), 16, 40)
    kept = InstaHide(reuse=True)
    epochs = [torch.cat([t for _, t in kept.epoch((x, y), 16, 40)]) for _ in range(3)]
    assert all(torch.equal(epochs[0].unique(dim=0), e.unique(dim=0)) for e in epochs)
    assert not torch.equal(epochs[0], epochs[1])  # another order
    assert kept.ledger.first.tolist() == [1] * 40
    assert "what breaks InstaHide" in InstaHide().report()


def test_rounds_hold_outside_epoch_too() -> None:
    """Whatever the caller calls the epochs, no image comes first more often."""
    x, y = photos(), own_class(40)
    for epochs in ((0, 1), (0, 0)):
        enc = InstaHide(rounds=1)
        for start in (0, 20):
            enc.encode_rows(x, y, range(start, start + 20), epochs[0], 40)
        with pytest.raises(BadInput, match="rounds: the 1 rounds of fresh encodings are used up"):
            enc.encode_rows(x, y, [3], epochs[1], 40)
        assert enc.ledger.first.tolist() == [1] * 40
    used = InstaHide(reuse=True)
    used.encode_rows(x, y, range(40), 0, 40)
    with pytest.raises(BadInput, match="rounds"):
        used.epoch((x, y), 16, 40)


def test_kept_encodings_belong_to_one_set() -> None:
    x, y = photos(), own_class(40)
    enc = InstaHide(reuse=True)
    first = torch.cat([t for _, t in enc.epoch((x, y), 16, 40)])
    again = torch.cat([t for _, t in enc.epoch((x.clone(), y.clone()), 16, 40)])  # the same content
    assert torch.equal(first.unique(dim=0), again.unique(dim=0))
    for other in ((255 - x, y), (x, y.flip(0))):
        with pytest.raises(BadInput, match="another set"):
            enc.epoch(other, 16, 40)
    assert enc.ledger.first.tolist() == [1] * 40


def test_ranks_are_told_that_they_count_apart(monkeypatch) -> None:
    monkeypatch.setattr(encoder_module, "world_size", lambda: 2)
    enc = InstaHide(k=4, private=2, public=photos(30), max_exposure=40)
    with pytest.warns(PrivacyCaution, match="each rank its own shard"):
        enc.begin(photos(), own_class(40), 40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        enc.encode_rows(photos(), own_class(40), [0], num_classes=40)
    assert "other ranks" in enc.report()


def test_a_forked_child_does_not_count_in_a_ledger_that_nobody_sees() -> None:
    enc = InstaHide(max_exposure=9)
    enc.begin(photos(), own_class(40), 40)
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            enc.encode_rows(photos(), own_class(40), [0], num_classes=40)
        except BadInput as refused:
            os.write(write, str(refused).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    assert b"forked from the one that owns the ledger" in os.read(read, 4096)
    os.close(read)


# ---- row 14: encoded inference


def test_encoded_inference_keeps_its_share_and_warns() -> None:
    enc = InstaHide(mask="none", insecure_seed=1)
    x, partners = torch.full((3, 3, 4, 4), 255, dtype=torch.uint8), torch.zeros(20, 3, 4, 4, dtype=torch.uint8)
    with pytest.warns(PrivacyCaution, match="attack surface") as seen:
        made = enc.encode_for_inference(x, n=8, min_private=0.5, partners=partners)
    assert seen[0].filename == __file__
    share = (made.images[:, 0, 0, 0] + 1) / 2  # white test image, black partners
    assert made.images.shape == (24, 3, 4, 4)
    assert share.min() >= 0.5 - 1e-6
    assert share.max() <= 0.65 + 1e-6
    assert len(share.unique()) == 24  # fresh keys for each
    assert made.insecure
    assert InstaHide.encode_for_inference.__doc__.count("attack surface") == 1


def test_encoded_inference_takes_partners_from_the_pool_and_counts_the_private_set() -> None:
    cross = InstaHide(k=6, private=2, public=photos(30))
    assert cross.encode_for_inference(photos(2), 3, 0.3).images.shape == (6, 3, 4, 4)
    inside, x = InstaHide(), photos()
    with pytest.raises(BadInput, match="partners"):
        inside.encode_for_inference(photos(2), 3)
    inside.encode_rows(x, own_class(40), [0], num_classes=40)
    inside.encode_for_inference(photos(2), 5, partners=x)
    assert int(inside.ledger.partner.sum()) == 3 + 2 * 5 * 3
    with pytest.raises(BadInput, match="min_private"):
        inside.encode_for_inference(x, 1, min_private=0.7, partners=x)
    assert InstaHide(k=8).encode_for_inference(x, 1, min_private=0.64, partners=x).images.shape == x.shape


def test_predictions_are_averaged_per_image() -> None:
    logits = torch.tensor([[0.0, 0.0], [100.0, 0.0], [0.0, 100.0], [0.0, 100.0]])
    want = torch.tensor([[0.75, 0.25], [0.0, 1.0]])
    assert torch.allclose(average_predictions(logits, 2), want)
    assert torch.allclose(average_predictions(logits.softmax(1), 2, "probabilities"), want)
    with pytest.raises(BadInput, match="groups of 3"):
        average_predictions(logits, 3)
    for wrong in (logits, torch.full((4, 2), torch.nan)):
        with pytest.raises(BadInput, match="no probabilities"):
            average_predictions(wrong, 2, "probabilities")


def test_plain_images_for_inference() -> None:
    x = photos(2)
    assert torch.allclose(InstaHide().plain_for_inference(x).double(), unit(x), atol=1e-6)
    assert torch.allclose(InstaHide(mask="abs").plain_for_inference(x).double(), unit(x).abs(), atol=1e-6)


# ---- row 15: augmentation


def test_augmentation_is_shared_within_an_epoch_or_drawn_at_each_use() -> None:
    """The augmentation writes its call and row into the image, so that the mix shows which copy was used."""
    calls: list[int] = []

    def stamp(images: torch.Tensor) -> torch.Tensor:
        calls.append(len(images))
        marked = images.clone()
        marked[:, 0, 0, 0] = torch.linspace(0, 1, len(images))
        return marked

    x, y = torch.zeros(40, 1, 2, 2), own_class(40)
    paper = InstaHide(mask="none", augmentation=stamp)
    out = [paper.encode_rows(x, y, range(r, r + 10), epoch=0, num_classes=40) for r in (0, 10)]
    assert calls == [40]  # one copy of each image per epoch
    for o in out:  # shared by slot 0 and partners
        want = (o.targets * torch.linspace(0, 1, 40)).sum(1) * 2 - 1
        assert torch.allclose(o.images[:, 0, 0, 0], want, atol=1e-5)
    paper.encode_rows(x, y, range(5), epoch=1, num_classes=40)
    assert calls == [40, 40]
    calls.clear()
    each = InstaHide(mask="none", augment="per_use", augmentation=stamp)
    each.encode_rows(x, y, range(10), num_classes=40)
    assert calls == [40]  # ten encodings of four images, each augmented for itself


def test_augmentations_that_break_the_images_are_refused() -> None:
    for wrong in (lambda t: t[..., :2], lambda t: t.double(), lambda t: t + 1):
        for when in ("per_epoch", "per_use"):
            enc = InstaHide(augment=when, augmentation=wrong)
            with pytest.raises(BadInput, match="augmentation"):
                enc.encode_rows(photos(dtype=torch.float32), own_class(40), range(4), num_classes=40)


# ---- the plain loop


def sets() -> Iterator[object]:
    x, y = photos(), own_class(40)
    yield x, y
    yield TensorDataset(x, y)
    yield [(x[i], i) for i in range(40)]


@pytest.mark.parametrize("train_set", list(sets()))
def test_an_epoch_has_each_image_once_in_slot_0(train_set) -> None:
    enc = InstaHide()
    batches = list(enc.epoch(train_set, batch_size=12, num_classes=40))
    assert [len(x) for x, _ in batches] == [12, 12, 12, 4]
    assert enc.ledger.first.tolist() == [1] * 40
    assert len(list(enc.epoch(train_set, 12, 40, drop_last=True))) == 3
    assert enc.epochs == 2


def test_training_on_encodings_learns() -> None:
    torch.manual_seed(0)
    x, y = torch.full((60, 1, 4, 4), 0.5), torch.arange(60) % 2
    x[y == 1, :, :2] = 1.0
    x[y == 0, :, 2:] = 0.0  # the class is where |x| is not 0
    enc, net = InstaHide(mask="abs"), torch.nn.Linear(16, 2)
    opt = torch.optim.SGD(net.parameters(), 0.5)
    for _ in range(15):
        for images, targets in enc.epoch((x, y), 20, 2):
            loss = -(targets * net(images.flatten(1)).log_softmax(1)).sum(1).mean()
            opt.zero_grad()
            loss.backward()
            opt.step()
    assert (net(enc.plain_for_inference(x).flatten(1)).argmax(1) == y).float().mean() == 1.0


# ---- cross mode: labels


def test_cross_labels_lose_the_public_mass() -> None:
    enc = InstaHide(k=6, private=2, public=photos(30))
    _, y = enc.encode_rows(photos(), own_class(40), list(range(40)) * 50, num_classes=40)
    mass = y.sum(1)
    assert mass.min() >= 0.3 - 1e-6
    assert mass.max() < 1
    assert mass.mean() == pytest.approx(0.435, abs=0.015)
    whole = InstaHide(k=6, private=2, public=photos(30), labels="renormalised")
    _, soft = whole.encode_rows(photos(), own_class(40), range(9), num_classes=40)
    assert torch.allclose(soft.sum(1), torch.ones(9))


# ---- honesty


def test_it_says_what_it_is() -> None:
    doc = " ".join(InstaHide.__doc__.split())
    for said in ("broken", "no (epsilon, delta)", "mask adds nothing", "is what breaks it"):
        assert said in doc
    enc = InstaHide(k=6, private=2, public=photos(30))
    enc.encode_rows(photos(), own_class(40), range(9), num_classes=40)
    for text in (enc.report(), str(enc.manifest())):
        assert "no (epsilon, delta)" in text
        assert "broken" in text
    assert "claimed brute-force work" in enc.report()
    assert "30 public" in enc.report()
    assert enc.manifest()["cost"] == cost_of(6, 2, 40, 30, 1).lines()
    assert InstaHide(k=6, private=2, public=photos(30)).manifest()["cost"] == []  # nothing has been encoded yet
    assert " ".join(cost_of(6, 2, 5000, 1_280_000, 50).text().split()) in doc


def test_claimed_work_is_that_of_the_paper() -> None:
    """instahide.md section 4, line 5."""
    for k, naive, middle in ((4, 1.6e12, 1.6e12), (6, 2.7e24, 2.1e18)):
        found = [10**log10 for log10 in claimed_work(k, 2, 5000, 1_280_000)]
        assert found == [pytest.approx(naive, rel=0.03), pytest.approx(middle, rel=0.03)]


def test_many_images_in_one_encoding_are_reported() -> None:
    enc = InstaHide(k=200)
    enc.encode_rows(photos(300), own_class(300), [0], num_classes=300)
    assert "e+492 tries over all partners" in enc.report()  # 300^199
    assert enc.manifest()["cost"]


def test_weak_settings_warn_at_the_caller_and_are_recorded() -> None:
    with pytest.warns(PrivacyCaution, match="below 4") as seen:
        enc = InstaHide(k=2)
    assert seen[0].filename == __file__
    assert len(enc.manifest()["cautions"]) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert InstaHide(k=6, private=2, public=photos(30)).cautions == []
        assert InstaHide(k=6, private=2, public=photos(30), labels="quantised").cautions == []
    few = InstaHide(k=6, private=2, c2=0.1, public=photos(30), labels="quantised")
    assert any("target of zeros" in text for text in few.cautions)
    _, y = few.encode_rows(photos(), own_class(40), [*range(40)] * 20, num_classes=40)
    assert (y.sum(1) == 0).any()


# ---- bad input


@pytest.mark.parametrize(
    ("settings_", "match"),
    [
        ({"c1": 0.2}, "c1: 0.2 is outside"),
        ({"c1": 0.25}, "fewer than one draw in 1000"),
        ({"k": 6, "private": 1, "c1": 0.3, "c2": 0.4, "public": photos()}, "c2: 0.4 cannot be reached"),
        ({"private": 2}, "give a pool"),
        ({"public": photos()}, "the pool has no use"),
        ({"private": 5}, "not possible"),
        ({"rounds": 0}, "whole numbers from 1"),
        ({"max_exposure": 0}, "whole numbers from 1"),
        ({"private": 0}, "private: 0 is not possible; give whole numbers from 1"),
        ({"private": True}, "private: True"),
        ({"dtype": torch.float64}, "dtype"),
    ],
)
def test_bad_settings(settings_, match) -> None:
    with pytest.raises(BadInput, match=match):
        InstaHide(**settings_)


@pytest.mark.parametrize("wrong", [{"k": 4.0}, {"k": "4"}, {"rounds": 1.5}, {"insecure_seed": 0.5}, {"private": [2]}])
def test_numbers_that_are_not_whole(wrong) -> None:
    """Below the type check of these tests, which stops them first."""
    ((name, value),) = wrong.items()
    with pytest.raises(BadInput, match=name) as refused:
        encoder_module._whole(**wrong)
    assert repr(value) in str(refused.value)
    assert encoder_module._whole(k=np.int64(3), insecure_seed=-5, rounds=None) == [3, -5, None]


@pytest.mark.parametrize(
    ("args", "match"),
    [
        ((photos(3), [0, 1, 2], [0], 0, 3), "4 distinct private images are not to be had from 3"),
        ((photos(), own_class(40), [40], 0, 40), "not all in the set"),
        ((photos(), own_class(40), [-1], 0, 40), "not all in the set"),
        ((photos(), own_class(40), torch.tensor([0.5]), 0, 40), "row numbers"),
        ((photos(), own_class(40), [0], 0, 39), "0 to 39 do not fit 39 classes"),
        ((photos(), own_class(40) - 1, [0], 0, 40), "do not fit"),
        ((photos(), own_class(40), [0], 0, None), "num_classes"),
        ((photos(), own_class(39), [0], 0, 40), "39 labels for 40 images"),
        ((photos(), torch.full((40, 2), 0.5), [0], 0, 2), "soft already"),
        ((photos(), one_hot(own_class(40), 40), [0], 0, 41), "does not fit"),
        ((photos(), torch.zeros(40), [0], 0, 40), "class indices"),
        ((photos()[0], own_class(3), [0], 0, 3), "shape"),
        ((photos().double() / 255, own_class(40), [0], 0, 40), "dtype"),
        ((photos().int(), own_class(40), [0], 0, 40), "dtype"),
        ((photos(dtype=torch.float32) * 2 - 1, own_class(40), [0], 0, 40), "must lie in"),
        ((photos(dtype=torch.float32) * float("nan"), own_class(40), [0], 0, 40), "must lie in"),
    ],
)
def test_bad_images_rows_and_labels(args, match) -> None:
    with pytest.raises(BadInput, match=match):
        InstaHide().encode_rows(*args)


@pytest.mark.parametrize(
    ("public", "match"),
    [
        (photos(1), "too few for 2"),
        (photos(30, 1), "1 channels against 3"),
        (photos(30, 3, 5, 4), "make both alike"),
        (PublicPool(photos(30, 3, 3, 9), crop=True), "too small to crop"),
        (photos(30, dtype=torch.float32), "store both alike"),
    ],
)
def test_bad_pools(public, match) -> None:
    enc = InstaHide(k=4, private=2, public=public)
    with pytest.raises(BadInput, match=match):
        enc.encode_rows(photos(), own_class(40), [0], num_classes=40)


def test_one_hot_targets_are_taken() -> None:
    a = InstaHide(insecure_seed=1).encode_rows(photos(), own_class(40), [5], num_classes=40)
    b = InstaHide(insecure_seed=1).encode_rows(photos(), one_hot(own_class(40), 40), [5])
    assert torch.equal(a.targets, b.targets)


def test_a_train_set_that_is_none_is_refused_at_the_call() -> None:
    for wrong in ([(1, 2, 3)], 5, [("a", 0)]):
        with pytest.raises(BadInput, match="train_set"):
            InstaHide().epoch(wrong, 4, 10)
    with pytest.raises(BadInput, match="batch_size"):
        InstaHide().epoch((photos(), own_class(40)), 0, 40)


# ---- the defences of an audit


def batch(n: int = 8, dtype: torch.dtype = torch.float32) -> Batch:
    x = photos(n).to(dtype) / 255
    return Batch(x, one_hot(own_class(n), n).to(dtype), Domain(mean=(0.4,) * 3, std=(0.2,) * 3), tuple("abcdefgh"[:n]))


def make(name: str, **given) -> Defense:
    return DEFENSES[name].make(**given)


@pytest.mark.parametrize("name", ["instahide", "mixup"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_registered_defences_are_pure_and_state_their_domain(name, dtype) -> None:
    defense, private = make(name), batch(dtype=dtype)
    before = private.images.clone(), private.targets.clone()
    a, b, c = (defense.encode(private, Insecure(s)) for s in (1, 1, 2))
    assert torch.equal(a.images, b.images)
    assert not torch.equal(a.images, c.images)
    assert not torch.equal(defense.encode(private, OsKey()).images, defense.encode(private, OsKey()).images)
    assert torch.equal(private.images, before[0])
    assert torch.equal(private.targets, before[1])
    assert a.domain == Domain(-1.0, 1.0, (0.0,) * 3, (1.0,) * 3)
    assert a.images.dtype == a.targets.dtype == dtype
    assert a.images.abs().max() <= 1 + 1e-6
    assert a.ids == private.ids
    assert (defense.claim, defense.encodes) == ("heuristic", True)
    want = torch.einsum("bn,nchw->bchw", a.targets.double(), private.images.double() * 2 - 1)
    assert torch.allclose(a.images.double().abs(), want.abs(), atol=1e-5)
    assert ((a.targets > 0).sum(1) == 4).all()
    assert (a.targets.diagonal() > 0).all()


def test_mixup_is_instahide_without_a_mask() -> None:
    private = batch()
    a = make("mixup").encode(private, Insecure(3))
    b = make("instahide", mask="none").encode(private, Insecure(3))
    sign, mag = (make("instahide", mask=m).encode(private, Insecure(3)).images for m in ("sign", "abs"))
    assert torch.equal(a.images, b.images)
    assert torch.equal(a.targets, b.targets)
    assert torch.equal(a.images.abs(), mag)
    assert torch.equal(sign.abs(), mag)


def test_one_image_mixes_with_itself_alone() -> None:
    """Zero strength: k = 1 without a mask leaves the images where they were, in [-1, 1]."""
    private = batch()
    out = make("instahide", k=1, c1=1.0, mask="none").encode(private, Insecure(0))
    assert torch.allclose(out.images, private.images * 2 - 1, atol=1e-6)
    assert torch.equal(out.targets, private.targets)


def test_pool_and_public_images_of_a_client() -> None:
    few, pool = batch(2), batch(8)
    with pytest.raises(BadInput, match="cannot be drawn from"):
        make("instahide").encode(few, Insecure(0))
    wide = Batch(few.images, torch.cat([few.targets, torch.zeros(2, 6)], 1), few.domain, few.ids)
    assert make("instahide", pool=pool).encode(wide, Insecure(0)).images.shape == few.images.shape
    cross = make("instahide", k=6, private=2, public=batch(8).images).encode(batch(), Insecure(0))
    assert (cross.targets.sum(1) < 1).all()
    with pytest.raises(BadInput, match="public"):
        make("instahide", private=2)
    with pytest.raises(BadInput, match="classes differ"):
        make("instahide", pool=pool).encode(few, Insecure(0))
    with pytest.raises(BadInput, match="against"):
        make("instahide", private=2, public=torch.rand(9, 1, 4, 4)).encode(batch(), Insecure(0))
    with pytest.raises(BadInput, match="outside"):
        make("mixup", k=2, c1=0.4)
