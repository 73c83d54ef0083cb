"""The table in the terminal."""

from __future__ import annotations

from typing import Any

import pytest

from frostglass.auditing.scorecard import Cell, Labels, OverThreshold, Scorecard, Summary, Verdict
from frostglass.auditing.table import table_text


def summary(
    found: int, images: int = 8, proved: int = 0, psnr: tuple[float | None, ...] = (21.3, 9.8, 31.2)
) -> Summary:
    median, worst, best = psnr
    return Summary(
        images=images, matched=images, batches=2, psnr_mean=median, psnr_median=median, psnr_worst=worst,
        psnr_best=best, ssim_mean=0.5, ssim_median=0.512, ssim_worst=0.1, ssim_best=0.9, proved=proved,
        over_threshold=OverThreshold(metric="psnr", value=20, count=found),
    )  # fmt: skip


def cell(**changes: Any) -> Cell:
    fields: dict[str, Any] = {
        "id": "c", "title": "a cell", "scenario": "cifar10", "attack": "spear", "defense": "none",
        "defense_claim": "none", "model": "mlp", "mode": "train", "threat": "t", "grants": [], "upper_bound": False,
        "batch": 4, "batches": 2, "update": "gradient", "status": "done", "seconds": 1284.0,
        "labels": Labels(source="unused"), "summary": summary(5),
    }  # fmt: skip
    return Cell(**(fields | changes))


def card(*cells: Cell) -> Scorecard:
    return Scorecard(
        name="n", seed=0, headline="h", frostglass="0", environment={}, plan_sha256="", show_images=False,
        cells=list(cells), limits=[],
    )  # fmt: skip


def test_one_aligned_row_a_cell() -> None:
    text = table_text(card(cell(), cell(defense="dp_sgd", summary=summary(0, 64, psnr=(-3.0, -9.5, 8.0)))), 100)
    head, rule, first, second, blank, *notes = text.splitlines()
    assert first.split() == ["cifar10", "none", "spear", "5/8", "0", "21.3", "[9.8,", "31.2]", "0.51", "2", "21", "min"]
    assert second.split()[3:8] == ["0/64", "0", "−3.0", "[−9.5,", "8.0]"]
    assert len(head) == len(rule) == len(first) == len(second)
    assert head.index("recovered") + len("recovered") == first.index("5/8") + 3
    assert blank == ""
    assert notes[0].startswith("recovered: reaches PSNR 20 dB")
    assert "nothing shown by this attack" in notes[1]


@pytest.mark.parametrize("width", [10, 40, 60, 80, 100, 200])
def test_never_wider_than_asked(width: int) -> None:
    long = cell(
        scenario="a scenario with a long name indeed", defense="instahide+dp_sgd", attack="inverting_gradients" * 2,
        upper_bound=True, encoding_summary=summary(8),
    )  # fmt: skip
    lines = table_text(card(long, cell(status="failed", error="x " * 200, summary=None)), width).splitlines()
    assert max(map(len, lines)) <= max(width, 40)


def test_long_names_end_in_an_ellipsis_and_keep_the_upper_bound_mark() -> None:
    text = table_text(card(cell(attack="inverting_gradients" * 3, scenario="s" * 60, upper_bound=True)), 100)
    row = text.splitlines()[2]
    assert row.count("…") == 2
    assert "… *" in row
    assert "* upper bound: the grants exceed" in text


def test_names_take_what_others_leave() -> None:
    row = table_text(card(cell(scenario="a rather long dataset")), 100).splitlines()[2]
    assert row.startswith("a rather long dataset ")


def test_narrow_terminals_lose_the_least_important_numbers() -> None:
    head = table_text(card(cell(scenario="s" * 40, attack="a" * 40)), 72).splitlines()[0]
    assert "time" not in head
    assert "recovered" in head
    assert "PSNR" in head


@pytest.mark.parametrize("verdict", ["VIOLATED", "BOUNDED", "INCONCLUSIVE", "BROKEN CLAIM"])
def test_what_was_recovered_and_the_verdict_fit_into_forty_columns(verdict: str) -> None:
    control = Verdict.model_construct(verdict=verdict, role="control")
    wide = cell(scenario="s" * 40, defense="d" * 40, attack="a" * 40, summary=summary(64, 64), verdict=control)
    text = table_text(card(wide), 40)
    head, _, row, *_ = text.splitlines()
    assert head.split()[-2:] == ["recovered", "verdict"]
    assert row.endswith(f"{verdict} °")
    assert "64/64" in row
    assert max(map(len, text.splitlines())) <= 40


def test_the_footnote_explains_no_column_that_had_to_go() -> None:
    def note(width: int) -> str:
        long = cell(scenario="s" * 40, defense="d" * 40, attack="a" * 40)
        return " ".join(table_text(card(long), width).split("\n\n")[1].split())

    assert note(120) == "recovered: reaches PSNR 20 dB; PSNR in dB and SSIM are medians over the images"
    assert note(72) == "recovered: reaches PSNR 20 dB; PSNR in dB is a median over the images"
    assert note(40) == "recovered: reaches PSNR 20 dB"


def test_missing_values_are_dashes_and_broken_cells_say_so() -> None:
    empty = summary(0, psnr=(None, None, None)).model_copy(update={"ssim_median": None})
    cells = [
        cell(summary=empty), cell(summary=summary(1, psnr=(21.0, None, 30.0))),
        cell(status="failed", error="Traceback\nAttackFailed: no", summary=None), cell(status="skipped", summary=None),
    ]  # fmt: skip
    text = table_text(card(*cells), 100)
    rows = text.splitlines()[2:6]
    assert rows[0].split()[3:7] == ["0/8", "0", "–", "–"]
    assert "21.0 [–, 30.0]" in rows[1]
    assert rows[2].split()[3:] == ["failed", "–", "–", "–", "–", "21", "min"]
    assert rows[3].split()[3] == "skipped"
    assert "failed: a cell: AttackFailed: no" in text
    assert "None" not in text
    assert "nan" not in text


def test_encodings_have_a_line_of_their_own() -> None:
    text = table_text(card(cell(summary=summary(0), encoding_summary=summary(8, proved=2))), 100)
    assert "encodings of a cell: 8 of 8 recovered, 2 proved, PSNR 21.3 [9.8, 31.2]" in text
    assert "nothing shown" not in text


def test_names_cannot_steer_the_terminal_nor_break_the_columns() -> None:
    text = table_text(card(cell(scenario="\x1b[31mred\nline\u202e", attack="攻撃"), cell()), 100)
    assert "\x1b" not in text
    assert "\u202e" not in text
    first, second = text.splitlines()[2:4]
    assert first.index("5/8") + 2 == second.index("5/8"), "two wide characters take four columns"


def test_no_cells() -> None:
    assert table_text(card()) == "No cell was run."


def test_width_comes_from_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "64")
    assert max(map(len, table_text(card(cell(scenario="s" * 90))).splitlines())) <= 64
