"""The cost report: claimed work against check values, what is counted, and what it does not leave out."""

from __future__ import annotations

import json
from importlib import resources

import pytest

from frostglass.core.errors import BadInput
from frostglass.defenses import cost as cost_module
from frostglass.defenses.cost import cost_of, measured_attacks, nearest_attack
from frostglass.defenses.honesty import WARNING


@pytest.mark.parametrize(
    ("k", "naive", "middle"), [(4, 1.6384e12, 1.6384e12), (6, 2.684354e24, 2.097152e18)]
)  # N = 1.28e6
def test_claimed_work_of_the_paper(k, naive, middle) -> None:
    found = cost_of(k, 2, 5000, 1_280_000, 50)
    assert 10**found.log10_naive == pytest.approx(naive, rel=1e-6)
    assert 10**found.log10_middle == pytest.approx(middle, rel=1e-6)
    assert found.to_json()["claimed_tries_naive"] == pytest.approx(naive, rel=1e-6)


def test_work_beyond_any_float_is_a_power_of_ten() -> None:
    found = cost_of(200, 2, 100, 10**10, 1)
    assert "1.0e+1980 tries over all partners, 1.0e+1000 meeting" in found.text()
    assert found.to_json()["claimed_tries_naive"] is None
    assert found.to_json()["claimed_log10_tries_naive"] == pytest.approx(1980)


def test_inside_one_set_the_private_images_are_the_pool() -> None:
    found = cost_of(4, 4, 50_000, 0, 200)
    assert 10**found.log10_naive == pytest.approx(50_000**3)
    assert 10**found.log10_middle == pytest.approx(50_000**2)
    assert found.appearances == 800


def test_what_is_counted() -> None:
    found = cost_of(6, 2, 100, 10_000, 50)  # the challenge
    assert found.encodings == 5000
    assert found.appearances == 100
    assert found.to_json()["equations_per_unknown"] == 50


def test_the_text_leaves_nothing_out() -> None:
    found = cost_of(6, 2, 5000, 1_280_000, 50)
    text = found.text()
    for part in (WARNING, "2.7e+24", "2.1e+18", "100 on average", "50 equations", "(epsilon, delta): none", "Carlini"):
        assert part in text
    assert json.loads(json.dumps(found.to_json()))["epsilon_delta"] is None


def test_nearest_measured_attack(monkeypatch) -> None:
    row = {"attack": "a", "private": 2, "images": 100, "rounds": 50, "result": "SSIM 0.9"}
    table = [{**row, "k": 4}, {**row, "k": 6, "rounds": 10}, {**row, "k": 6}]
    assert nearest_attack(table, 6, 2, 5000, 60) is table[2]
    assert nearest_attack(table, 5, 2, 100, 50) in table
    assert nearest_attack(table, 2, 2, 100, 50) is table[0]
    assert nearest_attack([], 6, 2, 100, 50) is None
    monkeypatch.setattr(cost_module, "measured_attacks", lambda: tuple(table))
    assert "a at k = 6 (2 private), 100 images, 50 rounds: SSIM 0.9" in cost_of(6, 2, 5000, 10_000, 50).text()
    monkeypatch.setattr(cost_module, "measured_attacks", tuple)
    assert "nearest setting: not measured" in cost_of(6, 2, 5000, 10_000, 50).text()


def test_the_packaged_table_has_all_that_a_sentence_needs() -> None:
    assert resources.files("frostglass.defenses").joinpath("measured_attacks.json").is_file()
    for row in measured_attacks():
        assert {"attack", "k", "private", "images", "rounds", "result"} <= set(row)


@pytest.mark.parametrize(
    "wrong",
    [(4, 5, 100, 0, 1), (4, 4, 3, 0, 1), (4, 2, 100, 1, 1), (4, 4, 100, 50, 1), (4, 4, 100, 0, 0), (0, 0, 1, 0, 1)],
)
def test_numbers_that_no_encoding_could_have(wrong) -> None:
    with pytest.raises(BadInput):
        cost_of(*wrong)
