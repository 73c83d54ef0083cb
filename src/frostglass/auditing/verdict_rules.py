"""The four verdicts, exactly: conditions, order, and the words. Nothing here reads a file or runs an attack."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from frostglass.guarantees.interval import clopper_pearson

Kind = Literal["BROKEN CLAIM", "VIOLATED", "BOUNDED", "INCONCLUSIVE"]

ORDER: tuple[Kind, ...] = ("BROKEN CLAIM", "VIOLATED", "BOUNDED", "INCONCLUSIVE")
"""The first that holds is the verdict; all that hold are reported."""

EXIT_CODES: dict[Kind, int] = {"BOUNDED": 0, "VIOLATED": 10, "INCONCLUSIVE": 11, "BROKEN CLAIM": 12}
"""Of `frostglass audit --gate`."""


@dataclass(frozen=True)
class Guarantee:
    """What is proved, or claimed, about the same event, chance, unit and adjacency.

    Args:
        observed: gamma for the messages that the attack saw.
        total: gamma for all releases that are claimed; at least `observed` counts for BOUNDED.
        basis: where it comes from, half a sentence.
        assumptions: what it needs, a sentence each; none: it bounds nothing.
    """

    observed: float
    total: float
    basis: str
    assumptions: tuple[str, ...]


@dataclass(frozen=True)
class Evidence:
    """What one test has come to.

    Args:
        trials, successes: independent trials.
        proved: images that the attack verified algebraically; each is a fact.
        kappa, tolerance, confidence: as fixed in the plan.
        tests: among which the error is shared (Bonferroni).
        guarantee: None where nothing is proved or claimed.
        linter_errors: rules that the configuration breaks.
        invalid: why the successes cannot be counted (not calibrated, not independent), a sentence each.
        lacking: what a statement that the attack does not succeed still needs, a sentence each.
        recognisable: which pictures reach the threshold, whether or not a trial is about them, as a clause; or empty.
        about: what the trials were decided on, a sentence each.
    """

    trials: int
    successes: int
    kappa: float
    tolerance: float
    confidence: float = 0.95
    tests: int = 1
    proved: int = 0
    guarantee: Guarantee | None = None
    linter_errors: int = 0
    invalid: tuple[str, ...] = ()
    lacking: tuple[str, ...] = ()
    recognisable: str = ""
    about: tuple[str, ...] = ()

    @property
    def bar(self) -> float:
        """What a violation exceeds: the tolerance, and never less than what guessing reaches."""
        return max(self.tolerance, self.kappa)


@dataclass(frozen=True)
class Decision:
    """A verdict.

    Args:
        verdict: the first of `ORDER` that holds.
        holds: all that hold, in order.
        lower, upper: limits of the success rate; None without a trial.
        text: sentences for a person.
        unsuccessful: whether it may be said that the attack did no better than guessing, and the upper limit be quoted.
    """

    verdict: Kind
    holds: tuple[Kind, ...]
    lower: float | None
    upper: float | None
    text: str
    unsuccessful: bool
    notes: tuple[str, ...] = field(default=())


def shared_level(confidence: float, tests: int) -> float:
    """Of the interval of each of several tests, so that `confidence` holds for all together (Bonferroni)."""
    return 1 - (1 - confidence) / tests


def confidence_words(confidence: float, tests: int) -> str:
    """The same for a reader."""
    return f"{100 * confidence:g} % confidence" + (f", shared among {tests} tests" if tests > 1 else "")


def decide(e: Evidence) -> Decision:
    """The verdict on one test."""
    lower, upper = None, None
    if e.trials:
        lower, upper = clopper_pearson(e.successes, e.trials, shared_level(e.confidence, e.tests))
    counts = lower is not None and not e.invalid
    floor = lower if counts and lower is not None else 0.0
    g = e.guarantee
    holds: list[Kind] = []
    if g is not None and floor > g.observed:
        holds.append("BROKEN CLAIM")
    if floor > e.bar or e.proved:
        holds.append("VIOLATED")
    if g is not None and g.assumptions and max(g.observed, g.total) <= e.tolerance and not e.linter_errors:
        holds.append("BOUNDED")
    if not holds:
        holds.append("INCONCLUSIVE")
    unsuccessful = counts and not e.lacking and "INCONCLUSIVE" in holds and floor <= e.kappa
    words = [_words(kind, e, floor, upper, unsuccessful) for kind in holds]
    return Decision(holds[0], tuple(holds), lower, upper, " ".join(words), unsuccessful)


def _words(kind: Kind, e: Evidence, lower: float, upper: float | None, unsuccessful: bool) -> str:
    seen = f"{e.successes} of {e.trials} trial{'s' if e.trials != 1 else ''} succeeded"
    sure = confidence_words(e.confidence, e.tests)
    g = e.guarantee
    if kind == "BROKEN CLAIM" and g is not None:
        return (
            f"The implementation, the accounting or a stated assumption is wrong: {seen}, a rate of at least "
            f"{lower:.3g} ({sure}), where {g.basis} allows {g.observed:.3g} at the most."
        )
    if kind == "VIOLATED" and lower > e.bar:
        return (
            f"The attack succeeds more often than tolerated: {seen}, a rate of at least {lower:.3g} ({sure}); "
            f"tolerated is {e.tolerance:g}."
        )
    if kind == "VIOLATED":
        what = "image was" if e.proved == 1 else "images were"
        return f"{e.proved} private {what} recovered and verified algebraically: a fact, whatever the number of trials."
    if kind == "BOUNDED" and g is not None:
        return (
            f"Under the assumptions listed, no attack of this event succeeds more often than "
            f"{max(g.observed, g.total):.3g} ({g.basis}); tolerated is {e.tolerance:g}, guessing reaches {e.kappa:.3g}."
        )
    return _inconclusive(e, seen, sure, (lower, upper), unsuccessful)


def _inconclusive(e: Evidence, seen: str, sure: str, limits: tuple[float, float | None], unsuccessful: bool) -> str:
    lower, upper = limits
    beats_guessing = lower > e.kappa
    parts = ["Nothing is shown, neither that images are at risk nor that they are not"]
    if beats_guessing:
        parts = [
            f"The attack succeeds more often than guessing, which reaches {e.kappa:.3g}, but not surely more often "
            f"than the {e.tolerance:g} tolerated: {seen}, a rate of at least {lower:.3g} ({sure})"
        ]
    elif e.recognisable:  # such pictures are shown; what is not is how often there is one of the image that was drawn
        parts = [f"{e.recognisable}, but how often that happens is not shown"]
    parts += [x.rstrip(".") for x in e.about]
    if not e.trials:
        parts.append("no trial was finished")
    elif e.invalid:
        parts.append(f"{seen}, and this cannot be counted: {'; '.join(_lowered(x) for x in e.invalid)}")
    elif unsuccessful:
        parts.append(f"{seen}; for the attack that was run, the rate is at most {upper:.3g} (two-sided, {sure})")
    elif not beats_guessing:
        parts.append(f"{seen}; that says nothing against the attack, as {'; '.join(_lowered(x) for x in e.lacking)}")
    if e.guarantee is not None:
        g = e.guarantee
        parts.append(
            f"the bound {max(g.observed, g.total):.3g} ({g.basis}) is above the {e.tolerance:g} tolerated"
            if max(g.observed, g.total) > e.tolerance
            else f"nothing is proved, as the linter reports errors: {e.linter_errors}"
        )
    return ". ".join(p[0].upper() + p[1:] for p in parts) + "."


def _lowered(sentence: str) -> str:
    text = sentence.rstrip(".")
    return text if text[:2].isupper() else text[0].lower() + text[1:]


def overall(kinds: list[Kind]) -> Kind:
    """Of several tests: a broken claim or a violation anywhere counts, and BOUNDED only where every test is bounded."""
    for kind in ("BROKEN CLAIM", "VIOLATED"):
        if kind in kinds:
            return kind
    return "BOUNDED" if kinds and all(k == "BOUNDED" for k in kinds) else "INCONCLUSIVE"
