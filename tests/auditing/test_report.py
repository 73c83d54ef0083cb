"""The report page: what it says, what it must never say, and how it looks to a browser."""

from __future__ import annotations

import base64
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from frostglass.auditing import wording
from frostglass.auditing.plots import by_cell, convergence
from frostglass.auditing.report import render, write_report
from frostglass.auditing.scorecard import Cell, ImageScore, Labels, OverThreshold, Scorecard, Summary
from frostglass.core.threat import ALWAYS, MEANING, Knows

SERVER = sorted(k.value for k in ALWAYS)
HOSTILE = "<script>alert(1)</script>"


def image_scores(values: list[float | None], proved: int = 0, target: str = "private") -> list[ImageScore]:
    return [
        ImageScore(
            id=f"photo/{i}", sha256=f"{i:02x}" * 32, psnr=v, ssim=None if v is None else min(1.0, v / 50),
            proved=i < proved, target=target, extra={"fft2d": v, "rank": None},
        )
        for i, v in enumerate(values)
    ]  # fmt: skip


def summary(images: list[ImageScore], batch_means: list[float] | None = None) -> Summary:
    held = [i.psnr for i in images if i.psnr is not None]
    seen = [i.ssim for i in images if i.ssim is not None]
    missing = len(held) < len(images)
    return Summary(
        images=len(images), matched=len(held), batches=len(batch_means or [0]),
        psnr_mean=sum(held) / len(held) if held else None, psnr_median=sorted(held)[len(held) // 2] if held else None,
        psnr_worst=None if missing else min(held), psnr_best=max(held, default=None),
        ssim_mean=sum(seen) / len(seen) if seen else None, ssim_median=sorted(seen)[len(seen) // 2] if seen else None,
        ssim_worst=None if missing else min(seen), ssim_best=max(seen, default=None),
        proved=sum(i.proved for i in images),
        over_threshold=OverThreshold(metric="psnr", value=20.0, count=sum(v >= 20 for v in held)),
        psnr_batch_means=batch_means or [],
    )  # fmt: skip


def cell(name: str = "c1", values: list[float | None] | None = None, proved: int = 0, **changes: Any) -> Cell:
    images = image_scores([31.5, 12.0, 24.25] if values is None else values, proved)
    fields: dict[str, Any] = {
        "id": name, "title": f"Cell {name}", "scenario": "cifar", "attack": "inverting_gradients", "defense": "none",
        "defense_claim": "none", "model": "resnet18", "mode": "train", "threat": "honest", "upper_bound": False,
        "grants": [*SERVER, "examples"], "batch": 3, "batches": 1, "update": "gradient", "status": "done",
        "seconds": 75.0, "iterations": 100, "labels": Labels(source="unused"), "images": images,
        "summary": summary(images),
    }  # fmt: skip
    return Cell(**(fields | changes))


def scorecard(*cells: Cell, **changes: Any) -> Scorecard:
    fields: dict[str, Any] = {
        "name": "first look", "seed": 7, "headline": "2 of 3 images were recovered.", "frostglass": "0.1.0",
        "environment": {"torch": "2.11", "git": ""}, "plan_sha256": "ab" * 32, "show_images": False,
        "cells": list(cells), "limits": ["One network only."],
    }  # fmt: skip
    return Scorecard(**(fields | changes))


def broken(name: str, status: str = "failed", **changes: Any) -> Cell:
    nothing = {"images": [], "summary": None, "status": status, "error": f"dlg: loss is <b>{status}</b>"}
    return cell(name, **(nothing | changes))


def encoded(name: str) -> Cell:
    coded = image_scores([32.0, 33.0, 34.0], proved=1, target="encoding")
    return cell(
        name, [8.0, 9.0, 10.0], defense="instahide", defense_claim="heuristic", encoding_images=coded,
        encoding_summary=summary(coded),
    )  # fmt: skip


def every_kind() -> list[Cell]:
    return [
        cell("c1", proved=1, labels=Labels(source="restored", restored=[3, 5, 5], set_accuracy=1.0)),
        cell(
            "c2", upper_bound=True, batches=2, objective=0.3, objective_at_truth=0.1, warnings=["Labels were granted."],
            grants=[k.value for k in Knows], labels=Labels(source="granted"), title="Cell c2 (upper bound)",
        ),
        cell("c3", [8.0, 9.0, 10.0], objective=0.3, objective_at_truth=0.1, settings={"lr": {"a": 0.1, "b": None}}),
        encoded("c4"),
        cell("c5", [None, None, None], privacy_spent={"epsilon": 4.25, "delta": 1e-5, "sampling": None}),
        broken("c6"),
        broken("c7", "skipped"),
    ]  # fmt: skip


def progress(cells: list[Cell]) -> list[dict[str, Any]]:
    return [
        {"kind": "progress", "where": f"{c.id}/{b}", "step": t, "steps": 100, "objective": 1 / t, "tv": 0.0, "x": "nan"}
        for c in cells
        for b in range(c.batches)
        for t in range(10, 101, 10)
    ]


def pictures(cells: list[Cell], side: int = 32, channels: int = 3) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for c in (c for c in cells if c.status == "done"):
        made = torch.rand(3, channels, side, side)
        made[1] = float("nan")
        found |= {f"{c.id}/private": torch.rand(3, channels, side, side), f"{c.id}/reconstruction": made}
        found |= {f"{c.id}/film/{t:06d}": torch.randn(3, channels, side, side) for t in (0, 40, 100)}
        if c.encoding_summary:
            found[f"{c.id}/encoding"] = 2 * torch.rand(3, channels, side, side) - 1
    return found


def full_page(side: int = 32) -> str:
    cells = every_kind()
    return render(scorecard(*cells, show_images=True), progress(cells), pictures(cells, side))


class Words(HTMLParser):
    """What a person reads: text and alternative texts; and all tags, checked to be closed in order."""

    VOID = frozenset({"meta", "link", "img", "br"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.parts: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.parts += [v for k, v in attrs if k in ("alt", "aria-label", "data-label") and v]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.parts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.parts).split())


def read(*cells: Cell, **changes: Any) -> str:
    return Words(render(scorecard(*cells, **changes), [], None)).text


def test_page_is_well_formed_and_holds_everything_it_shows() -> None:
    words = Words(full_page())
    links = [v for _, a in words.tags for k, v in a.items() if k in ("src", "href", "xlink:href", "srcset") and v]
    assert all(v.startswith(("data:", "#")) for v in links)
    ids = [a["id"] for _, a in words.tags if a.get("id")]
    assert len(ids) == len(set(ids)), "an id occurs twice"
    assert {v[1:] for v in links if v.startswith("#")} <= set(ids)
    assert not {"script", "iframe", "object", "form"} & {tag for tag, _ in words.tags}
    assert all(a.get("alt") for tag, a in words.tags if tag == "img")
    page = full_page()
    assert "@import" not in page
    assert not re.findall(r"url\((?!#)", page)


def test_page_never_says_that_something_is_safe_nor_prints_a_missing_value() -> None:
    text = Words(full_page()).text
    assert not re.search(r"\bsafe\b|\bsecure\b", text, re.IGNORECASE)
    assert not re.search(r"\bNone\b|\bnan\b|\bnull\b|\bundefined\b", text)


def test_order_of_the_parts() -> None:
    text = Words(full_page()).text
    parts = [
        "2 of 3 images were recovered.", "Of 7 cells", "Overview", "Cell 1 of 7", "What the attacker was granted",
        "Before and after", "From noise to picture", "Progress of the attack", "Labels", "Privacy spent",
        "Cell 7 of 7", "What this report cannot say", "How this was made",
    ]  # fmt: skip
    places = [text.index(p) for p in parts]
    assert places == sorted(places)


def test_subline_counts_each_ending() -> None:
    assert wording.subline(scorecard(*every_kind())) == (
        "Of 7 cells, 2 recovered at least one private image, 1 recovered encodings but no private image, "
        "2 showed nothing with the attack that was run, 1 failed and has no result, 1 was not scored."
    )
    assert wording.subline(scorecard()) == "No cell was run."


def test_numbers_come_with_n_and_spread() -> None:
    images = image_scores([30.0, 20.0, 10.0])
    text = read(cell(images=images, summary=summary(images, [21.0, 19.0])))
    assert "20.0 [10.0 to 30.0]" in text
    assert "mean 20.0, n = 3" in text
    assert "batch means 21.0, 19.0 dB; standard deviation 1.4" in text
    assert "one batch: no spread between batches can be given" in read(cell())


def test_unmatched_images_are_dashes_and_hatched_tiles() -> None:
    assert "[– to 31.5]" in read(cell(values=[31.5, None, 24.0]))
    assert "2 of 3 were matched at all" in read(cell(values=[31.5, None, 24.0]))
    one = cell(values=[31.5, None, 24.0])
    words = Words(render(scorecard(one, show_images=True), [], pictures([one])))
    assert [a["aria-label"] for _, a in words.tags if a.get("class") == "empty"] == ["Image 2 was not recovered"]


def test_a_failed_attack_is_no_privacy() -> None:
    lost = cell(values=[8.0, 9.0], objective=0.3, objective_at_truth=0.1)
    text = read(lost)
    assert "nothing shown by this attack" in text
    assert "the attack failed, privacy was not shown" in text
    assert wording.outcome(lost).tone == "nothing"


@pytest.mark.parametrize(
    ("values", "end", "truth", "says"),
    [
        ([30.0], 0.3, 0.1, "a better one could recover more"),
        ([30.0], 0.1, 0.1, "as low as the truth, or within 5 % of it"),
        ([8.0], 0.1, 0.1, "does not single out the private images"),
        ([8.0], 1e-6, 0.0, "privacy was not shown"),
        ([8.0], -0.5, -1.0, "privacy was not shown"),
        ([8.0], 0.1, None, "cannot be told apart from privacy"),
        ([8.0], None, None, "reports no objective"),
    ],
)
def test_objective_in_words(values: list[float | None], end: float | None, truth: float | None, says: str) -> None:
    assert says in wording.objective_words(cell(values=values, objective=end, objective_at_truth=truth))


def test_failed_and_skipped_cells_show_their_error_and_no_score() -> None:
    page = render(scorecard(broken("c1"), broken("c2", "skipped")), [], None)
    text = Words(page).text
    assert "dlg: loss is <b>failed</b>" in text
    assert "A broken run shows nothing." in text
    assert "Did the optimiser" not in text
    assert "Progress of the attack" not in text
    assert "<b>failed" not in page


def test_upper_bound_is_tagged_once_in_the_title() -> None:
    text = read(cell(upper_bound=True, title="Deep (upper bound)"))
    assert "Deep UPPER BOUND" in text
    assert "(upper bound)" not in text
    assert "UPPER BOUND" not in read(cell())


def test_grants_are_split_into_given_and_withheld() -> None:
    page = render(scorecard(cell(grants=[*SERVER, "labels", "time_machine"])), [], None)
    given, withheld = page.split("What the attacker was not granted")
    assert MEANING[Knows.LABELS] in given
    assert "time_machine" in given
    assert MEANING[Knows.BN_BATCH] in withheld
    assert MEANING[Knows.LABELS] not in withheld


def test_pictures_are_withheld_unless_the_plan_shows_them(tmp_path: Path) -> None:
    cells = every_kind()
    card = scorecard(*cells, show_images=False)
    (tmp_path / "scorecard.json").write_text(card.model_dump_json())
    save_file(pictures(cells), tmp_path / "pictures.safetensors")  # a left-over file must not be read either
    for page in (render(card, [], pictures(cells)), write_report(tmp_path).read_text()):
        assert "data:image" not in page
        assert "<img" not in page
        text = Words(page).text
        assert "the report must not itself leak" in text
        assert "010101010101" in text, "the hash prefix names the image"
        assert "01" * 32 not in text
        assert "class 3" not in text, "restored labels are withheld like the pictures"


def test_pictures_are_true_to_the_tensors() -> None:
    from io import BytesIO

    from PIL import Image

    one = encoded("c1")
    shown = pictures([one], side=4)
    shown["c1/encoding"] = torch.full((3, 3, 4, 4), -1.0)
    shown["c1/private"] = torch.full((3, 3, 4, 4), 0.2)
    page = render(scorecard(one, show_images=True), [], shown)
    uris = dict(reversed(re.findall(r'<img src="data:image/png;base64,([^"]*)" alt="([^",]*)', page)))
    by_alt = {alt: Image.open(BytesIO(base64.b64decode(uri))) for uri, alt in uris.items()}
    assert by_alt["Private image 1"].getpixel((0, 0)) == (51, 51, 51)
    assert by_alt["Encoding of image 1"].getpixel((3, 3)) == (0, 0, 0)
    assert by_alt["Reconstruction of image 1"].size == (4, 4)
    assert "shown shifted, as (x + 1) / 2" in page


@pytest.mark.parametrize(("side", "channels"), [(8, 1), (96, 3), (400, 3), (16, 4)])
def test_pictures_of_any_size_and_depth(side: int, channels: int) -> None:
    one = cell()
    page = render(scorecard(one, show_images=True), [], pictures([one], side, channels))
    assert ('class="pairs pixelated"' in page) == (side < 96)
    assert ("Of 4 channels, the first is shown" in page) == (channels == 4)
    assert ("reduced to 320" in page) == (side == 400)


def test_cells_without_pictures_or_film() -> None:
    text = Words(render(scorecard(cell(), show_images=True), [], {})).text
    assert "No picture of this cell was kept." in text
    assert "From noise to picture" not in text


def test_labels_in_words() -> None:
    granted = wording.labels_words(Labels(source="granted"), 1, True)
    assert "were granted" in granted
    assert "no labels" in wording.labels_words(Labels(source="unused"), 1, True)
    empty = Labels(source="restored", restored=[], set_accuracy=None)
    assert wording.labels_words(empty, 1, True).endswith("no accuracy was recorded.")
    full = Labels(source="restored", restored=[5, 3, 5], set_accuracy=1.0, count_accuracy=0.5, no_gradient_guess=0.25)
    assert wording.labels_words(full, 2, True).endswith("Restored in the first batch: class 3, class 5 × 2.")
    assert "25 %" in wording.labels_words(full, 2, False)
    assert "class 3" not in wording.labels_words(full, 2, False)


def test_hostile_names_are_text() -> None:
    fields = ("id", "title", "scenario", "attack", "defense", "defense_claim", "model", "mode", "threat", "update")
    bad: dict[str, Any] = dict.fromkeys(fields, HOSTILE)
    bad |= {"grants": [HOSTILE], "warnings": [HOSTILE], "upper_bound": True}
    bad |= {"settings": {HOSTILE: HOSTILE}, "info": {HOSTILE: [HOSTILE]}, "privacy_spent": {HOSTILE: HOSTILE}}
    scored = [ImageScore(id=HOSTILE, sha256=HOSTILE, psnr=9, ssim=0.1, proved=True, extra={'"><img src=x>': 1.0})]
    one = cell(**bad, images=scored)
    rows = [{"kind": "progress", "where": HOSTILE, "step": t, "steps": 9, HOSTILE: 1 / t, "$x": 1.0} for t in (3, 9)]
    card = scorecard(
        one, broken("b", error=HOSTILE), name=HOSTILE, headline=HOSTILE, frostglass=HOSTILE, plan_sha256=HOSTILE,
        environment={HOSTILE: HOSTILE}, limits=[HOSTILE], show_images=True,
    )  # fmt: skip
    shown = {k.replace("c1/", f"{HOSTILE}/"): v for k, v in pictures([cell()]).items()}
    page = render(card, rows, shown)
    words = Words(page)
    assert "script" not in {tag for tag, _ in words.tags}
    assert all(str(a["src"]).startswith("data:") for tag, a in words.tags if tag == "img")
    assert HOSTILE in words.text
    assert "data:image/png" in page


def test_rows_belong_to_the_longest_matching_cell() -> None:
    rows = [
        {"kind": "progress", "where": where, "step": 1, "steps": 2, "loss": 1.0}
        for where in ("a", "a/0", "a/b/0", "ab/0", "gone/0")
    ] + [{"kind": "note", "where": "a/0", "text": "hello"}]
    found = by_cell(rows, ["a", "a/b"])
    assert {k: sorted(v) for k, v in found.items()} == {"a": ["a", "a/0"], "a/b": ["a/b/0"]}


def test_plot_draws_positive_terms_and_names_the_others() -> None:
    rows = by_cell(progress([cell(batches=2)]), ["c1"])["c1"]
    plot = convergence(rows, 0.05, "p1")
    assert plot is not None
    assert (plot.terms, plot.lines, plot.left_out, plot.truth) == (("objective",), 2, ("tv", "x"), True)
    assert "var(--s0)" in plot.svg
    assert "#0" not in plot.svg.replace("#p1", "")
    assert "objective from 0.1 to 0.01" in plot.alt
    assert convergence(rows, 0.05, "p1") == plot, "the same run gives the same page"
    assert convergence({}, 0.05, "p1") is None


def test_plot_survives_flat_lines_repeated_steps_and_huge_ranges() -> None:
    def row(step: int, value: float) -> dict[str, Any]:
        return {"kind": "progress", "where": "c", "step": step, "steps": 9, "loss": value, "again": True}

    for rows in ([row(1, 2.0), row(2, 2.0)], [row(1, 1e-30), row(2, 1e30)]):
        plot = convergence({"c": rows}, None, "p")
        assert plot is not None
        assert plot.terms == ("loss",)
    for empty in ([row(0, 5e-324), row(1, -1.0)], [row(1, 2.0)]):
        assert convergence({"c": empty}, None, "p") is None
    resumed = convergence({"c": [row(1, 9.0), row(2, 5.0), row(2, 4.0)]}, None, "p")
    assert resumed is not None
    assert "from 9 to 4" in resumed.alt


def test_numbers_in_words() -> None:
    assert [wording.number(v) for v in (None, float("nan"), -0.01, -2.0, float("inf"))] == [
        "–",
        "–",
        "0.0",
        "−2.0",
        "∞",
    ]
    assert [wording.duration(s) for s in (0.1, 42, 59.7, 200, 3600, 7300)] == [
        "<1 s", "42 s", "1 min", "3 min 20 s", "1 h", "2 h 1 min",
    ]  # fmt: skip
    assert [wording.clock(s) for s in (42, 1284, 7200)] == ["42 s", "21 min", "2.0 h"]
    assert list(wording.flat({"a": {"b": None, "c": [1, True, None]}, "d": float("nan"), "e": {}, "f": 1e-5})) == [
        ("a.b", "–"), ("a.c", "1, yes, –"), ("d", "–"), ("e", "–"), ("f", "1e-05"),
    ]  # fmt: skip
    assert wording.spread(None, None, None) == "–"
    assert wording.threshold(OverThreshold(metric="ssim", value=0.5, count=0)) == "SSIM 0.5"


def test_written_report_reads_the_folder(tmp_path: Path) -> None:
    cells = every_kind()
    (tmp_path / "scorecard.json").write_text(scorecard(*cells, show_images=True).model_dump_json())
    lines = [json.dumps(r) for r in progress(cells)]
    (tmp_path / "events.jsonl").write_text("\n".join([*lines, '{"kind": "prog']))  # as a killed run leaves it
    save_file(pictures(cells), tmp_path / "pictures.safetensors")
    page = write_report(tmp_path)
    assert page == tmp_path / "report.html"
    text = page.read_text(encoding="utf-8")
    assert text.count('class="plot"') == 7, "a failed cell shows how far it came"
    assert text.count("<img") > 5 * 5
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "events.jsonl", "pictures.safetensors", "report.html", "scorecard.json",
    ]  # fmt: skip


def test_empty_runs() -> None:
    assert "No cell was run." in read(headline="No cell finished.", limits=[], environment={})


LINES = "new Set([...document.querySelector('.overview tbody tr').cells].slice(1).map(c => c.offsetTop)).size"
"""On how many lines the nine values of the first row stand."""

FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("side", [32, 128])
def test_browser_shows_the_page(tmp_path: Path, side: int) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    browser_path = next(filter(None, map(shutil.which, names)), None)
    if browser_path is None:
        pytest.skip(f"no browser: none of {', '.join(names)} is on the PATH")
    cells = [*every_kind(), cell("x" * 90, scenario="y" * 200, title="z" * 200, error="e" * 300, warnings=["w" * 300])]
    page_file = tmp_path / "report.html"
    page_file.write_text(render(scorecard(*cells, show_images=True), progress(cells), pictures(cells, side)))
    wrong: list[str] = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=browser_path, args=list(FLAGS))
        for width, scheme in ((1200, "light"), (1200, "dark"), (420, "light")):
            page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            page.on("console", lambda m: wrong.append(m.text) if m.type in ("error", "warning") else None)
            page.on("pageerror", lambda e: wrong.append(str(e)))
            page.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else wrong.append(r.url))
            page.goto(page_file.as_uri())
            widths = page.evaluate("[...document.images].map(i => i.naturalWidth)")
            assert len(widths) > 50
            assert min(widths) > 0
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.evaluate("[...document.querySelectorAll('svg.plot')].every(s => s.getBBox().width > 200)")
            for other in (1161, 1160, 860, 600, 320):
                page.set_viewport_size({"width": other, "height": 900})
                assert page.evaluate("document.documentElement.scrollWidth") <= other
            for other, lines in ((1161, 1), (1160, 1), (1000, 1), (768, 3), (390, 9)):
                page.set_viewport_size({"width": other, "height": 900})
                assert page.evaluate(LINES) == lines, f"the overview's values are to fill a width of {other}"
            page.close()
        browser.close()
    assert not wrong


def test_a_percentage_is_100_only_where_all_is_meant() -> None:
    """One wrong label of 300 is not "100 % of the labels right"."""
    shares = (0.0, 0.001, 0.005, 0.5, 0.994, 299 / 300, 1.0, None)
    assert [wording.percent(s) for s in shares] == ["0 %", "<1 %", "<1 %", "50 %", "99 %", ">99 %", "100 %", "–"]
