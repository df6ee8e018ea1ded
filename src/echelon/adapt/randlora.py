"""RandLoRA: updates of full rank from fixed random matrices of low rank, between which only diagonal scalings train.

Source: "RandLoRA: Full-rank parameter-efficient fine-tuning of large models", arXiv 2502.00987. PEFT has the method too; its gradient of the scaled basis is
used here. Differs from PEFT: components are paired as in the paper's formula (``pairing="peft"`` for its own order); the random matrices are kept once, sized
by the layers that use them, drawn in float32 from the seed on every machine, and saved once or not at all; adapters, and layers of one adapter, may have
different ranks.
:func:`convert_randlora` makes an adapter of this kind out of one that PEFT saved.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import peft
import torch
from jaxtyping import Float
from peft.tuners.randlora.layer import UniqueBaseGrad
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from echelon.adapt.config import DeltaConfig
from echelon.adapt.linear import DeltaLinear, LoraFactors, sizes
from echelon.adapt.model import DeltaModel
from echelon.adapt.registration import register
from echelon.data.files import folder_whole
from echelon.errors import UserError
from echelon.linalg.bases import seed_of
from echelon.linalg.checks import one_of
from echelon.registry import method

_TOLERANCE = 1e-4  # of the noted sum of eight entries, which have the variance 1


@method(
    kind="adapter", name="randlora", year=2025, arxiv="2502.00987",
    title="RandLoRA: Full-rank parameter-efficient fine-tuning of large models",
    summary="Full-rank updates for the parameters of a LoRA of moderate rank: random low-rank matrices with trained diagonal scalings.",
    published="CLIP and DinoV2 on 21 image data sets: closes most of the gap between LoRA and full fine-tuning; small gains on language models",
)  # fmt: skip
@dataclass
class RandLoraConfig(DeltaConfig):
    """``y = W x + s sum_b B_b diag(lambda_b) A diag(gamma_b) dropout(x)``, for layers with fewer outputs than inputs the other way about.

    With m the smaller and M the larger side of a layer there are n = ceil(m / r) random matrices B_b (M, r) and one A (r, m), both shared by all layers, which
    use their first rows and columns. A layer trains n (r + m) numbers, about m + m²/r: a larger r means fewer. lambda begins at zero, gamma at a constant, so
    the update has rank r at first, and full rank once gamma has moved. A step costs about as much again as the layer itself (n r >= m inner dimensions), and an
    exported LoRA has the rank n r. The scale is large: where training diverges, or float16 overflows, lower `lora_alpha`, or a learning rate that is above
    1e-4 * 32 / r.

    Attributes:
        r: rank of the random matrices.
        lora_alpha: numerator of the scale; 20 r by default, or 2 r with the authors' scaling.
        randlora_alpha: PEFT's name for lora_alpha, as which it counts where it is given.
        randlora_dropout: PEFT's name for lora_dropout.
        projection_prng_key: PEFT's name for seed.
        save_projection: whether the random matrices are saved, once; they can always be made again from the seed, and are compared then.
        sparse: random matrices of -1, 0 and 1, with a sixth of the entries for either sign; no faster.
        very_sparse: the same with a share of 1 / (2 sqrt(m)) for either sign, m being the widest smaller side.
        basis_dtype: of the random matrices in memory and in files, `float32` or `bfloat16`.
        pairing: which scaled row of A meets which column of B: `paper`, or `peft`, whose code orders rows by rank first and columns by matrix first.
        scaling: `peft` for s = lora_alpha / r, `authors` for s = lora_alpha / (r sqrt(n)), as in their own code.
        basis_signature: sums of the first eight entries of A and of B, set by the adapter and compared when they are made again.
    """

    r: int = 32
    lora_alpha: float | None = None  # type: ignore[assignment]
    randlora_alpha: float | None = None
    randlora_dropout: float | None = None
    projection_prng_key: int | None = None
    save_projection: bool = False
    sparse: bool = False
    very_sparse: bool = False
    basis_dtype: str = "float32"
    pairing: str = "paper"
    scaling: str = "peft"
    basis_signature: list[float] | None = None

    peft_name: ClassVar[str] = "echelon_randlora"

    def __post_init__(self) -> None:
        for theirs, ours in (("randlora_alpha", "lora_alpha"), ("randlora_dropout", "lora_dropout"), ("projection_prng_key", "seed")):
            if getattr(self, theirs) is not None:
                setattr(self, ours, getattr(self, theirs))
                setattr(self, theirs, None)
        super().__post_init__()
        if self.sparse and self.very_sparse:
            raise ValueError("very_sparse is True; it must be False where sparse is True")
        one_of("basis_dtype", self.basis_dtype, ("float32", "bfloat16"))
        one_of("pairing", self.pairing, ("paper", "peft"))
        one_of("scaling", self.scaling, ("peft", "authors"))
        self.stored = self.basis_signature is not None  # read from a file
        self.projections = Projections(self)

    def usual_alpha(self, rank: int) -> float:
        return (20.0 if self.scaling == "peft" else 2.0) * rank


class Projections:
    """The one pair of random matrices of an adapter, A (r, small side) and B (large side, n r) with the n matrices side by side, once on each device in use.

    They are no buffers: DistributedDataParallel would send them around before each forward, and PEFT would save them for each layer.
    """

    def __init__(self, config: RandLoraConfig) -> None:
        self.config = config
        self.rank = self.small = self.large = self.columns = 0
        self.held: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def cover(self, small: int, large: int, rank: int) -> None:
        """Be large enough for a layer, before anything is drawn."""
        self.rank, self.small, self.large = max(self.rank, rank), max(self.small, small), max(self.large, large)
        self.columns = max(self.columns, rank * matrices(small, rank))

    def on(self, device: torch.device | str) -> tuple[Float[Tensor, "r small"], Float[Tensor, "large columns"]]:
        """A and B on a device.

        Raises:
            ValueError: if they are not those that the adapter was trained with.
        """
        device = torch.device(device)
        if device not in self.held:
            with torch.inference_mode(False), torch.no_grad():
                if not self.held:
                    self.held[torch.device("cpu")] = self._noted(self._draw("A", (self.rank, self.small)), self._draw("B", (self.large, self.columns)))
                A, B = next(iter(self.held.values()))
                self.held[device] = A.to(device), B.to(device)
        return self.held[device]

    def take(self, A: Float[Tensor, "r small"], B: Float[Tensor, "large columns"]) -> None:
        """Use these, which were saved.

        Raises:
            ValueError: if they are too small for the layers, or not those that the adapter was trained with.
        """
        for name, found, needed in (("A", A, (self.rank, self.small)), ("B", B, (self.large, self.columns))):
            if found.ndim != 2 or any(have < need for have, need in zip(found.shape, needed, strict=True)):
                raise ValueError(f"the saved random matrix {name} has shape {tuple(found.shape)}; the layers of this model need {needed} at least")
        self.held = {torch.device("cpu"): self._noted(A.detach().cpu(), B.detach().cpu())}

    def _draw(self, name: str, shape: tuple[int, int]) -> Float[Tensor, "rows columns"]:
        generator = torch.Generator().manual_seed(seed_of(self.config.seed, name))
        drawn = torch.empty(shape).uniform_(0, 1, generator=generator)
        if self.config.sparse or self.config.very_sparse:
            share = 1 / 6 if self.config.sparse else 0.5 * self.small**-0.5
            drawn = (drawn > 1 - share).float() - (drawn < share).float()
            if not drawn.any():
                raise ValueError(f"seed is {self.config.seed}; with it all entries of the sparse matrix {name} {shape} are zero; take another")
        else:
            drawn = drawn.mul_(2).sub_(1)
        mean, square = (float(total) / drawn.numel() for total in (drawn.sum(dtype=torch.float64), drawn.square().sum(dtype=torch.float64)))
        spread = math.sqrt((square - mean**2) * drawn.numel() / max(1, drawn.numel() - 1))
        return (drawn / (spread or 1.0)).to(getattr(torch, self.config.basis_dtype))

    def _noted(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Both, with their first entries noted, or compared with what was noted."""
        found, noted = [math.fsum(matrix.flatten()[:8].tolist()) for matrix in (A, B)], self.config.basis_signature
        if not self.config.stored or noted is None:
            self.config.basis_signature = found
        elif any(abs(a - b) > _TOLERANCE for a, b in zip(found, noted, strict=True)):
            raise ValueError(
                "the random matrices are not those that the adapter was trained with: seed, r, target_modules or sizes of layers differ, this version of torch "
                "draws other numbers, or the adapter was converted; save it with save_projection=True where it was trained, and load it with load_adapter"
            )
        return A, B


class RandLoraLinear(DeltaLinear):
    """A linear layer with scalings of shared random matrices.

    Attributes:
        projections: by adapter, the random matrices of all its layers.
        pairings: by adapter, how they are paired.
        scales: by adapter, of what is added.
    """

    prefix = "echelon_randlora_"
    trained = ("lambda", "gamma")
    kept = ("projections", "pairings", "scales")
    projections: dict[str, Projections]
    pairings: dict[str, str]
    scales: dict[str, float]

    @classmethod
    def check(cls, key: str, module: nn.Module, config: Any) -> None:
        super().check(key, module, config)
        config.projections.cover(*sorted(sizes(module)), config.rank_of(key))

    def start(self, name: str, config: Any) -> dict[str, Tensor]:
        rank, small = self.ranks[name], min(self.in_features, self.out_features)
        count = matrices(small, rank)
        self.projections[name], self.pairings[name] = config.projections, config.pairing
        self.scales[name] = self.alphas[name] / rank / (math.sqrt(count) if config.scaling == "authors" else 1)
        if not (config.stored and config.save_projection):
            config.projections.on("cpu")
        first = torch.zeros(rank, count) if config.init_weights else torch.randn(rank, count, generator=self.generator(config, "lambda"))
        return {"lambda": first, "gamma": torch.full((count, small), 1 / small)}

    def factors(self, name: str) -> LoraFactors:
        scalings, gamma = self.part("lambda", name), self.part("gamma", name)
        (rank, count), (small, large) = scalings.shape, sorted((self.in_features, self.out_features))
        A, B = self.projections[name].on(scalings.device)
        scaled = UniqueBaseGrad.apply(A[:rank, None, :small].to(scalings.dtype), scalings, gamma)  # (rank, count, small)
        narrow = (scaled if self.pairings[name] == "peft" else scaled.transpose(0, 1)).reshape(-1, small)
        wide = B[:large, : rank * count].to(scalings.dtype)
        if self.in_features <= self.out_features:
            return LoraFactors(narrow, wide, self.scales[name])
        return LoraFactors(wide.T, narrow.T, self.scales[name])


class RandLoraModel(DeltaModel):
    """A model with RandLoRA adapters."""

    prefix = "echelon_randlora_"
    tuner_layer_cls = RandLoraLinear

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        peft_config.projections = Projections(peft_config)
        super()._prepare_model(peft_config, model)

    @classmethod
    def _get_adapter_state_dict(cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor], unwanted_adapter_names: list[str]) -> Any:
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        matrices = zip("AB", config.projections.on("cpu"), strict=True) if config.save_projection else ()
        return found | {f"base_model.{cls.prefix}{part}": matrix for part, matrix in matrices}

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]) -> Any:
        saved = {part: key for part in "AB" for key in state_dict if key.endswith(f".{cls.prefix}{part}")}
        if len(saved) == 2:
            config.projections.take(state_dict[saved["A"]], state_dict[saved["B"]])
        rest = {key: value for key, value in state_dict.items() if key not in saved.values()}
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, rest)


def matrices(small: int, rank: int) -> int:
    """How many random matrices of this rank reach the full rank of a layer with this smaller side."""
    return -(-small // rank)


def convert_randlora(source: str | os.PathLike[str], out: str | os.PathLike[str]) -> RandLoraConfig:
    """Make an adapter of this package out of a RandLoRA that PEFT saved: the same function, with one pair of random matrices where PEFT 0.21 saves one a layer.

    Args:
        source: folder of the adapter, saved with PEFT's default ``save_projection=True``.
        out: a new folder, which appears whole.

    Returns:
        The config that was written.

    Raises:
        UserError: if the folder holds no such adapter or no random matrices, or ``out`` cannot be written.
    """
    try:
        old = peft.PeftConfig.from_pretrained(os.fspath(source))
        tensors = load_file(Path(source) / "adapter_model.safetensors")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"cannot read a PEFT adapter from {str(source)!r}: {str(error).splitlines()[0]}") from error
    if not isinstance(old, peft.RandLoraConfig):
        raise UserError(f"the adapter in {str(source)!r} is a {type(old).__name__}; it must be a RandLoRA of PEFT")
    shared = {part: next((value for key, value in tensors.items() if key.endswith(f".randlora_{part}")), None) for part in "AB"}
    A, B = shared["A"], shared["B"]
    if A is None or B is None:
        raise UserError(f"the adapter in {str(source)!r} has no random matrices, and PEFT's differ between machines; save it with save_projection=True")
    dtype = torch.bfloat16 if A.dtype == torch.bfloat16 else torch.float32
    same = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "fan_in_fan_out", "task_type",
            "base_model_name_or_path", "revision", "inference_mode", "sparse", "very_sparse", "r")  # fmt: skip
    config = RandLoraConfig(
        **{name: getattr(old, name) for name in same if hasattr(old, name)}, lora_alpha=old.randlora_alpha, lora_dropout=old.randlora_dropout,
        bias="lora_only" if old.bias == "randlora_only" else old.bias, save_projection=True, basis_dtype=str(dtype).removeprefix("torch."), pairing="peft",
    )  # fmt: skip
    config.projections.take(A.squeeze(1).to(dtype), B.flatten(1).to(dtype))
    own = {key.replace(".randlora_", f".{RandLoraModel.prefix}"): value for key, value in tensors.items() if not key.endswith((".randlora_A", ".randlora_B"))}
    own |= {f"base_model.{RandLoraModel.prefix}{part}": matrix.contiguous() for part, matrix in zip("AB", config.projections.on("cpu"), strict=True)}
    with folder_whole(out) as folder:
        save_file(own, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(os.fspath(folder))
    return config


register("echelon_randlora", RandLoraConfig, RandLoraModel)
