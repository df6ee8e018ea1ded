"""Round-to-nearest quantisers of weights and activations, and codes packed into bytes.

Source: "ZeroQuant-V2", arXiv 2303.08302 (the RTN study).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from echelon.linalg.checks import double, one_of, whole

CONVENTIONS = ("standard", "deepspeed")
ZERO_POINTS = ("float", "int")
GRANULARITIES = ("tensor", "token", "block")


@dataclass(frozen=True)
class Quantized:
    """Codes of b bits and what they mean: (code - zero) * scale, or code * scale + minimum.

    Attributes:
        codes: 0..2^b - 1, in the shape of what was quantised. Symmetric codes stand for code - 2^(b-1).
        scale: step of each group, float32, [..., groups].
        minimum: what code 0 stands for, for asymmetric codes with a float zero point; else None.
        zero: the code of 0, for asymmetric codes with a whole zero point; else None.
        bits: b.
        group_size: neighbours in the last dimension that share a step; -1 all of a row, 0 the whole tensor.
        dtype: of what was quantised.
    """

    codes: UInt8[Tensor, "... n"]
    scale: Float[Tensor, "... groups"]
    minimum: Float[Tensor, "... groups"] | None
    zero: Int[Tensor, "... groups"] | None
    bits: int
    group_size: int
    dtype: torch.dtype

    def dequantize(self, dtype: torch.dtype | None = None) -> Float[Tensor, "... n"]:
        """The values the codes stand for, computed in float64 and rounded once."""
        scale = self.widen(self.scale)
        if self.minimum is not None:
            values = self.codes.double() * scale + self.widen(self.minimum)
        elif self.zero is not None:
            values = (self.codes.double() - self.widen(self.zero)) * scale
        else:
            values = (self.codes.double() - 2 ** (self.bits - 1)) * scale
        return values.to(self.dtype if dtype is None else dtype)

    def widen(self, value: Float[Tensor, "... groups"], length: int | None = None) -> Float[Tensor, "... n"]:
        """What belongs to a group, in float64 and once for each of its members (or as it is, where it broadcasts)."""
        value = value.double()
        return value if self.group_size <= 0 else value.repeat_interleave(self.group_size, -1)[..., : length or self.codes.shape[-1]]


def rtn(
    values: Float[Tensor, "... n"], bits: int, *, symmetric: bool = False, group_size: int = -1, zero_point: str = "float",
    convention: str = "standard", pad_groups: bool = False, name: str = "weight",
) -> Quantized:  # fmt: skip
    """Round to the nearest of 2^b levels that span each group, half to even.

    ``standard``, symmetric: step max|w| / (2^(b-1) - 1), codes -2^(b-1)+1 .. 2^(b-1)-1. Asymmetric: step (max - min) / (2^b - 1), counted
    from the minimum; with a whole zero point the range is widened to hold 0, whose code is round(-min / step). A group of
    equal values, or of equal magnitudes where symmetric, is reproduced exactly (if float32 holds them). Quantising the result again changes nothing in float32
    and float64: steps are float32 numbers that survive the round trip.

    ``deepspeed``, as its training quantisers: steps max|w| / 2^(b-1) with codes -2^(b-1) .. 2^(b-1)-1, and (max - min) / 2^b with the
    minimum snapped to a multiple of the step; the largest value is then clipped by up to one step.

    Args:
        values: rows in the last dimension; for a weight [out, in], an output channel.
        bits: 2..8.
        symmetric: about zero.
        group_size: neighbours in a row that share a step; -1 the whole row, 0 the whole tensor.
        zero_point: ``float`` keeps the minimum, ``int`` a whole code for zero. For asymmetric standard codes.
        convention: ``standard`` or ``deepspeed``.
        pad_groups: let the last group of a row be short; else ``group_size`` must divide the row.
        name: of the values, for error messages.

    Raises:
        ValueError: if a knob is out of range, the groups do not fit, or the values are not finite; the message has ``name``.
    """
    whole("bits", bits, 2, 8)
    whole("group_size", group_size, -1)
    one_of("zero_point", zero_point, ZERO_POINTS)
    if one_of("convention", convention, CONVENTIONS) == "deepspeed" and zero_point == "int":
        raise ValueError("zero_point is 'int'; it must be 'float' with convention 'deepspeed', which has its own zero")
    wide = double(name, values)
    if wide.ndim == 0:
        raise ValueError(f"{name} has no dimension; it must have at least one")
    length = wide.shape[-1]
    if group_size > 0 and length % group_size and not pad_groups:
        raise ValueError(f"group_size is {group_size}; it must divide {length}, the row length of {name}, or pad_groups be set")
    groups = _grouped(wide, group_size)
    codes, scale, minimum, zero = (_deepspeed if convention == "deepspeed" else _standard)(groups, bits, symmetric, zero_point == "int")
    codes = codes.reshape(*wide.shape[:-1], -1)[..., :length] if group_size > 0 else codes.reshape(wide.shape)
    shape = (1,) * wide.ndim if group_size == 0 else (*wide.shape[:-1], -1)
    lows = None if minimum is None else minimum.float().reshape(shape).to(values.device)
    zeros = None if zero is None else zero.to(torch.int16).reshape(shape).to(values.device)
    codes = codes.to(torch.uint8).contiguous().to(values.device)
    return Quantized(codes, scale.float().reshape(shape).to(values.device), lows, zeros, bits, group_size, values.dtype)


def quantize_activations(
    values: Float[Tensor, "... n"], bits: int, *, granularity: str = "token", symmetric: bool = True, group_size: int = 128,
    limits: tuple[float, float] | None = None, pad_groups: bool = False, name: str = "activations",
) -> Float[Tensor, "... n"]:  # fmt: skip
    """Activations rounded to 2^b levels and back, in their own dtype.

    Args:
        values: the last dimension is one token.
        bits: 2..8.
        granularity: ``token``, each by its own range whatever else is in the batch; ``block``, each ``group_size`` of a token; ``tensor``, one
            range for all, measured here or given.
        symmetric: about zero.
        group_size: of ``block``.
        limits: static range (low, high) of ``tensor``; values beyond it are clipped.
        pad_groups: let a token's last block be short.
        name: of the values, for error messages.

    Raises:
        ValueError: if a knob is out of range or the values are not finite; the message has ``name``.
    """
    one_of("granularity", granularity, GRANULARITIES)
    if limits is None:
        size = {"tensor": 0, "token": -1, "block": group_size}[granularity]
        if granularity == "block":
            whole("group_size", group_size, 1)
        return rtn(values, bits, symmetric=symmetric, group_size=size, pad_groups=pad_groups, name=name).dequantize()
    low, high = limits
    if granularity != "tensor" or not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"limits is {limits!r}; it must be (low, high) with low < high, for granularity 'tensor' only")
    inside = double(name, values).clamp(low, high)
    if symmetric:
        inside = inside.clamp(-max(abs(low), abs(high)), max(abs(low), abs(high)))
        ends = inside.new_tensor([-max(abs(low), abs(high)), max(abs(low), abs(high))])
    else:
        ends = inside.new_tensor([low, high])
    # The two ends ride along and set the range.
    rounded = rtn(torch.cat([inside.flatten(), ends]), bits, symmetric=symmetric, group_size=0, name=name).dequantize()
    return rounded[:-2].reshape(values.shape).to(values.device, values.dtype)


def pack(codes: UInt8[Tensor, "... n"], bits: int) -> UInt8[Tensor, "... bytes"]:
    """Codes of 1..8 bits without gaps: each row is one stream of bits, lowest bits first, ending in zeros up to a whole byte.

    Code j takes the bits j*b .. j*b + b - 1 of its row. With 4 bits the even index is in the LOW half of a byte (DeepSpeed has it high);
    with 3 bits eight codes take three bytes.

    Raises:
        ValueError: if the codes are not uint8, empty, or do not fit into ``bits``.
    """
    whole("bits", bits, 1, 8)
    if codes.dtype != torch.uint8 or codes.ndim == 0 or codes.numel() == 0:
        raise ValueError(f"codes is {codes.dtype} of shape {tuple(codes.shape)}; it must be uint8 and not empty")
    if int(codes.max()) >= 2**bits:
        raise ValueError(f"codes has a value of {int(codes.max())}; it must be in 0..{2**bits - 1} for {bits} bits")
    length = codes.shape[-1]
    stream = torch.nn.functional.pad(codes, (0, -length % 8)).unflatten(-1, (-1, 8))  # eight codes fill `bits` bytes
    packed = stream.new_zeros(*stream.shape[:-1], bits)
    for position in range(8):
        byte, shift = divmod(position * bits, 8)
        packed[..., byte] |= stream[..., position] << shift
        if shift + bits > 8:
            packed[..., byte + 1] |= stream[..., position] >> (8 - shift)
    return packed.flatten(-2)[..., : _bytes(length, bits)].contiguous()


def unpack(packed: UInt8[Tensor, "... bytes"], bits: int, length: int) -> UInt8[Tensor, "... n"]:
    """What :func:`pack` packed, with ``length`` codes a row.

    Raises:
        ValueError: if the rows have not the bytes that ``length`` codes take.
    """
    whole("bits", bits, 1, 8)
    whole("length", length, 1)
    if packed.dtype != torch.uint8 or packed.ndim == 0 or packed.shape[-1] != _bytes(length, bits):
        raise ValueError(f"packed is {packed.dtype} of shape {tuple(packed.shape)}; it must be uint8 with {_bytes(length, bits)} bytes a row")
    stream = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % bits)).unflatten(-1, (-1, bits))
    codes = stream.new_zeros(*stream.shape[:-1], 8)
    for position in range(8):
        byte, shift = divmod(position * bits, 8)
        codes[..., position] = stream[..., byte] >> shift
        if shift + bits > 8:
            codes[..., position] |= stream[..., byte + 1] << (8 - shift)
    return (codes & (2**bits - 1)).flatten(-2)[..., :length].contiguous()


def _bytes(length: int, bits: int) -> int:
    return -(-length * bits // 8)


def _grouped(values: Float[Tensor, "... n"], group_size: int) -> Float[Tensor, "groups size"]:
    if group_size == 0:
        return values.reshape(1, -1)
    if group_size > 0:
        missing = -values.shape[-1] % group_size
        # A short group is filled with its own last value, which leaves its range as it is.
        values = torch.cat([values, values[..., -1:].expand(*values.shape[:-1], missing)], -1).unflatten(-1, (-1, group_size))
    return values.reshape(-1, values.shape[-1])


def _standard(groups: Tensor, bits: int, symmetric: bool, whole_zero: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    steps = 2**bits - 1
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    if symmetric:
        half = 2 ** (bits - 1) - 1
        least, most = groups.abs().amin(1, keepdim=True), groups.abs().amax(1, keepdim=True)
        scale = most / half
        scale = _settled(_storable(scale, most), lambda s: _single(half * s) / half)
        even = (least == most) & (_single(most) == most)
        scale = torch.where(even, torch.where(most > 0, most, torch.ones_like(most)), scale)
        return (groups / scale).round().clamp(-half, half) + half + 1, scale, None, None
    if not whole_zero:
        low = _single(low)
        constant = groups.amax(1, keepdim=True) == groups.amin(1, keepdim=True)
        scale = _settled(_storable((high - low) / steps, high - low), lambda s: (_single(steps * s + low) - low) / steps)
        scale = torch.where(constant, torch.ones_like(scale), scale)
        return ((groups - low) / scale).round().clamp(0, steps), scale, low, None
    constant = (low == high) & (low != 0) & (_single(low) == low)
    floor, ceiling = low.clamp_max(0), high.clamp_min(0)
    span = ceiling - floor
    scale = _storable(span / steps, span)
    zero = (-floor / scale).round().clamp(0, steps)
    scale = _settled(scale, lambda s: (_single((steps - zero) * s) - _single(-zero * s)) / steps)
    scale = torch.where(constant, low.abs(), scale)
    zero = torch.where(constant, (low < 0).double(), zero)
    codes = (groups / scale + zero).round().clamp(0, steps)
    # Where the zero point was a tie, an end of the range may round inward; a second pass would then shrink the range.
    codes = torch.where(constant | (groups != floor), codes, torch.zeros_like(codes))
    codes = torch.where(constant | (groups != ceiling), codes, torch.full_like(codes, steps))
    return torch.where(span > 0, codes, torch.zeros_like(codes)), scale, None, zero


def _deepspeed(groups: Tensor, bits: int, symmetric: bool, _: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    if symmetric:
        most, half = groups.abs().amax(1, keepdim=True), 2 ** (bits - 1)
        scale = _storable(most / half, most)
        return (groups / scale).round().clamp(-half, half - 1) + half, scale, None, None
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    scale = _storable((high - low) / 2**bits, high - low)
    # A constant group has no step to snap to.
    zero = _single(torch.where(high > low, (low / scale).round() * scale, low))
    return ((groups - zero) / scale).round().clamp(0, 2**bits - 1), scale, zero, None


def _single(value: Tensor) -> Tensor:
    return value.float().double()


def _storable(scale: Tensor, span: Tensor) -> Tensor:
    """The step as a normal float32 number; 1 where the range is empty."""
    return torch.where(span > 0, _single(scale).clamp_min(torch.finfo(torch.float32).tiny), torch.ones_like(scale))


def _settled(scale: Tensor, again: Callable[[Tensor], Tensor]) -> Tensor:
    """The float32 step that the rounded levels lead back to.

    ``again`` maps a step to the one that its own levels, rounded to float32, would yield. It is non-decreasing, so the iteration cannot cycle.
    """
    for _ in range(16):
        after = _single(again(scale))
        after = torch.where(after > 0, after, scale)
        if torch.equal(after, scale):
            break
        scale = after
    return scale
