"""Instructions of compiled loops: what they do as plain Python, they do compiled."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from frostglass.numerics import compiled
from frostglass.numerics.compiled import RUN, both_sides, kernel, put, put_on

U = np.uint64
pytest.importorskip("numba")

WIDE = both_sides(np.array([[2.0, 0, -1], [0, 1, 1], [1, -3, 0], [0, 0, 0.5]]))
TALL = both_sides(np.array([[1.0, 0, 0, 4], [0, -1, 2, 0]]))


def moves(source, target, size):  # type: ignore[no-untyped-def]
    put(source, U(3), target, U(5), U(size))
    put_on(source, U(40), target, U(50), U(size))
    put_on(source, U(40), target, U(50), U(size))


def multiplies(wide, tall):  # type: ignore[no-untyped-def]
    WIDE(wide)
    TALL(tall)


@pytest.mark.parametrize("size", [0, 1, RUN - 1, RUN])
def test_runs_are_copied_and_added(size: int) -> None:
    source, found = np.arange(90, dtype=np.float32), np.zeros(90, np.float32)
    wanted = found.copy()
    wanted[5 : 5 + size] = source[3 : 3 + size]
    wanted[50 : 50 + size] += 2 * source[40 : 40 + size]
    for run in (kernel(moves), inspect.unwrap(moves)):
        assert run is not None
        found[:] = 0
        run(source, found, size)
        assert np.array_equal(found, wanted)


def test_a_matrix_multiplies_both_sides_of_a_tile() -> None:
    made = np.random.default_rng(0)
    tiles = [made.normal(size=16 * RUN).astype(np.float32) for _ in range(2)]
    plain, fast = [t.copy() for t in tiles], [t.copy() for t in tiles]
    inspect.unwrap(multiplies)(*plain)
    run = kernel(multiplies)
    assert run is not None
    run(*fast)
    wide = np.array([[2.0, 0, -1], [0, 1, 1], [1, -3, 0], [0, 0, 0.5]])
    corner = tiles[0].reshape(4, 4, RUN)[:3, :3]
    wanted = np.einsum("ai,bj,ijk->abk", wide, wide, corner)
    assert np.allclose(plain[0].reshape(4, 4, RUN), wanted, atol=1e-4)
    assert np.allclose(plain[0], fast[0], atol=1e-4)
    assert np.allclose(*(t.reshape(4, 4, RUN)[:2, :2] for t in (plain[1], fast[1])), atol=1e-4)


def counts(x):  # type: ignore[no-untyped-def]
    return x + 1


def test_code_compiled_with_other_instructions_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import numba

    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    make: Callable[..., Any] = inspect.unwrap(kernel)

    def loaded() -> int:
        run = make(counts)
        assert run(1) == 2
        return sum(run.stats.cache_hits.values())

    assert loaded() == 0
    assert loaded() == 1
    monkeypatch.setattr(compiled, "_edition", lambda _: "another")
    assert loaded() == 0


def test_a_full_disk_keeps_no_kernel_and_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    import numba

    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    run = inspect.unwrap(kernel)(counts)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))  # files may be made, and nothing be written to them
    try:
        assert run(1) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.rglob("*.nb?"))


@pytest.mark.parametrize("file", ["mixing_lanes.py", "mixing_vectors.py", "compiled.py"])
def test_the_edition_is_that_of_all_files_with_instructions(monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    """Of the kernel's own calls: mixing has nothing to do with tiles."""
    from frostglass.numerics import fused_mixing, tile_kernels

    mixes, cuts = inspect.unwrap(fused_mixing.mix_rows), inspect.unwrap(tile_kernels.cut_tiles)
    before = compiled._edition(mixes), compiled._edition(cuts)
    known = inspect.unwrap(compiled._digest)
    monkeypatch.setattr(compiled, "_digest", lambda of: "changed" if Path(of).name == file else known(of))
    assert compiled._edition(mixes) != before[0]
    assert (compiled._edition(cuts) == before[1]) is (file != "compiled.py")


def test_a_kernel_that_makes_no_array_counts_no_references() -> None:
    """Which a kernel that makes one must do."""
    from frostglass.numerics import fused_mixing, key_loops

    for plain in (fused_mixing.mix_rows, fused_mixing.mix_labels, key_loops.choose_distinct):
        run = kernel(plain)
        assert run is not None
        assert run.targetoptions.get("_nrt", True) is (plain is key_loops.choose_distinct)
