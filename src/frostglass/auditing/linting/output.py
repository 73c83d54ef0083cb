"""What the linter found, as text, JSON, or SARIF 2.1.0."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from frostglass._version import __version__
from frostglass.auditing.linting.facts import Finding
from frostglass.auditing.linting.recompute import Recomputed
from frostglass.auditing.linting.rules import RULES
from frostglass.guarantees.psnr_ceiling import SAY_BOTH
from frostglass.guarantees.summary import Bound

SARIF_SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
WIDTH = 100


@dataclass(frozen=True)
class Checked:
    """One file, or the numbers of the command line.

    Args:
        name: of the file, as it was given.
        kind: what it was read as.
        mechanisms: how many were found in it.
        findings: what fired.
        numbers: recomputed, one for each mechanism with enough of them.
    """

    name: str
    kind: str
    mechanisms: int
    findings: tuple[Finding, ...]
    numbers: tuple[Recomputed, ...]

    @property
    def errors(self) -> int:
        """Findings that are errors."""
        return sum(f.severity == "error" for f in self.findings)


def as_text(checked: Checked) -> str:
    """For a person."""
    many = f"{checked.mechanisms} privacy mechanism{'s' if checked.mechanisms != 1 else ''}"
    lines = [f"{checked.name}: {checked.kind}, {many}"]
    if not checked.mechanisms:
        lines.append("  No mechanism was found, so nothing was checked; without one, nothing is proved either.")
    for f in checked.findings:
        file = f.file or checked.name
        place = f"{file}:{f.line}" if f.line else file
        lines += ["", f"{place}: {f.severity} [{f.rule}] {f.where}", *_wrapped(f.found)]
        lines += [*_wrapped(f"means: {f.meaning}"), *_wrapped(f"fix:   {f.fix}")]
    for n in checked.numbers:
        lines += ["", *_numbers(n)]
    errors, warnings = checked.errors, len(checked.findings) - checked.errors
    lines += ["", f"{_count(errors, 'error')}, {_count(warnings, 'warning')}."]
    if not errors and checked.mechanisms:
        lines.append("No rule reports an error: the numbers above hold if the implementation does what the file says.")
    return "\n".join(lines)


def _count(n: int, word: str) -> str:
    return f"{n} {word}{'s' if n != 1 else ''}"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent="    ", subsequent_indent="           ")


def _numbers(n: Recomputed) -> list[str]:
    said = "" if n.declared is None else f" (declared: {n.declared:g})"
    std = "" if n.noise_std is None else f"noise s = {n.noise_std:.4g}, "
    many = "one release" if n.steps == 1 else f"{n.steps} releases"
    best = min(n.epsilon.values())
    lines = [
        f"  {n.where}, recomputed at the true sensitivity:",
        f"    {std}noise multiplier s / C = {n.sigma:.4g}, zCDP rho = {n.rho:.4g} a release",
        f"    epsilon at delta = {n.delta:g}: {best:.4g} over {many}{said}; one release: {n.epsilon_release:.4g}",
        "      " + ", ".join(f"{name} {value:.4g}" for name, value in n.epsilon.items()),
        f"    gamma, the highest success of any attack, over {many}:",
        *(f"      chance {b.kappa:<6g} gamma {b.gamma:.4f}{_error(b)}" for b in n.gamma),
    ]
    if n.psnr is not None:
        size = f"{n.dimensions} values" if n.dimensions_given else "3 x 224 x 224 values (--image says another size)"
        lines.append(f"    PSNR ceiling without a prior, update of one image of {size}: {n.psnr:.1f} dB")
        lines += textwrap.wrap(SAY_BOTH, WIDTH, initial_indent="      ", subsequent_indent="      ")
    else:
        lines.append("    PSNR ceiling: none; one image is only a part of a client's clipped update")
    return lines


def _error(bound: Bound) -> str:
    """Of a simulation, whose runs are few where releases are many."""
    return f" ± {bound.standard_error:.1g} (one standard error)" if bound.standard_error else ""


def as_json(checked: Checked) -> dict[str, Any]:
    """As values."""
    return {
        "file": checked.name,
        "kind": checked.kind,
        "mechanisms": checked.mechanisms,
        "errors": checked.errors,
        "findings": [asdict(f) | {"file": f.file or checked.name} for f in checked.findings],
        "recomputed": [n.to_json() for n in checked.numbers],
    }


def as_sarif(checked: Sequence[Checked]) -> dict[str, Any]:
    """A SARIF 2.1.0 log, as code hosts read it."""
    driver: Mapping[str, Any] = {
        "name": "frostglass",
        "version": __version__,
        "semanticVersion": __version__,
        "rules": [
            {
                "id": r.id,
                "name": r.id.title().replace("-", ""),
                "shortDescription": {"text": r.about[0].upper() + r.about[1:] + "."},
            }
            for r in RULES
        ],
    }
    ids = [r.id for r in RULES]
    results = [_result(c.name, f, ids) for c in checked for f in c.findings]
    return {
        "$schema": SARIF_SCHEMA,
        "version": "2.1.0",
        "runs": [{"tool": {"driver": driver}, "columnKind": "utf16CodeUnits", "results": results}],
    }


def _result(name: str, f: Finding, ids: Sequence[str]) -> dict[str, Any]:
    place: dict[str, Any] = {"artifactLocation": {"uri": (f.file or name).replace("\\", "/")}}
    if f.line:
        place["region"] = {"startLine": f.line}
    return {
        "ruleId": f.rule,
        "ruleIndex": ids.index(f.rule),
        "level": f.severity,
        "message": {"text": f"{f.where}: {f.found} {f.meaning} {f.fix}"},
        "locations": [{"physicalLocation": place}],
    }
