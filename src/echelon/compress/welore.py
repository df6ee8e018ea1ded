"""WeLore: one threshold on normalised singular values says which matrices are low-rank; only these are factored, and only these are trained.

Source: "From GaLore to WeLore: How Low-Rank Weights Non-uniformly Emerge from Low-Rank Gradients", arXiv 2407.11239.
Differs from it: the threshold is the exact quantile of the pooled values for the wanted reduction, in place of a table or a grid of steps of 0.005; a
matrix counts as low-rank by default where factors really save parameters (``criterion="ratio"`` is the paper's rule); dtype and biases are kept;
query, key and value that share one matrix (GPT-2, GPT-NeoX) are taken apart, since the spectrum of their stack tells of none of them.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from echelon import linalg
from echelon.calibrate import Moments
from echelon.compress.base import Job
from echelon.compress.fused import split_layers, split_modules, split_specs
from echelon.compress.linear import Layer, LowRankCompressor
from echelon.compress.recovery import low_rank_parameters, select_trainable
from echelon.data.files import write_whole
from echelon.errors import UserError
from echelon.linalg.lowrank import Factors
from echelon.models.modules import LowRankLinear, Spec, kind, like
from echelon.models.targets import Targets
from echelon.registry import method

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@method(
    kind="compressor", name="welore", title="From GaLore to WeLore: How Low-Rank Weights Non-uniformly Emerge from Low-Rank Gradients",
    arxiv="2407.11239", year=2024, summary="Factor only the matrices that one global threshold on singular values shows to be low-rank.",
    published="Llama-2-7B at 50 % rank reduction, only the factors fine-tuned: better than full fine-tuning, 3x throughput, 0.6x memory (abstract)",
)  # fmt: skip
@dataclass(frozen=True)
class WeLore(LowRankCompressor):
    """Drop, in every matrix, the singular values that are small beside its largest, and factor it if few enough remain.

    Singular values are mapped to ``(s - s_min) / (s_max - s_min)`` matrix by matrix; those below one threshold, the same for all, are dropped. A
    matrix is a low-rank component if the rest is worth factoring; it becomes ``U sqrt(S)``, ``sqrt(S) V^T``, and all others stay dense. No data
    is needed. Above a reduction of about 0.3 the result is of little use before it has been trained on (see
    :func:`echelon.compress.recovery.recover`, or ``--recover_steps``).

    What is trainable is set on the compressed model and is not stored: after loading it again, call
    ``select_trainable(model, low_rank_parameters(model).__contains__)``. LoRA on top works with ``target_modules="all-linear"``, and
    :func:`echelon.compress.merge_to_dense` gives back plain matrices. The report lists the low-rank components as its modules, the dense ones as
    skipped, and in ``details`` the threshold, the reduction asked for and reached, and the share of parameters kept.

    Attributes:
        rank_reduction: share of all singular values to drop, in (0, 1). Dense matrices drop none in the end, so less is reached.
        threshold: drop the normalised singular values below this, at most 1, in place of `rank_reduction`.
        criterion: `params` factors a matrix where that saves parameters; `ratio` where it loses more than `min_ratio` of its singular values.
        min_ratio: see `criterion`, in [0, 1). Below 0.5 matrices may grow.
        normaliser: `minmax`, or `quantile99`, which takes the 99 % quantile for the largest value: one outlier then does not make a matrix look low-rank.
        min_rank: no factored matrix gets a smaller rank; keys and values of grouped attention have few singular values.
        train: what may be trained afterwards: `lrc` for the factors (and norms), `all`, or `none`.
        freeze_norms: with `lrc`, leave out the norms.
        dtype_factors: `same` as the model, or float32, bfloat16 or float16 for the factors alone; inputs and outputs are then cast.
        spectra: folder in which singular values are kept under the hash of their weight, so that another run need not compute them again.
        target_modules: layers to take: `all-linear` inside the blocks, `attention`, `mlp`, a regular expression, or a list of name ends.
        strict: raise where a layer cannot be taken.
    """

    budget_knob: ClassVar[str] = "rank_reduction"
    budget_range: ClassVar[tuple[float, float]] = (1e-4, 1 - 1e-4)

    rank_reduction: float = 0.3
    threshold: float | None = None
    criterion: Literal["params", "ratio"] = "params"
    min_ratio: float = 0.5
    normaliser: Literal["minmax", "quantile99"] = "minmax"
    min_rank: int = 1
    train: Literal["lrc", "all", "none"] = "lrc"
    freeze_norms: bool = False
    dtype_factors: Literal["same", "float32", "bfloat16", "float16"] = "same"
    spectra: str | None = None
    target_modules: Targets = None
    strict: bool = False

    def __post_init__(self) -> None:
        """Raises: ValueError: if a knob is out of range."""
        if not 0 < self.rank_reduction < 1:
            raise ValueError(f"rank_reduction is {self.rank_reduction!r}; it must be in (0, 1)")
        if self.threshold is not None and not self.threshold <= 1:
            raise ValueError(f"threshold is {self.threshold!r}; it must be at most 1, above which no singular value would be left")
        if not 0 <= self.min_ratio < 1:
            raise ValueError(f"min_ratio is {self.min_ratio!r}; it must be in [0, 1)")
        if self.min_rank < 1:
            raise ValueError(f"min_rank is {self.min_rank!r}; it must be at least 1")
        choices = {
            "criterion": ("params", "ratio"), "normaliser": ("minmax", "quantile99"), "train": ("lrc", "all", "none"), "dtype_factors": ("same", *DTYPES),
        }  # fmt: skip
        for name, legal in choices.items():
            if getattr(self, name) not in legal:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(legal)}")

    @property
    def uses_spectrum(self) -> bool:
        return True

    @property
    def may_grow(self) -> bool:
        return self.criterion == "ratio"

    def layers(self, job: Job) -> dict[str, Layer]:
        return split_layers(job.model, super().layers(job))

    def spectrum(self, weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None, moments: Moments | None) -> Float[Tensor, " k"]:
        """Singular values, always computed on the CPU, where they come out the same each time."""
        if self.spectra is None:
            return linalg.spectrum(weight.cpu())
        file = Path(self.spectra) / f"{weight_hash(weight)}.safetensors"
        if file.is_file():
            try:
                return load_file(file)["singular_values"]
            except (SafetensorError, OSError, KeyError) as error:
                raise UserError(f"cannot read the singular values in {file}: {error}; remove the file") from error
        values = linalg.spectrum(weight.cpu())
        write_whole(file, save({"singular_values": values}))
        return values

    def plan(self, layers: Mapping[str, Layer]) -> dict[str, int]:
        if not layers:
            return {}
        return linalg.allocate(
            "threshold", self._spectra(layers), {name: layer.shape for name, layer in layers.items()}, self.rank_reduction, threshold=self.threshold,
            criterion=self.criterion, min_ratio=self.min_ratio, normaliser=self.normaliser, min_rank=self.min_rank,
        )  # fmt: skip

    def specs(self, job: Job, state: dict[str, Layer]) -> dict[str, Spec]:
        made = super().specs(job, state)
        job.report.details = self._details(state, made)
        if self.dtype_factors != "same":
            made = {name: spec | {"kind": "welore.lowrank", "dtype": self.dtype_factors} for name, spec in made.items()}
        return split_specs(state, made)

    def apply(self, job: Job, state: dict[str, Layer], specs: Mapping[str, Spec]) -> None:
        super().apply(job, state, split_modules(job, state, specs))
        names = low_rank_parameters(job.model, norms=not self.freeze_norms) if self.train == "lrc" else set()
        select_trainable(job.model, lambda name: self.train == "all" or name in names)

    def factor(
        self, weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None, moments: Moments | None, rank: int
    ) -> Factors:
        """The truncated SVD, its singular values shared evenly between the factors."""
        return linalg.svd(weight, rank, method="exact", balance="sqrt", dtype=torch.float64)

    def _spectra(self, layers: Mapping[str, Layer]) -> dict[str, Tensor]:
        return {name: layer.spectrum for name, layer in layers.items() if layer.spectrum is not None}

    def _details(self, layers: Mapping[str, Layer], specs: Mapping[str, Spec]) -> dict[str, float | None]:
        if not layers:
            return {}
        spectra, shapes = self._spectra(layers), {name: layer.shape for name, layer in layers.items()}
        of = sum(map(len, spectra.values()))
        ranks = {name: spec["rank"] for name, spec in specs.items()}
        dense = {name: shape[0] * shape[1] for name, shape in shapes.items()}
        kept = sum(ranks[name] * sum(shapes[name]) if name in ranks else dense[name] for name in shapes)
        return {
            "threshold": linalg.reduction_threshold(spectra, self.rank_reduction, self.normaliser) if self.threshold is None else self.threshold,
            "rank_reduction_requested": self.rank_reduction if self.threshold is None else None,
            "rank_reduction_reached": sum(len(spectra[name]) - rank for name, rank in ranks.items()) / of,
            "parameters_kept_of_targets": kept / sum(dense.values()),
        }


def weight_hash(weight: Float[Tensor, "out in"]) -> str:
    """SHA-256 of a matrix: its values, shape and dtype."""
    plain = weight.detach().cpu().contiguous()
    made = hashlib.sha256(f"{plain.dtype} {tuple(plain.shape)}".encode())
    made.update(plain.view(torch.uint8).numpy().data)
    return made.hexdigest()


@kind("welore.lowrank")
def _lowrank(spec: Spec, old: nn.Module) -> nn.Module:
    factory = like(old) | {"dtype": DTYPES[spec["dtype"]]}
    return CastLowRankLinear(spec["in"], spec["out"], spec["rank"], spec["bias"], spec.get("transposed", False), **factory)


class CastLowRankLinear(LowRankLinear):
    """Factors in a dtype of their own, between a cast and a cast back."""

    def spec(self) -> Spec:
        dtype = str(self.down.weight.dtype).removeprefix("torch.")
        return super().spec() | ({"kind": "welore.lowrank", "dtype": dtype})

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        return super().forward(x.to(self.down.weight.dtype)).to(x.dtype)
