"""What InstaHide claims to cost an attacker, what it has cost in fact, and what it does not give."""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from frostglass.core.errors import BadInput
from frostglass.defenses.honesty import WARNING, claimed_work

NO_GUARANTEE = "(epsilon, delta): none. InstaHide proves nothing about an image; for a proof use DP-SGD."
PUBLISHED = (
    "published: 100 images in 50 rounds at k = 6 were recovered for under 20 dollars of GPU time (Carlini et al. 2021)"
)


@dataclass(frozen=True)
class Cost:
    """The cost report of one setting.

    Args:
        k: images in one encoding.
        private: private ones among them.
        images: size of the private set, N.
        public: size of the public pool, 0 without one.
        rounds: encodings with each image as first image, R.
        log10_naive, log10_middle: tries of the claimed brute force: over all partners, and meeting in the middle.
        nearest: the measured attack whose setting is nearest, None if none has been measured.
    """

    k: int
    private: int
    images: int
    public: int
    rounds: int
    log10_naive: float
    log10_middle: float
    nearest: Mapping[str, Any] | None

    @property
    def encodings(self) -> int:
        """E = N R, encodings in all."""
        return self.images * self.rounds

    @property
    def appearances(self) -> int:
        """Encodings that an image is in, on average: R as first image and (private - 1) R as partner."""
        return self.private * self.rounds

    def lines(self) -> list[str]:
        """The report, a sentence or two a line."""
        return [
            f"claimed brute-force work: {_power(self.log10_naive)} tries over all partners, "
            f"{_power(self.log10_middle)} meeting in the middle; a worst-case figure for a single encoding, which "
            "attacks on many encodings do not pay",
            f"encodings per image: {self.appearances} on average ({self.rounds} as first image, "
            f"{self.appearances - self.rounds} as partner); {self.encodings} encodings in all",
            f"unknowns against equations: {self.images} private images, {self.encodings} encodings, so "
            f"{self.rounds} equation{'s' if self.rounds > 1 else ''} (up to signs) for each unknown pixel",
            f"measured success of our own attacks at the nearest setting: {_measured(self.nearest)}",
            PUBLISHED,
            NO_GUARANTEE,
        ]

    def text(self) -> str:
        """The whole report for a person."""
        pool = f"{self.public} public images" if self.public else "no public pool"
        head = f"InstaHide, k = {self.k} ({self.private} private), {self.images} private images, {pool}"
        often = f"{self.rounds} round{'s' if self.rounds > 1 else ''}"
        return "\n".join([f"{head}, {often}", WARNING, *(f"- {line}" for line in self.lines())])

    def to_json(self) -> dict[str, Any]:
        """The same as values; tries beyond what a float holds are None, their logarithms never are."""
        return {
            "k": self.k,
            "private": self.private,
            "private_images": self.images,
            "public_images": self.public,
            "rounds": self.rounds,
            "claimed_tries_naive": _tries(self.log10_naive),
            "claimed_tries_meet_in_the_middle": _tries(self.log10_middle),
            "claimed_log10_tries_naive": self.log10_naive,
            "claimed_log10_tries_meet_in_the_middle": self.log10_middle,
            "encodings": self.encodings,
            "encodings_per_image": self.appearances,
            "equations_per_unknown": self.rounds,
            "nearest_measured_attack": None if self.nearest is None else dict(self.nearest),
            "published_attack": PUBLISHED,
            "epsilon_delta": None,
            "warning": WARNING,
        }


def _power(log10: float) -> str:
    power = math.floor(log10)
    first = f"{10 ** (log10 - power):.1f}"
    return f"1.0e+{power + 1:02d}" if first == "10.0" else f"{first}e+{power:02d}"


def _tries(log10: float) -> float | None:
    return float(10**log10) if log10 < sys.float_info.max_10_exp else None


def _measured(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "not measured"
    return (
        f"{found['attack']} at k = {found['k']} ({found['private']} private), {found['images']} images, "
        f"{found['rounds']} rounds: {found['result']}"
    )


@functools.cache
def measured_attacks() -> tuple[Mapping[str, Any], ...]:
    """The packaged table of our own attacks: attack, k, private, images, rounds, result (a short text) of each."""
    text = resources.files("frostglass.defenses").joinpath("measured_attacks.json").read_text(encoding="utf-8")
    return tuple(json.loads(text)["entries"])


def nearest_attack(
    table: Sequence[Mapping[str, Any]], k: int, private: int, images: int, rounds: int
) -> Mapping[str, Any] | None:
    """The entry with the same k, or the nearest k, then private slots, then rounds and images (by their ratio)."""

    def distance(entry: Mapping[str, Any]) -> tuple[float, float, float]:
        ratios = math.log(entry["rounds"] / rounds), math.log(entry["images"] / images)
        return abs(entry["k"] - k), abs(entry["private"] - private), math.hypot(*ratios)

    return min(table, key=distance, default=None)


def cost_of(k: int, private: int, images: int, public: int, rounds: int) -> Cost:
    """The cost report of a setting.

    Raises:
        BadInput: numbers that no encoding could have.
    """
    found = []
    if k < 1 or not 1 <= private <= k:
        found.append(f"k, private: {private} private images among k = {k} is not possible; give 1 <= private <= k.")
    if images < private:
        found.append(f"private images: {images} are fewer than the {private} that one encoding mixes.")
    if private < k and public < k - private:
        found.append(f"public images: {public} do not fill {k - private} public slots; give a pool, or private = k.")
    if private == k and public:
        found.append(
            f"private: all {k} slots are private, so the {public} public images have no use; give private < k."
        )
    if rounds < 1:
        found.append(f"rounds: {rounds} must be at least 1.")
    if found:
        raise BadInput(found)
    work = claimed_work(k, private, images, public)
    nearest = nearest_attack(measured_attacks(), k, private, images, rounds)
    return Cost(k, private, images, public, rounds, *work, nearest)
