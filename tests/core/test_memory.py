"""Freed memory is kept while a loop runs, and goes back afterwards."""

from __future__ import annotations

import subprocess
import sys

import pytest

from frostglass.core import memory

RESIDENT = """
import resource, sys
import torch
from frostglass.core.memory import _glibc, freed_memory_kept
if _glibc() is None:
    sys.exit(3)

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() // 2**20

before = resident()
with freed_memory_kept():
    held = [torch.ones(size * 2**18) for size in range(1, 25)]  # 300 MiB in blocks of 1 to 24 MiB, as layers are
    del held
    inside = resident()
print(before, inside, resident())
"""


def test_freed_memory_stays_in_the_block_and_goes_back_after_it() -> None:
    done = subprocess.run([sys.executable, "-c", RESIDENT], capture_output=True, text=True, check=False)
    if done.returncode == 3:
        pytest.skip("another C library than glibc: nothing is changed there")
    assert done.returncode == 0, done.stderr
    before, inside, after = map(int, done.stdout.split())
    assert inside > before + 250
    assert after < before + 50


class Told:
    """A C library that writes down what it is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, ...]] = []

    def mallopt(self, what: int, value: int) -> int:
        self.calls.append((what, value))
        return 1

    def malloc_trim(self, pad: int) -> int:
        self.calls.append((pad,))
        return 1


def test_the_setting_ends_with_the_block_also_when_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Told()
    monkeypatch.setattr(memory, "_glibc", lambda: library)
    inside: list[tuple[int, ...]] = []

    def failing() -> None:
        with memory.freed_memory_kept():
            inside.extend(library.calls)
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert inside == [(-3, 2**25), (-1, 2**31 - 1)]
    assert library.calls[2:] == [(-1, 2**26), (0,)]


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_glibc", lambda: None)
    ran = False
    with memory.freed_memory_kept():
        ran = True
    assert ran
