"""Convolutions as two smaller ones: three ways to read a kernel as matrices, and the module that each gives.

With a kernel (N, C, H, W), N out, C in:

- ``nc``, channels: one matrix N x CHW; a convolution into k channels, then one of width 1. Any number of dimensions.
- ``vh``, space: one matrix CH x NW; a vertical convolution into k channels, then a horizontal one.
- ``nd``, network decoupling: N matrices C x HW; k paths of a convolution of width 1 followed by one that keeps channels apart, summed.

Source: "Trained Rank Pruning for Efficient Deep Neural Networks", arXiv 2004.14566. Differs from its code: any stride, padding, dilation, padding mode and
bias; the k paths of ``nd`` stand in one pair of convolutions.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from echelon.linalg.checks import one_of
from echelon.models.modules import Spec, kind, like

SCHEMES = ("nc", "vh", "nd")
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def is_convolution(module: nn.Module) -> bool:
    return isinstance(module, CONVOLUTIONS)


def matrices(weight: Float[Tensor, "..."], scheme: str) -> Float[Tensor, "*batch rows columns"]:
    """A kernel as the matrix of a scheme, or as the N matrices of ``nd``; under ``nc`` a matrix is itself."""
    if scheme == "nc":
        return weight.flatten(1)
    if scheme == "nd":
        return weight.flatten(2)
    out, channels, height, width = weight.shape
    return weight.permute(1, 2, 0, 3).reshape(channels * height, out * width)


def kernel(found: Float[Tensor, "*batch rows columns"], scheme: str, shape: torch.Size) -> Float[Tensor, "..."]:
    """The inverse of :func:`matrices`, for a kernel of this shape."""
    if scheme == "vh":
        out, channels, height, width = shape
        return found.view(channels, height, out, width).permute(2, 0, 1, 3)
    return found.reshape(shape)


def parameters_at(shape: torch.Size, scheme: str, rank: int) -> int:
    """Numbers in the two factors of a weight of this shape, without the bias."""
    if scheme == "nd":
        return rank * shape[0] * (shape[1] + shape[2:].numel())
    rows, columns = (shape[1] * shape[2], shape[0] * shape[3]) if scheme == "vh" else (shape[0], shape[1:].numel())
    return rank * (rows + columns)


def conv_spec(name: str, module: Any, scheme: str, rank: int) -> Spec:
    """What a convolution becomes under a scheme.

    Raises:
        ValueError: if it has groups, or the scheme is not for its number of dimensions.
    """
    one_of("scheme", scheme, SCHEMES)
    if module.groups != 1:
        raise ValueError(f"{name} has groups {module.groups}; only convolutions with groups 1 can be factored")
    if scheme != "nc" and not isinstance(module, nn.Conv2d):
        raise ValueError(f"scheme is {scheme!r}; {name} is a {type(module).__name__}, so it must be nc")
    return {"kind": "factored_conv.convolution", "scheme": scheme, "rank": rank}


@kind("factored_conv.convolution")
def _convolution(spec: Spec, old: Any) -> nn.Module:
    return FactoredConv(old, spec["scheme"], spec["rank"], **like(old))


class FactoredConv(nn.Module):
    """``y = up(down(x))``, two convolutions with the bias on ``up``, in the place of a dense one.

    ``weight`` is an empty buffer, as in :class:`echelon.models.modules.LowRankLinear`.

    Args:
        old: the convolution whose sizes, stride, padding and dilation it has.
        scheme: ``nc``, ``vh`` or ``nd``.
        rank: channels between the factors; under ``nd`` for each output.
        factory: dtype and device.
    """

    def __init__(self, old: Any, scheme: str, rank: int, **factory: Any):
        super().__init__()
        self.scheme, self.rank = scheme, rank
        self.in_channels, self.out_channels = old.in_channels, old.out_channels
        self.cls: Any = next(cls for cls in CONVOLUTIONS if isinstance(old, cls))
        names = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
        self.geometry: dict[str, Any] = {name: getattr(old, name) for name in names}
        first, second = self._shares()
        self.down = self._conv(self.in_channels, rank * (self.out_channels if scheme == "nd" else 1), first, bias=False, **factory)
        groups = {"groups": self.out_channels} if scheme == "nd" else {}
        self.up = self._conv(self.down.out_channels, self.out_channels, second, bias=old.bias is not None, **groups, **factory)
        self.register_buffer("weight", torch.empty(0, **factory))

    def _conv(self, inputs: int, outputs: int, geometry: dict[str, Any], **rest: Any) -> Any:
        return nn.utils.skip_init(self.cls, inputs, outputs, **geometry, **rest)

    def _shares(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The geometry of both factors."""
        point = {"kernel_size": (1,) * len(self.geometry["kernel_size"])}
        if self.scheme == "vh":

            def along(axis: int) -> dict[str, Any]:
                rest = {"kernel_size": 1, "stride": 1, "padding": 0, "dilation": 1}
                made: dict[str, Any] = {"padding_mode": self.geometry["padding_mode"]}
                for name, nothing in rest.items():
                    value = self.geometry[name]
                    made[name] = value if isinstance(value, str) else tuple(v if i == axis else nothing for i, v in enumerate(value))
                return made

            return along(0), along(1)
        return (self.geometry, point) if self.scheme == "nc" else (point, self.geometry)

    @property
    def bias(self) -> nn.Parameter | None:
        return self.up.bias

    def spec(self) -> Spec:
        """What it takes to build it again from the dense convolution."""
        return {"kind": "factored_conv.convolution", "scheme": self.scheme, "rank": self.rank}

    def forward(self, x: Float[Tensor, "*batch channels space"]) -> Float[Tensor, "*batch out space_out"]:
        return self.up(self.down(x))

    @torch.no_grad()
    def fill(
        self, left: Float[Tensor, "*batch rows rank"], values: Float[Tensor, "*batch rank"], right: Float[Tensor, "*batch rank columns"],
        bias: Float[Tensor, " out"] | None,
    ) -> None:  # fmt: skip
        """Set the values from the leading singular triplets of :func:`matrices`: their roots on both sides, or under ``vh`` all on the second."""
        left_scale, right_scale = (torch.ones_like(values), values) if self.scheme == "vh" else (values.sqrt(), values.sqrt())
        left, right = left * left_scale[..., None, :], right * right_scale[..., :, None]
        if self.scheme == "nc":
            up, down = left, right
        elif self.scheme == "vh":
            down, up = left.T, right.view(self.rank, self.out_channels, -1).transpose(0, 1)
        else:
            down, up = left.transpose(1, 2), right
        self.up.weight.copy_(up.reshape(self.up.weight.shape))
        self.down.weight.copy_(down.reshape(self.down.weight.shape))
        if bias is not None:
            self.up.bias.copy_(bias)

    def product(self) -> Float[Tensor, "out channels *kernel"]:
        """The dense kernel that the factors stand for."""
        up, down = self.up.weight.double(), self.down.weight.double()
        size, rank = self.geometry["kernel_size"], self.down.weight.shape[0]
        if self.scheme == "nc":
            made = (up.flatten(1) @ down.flatten(1)).view(self.out_channels, self.in_channels, *size)
        elif self.scheme == "vh":
            made = torch.einsum("nkw,kch->nchw", up.view(self.out_channels, rank, size[1]), down.view(rank, self.in_channels, size[0]))
        else:
            made = torch.einsum("nkhw,nkc->nchw", up, down.view(self.out_channels, self.rank, self.in_channels))
        return made.to(self.up.weight.dtype)

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """The one convolution of the same function and the original size."""
        made = self._conv(self.in_channels, self.out_channels, self.geometry, bias=self.bias is not None, **like(self))
        made.weight.copy_(self.product())
        if self.bias is not None:
            made.bias.copy_(self.bias)
        return made

    def extra_repr(self) -> str:
        return f"in_channels={self.in_channels}, out_channels={self.out_channels}, scheme={self.scheme}, rank={self.rank}"
