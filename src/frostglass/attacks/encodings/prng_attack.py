"""Opens an encoded set whose keys come from a small number: search, replay, unmask, least squares.

The private coefficients stand in the labels, so each seed can be refused by the first of them that it does not give. A
seed that gives all is the one; with it come pairs and masks, and the images follow from linear equations. Two
generators are tried: the released code's (the InstaHide challenge fell this way) and this library's own under
`insecure_seed`, as a set or a challenge draws from it. A key of the operating system is not among 2^32 numbers, and the
search says what it has searched.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from frostglass.attacks.encodings.given import (
    NO_ENCODINGS,
    Mixing,
    encodings_of,
    messages_of,
    mixing_of,
    nothing,
    targets_of,
)
from frostglass.attacks.registry import ATTACKS
from frostglass.core.drive import Scalars
from frostglass.core.errors import AttackFailed, BadInput
from frostglass.core.reconstruction import Reconstruction
from frostglass.core.runtime import Runtime
from frostglass.core.threat import Knows, Observation
from frostglass.numerics.phase_retrieval import pixel_signs
from frostglass.numerics.prng_search import Clues, clues_of, label_mode, search_permutation, search_released
from frostglass.numerics.prng_search_challenge import challenge_keys, search_challenge
from frostglass.numerics.prng_search_own import own_keys, search_own
from frostglass.numerics.prng_search_released import SEEDS, SeededKeys, released_keys
from frostglass.numerics.prng_search_solve import consistent, second_classes, solve_images

RELEASED_STEP, OWN_STEP = 1 << 18, 1 << 14
"""Seeds looked at in one step: about a second each."""
ENOUGH = 40.0
"""Bits of evidence that labels must hold beyond the size of the search."""


@dataclass(frozen=True)
class Search:
    """How far it has come: next seed of each search, and what was found (-1: nothing yet)."""

    released: int
    own: int
    permutations: int
    released_seed: int = -1
    torch_seed: int = -1
    own_seed: int = -1


@dataclass(frozen=True)
class PrngAttack:
    """See `prng_attack`."""

    name: str
    first: int
    last: int
    torch_search: bool
    needs: frozenset[Knows] = frozenset({Knows.DEFENCE, Knows.EXAMPLES})
    every: int = 1

    @property
    def steps(self) -> int:
        """Chunks of all searches together."""
        seeds = self.last - self.first
        return -(-seeds // RELEASED_STEP) * (2 if self.torch_search else 1) + -(-seeds // OWN_STEP)

    def check(self, seen: Observation) -> list[str]:
        """Sentences on why this observation cannot be attacked."""
        if not messages_of(seen):
            return [NO_ENCODINGS]
        targets, mixing = targets_of(seen), mixing_of(seen)
        if targets is None:
            return ["it searches by the coefficients in the labels, and no labels were given."]
        if mixing is None:
            return ["it needs k and the number of private slots; give --known k=6,private=2."]
        if not seen.examples:
            return ["it needs the number of private images; give --known images=N."]
        if label_mode(targets.numpy(), mixing.law) is None:
            return ["the labels are one-hot: they hold no coefficients to search by."]
        try:
            clues = clues_of(targets.numpy(), mixing.law)
        except BadInput as wrong:
            return list(wrong.problems)
        bits = float(np.log2(max(2, self.last - self.first)))
        if clues.bits < bits + ENOUGH:
            return [
                f"the first {len(clues.kinds)} of {len(targets)} labels, which it goes by, hold about {clues.bits:.0f} "
                f"bits, too few to tell one seed of 2^{bits:.0f}."
            ]
        return []

    def init(self, seen: Observation, run: Runtime) -> Search:
        """Nothing has been searched."""
        if not bool(encodings_of(seen).isfinite().all()):
            raise AttackFailed("prng_attack: the encodings hold values that are not finite.")
        return Search(self.first, self.first, self.first)

    def step(self, seen: Observation, state: Search, run: Runtime, t: int) -> tuple[Search, Scalars]:
        """One chunk: the released generator first, then this library's own."""
        mixing = mixing_of(seen)
        targets = targets_of(seen)
        assert mixing is not None
        assert targets is not None
        assert seen.examples is not None
        clues = clues_of(targets.numpy(), mixing.law)
        folded = mixing.law.law == "folded_normal"
        if state.released_seed >= 0:
            new = self._permutations(seen, state, mixing, targets)
        elif folded and state.released < self.last:
            new = self._released(seen.examples, state, mixing, clues, targets)
        else:
            stop = min(self.last, state.own + OWN_STEP)
            rounds = _rounds(mixing, seen.examples, len(targets))
            if rounds:
                seed = search_challenge(clues, mixing.law, seen.examples, rounds, state.own, stop)
            else:
                shards = mixing.shards or (len(targets),)
                seed = search_own(clues, mixing.law, shards, state.own, stop)
            new = replace(state, own=stop, own_seed=seed)
        return new, {"searched": float(new.released + new.own + new.permutations - 3 * self.first)}

    def _released(self, images: int, state: Search, mixing: Mixing, clues: Clues, targets: Tensor) -> Search:
        stop = min(self.last, state.released + RELEASED_STEP)
        found = search_released(clues, mixing.law, images, state.released, stop)
        if found < 0:
            return replace(state, released=stop)
        same = consistent(found, targets[:images].numpy(), images, mixing.law)
        return replace(state, released=stop, released_seed=found, torch_seed=found if same else -1)

    def _permutations(self, seen: Observation, state: Search, mixing: Mixing, targets: Tensor) -> Search:
        """The coefficients' seed is known, that of permutations and masks is another one."""
        assert seen.examples is not None
        first, second = second_classes(state.released_seed, targets.numpy(), seen.examples, mixing.law)
        stop = min(self.last, state.permutations + RELEASED_STEP)
        return replace(state, permutations=stop, torch_seed=search_permutation(first, second, state.permutations, stop))

    def done(self, state: Search) -> bool:
        """Both seeds are known, or everything was searched."""
        if state.own_seed >= 0 or (state.released_seed >= 0 and state.torch_seed >= 0):
            return True
        if state.released_seed >= 0:
            return not self.torch_search or state.permutations >= self.last
        return state.released >= self.last and state.own >= self.last

    def read(self, seen: Observation, state: Search) -> Reconstruction:
        """The images, if a seed was found; else what was searched."""
        info: dict[str, float | int | str | bool] = {
            "found": "nothing", "searched_released": _span(self.first, state.released),
            "searched_own": _span(self.first, state.own),
        }  # fmt: skip
        mixing = mixing_of(seen)
        assert mixing is not None
        candidates = self._keys(seen, state, mixing, info)
        if not candidates:
            return nothing(seen, **info)
        pool = None if mixing.public is None else mixing.public.flatten(1).float()
        y = encodings_of(seen).flatten(1).float()
        each = [solve_images(y, keys, seen.examples or 0, mixing.mask, pool) for keys in candidates]
        solved = min(each, key=lambda s: s.residual)
        info["residual"] = solved.residual
        images = solved.images.view(-1, *seen.image_shape).clamp(-1, 1)
        if solved.open_signs:  # absolute values, and no known public image: neighbours agree under one sign for the set
            images, info["sign_free"] = images * pixel_signs(images), True
        return Reconstruction(
            images,
            torch.zeros(len(solved.images), dtype=torch.bool),
            solved.residual,
            info=info,
        )

    def _keys(
        self, seen: Observation, state: Search, mixing: Mixing, info: dict[str, float | int | str | bool]
    ) -> list[SeededKeys]:
        """Keys of every row; several where the order of the rows is open."""
        n, e, d = seen.examples or 0, len(encodings_of(seen)), int(np.prod(seen.image_shape))
        if state.own_seed >= 0:
            info |= {"found": "insecure_seed of this library's encoder", "seed": state.own_seed}
            shards, masked = mixing.shards or (e,), mixing.mask == "sign"
            rounds = _rounds(mixing, n, e)
            if rounds:
                return [challenge_keys(state.own_seed, n, mixing.public_images, rounds, mixing.law, d)]
            if sum(shards) % n:
                info["mask"] = f"coefficients only: {sum(shards)} encodings are no whole number of rounds of {n} images"
                return []
            return [
                own_keys(state.own_seed, n, mixing.public_images, shards, mixing.law, d, masked, in_rounds)
                for in_rounds in (False, True)
            ]
        if state.released_seed < 0:
            return []
        info |= {"found": "seed of the released generator", "seed": state.released_seed}
        if state.torch_seed < 0:
            info["mask"] = (
                f"coefficients only: {_span(self.first, state.permutations)} hold no seed of the permutations"
            )
            return []
        info["torch_seed"] = state.torch_seed
        if mixing.law.private < mixing.law.k and mixing.public_images < n:
            info["mask"] = "coefficients and first pairs only: say how many public images there are (--known public=M)"
            return []
        public = mixing.public_images if mixing.law.private < mixing.law.k else 0
        pixels = d if mixing.mask == "sign" else 0
        return [released_keys(state.released_seed, n, public, -(-e // n), mixing.law, pixels, state.torch_seed)]


def _rounds(mixing: Mixing, images: int, encodings: int) -> int:
    """Rounds of a whole challenge of our own; 0 for anything else."""
    return mixing.challenge_rounds if mixing.challenge_rounds * images == encodings else 0


def _span(first: int, next_: int) -> str:
    return "nothing" if next_ <= first else f"seeds {first} to {next_ - 1}"


@ATTACKS.register(paper="InstaHide challenge, PRNG attack (Carlini et al. 2020)", family="encodings", reads="encodings")
def prng_attack(*, first: int = 0, last: int = 1 << 20, torch_search: bool = True) -> PrngAttack:
    """Opens a set made with a 32-bit-seeded generator, by searching the seed through the labels' coefficients.

    Args:
        first, last: seeds first to last - 1 are searched; a checkpoint keeps how far.
        torch_search: where the coefficients' seed does not give the pairs too, search another one for those.
    """
    if not 0 <= first < last <= SEEDS:
        raise BadInput(f"prng_attack: seeds {first} to {last} are no range within 0 to 2^32; give first < last.")
    return PrngAttack("prng_attack", first, last, torch_search)
