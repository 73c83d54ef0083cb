"""The scorecard of an audit of encodings: the ordinary one, with the set, its exposure and the verdict beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from pydantic import Field

from frostglass._version import __version__
from frostglass.auditing.scorecard import Cell, Scorecard, Summary
from frostglass.auditing.unmixing_inputs import EncodedSet
from frostglass.auditing.unmixing_plan import UnmixPlan
from frostglass.auditing.unmixing_view import View
from frostglass.auditing.wording import number, plural, threshold
from frostglass.core.errors import BadInput
from frostglass.defenses.cost import NO_GUARANTEE, measured_attacks, nearest_attack

LIMITS = [
    "An attack that fails proves nothing: a stronger one, more compute or other grants may succeed.",
    "Recovered images are known up to one sign for the whole set where a mask hides it; scores take the better sign.",
    "Scores compare after one-to-one matching by squared error; a person may recognise more, or less.",
    "The exposure histogram is what the set says of itself; sets that it does not count expose the images further.",
]


class UnmixScorecard(Scorecard):
    """As `Scorecard`, with what is particular to an encoded set."""

    encoded: dict[str, Any] = Field(description="the set: encodings, settings, exposure, digest")
    known: dict[str, str] = Field(description="what the attacker was given, in words")
    findings: list[str] = Field(description="sentences, the most important first")
    scored: bool = Field(description="whether the private images were given for scoring")
    guess: Summary | None = Field(
        None, description="what the mean of the other private images scores, without any attack"
    )


def load_unmix_scorecard(path: Path) -> UnmixScorecard:
    """Reads and checks the scorecard of `frostglass unmix`.

    Raises:
        BadInput: it cannot be read, or is another one.
    """
    try:
        return UnmixScorecard.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as wrong:
        raise BadInput(f"{path}: cannot be read ({wrong.strerror or wrong}).") from None
    except ValueError as wrong:
        raise BadInput(f"{path}: is no scorecard of `frostglass unmix` ({str(wrong).splitlines()[0]}).") from None


def make_card(
    plan: UnmixPlan,
    encoded: EncodedSet,
    view: View,
    cells: list[Cell],
    environment: Mapping[str, str],
    *,
    scored: bool,
    guess: Summary | None = None,
) -> UnmixScorecard:
    """All cells with the set and the verdict."""
    verdict = verdict_of(encoded, view, cells, scored=scored, guess=guess)
    return UnmixScorecard(
        name=plan.name,
        seed=plan.seed,
        headline=verdict[0],
        frostglass=__version__,
        environment=dict(environment),
        plan_sha256=plan.digest(),
        show_images=plan.report.show_images,
        cells=cells,
        limits=LIMITS,
        encoded=_facts(encoded, view),
        known=dict(view.words),
        findings=verdict,
        scored=scored,
        guess=guess,
    )


def _facts(encoded: EncodedSet, view: View) -> dict[str, Any]:
    manifest, law = encoded.manifest, view.law
    exposure = manifest.get("exposure_histogram_with_earlier_sets") or manifest.get("exposure_histogram")
    return {
        "name": encoded.name,
        "encodings": encoded.count,
        "shape": list(encoded.shape),
        "classes": None if encoded.targets is None else int(encoded.targets.shape[1]),
        "sha256": encoded.digest,
        "private_images": view.images,
        "rounds": None if not view.images else round(encoded.count / view.images, 2),
        "k": None if law is None else law.k,
        "private": None if law is None else law.private,
        "exposure_histogram": None if exposure is None else {str(k): int(v) for k, v in exposure.items()},
        "insecure": manifest.get("insecure"),
        "manifest": bool(manifest.get("shards")),
    }


def verdict_of(
    encoded: EncodedSet, view: View, cells: Sequence[Cell], *, scored: bool, guess: Summary | None = None
) -> list[str]:
    """What it comes to: recovered images, exposure, keys, and what was never promised."""
    lines = [_recovered(cells, scored=scored), _guessed(guess), exposure_words(encoded.manifest, view, encoded.count)]
    lines += _keys(cells, encoded.manifest)
    near = _nearest(view, encoded.count)
    if near is not None:
        lines.append(near)
    skipped = [c.attack for c in cells if c.status == "skipped"]
    if skipped:
        lines.append(f"Not run, because they do not apply here: {', '.join(skipped)}.")
    lines.append(NO_GUARANTEE)
    return [line for line in lines if line]


def _recovered(cells: Sequence[Cell], *, scored: bool) -> str:
    tried = [c for c in cells if c.status == "done"]
    if not tried:
        return "No attack has finished: nothing was measured."
    if not scored:
        made = {c.attack: int(c.info.get("recovered", 0)) for c in tried if c.info.get("recovered")}
        if not made:
            return "No attack returned an image; that is no proof of privacy."
        told = ", ".join(f"{n} by {name}" for name, n in made.items())
        return f"Images were returned: {told}. Look at them; without the private images nobody can score them."
    own = [c for c in tried if c.summary is not None and c.attack != "demask"]
    best = max(own, key=lambda c: (c.summary.over_threshold.count, c.summary.ssim_mean or 0.0), default=None)  # type: ignore[union-attr]
    if best is None or best.summary is None or not best.summary.over_threshold.count:
        if not own:
            return "Only single encodings were looked at; that is no proof of privacy: run the other attacks."
        who = f"None of the {len(own)} attacks recovered a" if len(own) != 1 else f"{own[0].attack} recovered no"
        return f"{who} recognisable image; that is no proof of privacy: see the limits."
    s = best.summary
    share = s.over_threshold.count / max(1, s.images)
    word = "Broken" if share >= 0.5 else "Partly broken"
    return (
        f"{word}: {s.over_threshold.count} of {plural(s.images, 'private image')} recovered by {best.attack} "
        f"(at least {threshold(s.over_threshold)}; median SSIM {number(s.ssim_median, 2)})."
    )


def _guessed(guess: Summary | None) -> str:
    if guess is None:
        return ""
    reached = guess.over_threshold
    line = (
        f"Guessing the mean of the other private images, without any attack, gives a median SSIM of "
        f"{number(guess.ssim_median, 2)} and {reached.count} of {guess.images} at least {threshold(reached)}."
    )
    return line if not reached.count else f"{line} Read the counts beside that: such images are alike."


def exposure_words(manifest: Mapping[str, Any], view: View, encodings: int) -> str:
    """How often each image was used, from the ledger's histogram where the set has one."""
    histogram = manifest.get("exposure_histogram_with_earlier_sets") or manifest.get("exposure_histogram")
    if not histogram:
        if not view.images:
            return ""
        return (
            f"The set has no exposure ledger. {encodings} encodings of {view.images} images are "
            f"{encodings / view.images:.1f} rounds: as many equations, up to signs, for each unknown pixel."
        )
    counts = sorted((int(k), int(v)) for k, v in histogram.items())
    least, most = counts[0][0], counts[-1][0]
    below, half = accumulate(v for _, v in counts), (sum(v for _, v in counts) + 1) // 2
    typical = next(k for (k, _), so_far in zip(counts, below, strict=True) if so_far >= half)  # the lower median
    span = f"{most}" if least == most else f"{least} to {most}, typically {typical}"
    advice = (
        "Every further encoding of an image makes it easier to recover; encode once and reuse (rounds = 1)."
        if most > 2 else "So few leave each image open; earlier or later sets of the same images would add to it."
    )  # fmt: skip
    earlier = ", earlier sets included" if "exposure_histogram_with_earlier_sets" in manifest else ""
    return f"By the exposure ledger{earlier}, an image stands in {span} encodings. {advice}"


def _keys(cells: Sequence[Cell], manifest: Mapping[str, Any]) -> list[str]:
    lines = []
    for cell in cells:
        if cell.attack != "prng_attack" or cell.status != "done":
            continue
        if cell.info.get("found", "nothing") == "nothing":
            lines.append(
                f"Keys: no seed found; searched {cell.info.get('searched_released')} of the released generator and "
                f"{cell.info.get('searched_own')} of this library's own."
            )
        else:
            lines.append(f"Keys: OPEN. They come from a small number ({cell.info['found']}), and it was found.")
    if manifest.get("insecure"):
        lines.append("The manifest says that the set was made with insecure_seed: anybody can undo it.")
    return lines


def _nearest(view: View, encodings: int) -> str | None:
    if view.law is None or not view.images:
        return None
    rounds = max(1, round(encodings / view.images))
    found = nearest_attack(measured_attacks(), view.law.k, view.law.private, view.images, rounds)
    if found is None:
        return None
    return (
        f"Measured before, at the nearest setting (k = {found['k']}, {found['images']} images, {found['rounds']} "
        f"rounds): {found['attack']}: {found['result']}."
    )
