"""First guess of which encodings share which image: k-means on similarities, class by class.

An encoding whose label names a class holds an image of that class (Carlini et al. 2021 use the label the same way), so
that the encodings of one class fall into as many groups as the class has images.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from frostglass.core.randomness import Rng


def images_per_class(mass: Float[Tensor, "e k"], images: int) -> Int64[Tensor, " k"]:
    """Number of images of each class, from the label mass alone: proportional, by largest remainder.

    Classes that occur get at least one image as long as there are enough images.
    """
    total = mass.sum(0).double()
    share = total / total.sum().clamp_min(1e-12) * images
    counts = share.floor()
    counts[(counts == 0) & (total > 0)] = 1
    while int(counts.sum()) > images:
        spare = torch.where(counts > 1, counts - share, torch.full_like(share, -torch.inf))
        if bool(spare.isinf().all()):
            spare = counts - share
        counts[spare.argmax()] -= 1
    while int(counts.sum()) < images:
        counts[(share - counts).argmax()] += 1
    return counts.long()


def classes_of_images(per_class: Int64[Tensor, " k"]) -> Int64[Tensor, " p"]:
    """[images] class of each image, in ascending order: per_class = (2, 0, 1) gives (0, 0, 2)."""
    return torch.repeat_interleave(torch.arange(len(per_class), device=per_class.device), per_class)


def cluster_within_labels(
    similarity: Float[Tensor, "e e"],
    mass: Float[Tensor, "e k"],
    per_class: Int64[Tensor, " k"],
    rng: Rng,
    restarts: int = 20,
    sweeps: int = 30,
) -> Float[Tensor, "e p"]:
    """Affinity of every encoding to every image (its group's mean similarity, standardised by row and column).

    Args:
        similarity: symmetric; the diagonal is ignored.
        mass: label rows; an encoding belongs to the classes with mass above 0.
        per_class: images of each class; images are numbered class by class (`classes_of_images`).
        restarts: random starts of each class's k-means; the one with the tightest groups is kept.
        sweeps: most k-means iterations.
    """
    s = similarity - similarity.mean()
    s.fill_diagonal_(0)
    columns = []
    for c, groups in enumerate(per_class.tolist()):
        if not groups:
            continue
        members = (mass[:, c] > 0).nonzero().flatten()
        member = _kmeans(s[members][:, members], mass[members, c], groups, rng.at("class", c), restarts, sweeps)
        columns.append(s[:, members] @ (member / member.sum(0).clamp_min(1e-12)))
    return torch.cat(columns, 1)


def _kmeans(s: Tensor, mass: Tensor, groups: int, rng: Rng, restarts: int, sweeps: int) -> Tensor:
    """[members, groups] mass of each member in its group."""
    if groups == 1 or len(s) <= groups:
        z = torch.arange(len(s), device=s.device) % groups
        return torch.nn.functional.one_hot(z, groups).to(s) * mass[:, None]
    best, kept = -torch.inf, torch.zeros(len(s), dtype=torch.long, device=s.device)
    for start in range(restarts):
        z = rng.at(start).integers(groups, (len(s),)).to(s.device)
        for _ in range(sweeps):
            one = torch.nn.functional.one_hot(z, groups).to(s) * mass[:, None]
            score = s @ (one / torch.linalg.vector_norm(one, dim=0).clamp_min(1e-9))
            now = score.argmax(1)
            if torch.equal(now, z):
                break
            z = now
        value = float((score.gather(1, z[:, None])[:, 0] * mass).sum())
        if value > best:
            best, kept = value, z
    return torch.nn.functional.one_hot(kept, groups).to(s) * mass[:, None]
