"""The scores of a submission, as the challenge of 2020 defines them, means over all encodings.

    Max_SSIM = max(SSIM(dec, p1), SSIM(dec, p2))      Mean_SSIM = their mean      p1, p2: the private images of the row

Its README says Max_L2 in the text and Min_L2 in the table of results; both are computed. L2 is the mean squared
difference of pixels in [-1, 1], which fits its table (the distance of unrelated images, halved, is near 0.3).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from frostglass.auditing.metrics.ssim import ssim_values
from frostglass.auditing.unmixing_challenge import DECRYPTION, Opening, load_opening, read_about
from frostglass.core.errors import BadInput

CHUNK = 500
"""Encodings scored at a time."""


def score_challenge(folder: Path, submission: Path, opening: Path, *, either_sign: bool = False) -> dict[str, Any]:
    """Scores `submission` (decryption.npy, or the folder that holds it).

    Args:
        folder: the challenge.
        submission: one image for each encoding, in the order of the encodings.
        opening: the file that the challenge's maker keeps.
        either_sign: the whole submission may be negated: images from masked encodings have no sign of their own.

    Raises:
        BadInput: the opening is not the one committed to, or the submission does not fit.
    """
    about, held = read_about(folder), load_opening(opening)
    if held.commitment() != about["commitment"]:
        raise BadInput(f"challenge: {opening} is not the opening that {folder} commits to; its SHA-256 is another one.")
    given = _submission(submission / DECRYPTION if submission.is_dir() else submission, about)
    found = [_scores(given, held)]
    if either_sign:
        found.append(_scores(-given, held))
    best = max(found, key=lambda s: s["Max_SSIM"])
    return {**best, "encodings": len(given), "negated": best is not found[0], "commitment": "holds"}


def _submission(path: Path, about: dict[str, Any]) -> Tensor:
    """[E, c, h, w] in [-1, 1]."""
    try:
        held: NDArray[Any] = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as wrong:
        raise BadInput(
            f"challenge: the submission {path} cannot be read ({wrong}); save numbers with np.save."
        ) from None
    try:
        c, h, w = about["shape"]
        want = (about["encodings"], h, w, c)
    except (KeyError, TypeError, ValueError):
        raise BadInput(
            "challenge: challenge.json does not say how many encodings there are, or of which shape."
        ) from None
    if not isinstance(held, np.ndarray):
        raise BadInput(f"challenge: the submission {path} is an archive; save one array with np.save.")
    if held.shape != want or held.dtype.kind not in "fiu":
        raise BadInput(f"challenge: the submission is {held.shape} {held.dtype} and must be {want} of numbers.")
    x = torch.from_numpy(np.ascontiguousarray(held, np.float32)).permute(0, 3, 1, 2)
    if held.dtype == np.uint8:
        return x / 127.5 - 1
    low, high = float(x.min()), float(x.max())
    if not (np.isfinite(low) and np.isfinite(high)) or low < -1.001 or high > 1.001:
        raise BadInput(f"challenge: pixels of the submission run from {low:.4g} to {high:.4g}; give [-1, 1] or [0, 1].")
    return x * 2 - 1 if low >= -0.001 else x  # the same room for rounding at 0 as at the ends


def _scores(given: Tensor, held: Opening) -> dict[str, float]:
    truth = torch.from_numpy(held.images).permute(0, 3, 1, 2).float() / 127.5 - 1
    index = torch.from_numpy(held.indices[:, : held.private])
    total = dict.fromkeys(("Max_SSIM", "Mean_SSIM", "Max_L2", "Min_L2", "Mean_L2"), 0.0)
    for start in range(0, len(given), CHUNK):
        part, rows = given[start : start + CHUNK], index[start : start + CHUNK]
        ssim, l2 = [], []
        for slot in range(held.private):
            goal = truth[rows[:, slot]]
            ssim.append(ssim_values((part + 1) / 2, (goal + 1) / 2))
            l2.append((part - goal).double().square().flatten(1).mean(1))
        s, d = torch.stack(ssim), torch.stack(l2)
        for name, values in (
            ("Max_SSIM", s.amax(0)), ("Mean_SSIM", s.mean(0)), ("Max_L2", d.amax(0)), ("Min_L2", d.amin(0)),
            ("Mean_L2", d.mean(0)),
        ):  # fmt: skip
            total[name] += float(values.sum())
    return {name: round(value / len(given), 6) for name, value in total.items()}
