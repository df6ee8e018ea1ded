"""The one layer that all tuners share: a linear layer plus a product of two factors, without the product ever being formed in forward.

A tuner says what it keeps for each adapter (:attr:`DeltaLinear.trained` and :attr:`~DeltaLinear.frozen`), how that begins (:meth:`DeltaLinear.start`), and
which two factors it stands for (:meth:`DeltaLinear.factors`); forward, merging, dtypes, quantised bases, ``Conv1D`` and export follow.
"""

import warnings
from abc import abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from echelon.adapt.config import DeltaConfig
from echelon.linalg.bases import seed_of


class LoraFactors(NamedTuple):
    """What an adapter adds to a matrix (out, in): ``scale * B @ A``, as LoRA writes it.

    Attributes:
        A: (r, in).
        B: (out, r).
        scale: a number.
    """

    A: Float[Tensor, "r in"]
    B: Float[Tensor, "out r"]
    scale: float

    def dense(self) -> Float[Tensor, "out in"]:
        """The product, in float32 or the factors' dtype if that is wider."""
        dtype = torch.promote_types(self.A.dtype, torch.float32)
        return (self.B.to(dtype) @ self.A.to(dtype)) * self.scale


class DeltaLinear(nn.Module, BaseTunerLayer):
    """A linear layer with adapters beside it, of the names that PEFT gives them.

    What an adapter keeps is made in float32, or in the base's dtype if that is wider. PEFT's layers round first values to the dtype of the base, from which
    orthonormal factors and small numbers do not recover.

    Attributes:
        trained: what trains for each adapter; PEFT finds it in ``<prefix><part>``, a ``ParameterDict`` by adapter.
        frozen: what is saved and never trained.
        kept: names of dicts by adapter that a tuner has besides.
        key: name of the layer in the base model.
        ranks: rank by adapter.
        alphas: ``lora_alpha`` by adapter.

    Args:
        base_layer: ``nn.Linear``, ``Conv1D``, or a quantised layer that PEFT knows.
        adapter_name: of the first adapter.
        config: of the first adapter.
        key: name of the layer in the base model.
        quantization: what PEFT says about the model's quantisation.
    """

    prefix: ClassVar[str]
    trained: ClassVar[tuple[str, ...]] = ("A", "B")
    frozen: ClassVar[tuple[str, ...]] = ()
    kept: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        cls.adapter_layer_names = tuple(cls.prefix + part for part in cls.trained)
        frozen = (cls.prefix + part for part in cls.frozen)
        cls.other_param_names = (*frozen, cls.prefix + "dropout", "ranks", "alphas", "_merged_factors", *cls.kept)

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: DeltaConfig, key: str, **quantization: Any) -> None:
        super().__init__()
        self.base_layer, self.key = base_layer, key
        self.quantization_backend = resolve_quantization_backend(base_layer, **quantization)
        self.merged_adapters: list[str] = []
        self.frozen_peft_weight_names = {}
        self._disable_adapters, self._active_adapter = False, adapter_name
        self.in_features, self.out_features = sizes(base_layer)
        self.transposed = isinstance(base_layer, Conv1D)
        for part in self.trained:
            setattr(self, self.prefix + part, nn.ParameterDict())
        for part in self.frozen:
            setattr(self, self.prefix + part, BufferDict(persistent=True))
        setattr(self, self.prefix + "dropout", nn.ModuleDict())
        self.ranks: dict[str, int] = {}
        self.alphas: dict[str, float] = {}
        self._merged_factors: dict[str, LoraFactors] = {}
        for other in self.kept:
            setattr(self, other, {})
        self.update_layer(adapter_name, config)

    @classmethod
    def check(cls, key: str, module: nn.Module, config: DeltaConfig) -> None:
        """Refuse a layer before any is replaced.

        Raises:
            ValueError: if the config does not suit it.
        """
        rank = config.rank_of(key)
        if rank > min(sizes(module)):
            warnings.warn(f"r is {rank}; {key} is {' x '.join(map(str, sizes(module)[::-1]))}, so more than {min(sizes(module))} adds nothing", stacklevel=2)

    @abstractmethod
    def start(self, name: str, config: DeltaConfig) -> dict[str, Tensor]:
        """First values of every part of a new adapter; its rank stands in ``ranks``.

        Raises:
            ValueError: if they cannot be formed.
        """

    @abstractmethod
    def factors(self, name: str) -> LoraFactors:
        """What an adapter stands for, differentiable in what it trains."""

    def apply_delta(self, name: str, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """What an adapter adds to the output for an input that went through dropout."""
        A, B, scale = self.factors(name)
        return nn.functional.linear(nn.functional.linear(x, A), B) * scale

    def update_layer(self, name: str, config: DeltaConfig) -> None:
        """Add an adapter, or begin one anew."""
        self.ranks[name], self.alphas[name] = config.rank_of(self.key), config.alpha_of(self.key)
        device, base = self._get_base_layer_device_and_dtype(self.get_base_layer())
        dtype = torch.promote_types(base, torch.float32) if base is not None and base.is_floating_point else torch.float32
        getattr(self, self.prefix + "dropout")[name] = nn.Dropout(config.lora_dropout) if config.lora_dropout > 0 else nn.Identity()
        with torch.no_grad():
            values = self.start(name, config)
        for part in (*self.trained, *self.frozen):
            value = values[part]
            value = value.to(device, dtype if value.is_floating_point() else value.dtype).contiguous()
            getattr(self, self.prefix + part)[name] = nn.Parameter(value) if part in self.trained else value
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def part(self, part: str, name: str) -> Tensor:
        """One of the tensors that an adapter keeps."""
        return getattr(self, self.prefix + part)[name]

    def generator(self, config: DeltaConfig, *names: str | int) -> torch.Generator:
        """A generator on the CPU for this layer and one purpose, whatever the order of layers."""
        return torch.Generator().manual_seed(seed_of(config.seed, self.key, *names))

    def kaiming(self, rows: int, config: DeltaConfig, *names: str | int) -> Float[Tensor, "rows in"]:
        """LoRA's first A: uniform within one over the root of the inputs."""
        return torch.empty(rows, self.in_features).uniform_(-1, 1, generator=self.generator(config, *names)) * self.in_features**-0.5

    def base_matrix(self) -> Float[Tensor, "out in"]:
        """The matrix of the base layer in float32 or wider, dequantised, as (out, in)."""
        weight = self._dense_weight()
        return (weight.T if self.transposed else weight).to(torch.promote_types(weight.dtype, torch.float32))

    def forward(self, x: Float[Tensor, "*batch in"], *args: Any, **kwargs: Any) -> Float[Tensor, "*batch out"]:
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        dtype = result.dtype
        names = [name for name in self.active_adapters if name in self.ranks]
        if names and self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        for name in names:
            own = self._cast_input_dtype(x, self.part(self.trained[0], name).dtype)
            result = result + self.apply_delta(name, getattr(self, self.prefix + "dropout")[name](own))
        return result.to(dtype)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the base matrix, in float32 with one rounding.

        Raises:
            ValueError: if the base cannot take it up, or ``safe_merge`` and the sum holds NaN or infinity.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.ranks:
                continue
            A, B, scale = self.factors(name)
            factors = LoraFactors(A.clone(), B.clone(), scale)
            merged = self._plus(factors, 1)
            if safe_merge and not merged.isfinite().all():
                raise ValueError(f"merging adapter {name} into {self.key} gives NaN or infinity")
            self.set_base_weight(merged)
            self._merged_factors[name] = factors
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Subtract what was merged, also where the adapter has changed since; exact but for the rounding of the base's dtype."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            self.set_base_weight(self._plus(self._merged_factors.pop(self.merged_adapters.pop()), -1))

    @torch.no_grad()
    def get_delta_weight(self, name: str) -> Float[Tensor, "..."]:
        """What an adapter adds, laid out like the base's weight."""
        delta = self.factors(name).dense()
        return delta.T if self.transposed else delta

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def _plus(self, factors: LoraFactors, sign: int) -> Tensor:
        weight, delta = self._dense_weight(), factors.dense()
        return (weight.to(delta.dtype) + sign * (delta.T if self.transposed else delta)).to(weight.dtype)

    def _dense_weight(self) -> Tensor:
        backend = self.quantization_backend
        if backend is not None and not backend.supports_merge:
            raise ValueError(f"{self.key} is quantised by {backend.backend_name}, whose matrix cannot be read or replaced; keep the adapter beside it")
        weight = self.get_base_weight()
        if weight.numel() != self.in_features * self.out_features:
            raise ValueError(f"{self.key} is a {type(self.get_base_layer()).__name__} without a dense matrix; keep the adapter beside it")
        return weight


def sizes(module: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear layer or of what stands around one."""
    base: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return (base.nx, base.nf) if isinstance(base, Conv1D) else (base.in_features, base.out_features)
