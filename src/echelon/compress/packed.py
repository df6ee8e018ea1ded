"""Linear layers whose matrix is stored in fewer bits: quantised ones, and pruned ones without their zeros.

Both are ``nn.Linear`` to the outside, so that PEFT finds them, with an empty ``weight`` (see :class:`echelon.models.modules.LowRankLinear`) and the bias as
it was. What is packed stands in integer buffers, which no cast to another dtype can change; steps and minima are the bit patterns of their
floating-point numbers for that reason.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

from echelon.linalg.quantize import Quantized, pack, quantize_activations, unpack
from echelon.models.modules import Spec, dense_module, kind, like

_AT_ONCE = 2**24  # numbers of a matrix that are unpacked at once


class PackedLinear(nn.Linear, ABC):
    """Base of the two: everything but how the matrix is stored.

    Args:
        spec: ``in``, ``out``, ``bias``, and ``transposed`` if the dense module was a ``Conv1D``.
        factory: dtype and device.
    """

    def __init__(self, spec: Spec, **factory: Any):
        nn.Module.__init__(self)  # nn.Linear's own draws random numbers
        self.in_features, self.out_features, self.transposed = spec["in"], spec["out"], spec.get("transposed", False)
        self.register_buffer("weight", torch.empty(0, **factory))
        self.register_parameter("bias", nn.Parameter(torch.zeros(self.out_features, **factory)) if spec["bias"] else None)

    @abstractmethod
    def dense(self) -> Float[Tensor, "out in"]:
        """The matrix that the layer multiplies by, in the layer's dtype."""

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one token."""
        return self.in_features * self.out_features

    def merge(self) -> nn.Module:
        """The dense module of the same function (but for rounded activations) and the original size."""
        return dense_module(self.dense().detach(), self.bias, self.transposed)

    @torch.no_grad()
    def _fill_bias(self, bias: Float[Tensor, " out"] | None) -> None:
        if bias is not None:
            self.bias.copy_(bias)


class QuantizedLinear(PackedLinear):
    """A matrix of codes of few bits (see :func:`echelon.linalg.pack` for their layout), unpacked a block of rows at a time when it is used.

    Gradients pass to the input, and straight through the rounding of activations; the codes are not trained.

    Args:
        spec: ``bits`` of a code (16: the matrix stays as it is, as parameter ``values``); ``group_size``; ``levels``: ``symmetric``, ``minimum`` or
            ``zero``, that is what is kept beside the step; ``scale_bits`` of steps and minima, 16 or 32; ``a_bits``, ``a_sym``, ``a_granularity`` and
            ``a_group`` of the activations (16: not rounded); and those of `PackedLinear`.
        factory: dtype and device.
    """

    codes: Tensor
    scale: Tensor
    minimum: Tensor
    zero: Tensor
    limits: Tensor

    def __init__(self, spec: Spec, **factory: Any):
        super().__init__(spec, **factory)
        self.bits, self.group_size, self.levels, self.a_bits = spec["bits"], spec["group_size"], spec["levels"], spec["a_bits"]
        self.rounding = {"granularity": spec["a_granularity"], "symmetric": spec["a_sym"], "group_size": spec["a_group"], "pad_groups": True}
        device, rows, columns = factory.get("device"), self.out_features, self.in_features
        if self.bits == 16:
            self.values = nn.Parameter(torch.zeros(rows, columns, **factory))
        else:
            self.register_buffer("codes", torch.zeros(rows, -(-columns * self.bits // 8), dtype=torch.uint8, device=device))
            shape = (1, 1) if self.group_size == 0 else (rows, 1 if self.group_size < 0 else -(-columns // self.group_size))
            stored = torch.int16 if spec["scale_bits"] == 16 else torch.int32
            self.register_buffer("scale", torch.zeros(shape, dtype=stored, device=device))
            if self.levels != "symmetric":
                self.register_buffer(self.levels, torch.zeros(shape, dtype=stored if self.levels == "minimum" else torch.uint8, device=device))
        if self.a_bits < 16 and spec["a_granularity"] == "tensor":
            self.register_buffer("limits", torch.zeros(2, dtype=torch.int32, device=device))

    @property
    def packed_parameters(self) -> int:
        """Numbers that the codes stand for."""
        return 0 if self.bits == 16 else self.in_features * self.out_features

    @torch.no_grad()
    def fill(self, matrix: Quantized | Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None, limits: tuple[float, float] | None = None) -> None:
        """Set the values; ``limits`` are those of the inputs, where their range is static."""
        self._fill_bias(bias)
        if limits is not None:
            self.limits.copy_(torch.tensor(limits, dtype=torch.float32).view(torch.int32))
        if not isinstance(matrix, Quantized):
            self.values.copy_(matrix)
            return
        self.codes.copy_(pack(matrix.codes, self.bits))
        self.scale.copy_(_bit_pattern(matrix.scale, self.scale.dtype))
        if matrix.minimum is not None:
            self.minimum.copy_(_bit_pattern(matrix.minimum, self.minimum.dtype))
        if matrix.zero is not None:
            self.zero.copy_(matrix.zero)

    def dense(self, rows: slice = slice(None)) -> Float[Tensor, "some in"]:
        """The matrix, or some of its rows: (code - zero) scale, or code scale + minimum, in float32 and rounded once to the layer's dtype."""
        if self.bits == 16:
            return self.values[rows]
        codes = unpack(self.codes[rows], self.bits, self.in_features).float()
        scale = self._wide(_numbers(self.scale), rows)
        if self.levels == "minimum":
            made = torch.addcmul(self._wide(_numbers(self.minimum), rows), codes, scale)
        elif self.levels == "zero":
            made = (codes - self._wide(self.zero.float(), rows)) * scale
        else:
            made = (codes - 2 ** (self.bits - 1)) * scale
        return made.to(self.weight.dtype)

    def _wide(self, value: Float[Tensor, "rows groups"], rows: slice) -> Float[Tensor, "some in"]:
        if self.group_size > 0:
            return value[rows].repeat_interleave(self.group_size, 1)[:, : self.in_features]
        return value if self.group_size == 0 else value[rows]

    def row_blocks(self) -> Iterator[slice]:
        step = max(1, _AT_ONCE // self.in_features)
        return (slice(start, start + step) for start in range(0, self.out_features, step))

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        if self.a_bits < 16:
            limits = tuple(_numbers(self.limits).tolist()) if self.rounding["granularity"] == "tensor" else None
            x = _Rounded.apply(x, self.a_bits, limits, self.rounding)
        if self.bits == 16:
            return nn.functional.linear(x, self.values, self.bias)
        product = _Product.apply(x, self)
        return product if self.bias is None else product + self.bias

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{shape}, bits={self.bits}, group_size={self.group_size}, levels={self.levels}, a_bits={self.a_bits}"


class PrunedLinear(PackedLinear):
    """The numbers that pruning kept, row after row, and one bit for each place: whatever the pattern, no zero is stored, and training cannot undo one.

    One bit a weight is also what the usual 2:4 format takes (two bits for each kept number), so that pattern has no format of its own. The matrix is
    unpacked to multiply; it saves memory, not time.

    Args:
        spec: ``kept``, how many numbers there are; and those of `PackedLinear`.
        factory: dtype and device.
    """

    mask: Tensor

    def __init__(self, spec: Spec, **factory: Any):
        super().__init__(spec, **factory)
        self.values = nn.Parameter(torch.zeros(spec["kept"], **factory))
        self.register_buffer("mask", torch.zeros(self.out_features, -(-self.in_features // 8), dtype=torch.uint8, device=factory.get("device")))

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one token, were zeros skipped."""
        return self.values.numel()

    @torch.no_grad()
    def fill(self, weight: Float[Tensor, "out in"], keep: Bool[Tensor, "out in"], bias: Float[Tensor, " out"] | None) -> None:
        """Set the values: those of ``weight`` where ``keep`` is true."""
        self._fill_bias(bias)
        self.values.copy_(weight[keep])
        self.mask.copy_(pack(keep.to(torch.uint8), 1))

    def dense(self) -> Float[Tensor, "out in"]:
        keep = unpack(self.mask, 1, self.in_features).bool()
        return self.values.new_zeros(keep.shape).masked_scatter(keep, self.values)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        return nn.functional.linear(x, self.dense(), self.bias)

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{shape}, kept={self.values.numel()}"


@kind("packed.quantized")
def _quantized(spec: Spec, old: nn.Module) -> nn.Module:
    return QuantizedLinear(spec, **like(old))


@kind("packed.pruned")
def _pruned(spec: Spec, old: nn.Module) -> nn.Module:
    return PrunedLinear(spec, **like(old))


class _Product(torch.autograd.Function):
    """``x W^T``, with nothing but the codes kept for the way back."""

    @staticmethod
    def forward(ctx: Any, x: Float[Tensor, "*batch in"], module: QuantizedLinear) -> Float[Tensor, "*batch out"]:
        ctx.module = module
        return torch.cat([nn.functional.linear(x, module.dense(rows).to(x.dtype)) for rows in module.row_blocks()], -1)

    @staticmethod
    def backward(ctx: Any, grad: Float[Tensor, "*batch out"]) -> tuple[Float[Tensor, "*batch in"], None]:  # type: ignore[override]
        parts = [grad[..., rows] @ ctx.module.dense(rows).to(grad.dtype) for rows in ctx.module.row_blocks()]
        return torch.stack(parts).sum(0), None


class _Rounded(torch.autograd.Function):
    """Activations rounded to few bits; the gradient passes as if they were not."""

    @staticmethod
    def forward(ctx: Any, x: Float[Tensor, "*batch in"], bits: int, limits: Any, rounding: dict[str, Any]) -> Float[Tensor, "*batch in"]:
        return quantize_activations(x, bits, limits=limits, name="the input of a quantised layer", **rounding)

    @staticmethod
    def backward(ctx: Any, grad: Float[Tensor, "*batch in"]) -> tuple[Float[Tensor, "*batch in"], None, None, None]:  # type: ignore[override]
        return grad, None, None, None


def _bit_pattern(value: Float[Tensor, "..."], stored: torch.dtype) -> Int[Tensor, "..."]:
    return value.to(torch.float16 if stored == torch.int16 else torch.float32).view(stored)


def _numbers(stored: Int[Tensor, "..."] | UInt8[Tensor, "..."]) -> Float[Tensor, "..."]:
    return stored.view(torch.float16 if stored.dtype == torch.int16 else torch.float32).float()
