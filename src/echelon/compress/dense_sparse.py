"""Linear layers whose matrix is a sparse combination of a small dense basis, block of columns by block: stored so, or learned through the factorizer."""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import embedding_bag, linear, pad

from echelon import linalg
from echelon.compress.packed import PackedLinear
from echelon.linalg.dictionary import SparseCode
from echelon.models.modules import Spec, kind, like

GATHER = 8  # a multiply-accumulate on gathered numbers takes about as long as this many in a matrix product


class DenseSparseLinear(PackedLinear):
    """``y_i = sum over blocks b and places j of values[i, b, j] (D_b x_b)[indices[i, b, j]]``, plus bias.

    Few tokens go through the basis first; for many the matrix is put together and multiplied, whichever takes less. Either way this saves memory and
    not time: there is no kernel for it. Basis and values can be trained, the supports stay.

    Args:
        spec: ``basis``, atoms of each block; ``nnz``, coefficients of a row in each block; ``block``, its columns; ``index_bits``, 8 or 16; and those of
            `PackedLinear`.
        factory: dtype and device.

    Attributes:
        basis: atoms in rows, the blocks side by side, [basis, in].
        values: coefficients, [out, blocks * nnz].
        indices: the atom of each coefficient, [out, blocks * nnz].
    """

    indices: Tensor

    def __init__(self, spec: Spec, **factory: object):
        super().__init__(spec, **factory)
        self.block, self.blocks, self.nnz = spec["block"], -(-self.in_features // spec["block"]), spec["nnz"]
        shape = (self.out_features, self.blocks * self.nnz)
        self.basis = nn.Parameter(torch.zeros(spec["basis"], self.in_features, **factory))  # type: ignore[call-overload]
        self.values = nn.Parameter(torch.zeros(shape, **factory))  # type: ignore[call-overload]
        self.register_buffer("indices", torch.zeros(shape, dtype=torch.uint8 if spec["index_bits"] == 8 else torch.int16, device=factory.get("device")))  # type: ignore[call-overload]

    def spec(self) -> Spec:
        """What it takes to build it again."""
        made = {"kind": "dense_sparse.linear", "in": self.in_features, "out": self.out_features, "bias": self.bias is not None, "basis": len(self.basis)}
        made |= {"nnz": self.nnz, "block": self.block, "index_bits": 8 * self.indices.element_size()}
        return made | ({"transposed": True} if self.transposed else {})

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one token that goes through the basis."""
        return self.basis.numel() + self.values.numel()

    def code(self) -> SparseCode:
        """The values as :func:`echelon.linalg.sparse_code` has them."""
        bases = self._table().detach().view(self.blocks, -1, self.block)
        return SparseCode(bases, self.values.detach().view(self._shape), self.indices.view(self._shape), self.in_features)

    @torch.no_grad()
    def fill(self, code: SparseCode, bias: Float[Tensor, " out"] | None) -> None:
        """Set the values, cast to this module's dtype."""
        self._fill_bias(bias)
        self.basis.copy_(code.bases.transpose(0, 1).flatten(1)[:, : self.in_features])
        self.values.copy_(code.values.flatten(1))
        self.indices.copy_(code.indices.flatten(1))

    def dense(self) -> Float[Tensor, "out in"]:
        """The matrix, put together in float32 or wider and rounded once to the layer's dtype; gradients reach basis and values."""
        wide = torch.promote_types(self.values.dtype, torch.float32)
        rows = embedding_bag(self._places().view(-1, self.nnz), self._table().to(wide), per_sample_weights=self.values.view(-1, self.nnz).to(wide), mode="sum")
        return rows.view(self.out_features, -1)[:, : self.in_features].to(self.values.dtype)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        tokens = x.numel() // self.in_features
        together = self.in_features * self.out_features * tokens + GATHER * self.nnz * self.in_features * self.out_features
        if together <= tokens * (self.basis.numel() + GATHER * self.values.numel()):
            return linear(x, self.dense(), self.bias)
        inputs = pad(x.reshape(tokens, -1), (0, self.blocks * self.block - self.in_features)).view(tokens, self.blocks, self.block)
        atoms = torch.einsum("brc,tbc->brt", self._table().view(self.blocks, -1, self.block), inputs).flatten(0, 1)
        made = embedding_bag(self._places(), atoms, per_sample_weights=self.values.to(atoms.dtype), mode="sum")
        made = made.T.reshape(*x.shape[:-1], self.out_features)
        return made if self.bias is None else made + self.bias

    @torch.no_grad()
    def widen(self, up: Float[Tensor, "out more"], down: Float[Tensor, "more in"]) -> None:
        """Add ``up @ down`` to the matrix, exactly: its rows become atoms that every row uses."""
        more, shape = len(down), (*self._shape[:2], len(down))
        new = torch.arange(len(self.basis), len(self.basis) + more, device=self.indices.device).expand(shape)
        values = torch.cat([self.values.view(self._shape), up[:, None].expand(shape).to(self.values)], 2)
        self._resize(torch.cat([self.basis, down.to(self.basis)]), values, torch.cat([self.indices.view(self._shape).long(), new], 2))

    @torch.no_grad()
    def narrow(self, more: int) -> None:
        """Undo :meth:`widen` by ``more`` directions."""
        values, indices = self.values.view(self._shape)[..., :-more], self.indices.view(self._shape)[..., :-more]
        self._resize(self.basis[: len(self.basis) - more].clone(), values, indices)

    def _resize(self, basis: Tensor, values: Tensor, indices: Tensor) -> None:
        trainable = self.basis.requires_grad, self.values.requires_grad
        self.nnz = values.shape[2]
        self.basis, self.values = nn.Parameter(basis, trainable[0]), nn.Parameter(values.flatten(1), trainable[1])
        self.indices = indices.flatten(1).to(torch.uint8 if len(basis) <= 256 else torch.int16)

    @property
    def _shape(self) -> tuple[int, int, int]:
        return self.out_features, self.blocks, self.nnz

    def _table(self) -> Float[Tensor, "atoms block"]:
        """The atoms of all blocks, one block after the other; the last is filled up with zeros where it is narrower."""
        padded = pad(self.basis, (0, self.blocks * self.block - self.in_features))
        return padded.view(-1, self.blocks, self.block).transpose(0, 1).reshape(-1, self.block)

    def _places(self) -> Int[Tensor, "out coefficients"]:
        """Where in :meth:`_table` each coefficient's atom stands."""
        return self.indices + (len(self.basis) * torch.arange(self.blocks, device=self.indices.device)).repeat_interleave(self.nnz)

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{shape}, basis={len(self.basis)}, nnz={self.nnz}, block={self.block}"


class StraightThroughLinear(DenseSparseLinear):
    """The layer while it learns: multiplies by the code, but the gradient goes to the dense matrix ``latent``, from which the code is made anew.

    It is larger than the dense layer. Saved, it holds what it takes to go on: latent matrix, basis and supports.

    Args:
        spec: as of `DenseSparseLinear`, with ``solver``, ``iterations`` and ``hysteresis`` of the factorizer.
        factory: dtype and device.
    """

    def __init__(self, spec: Spec, **factory: object):
        super().__init__(spec, **factory)
        self.latent = nn.Parameter(torch.zeros(self.out_features, self.in_features, **factory))  # type: ignore[call-overload]
        for name in ("basis", "values"):  # loading would set requires_grad on parameters
            start = getattr(self, name).detach()
            delattr(self, name)
            self.register_buffer(name, start)
        self.how = {name: spec[name] for name in ("solver", "iterations", "hysteresis")}

    def spec(self) -> Spec:
        return super().spec() | {"kind": "dense_sparse.latent"} | self.how

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one token: those of the matrix, which is put together."""
        return self.latent.numel()

    @torch.no_grad()
    def refactor(self) -> None:
        """Make the code fit the latent matrix as it is now, starting from the old code.

        Raises:
            ValueError: if another library keeps only a part of the matrix here (FSDP, ZeRO-3).
        """
        if self.latent.shape != (self.out_features, self.in_features):
            raise ValueError("the latent matrix is sharded; the factorizer needs all of it: train with DDP, or on one device")
        code = linalg.sparse_code(self.latent, len(self.basis), self.nnz, self.block, start=self.code(), dtype=torch.float64, **self.how)
        self.fill(code, None)

    @torch.no_grad()
    def settled(self) -> DenseSparseLinear:
        """The small layer with this code."""
        made = DenseSparseLinear(super().spec(), dtype=self.latent.dtype, device=self.latent.device)
        made.fill(self.code(), self.bias)
        return made

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        return linear(x, self.latent + (self.dense() - self.latent).detach(), self.bias)


@kind("dense_sparse.linear")
def _linear(spec: Spec, old: nn.Module) -> nn.Module:
    return DenseSparseLinear(spec, **like(old))


@kind("dense_sparse.latent")
def _latent(spec: Spec, old: nn.Module) -> nn.Module:
    return StraightThroughLinear(spec, **like(old))


def learning(model: nn.Module) -> Iterator[tuple[str, StraightThroughLinear]]:
    """Names and modules of all layers that learn through the factorizer."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, StraightThroughLinear))
