"""What attention and the MLP of a block have inside while the model runs over calibration data."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from echelon.calibrate import Block, Moments
from echelon.models.families import FamilyAdapter

Affine = tuple[Float[Tensor, "out in"], Float[Tensor, " out"] | None]


class Inside:
    """What a block was seen to do in the dense (or so far compressed) model.

    Attributes:
        entering: moments of what attention reads.
        hidden: moments of the MLP's hidden units.
        queries: mean square of each dimension of each query head, before rotation and behind a norm of queries (up to a common factor).
        keys: the same of each key head.
    """

    entering: Moments
    hidden: Moments
    queries: Float[Tensor, "heads d"]
    keys: Float[Tensor, "kv_heads d"]

    @classmethod
    def of(cls, family: FamilyAdapter, walked: Block, parts: set[str]) -> "Inside":
        """Run the block over the calibration data; only what the wanted parts need is observed."""
        made, block, roles, shape = cls(), family.blocks[walked.index], family.roles, family.attention_shape
        entering, hidden = f"{walked.name}.{roles.attention[0]}", f"{walked.name}.{roles.mlp_out}"
        names = ([entering] if parts & {"qk", "vo"} else []) + ([hidden] if "mlp" in parts else [])
        norms = [norm for norm in (getattr(block.attention, name, None) for name in ("q_norm", "k_norm")) if norm is not None and "qk" in parts]
        squares = [_Squares(walked.masks) for _ in norms]
        handles = [norm.register_forward_hook(square) for norm, square in zip(norms, squares, strict=True)]
        try:
            moments = walked.observe(names).moments
        finally:
            for handle in handles:
                handle.remove()
        if entering in moments:
            made.entering = moments[entering]
        if hidden in moments:
            made.hidden = moments[hidden]
        if squares:
            made.queries, made.keys = (square.sum for square in squares)
        elif "qk" in parts:
            query, key, _ = family.split_qkv(block)
            made.queries, made.keys = (_mean_squares(part, made.entering).unflatten(0, (-1, shape.head_dim)) for part in (query, key))
        return made


class _Squares:
    """A forward hook that adds up the squares of a norm's outputs (batch, tokens, heads, d) over tokens that are no pads."""

    sum: Float[Tensor, "heads d"]

    def __init__(self, masks: Sequence[Tensor | None]) -> None:
        self.masks: Iterator[Tensor | None] = iter(masks)
        self.sum = torch.zeros(())

    def __call__(self, module: nn.Module, args: Any, out: Float[Tensor, "batch tokens heads d"]) -> None:
        mask = next(self.masks)
        rows = out.flatten(0, 1) if mask is None else out[mask.to(out.device).bool()]
        self.sum = self.sum.to(out.device) + rows.double().square().sum(0)


def _mean_squares(affine: Affine, inputs: Moments) -> Float[Tensor, " out"]:
    """Of the outputs of an affine map, from the moments of its inputs."""
    weight, shift = affine
    squares = ((weight @ inputs.second_moment) * weight).sum(1)
    return (squares if shift is None else squares + shift * (2 * weight @ inputs.mean + shift)).clamp_min(0)
