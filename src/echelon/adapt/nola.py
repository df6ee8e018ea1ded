"""NOLA: a LoRA whose factors are mixtures of random matrices, so that a seed and a few hundred coefficients a layer are all there is to store.

Source: "NOLA: Compressing LoRA using Linear Combination of Random Basis", arXiv 2310.02556. As in its code for language models, A begins at a random offset,
without which all gradients would be zero. Differs from that code: random numbers do not depend on the device, on what else was drawn or on the order of layers,
and leave the global random state alone; the offset is made from the seed and not stored; merging adds the mixtures, where the code adds the offsets alone.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from echelon.adapt.config import DeltaConfig
from echelon.adapt.linear import DeltaLinear, LoraFactors
from echelon.adapt.model import DeltaModel
from echelon.adapt.registration import register
from echelon.linalg.bases import Basis, seed_of
from echelon.linalg.checks import one_of, whole
from echelon.linalg.quantize import Quantized, pack, rtn, unpack
from echelon.registry import method

_TOLERANCE = 1e-6  # of the noted sum of eight entries; other numbers would differ by about 2 / sqrt(num_basis)


class BasisCache:
    """Bases that stay in memory once they are made: the first ones that fit, since a step uses all in the same order and would push out the one it needs next.

    Copies begin empty.
    """

    def __init__(self, limit: float) -> None:
        self.limit, self.held = limit, dict[Basis, tuple[torch.device, torch.dtype, list[tuple[slice, Tensor]]]]()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.limit,)

    @property
    def bytes(self) -> int:
        """How many are in use."""
        return sum(part.nbytes for _, _, parts in self.held.values() for _, part in parts)

    def chunks(self, basis: Basis, device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Those of the basis, from memory if they are there or may be put there."""
        device = torch.device(device)
        found = self.held.get(basis)
        if found is not None and found[:2] == (device, dtype):
            yield from found[2]
            return
        self.held.pop(basis, None)
        if self.bytes + basis.count * basis.rows * basis.columns * dtype.itemsize > self.limit:
            yield from basis.chunks(device, dtype)
            return
        with torch.inference_mode(False):
            parts = list(basis.chunks(device, dtype))
        self.held[basis] = device, dtype, parts
        yield from parts


@dataclass(frozen=True)
class CachedBasis(Basis):
    """A basis that looks into a cache first.

    Attributes:
        cache: of the adapter.
    """

    cache: BasisCache = field(default_factory=lambda: BasisCache(0), compare=False, repr=False)

    def chunks(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Iterator[tuple[slice, Float[Tensor, "some rows columns"]]]:
        return self.cache.chunks(self.uncached(), device, dtype)

    def uncached(self, chunk: int | None = None) -> Basis:
        """The same matrices, made anew each time."""
        return Basis(self.seed, self.count, self.rows, self.columns, self.rng, chunk or self.chunk)


class Bases(NamedTuple):
    """What a layer's factors are mixed from.

    Attributes:
        offset: of A: one matrix (r, in).
        A: matrices (r, in).
        B: matrices (out, r).
    """

    offset: Basis
    A: CachedBasis
    B: CachedBasis


class Mixture(NamedTuple):
    """Factors that were mixed, and from which coefficients."""

    coefficients: tuple[Tensor, Tensor]
    factors: tuple[Float[Tensor, "r in"], Float[Tensor, "out r"]]


@method(
    kind="adapter", name="nola", year=2023, arxiv="2310.02556",
    title="NOLA: Compressing LoRA using Linear Combination of Random Basis",
    summary="Train the coefficients of random matrices whose mixtures are LoRA's factors: a seed and a few hundred numbers a layer, at any rank.",
    published="LLaMA-2 70B on Alpaca: 0.57 M coefficients match a LoRA of rank 1 that has about 20 times as many parameters",
)  # fmt: skip
@dataclass
class NolaConfig(DeltaConfig):
    """``y = W x + (lora_alpha / r) B A dropout(x)`` with ``A = A0 + sum alpha_i A_i`` and ``B = sum beta_j B_j``; only alpha and beta train.

    A_i and B_j have entries uniform in (-1, 1) over the root of their number, A0 is LoRA's usual first A; all are made from the seed and the layer's name.
    alpha and beta begin at zero. They are few and act on many entries: learning rates are 10 to 100 times LoRA's (1e-3 to 1e-2), without weight decay.

    Random numbers are made anew for every forward and backward, which dominates small batches; `basis_cache` trades memory for it. Where nothing trains, the
    mixed factors are kept, at the memory of a LoRA. GPT-2 was published with r=8, 512 matrices and alpha 8, LLaMA-2 with r=16, 512 and alpha 4.

    Attributes:
        r: rank of the mixtures; it changes neither what is trained nor what is stored.
        lora_alpha: numerator of the scale; r by default, which makes it 1.
        num_basis: how many matrices each factor is mixed from.
        num_basis_A: how many A is mixed from, where it is another number.
        num_basis_B: how many B is mixed from, where it is another number.
        basis_rng: `torch_cpu` draws on the CPU with torch's generator, as the released code would there; `counter` hashes positions on the device itself,
            with the same numbers on all devices: quicker on a GPU, slower on a CPU.
        basis_cache: bases that stay in memory: `none`, `all`, or `auto`: the first ones up to basis_cache_bytes.
        basis_cache_bytes: limit of `auto`; one layer takes num_basis * r * (in + out) * 4 bytes.
        share_basis: layers whose factors have the same shape share their basis, which makes the cache small; the offsets stay different.
        chunk_basis: matrices in memory at once while they are made.
        coef_bits: save coefficients rounded to 4 or 8 bits between their least and largest value; null saves them as they are. Such a file loads through
            PEFT, but not through `load_adapter` of a transformers model.
        basis_signature: for each layer the sums of the first eight numbers of its two bases, set by the adapter and compared when it is loaded.
    """

    lora_alpha: float | None = None  # type: ignore[assignment]
    num_basis: int = 512
    num_basis_A: int | None = None
    num_basis_B: int | None = None
    basis_rng: str = "torch_cpu"
    basis_cache: str = "auto"
    basis_cache_bytes: int = 2**28
    share_basis: bool = False
    chunk_basis: int = 64
    coef_bits: int | None = None
    basis_signature: dict[str, list[float]] | None = None

    peft_name: ClassVar[str] = "echelon_nola"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_basis", "num_basis_A", "num_basis_B", "chunk_basis"):
            if getattr(self, name) is not None or name in ("num_basis", "chunk_basis"):
                whole(name, getattr(self, name), 1)
        one_of("basis_rng", self.basis_rng, ("torch_cpu", "counter"))
        one_of("basis_cache", self.basis_cache, ("none", "auto", "all"))
        whole("basis_cache_bytes", self.basis_cache_bytes, 0)
        if self.coef_bits not in (None, 4, 8):
            raise ValueError(f"coef_bits is {self.coef_bits!r}; it must be 4, 8 or null")
        self.stored = self.basis_signature is not None  # read from a file
        self.cache = BasisCache({"none": 0, "auto": self.basis_cache_bytes, "all": math.inf}[self.basis_cache])

    @property
    def counts(self) -> tuple[int, int]:
        """How many matrices A and B are mixed from."""
        return self.num_basis_A or self.num_basis, self.num_basis_B or self.num_basis

    def bases(self, key: str, rows: int, columns: int, rank: int) -> Bases:
        """What the factors of a layer (rows, columns) of this name are mixed from."""
        shapes = {"A": (rank, columns), "B": (rows, rank)}
        where: dict[str, tuple[str | int, ...]] = {part: shape if self.share_basis else (key,) for part, shape in shapes.items()}
        made = [
            CachedBasis(seed_of(self.seed, *where[part], part), count, *shapes[part], self.basis_rng, min(self.chunk_basis, count), self.cache)  # type: ignore[arg-type]
            for part, count in zip("AB", self.counts, strict=True)
        ]
        return Bases(Basis(seed_of(self.seed, key, "A0"), 1, rank, columns, self.basis_rng), *made)  # type: ignore[arg-type]


class NolaLinear(DeltaLinear):
    """A linear layer with coefficients of random factors.

    Attributes:
        bases: by adapter, what factors are mixed from.
        mixtures: by adapter, the factors that were mixed last while nothing trained.
    """

    prefix = "echelon_nola_"
    trained = ("coef_A", "coef_B")
    kept = ("bases", "mixtures")
    bases: dict[str, Bases]
    mixtures: dict[str, Mixture]

    def start(self, name: str, config: Any) -> dict[str, Tensor]:
        self.mixtures.pop(name, None)
        self.bases[name] = bases = config.bases(self.key, self.out_features, self.in_features, self.ranks[name])
        self._compare(bases, config)
        made = zip(self.trained, config.counts, strict=True)
        return {part: torch.zeros(count) if config.init_weights else torch.randn(count, generator=self.generator(config, part)) for part, count in made}

    def factors(self, name: str) -> LoraFactors:
        coefficients = self.part("coef_A", name), self.part("coef_B", name)
        scale = self.alphas[name] / self.ranks[name]
        if torch.is_grad_enabled() and any(some.requires_grad for some in coefficients):
            self.mixtures.pop(name, None)
            return LoraFactors(*self._mix(name, *coefficients), scale)
        last = self.mixtures.get(name)
        if last is None or any(_differ(a, b) for a, b in zip(last.coefficients, coefficients, strict=True)):
            with torch.inference_mode(False), torch.no_grad():
                own = coefficients[0].detach().clone(), coefficients[1].detach().clone()
                last = self.mixtures[name] = Mixture(own, self._mix(name, *own))
        return LoraFactors(*last.factors, scale)

    def _mix(self, name: str, coef_A: Float[Tensor, " a"], coef_B: Float[Tensor, " b"]) -> tuple[Float[Tensor, "r in"], Float[Tensor, "out r"]]:
        bases = self.bases[name]
        offset = bases.offset.combine(coef_A.new_full((1,), self.in_features**-0.5))
        return offset + bases.A.combine(coef_A), bases.B.combine(coef_B)

    def _compare(self, bases: Bases, config: Any) -> None:
        """Note the first numbers of the bases, or compare them with what was noted."""
        found = [math.fsum(basis.uncached(chunk=1).first()) for basis in (bases.A, bases.B)]
        if not config.stored:
            config.basis_signature = {**(config.basis_signature or {}), self.key: found}
            return
        noted = config.basis_signature.get(self.key, ())
        if len(noted) != 2 or any(abs(a - b) > _TOLERANCE for a, b in zip(found, noted, strict=True)):
            raise ValueError(
                f"the random bases of {self.key} are not those that the adapter was trained with: seed, basis_rng, share_basis, the layer's name or its shape "
                "differ, or this version of torch draws other numbers; where the adapter was trained, save_lora writes a LoRA that needs no bases"
            )


class NolaModel(DeltaModel):
    """A model with NOLA adapters."""

    prefix = "echelon_nola_"
    tuner_layer_cls = NolaLinear

    @classmethod
    def _get_adapter_state_dict(cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor], unwanted_adapter_names: list[str]) -> Any:
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        for key in _coefficients(found, adapter_name) if config.coef_bits else ():
            found[key] = rounded(found[key], config.coef_bits, key)
        return found

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]) -> Any:
        found = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        for key, count in _coefficients(found, adapter_name).items() if config.coef_bits else ():
            if found[key].dtype == torch.uint8:
                found[key] = restored(found[key], config.coef_bits, config.counts[count])
        return found


def rounded(coefficients: Float[Tensor, " count"], bits: int, name: str = "coefficients") -> UInt8[Tensor, " bytes"]:
    """Coefficients as codes of 4 or 8 bits between their least and largest value, behind eight bytes: the step and the least value in float32.

    Raises:
        ValueError: if they are not finite; the message has ``name``.
    """
    made = rtn(coefficients, bits, name=name)
    assert made.minimum is not None
    return torch.cat([torch.stack([made.scale[0], made.minimum[0]]).view(torch.uint8), pack(made.codes, bits)])


def restored(packed: UInt8[Tensor, " bytes"], bits: int, count: int) -> Float[Tensor, " count"]:
    """The coefficients that :func:`rounded` wrote, in float32.

    Raises:
        ValueError: if there are not as many bytes as ``count`` codes take.
    """
    scale, minimum = packed[:8].clone().view(torch.float32).split(1)
    return Quantized(unpack(packed[8:], bits, count), scale, minimum, None, bits, -1, torch.float32).dequantize()


def _coefficients(state: dict[str, Tensor], adapter_name: str) -> dict[str, int]:
    """Keys of the coefficients, each with 0 for those of A and 1 for those of B."""
    ends = [f".{NolaModel.prefix}{part}.{adapter_name}" for part in NolaLinear.trained]
    return {key: place for key in state for place, end in enumerate(ends) if key.endswith(end)}


def _differ(a: Tensor, b: Tensor) -> bool:
    return a.dtype != b.dtype or a.device != b.device or not torch.equal(a, b)


register("echelon_nola", NolaConfig, NolaModel)
