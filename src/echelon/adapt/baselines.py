"""PEFT's own adapters that the others are compared with, as methods: their best known knobs, and PEFT's config made of them.

    model = get_peft_model(model, Dora(r=8).config())

What they draw comes from the global generator, as PEFT has it. AdaLoRA is not among them: PEFT keeps its importance scores where no checkpoint has them.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from peft import LoraConfig, PeftConfig, VeraConfig

from echelon.linalg.checks import number, one_of, whole
from echelon.registry import method


@method(
    kind="baseline", title="LoRA: Low-Rank Adaptation of Large Language Models", arxiv="2106.09685", year=2021,
    summary="PEFT's own LoRA: a product of two trained factors beside each matrix.",
)  # fmt: skip
@dataclass(frozen=True)
class Lora:
    """``y = W x + (lora_alpha / r) B A dropout(x)``.

    Attributes:
        r: rank, at least 1.
        lora_alpha: numerator of the scale of what is added, above 0.
        lora_dropout: share of the inputs that are zero while training, in [0, 1).
        target_modules: linear layers that are adapted: names or their ends, a regular expression for whole names, or `all-linear`; by default what PEFT takes
            on a model of this type.
        bias: which biases train: `none`, `all`, or `lora_only` for those of the adapted layers.
    """

    r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    target_modules: str | list[str] | None = None
    bias: str = "none"

    variant: ClassVar[dict[str, Any]] = {}

    def __post_init__(self) -> None:
        """Raises: ValueError: if a knob is out of range."""
        whole("r", self.r, 1)
        number("lora_alpha", self.lora_alpha, 0, float("inf"), open_low=True, open_high=True)
        number("lora_dropout", self.lora_dropout, 0, 1, open_high=True)
        one_of("bias", self.bias, ("none", "all", "lora_only"))

    def config(self) -> PeftConfig:
        """PEFT's config, a new one each time."""
        return LoraConfig(
            r=self.r, lora_alpha=self.lora_alpha, lora_dropout=self.lora_dropout, target_modules=self.target_modules, bias=self.bias, **self.variant,  # type: ignore[arg-type]
        )  # fmt: skip


@method(
    kind="baseline", name="rslora", title="A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", arxiv="2312.03732", year=2023,
    summary="PEFT's LoRA scaled by lora_alpha over the root of r, so that high ranks learn.",
)  # fmt: skip
@dataclass(frozen=True)
class RsLora(Lora):
    """LoRA with the scale ``lora_alpha / sqrt(r)``."""

    variant: ClassVar[dict[str, Any]] = {"use_rslora": True}


@method(
    kind="baseline", title="DoRA: Weight-Decomposed Low-Rank Adaptation", arxiv="2402.09353", year=2024,
    summary="PEFT's DoRA: the length of each row trains apart from its direction, which is LoRA's.",
)  # fmt: skip
@dataclass(frozen=True)
class Dora(Lora):
    """``W' = m (W + s B A) / |W + s B A|``, row by row, with ``m`` trained."""

    variant: ClassVar[dict[str, Any]] = {"use_dora": True}


@method(
    kind="baseline", title="PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models", arxiv="2404.02948", year=2024,
    summary="PEFT's PiSSA: LoRA that starts from the largest singular directions of the weight, the base keeping the rest.",
)  # fmt: skip
@dataclass(frozen=True)
class Pissa(Lora):
    """LoRA whose first factors are taken out of the weight; a saved one is loaded onto the unchanged base, which PEFT decomposes again."""

    variant: ClassVar[dict[str, Any]] = {"init_lora_weights": "pissa"}


@method(
    kind="baseline", title="VeRA: Vector-based Random Matrix Adaptation", arxiv="2310.11454", year=2023,
    summary="PEFT's VeRA: random factors that all layers share, with a trained number for each row.",
)  # fmt: skip
@dataclass(frozen=True)
class Vera:
    """``y = W x + b * (B (d * (A dropout(x))))`` with A and B random, shared and frozen.

    Attributes:
        r: rows of the shared A, at least 1.
        vera_dropout: share of the inputs that are zero while training, in [0, 1).
        d_initial: first value of d.
        target_modules: as LoRA's.
        projection_prng_key: seed of A and B, at least 0.
    """

    r: int = 256
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    target_modules: str | list[str] | None = None
    projection_prng_key: int = 0

    def __post_init__(self) -> None:
        """Raises: ValueError: if a knob is out of range."""
        whole("r", self.r, 1)
        number("vera_dropout", self.vera_dropout, 0, 1, open_high=True)
        number("d_initial", self.d_initial, float("-inf"), float("inf"), open_low=True, open_high=True)
        whole("projection_prng_key", self.projection_prng_key, 0)

    def config(self) -> PeftConfig:
        """PEFT's config, a new one each time."""
        return VeraConfig(
            r=self.r, vera_dropout=self.vera_dropout, d_initial=self.d_initial, target_modules=self.target_modules, projection_prng_key=self.projection_prng_key
        )  # fmt: skip
