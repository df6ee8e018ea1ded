"""Eight bits a number, in blocks: how optimizers store their moments. And four or eight bits, by rows: how they store what projection left out.

Source: "8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861: each block is divided by its largest magnitude and rounded to the
nearest of 256 levels that stand closer together near zero (dynamic tree quantisation).
"""

import functools

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from echelon.linalg.quantize import pack, unpack

BLOCK = 256


@functools.cache
def levels(signed: bool) -> Float[Tensor, "256"]:
    """The 256 levels in [-1, 1], or in [0, 1], ascending.

    Seven decades, the widest one finest: decade ``e`` from the smallest holds the centres of ``2**e`` (unsigned: twice as many) equal parts of [0.1, 1] of
    it. Zero and one are levels of their own.
    """
    decades = []
    for decade in range(7):
        parts = 2 ** (decade if signed else decade + 1)
        centres = 0.1 + 0.9 * (torch.arange(parts, dtype=torch.float64) + 0.5) / parts
        decades.append(10.0 ** (decade - 6) * centres)
    positive = torch.cat(decades)
    both = [positive, -positive] if signed else [positive]
    return torch.cat([*both, torch.tensor([0.0, 1.0], dtype=torch.float64)]).sort().values.float()


@functools.cache
def _cells(signed: bool, device: torch.device) -> tuple[UInt8[Tensor, "65536"], Float[Tensor, "65536"]]:
    """For floats that share their upper sixteen bits: the least of their codes, and the number above which the code is the next one.

    Two neighbouring midpoints between levels never lie among the same such floats.
    """
    table = levels(signed)
    midpoints = (table[1:] + table[:-1]) / 2
    upper = torch.arange(65536, dtype=torch.int32) << 16
    ends = torch.stack([upper, upper | 0xFFFF]).view(torch.float32)
    lowest = torch.bucketize(ends.nan_to_num().amin(0), midpoints)
    above = torch.cat([midpoints, midpoints.new_tensor([float("inf")])])[lowest]
    return lowest.to(device, torch.uint8), above.to(device)


def quantize(values: Float[Tensor, "..."], signed: bool = True) -> tuple[UInt8[Tensor, "..."], Float[Tensor, " blocks"]]:
    """Codes in the values' shape, and the largest magnitude of every block of 256 in row-major order.

    Args:
        values: finite numbers; non-negative where unsigned.
        signed: whether they have a sign.
    """
    flat = values.float().reshape(-1)
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(1)
    unit = (blocks / scale.clamp_min(1e-38)[:, None]).view(-1)[: len(flat)]
    lowest, above = _cells(signed, values.device)
    upper = (unit.view(torch.int32) >> 16).bitwise_and_(0xFFFF)  # a look-up costs a tenth of a search among the levels
    codes = lowest.index_select(0, upper).add_(unit > above.index_select(0, upper))
    return codes.reshape(values.shape), scale


def dequantize(codes: UInt8[Tensor, "..."], scale: Float[Tensor, " blocks"], signed: bool = True) -> Float[Tensor, "..."]:
    """The values that :func:`quantize` stored, in float32."""
    unit = levels(signed).to(codes.device).index_select(0, codes.reshape(-1).int())
    whole = torch.nn.functional.pad(unit, (0, -len(unit) % BLOCK)).view(-1, BLOCK) * scale[:, None]
    return whole.view(-1)[: len(unit)].reshape(codes.shape)


def quantize_rows(
    values: Float[Tensor, "m n"], bits: int
) -> tuple[UInt8[Tensor, "m bytes"], Float[Tensor, "m 1"], Float[Tensor, "m 1"]]:  # fmt: skip
    """Each row rounded to ``2**bits`` even levels from its least to its largest number: packed codes, the least number, and the step.

    An error is at most half a step (and the rounding of the values' dtype); a row of equal numbers comes back exactly.

    Args:
        values: finite.
        bits: 4 (two codes a byte) or 8.
    """
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    unit = (values - low) / torch.where(step > 0, step, torch.ones_like(step))
    return pack(unit.add_(0.5).floor_().clamp_(0, 2**bits - 1).to(torch.uint8), bits), low, step


def dequantize_rows(
    codes: UInt8[Tensor, "m bytes"], low: Float[Tensor, "m 1"], step: Float[Tensor, "m 1"], bits: int, length: int
) -> Float[Tensor, "m n"]:  # fmt: skip
    """The values that :func:`quantize_rows` stored of rows of this length, in the dtype of ``low``."""
    return torch.addcmul(low, unpack(codes, bits, length).to(low.dtype), step)
