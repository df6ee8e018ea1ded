"""LoRA-SB and LoRA-XS: train a small square matrix between two frozen factors.

Sources: "Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank Fine-Tuning", arXiv 2411.19557 (LoRA-SB: factors of the
first step of full fine-tuning), and the LoRA-XS initialisation beside it (factors of the weight). Differs from the code of LoRA-SB: the size of the first step
comes from the real schedule; decompositions are exact up to a smaller side of 2048 and oversampled beyond, in float64 and from a local seed; gradients are
taken without dropout, and labels count alike whatever the batches; the model's own random state, modes and gradients stay as they are.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainingArguments, get_scheduler

from echelon.adapt.config import DeltaConfig
from echelon.adapt.linear import DeltaLinear, LoraFactors, sizes
from echelon.adapt.model import DeltaModel, targets
from echelon.adapt.registration import register
from echelon.calibrate.gradients import Gradients, Loss, collect_gradients
from echelon.linalg.bases import Basis, seed_of
from echelon.linalg.checks import number, one_of, whole
from echelon.linalg.lowrank import svd
from echelon.registry import method

UPDATES = ("update_approx", "update_raw")
EXACT_LIMIT = 2048  # the smaller side up to which `auto` decomposes exactly
_NO_DIRECTION = 1e-8  # of the largest singular value; smaller ones say nothing of their direction
_XS_STD = 1e-5
_SIGNATURE_TOLERANCE = 1e-3


class Core(NamedTuple):
    """What a layer begins with: ``scale * B @ R @ A`` is what it adds.

    Attributes:
        B: (out, r), orthonormal columns.
        R: (r, r).
        A: (r, in), orthonormal rows (times singular values in LoRA-XS).
    """

    B: Float[Tensor, "out r"]
    R: Float[Tensor, "r r"]
    A: Float[Tensor, "r in"]


@method(
    kind="adapter", name="lora_sb", year=2024, arxiv="2411.19557",
    title="Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank Fine-Tuning",
    summary="Train an r x r matrix between frozen factors of the first full fine-tuning step (LoRA-SB) or of the weight (LoRA-XS).",
    needs="a short pass of gradients over training data before training (LoRA-SB)",
    published="Mistral-7B and Gemma-2 9B on GSM8K and MATH: above LoRA with 27 to 90 times fewer trained parameters",
)  # fmt: skip
@dataclass
class LoraSbConfig(DeltaConfig):
    """``y = W x + (lora_alpha / r) B R A dropout(x)`` with A and B frozen and R trained.

    For the two inits from an update call :func:`prepare` first. The model then starts after an approximate first step, not at the base model;
    `svd_weight` starts near it, `random_orthogonal` at it. A and B are buffers: with DistributedDataParallel give ``broadcast_buffers=False``. Train with
    AdamW without weight decay.

    Attributes:
        r: size of the core, at most the smaller side of every layer; 24 to 32 for small models.
        lora_alpha: numerator of the scale; r by default, which makes it 1 and needs no correction of gradients.
        init_weights: `update_approx` (LoRA-SB: the sign of the summed gradient), `update_raw` (the gradient itself), `svd_weight` (LoRA-XS),
            `random_orthogonal`, or false for random numbers all over.
        init_num_samples: rows of data that `prepare` takes; by default a thousandth of them, and at least 1.
        init_lr: size of the first step; `prepare` sets it from the schedule unless it is given.
        svd: `exact`, `randomized` (8 more directions, 4 power iterations), or `auto`: exact up to a smaller side of 2048.
        save_factors: whether A and B are saved; if not, the adapter is r x r numbers a layer, and they are made again from the weight or the seed, or by
            `prepare` from the same data, and compared.
        store_dtype: of A and B, `float32` or `bfloat16`; rounded factors are orthonormal to about 2e-3.
        factor_signature: two numbers of A and B of each layer, set by the adapter and compared when they are made again.
    """

    r: int = 96
    lora_alpha: float | None = None  # type: ignore[assignment]
    init_weights: Any = "update_approx"
    init_num_samples: int | None = None
    init_lr: float | None = None
    svd: str = "auto"
    save_factors: bool = True
    store_dtype: str = "float32"
    factor_signature: dict[str, list[float]] | None = None

    peft_name: ClassVar[str] = "echelon_lora_sb"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_weights is not False:
            one_of("init_weights", self.init_weights, (*UPDATES, "svd_weight", "random_orthogonal"))
        if self.init_num_samples is not None:
            whole("init_num_samples", self.init_num_samples, 1)
        if self.init_lr is not None:
            number("init_lr", self.init_lr, 0, float("inf"), open_low=True, open_high=True)
        one_of("svd", self.svd, ("auto", "exact", "randomized"))
        one_of("store_dtype", self.store_dtype, ("float32", "bfloat16"))
        self.stored = self.factor_signature is not None  # read from a file: the values come with the checkpoint
        self.prepared: dict[str, Core] = {}

    def start_from(self, model: nn.Module, batches: Iterable[Mapping[str, Any]], learning_rate: float) -> None:
        """:func:`prepare`, where the init is one from an update; the first step has the size of ``learning_rate`` unless ``init_lr`` is given."""
        if self.init_weights in UPDATES:
            self.init_lr = learning_rate if self.init_lr is None else self.init_lr
            prepare(model, self, batches)


class LoraSbLinear(DeltaLinear):
    """A linear layer with a trained core between frozen factors."""

    prefix = "echelon_lora_sb_"
    trained = ("R",)
    frozen = ("A", "B")

    @classmethod
    def check(cls, key: str, module: nn.Module, config: Any) -> None:
        _check_rank(key, module, config)
        needs = config.init_weights in UPDATES and not (config.stored and config.save_factors)
        if needs and key not in config.prepared:
            raise ValueError(f"init_weights is {config.init_weights!r} and nothing is known of {key}; call echelon.adapt.prepare(model, config, data) first")

    def start(self, name: str, config: Any) -> dict[str, Tensor]:
        rank = self.ranks[name]
        if config.stored and config.save_factors:
            return {"A": torch.zeros(rank, self.in_features), "R": torch.zeros(rank, rank), "B": torch.zeros(self.out_features, rank)}
        core = config.prepared.pop(self.key) if config.init_weights in UPDATES else self._own(config, rank)
        if config.store_dtype == "bfloat16":
            core = core._replace(A=core.A.bfloat16().float(), B=core.B.bfloat16().float())
        self._compare(core, config)
        return {"A": core.A, "R": core.R / (self.alphas[name] / rank), "B": core.B}

    def factors(self, name: str) -> LoraFactors:
        A, R, B = (self.part(part, name) for part in ("A", "R", "B"))
        return LoraFactors(R @ A.to(R.dtype), B.to(R.dtype), self.alphas[name] / self.ranks[name])

    def apply_delta(self, name: str, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        core = self.part("R", name)
        for matrix in (self.part("A", name), core, self.part("B", name)):  # cheaper than forming R A
            x = nn.functional.linear(x, matrix.to(core.dtype))
        return x * (self.alphas[name] / self.ranks[name])

    def _own(self, config: Any, rank: int) -> Core:
        seed = seed_of(config.seed, self.key, "svd")
        noise = torch.randn(rank, rank, generator=self.generator(config, "R"))
        if config.init_weights == "svd_weight":
            found = decompose(self.base_matrix(), rank, config.svd, seed)
            return Core(found.B, noise * _XS_STD, found.R @ found.A)
        A, B = (torch.linalg.qr(torch.randn(size, rank, generator=self.generator(config, part), dtype=torch.float64))[0].float()
                for part, size in (("A", self.in_features), ("B", self.out_features)))  # fmt: skip
        return Core(B, noise if config.init_weights is False else torch.zeros_like(noise), A.T)

    def _compare(self, core: Core, config: Any) -> None:
        """Note two numbers of the factors, or compare them with what was noted."""
        found = []
        for matrix in (core.A, core.B):
            rows, columns = matrix.shape
            found.append(float((Basis(0, 1, rows, columns, rng="counter").combine(torch.ones(1)) * matrix.cpu()).sum()))
        if not config.stored:
            config.factor_signature = {**(config.factor_signature or {}), self.key: found}
            return
        noted, size = config.factor_signature.get(self.key), [float(matrix.norm()) for matrix in (core.A, core.B)]
        if noted is None or any(abs(a - b) > _SIGNATURE_TOLERANCE * norm for a, b, norm in zip(found, noted, size, strict=True)):
            raise ValueError(f"the factors of {self.key} are not those that the adapter was trained with; are base model and data the same?")


class LoraSbModel(DeltaModel):
    """A model with LoRA-SB or LoRA-XS adapters."""

    prefix = "echelon_lora_sb_"
    tuner_layer_cls = LoraSbLinear

    @classmethod
    def _get_adapter_state_dict(cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor], unwanted_adapter_names: list[str]) -> Any:
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        factors = [key for key in found if key.endswith(tuple(f".{cls.prefix}{part}.{adapter_name}" for part in LoraSbLinear.frozen))]
        for key in factors:
            if config.save_factors:
                found[key] = found[key].to(getattr(torch, config.store_dtype))
            else:
                del found[key]
        return found

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]) -> Any:
        found = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        if not config.save_factors:  # they were made again, and are no missing keys
            ends = tuple(f".{cls.prefix}{part}.{adapter_name}" for part in LoraSbLinear.frozen)
            found |= {key: value for key, value in model.state_dict().items() if key.endswith(ends)}
        return found


def prepare(
    model: nn.Module, config: LoraSbConfig, data: Iterable[Mapping[str, Any]] | Callable[[], None] | Gradients, *,
    arguments: TrainingArguments | None = None, total_steps: int | None = None, loss: Loss | None = None, cache: str | None = None,
) -> Gradients:  # fmt: skip
    """Estimate the first step of full fine-tuning and give its factors to the config, for one call of ``get_peft_model`` on this model.

    Use the batches, collator and masks of training. The model is not changed. A quantised base may be used: gradients are those of the dequantised weight.

    Args:
        model: the base model.
        config: with one of the two inits from an update.
        data: batches with labels, of which ``init_num_samples`` rows are taken; or a function that runs forward and backward itself; or gradients that were
            collected before, such as this function returns.
        arguments: of the training to come, for the size of the first step where ``init_lr`` is not given.
        total_steps: optimizer steps of that training, where the arguments do not have ``max_steps``.
        loss: see `collect_gradients`.
        cache: see `collect_gradients`.

    Returns:
        Sums of gradients by layer, for other methods that want them.

    Raises:
        ValueError: if the config has another init or its layers are not in the model, the size of the step is unknown, or a gradient is missing or not finite.
    """
    if config.init_weights not in UPDATES:
        raise ValueError(f"init_weights is {config.init_weights!r}; only {' and '.join(UPDATES)} start from gradients")
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    meant = targets(base, config, LoraSbModel)
    for name, module in meant.items():
        _check_rank(name, module, config)
    config.init_lr = _first_step(config, arguments, total_steps)
    if isinstance(data, Gradients):
        gradients = data
    else:
        rows = data if callable(data) else list(_first_rows(data, config.init_num_samples))
        gradients = collect_gradients(base, list(meant), rows, loss=loss, cache=cache)
    for name in meant:
        if name not in gradients.sums:
            raise ValueError(f"the gradients hold nothing of {name}; collect them again with it among the names")
        gradient = gradients.sums[name]
        step = -config.init_lr * (gradient.sign() if config.init_weights == "update_approx" else gradient)
        if not step.any():
            warnings.warn(f"the gradient of {name} is zero on this data; its core starts at zero between arbitrary factors", stacklevel=2)
        config.prepared[name] = decompose(step, config.rank_of(name), config.svd, seed_of(config.seed, name, "svd"))
    return gradients


def first_learning_rate(arguments: TrainingArguments, total_steps: int) -> float:
    """Learning rate of a schedule behind its first step, which in a linear warm-up is the peak over the steps of the warm-up."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=arguments.learning_rate)
    schedule = get_scheduler(
        arguments.lr_scheduler_type, optimizer, arguments.get_warmup_steps(total_steps), total_steps, arguments.lr_scheduler_kwargs or None  # type: ignore[arg-type]
    )  # fmt: skip
    optimizer.step()
    schedule.step()
    return float(schedule.get_last_lr()[0])


def decompose(matrix: Float[Tensor, "out in"], rank: int, method: str = "auto", seed: int = 0) -> Core:
    """The best approximation of this rank as ``B @ R @ A`` in float32: orthonormal B and A also where the matrix has a lower rank, R diagonal and descending.

    The largest entry of each column of B is positive, so that factors made twice agree.
    """
    exact = "exact" if min(matrix.shape) <= EXACT_LIMIT else "randomized"
    found = svd(matrix.float(), rank, method=exact if method == "auto" else method, oversample=8, niter=4, seed=seed, dtype=torch.float64)
    values = found.down.norm(dim=1)
    some = int((values > _NO_DIRECTION * values.max()).sum()) if bool(values.any()) else 0
    values[some:] = 0
    right = found.down[:some] / values[:some, None]
    if some < rank:
        more = torch.randn(matrix.shape[1], rank - some, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(right.device)
        for _ in range(2):  # once leaves what rounding left
            more = more - right.T @ (right @ more)
        right = torch.cat([right, torch.linalg.qr(more)[0].T])
    sign = found.up.gather(0, found.up.abs().argmax(0, keepdim=True)).sign()
    return Core((found.up * sign).float(), values.diag().float(), (right * sign.T).float())


def _check_rank(name: str, module: nn.Module, config: LoraSbConfig) -> None:
    whole(f"r of {name} ({' x '.join(map(str, sizes(module)[::-1]))})", config.rank_of(name), 1, min(sizes(module)))


def _first_step(config: LoraSbConfig, arguments: TrainingArguments | None, total_steps: int | None) -> float:
    if config.init_lr is not None:
        return config.init_lr
    if arguments is None:
        raise ValueError("init_lr is null; give it, or the arguments of the training to come")
    steps = arguments.max_steps if arguments.max_steps > 0 else total_steps
    if not steps:
        raise ValueError("the arguments have no max_steps; give total_steps, the optimizer steps of the training to come")
    rate = first_learning_rate(arguments, steps)
    if not (math.isfinite(rate) and rate > 0):
        raise ValueError(f"the schedule starts with a learning rate of {rate}; give init_lr")
    return rate


def _first_rows(batches: Iterable[Mapping[str, Any]], count: int | None) -> Iterator[dict[str, Any]]:
    """Batches of the first rows, the last one cut."""
    if count is None:
        batches = batches if hasattr(batches, "dataset") else list(batches)
        rows = len(batches.dataset) if hasattr(batches, "dataset") else sum(_rows(batch) for batch in batches)
        count = max(1, rows // 1000)
    for batch in batches:
        taken = min(count, _rows(batch))
        yield {name: value[:taken] for name, value in batch.items()}
        count -= taken
        if not count:
            return


def _rows(batch: Mapping[str, Any]) -> int:
    return len(next(iter(batch.values())))


register("echelon_lora_sb", LoraSbConfig, LoraSbModel)
