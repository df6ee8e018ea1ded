"""How layers share a sparsity: evenly, along a line, or by how little each of them changes its input.

Source of the last: "Change Is the Only Constant: Dynamic LLM Slicing based on Layer Redundancy", arXiv 2411.03513.
"""

import re
from collections.abc import Sequence

import torch
from torch import nn

from echelon.calibrate import Block, Calibration, LayerWalker
from echelon.models.families import FamilyAdapter


def block_redundancy(family: FamilyAdapter, calibration: Calibration) -> list[float]:
    """The redundancy of each block of the dense model."""
    return [redundancy(block) for block in LayerWalker(family.model, calibration)]


@torch.no_grad()
def redundancy(block: Block) -> float:
    """The mean cosine between a block's input and its output, over all tokens that are not pads.

    Raises:
        ValueError: if there is no token, or the activations are not finite.
    """
    block.outputs = block.run()
    cosines = [
        nn.functional.cosine_similarity(before.double(), after.double(), dim=-1)[... if mask is None else mask.bool()]
        for before, after, mask in zip(block.states, block.outputs, block.masks, strict=True)
    ]  # fmt: skip
    values = torch.cat([cosine.flatten() for cosine in cosines])
    if not len(values) or not values.isfinite().all():
        raise ValueError("the calibration data holds nothing but pads, or the activations are not finite; the redundancy of layers is unknown")
    return float(values.mean())


def by_redundancy(redundancy: Sequence[float], sparsity: float, base: float = 1 / 3, most: float = 0.9) -> list[float]:
    """Sparsity of each layer: a share ``base`` of the mean for all, the rest in proportion to redundancy above the least redundant layer.

    The paper scales its score and adds a base slice, and leaves the scaling open; this one keeps the mean at ``sparsity`` exactly. No
    layer loses more than ``most`` (or ``sparsity``, if that is more); what is over goes to the others.
    """
    most = max(most, sparsity)
    score = torch.tensor(redundancy, dtype=torch.float64)
    score = score - score.min()
    if float(score.sum()) < 1e-9:
        return [sparsity] * len(score)
    shares = sparsity * (base + (1 - base) * score / score.mean())
    while float(shares.max()) > most + 1e-12:
        over = (shares - most).clamp_min(0).sum()
        shares = shares.clamp_max(most)
        open_ = shares < most
        shares = torch.where(open_, shares + over / open_.sum(), shares)
    return shares.tolist()


def linear_ends(schedule: str) -> tuple[float, float]:
    """The two numbers of ``linear(first,last)``.

    Raises:
        ValueError: if it is anything else, or a number is outside [0, 1).
    """
    found = re.fullmatch(r"\s*linear\(\s*([\d.]+)\s*,\s*([\d.]+)\s*\)\s*", schedule)
    ends = (float(found[1]), float(found[2])) if found else (1.0, 1.0)
    if not all(0 <= share < 1 for share in ends):
        raise ValueError(f"schedule is {schedule!r}; it must be const, redundancy, linear(first,last) with numbers in [0, 1), or a list of such numbers")
    return ends
