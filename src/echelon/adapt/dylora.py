"""DyLoRA: one LoRA that is usable at every rank up to the one it was trained with.

Source: "DyLoRA: Parameter-Efficient Tuning of Pretrained Models using Dynamic Search-Free Low Rank Adaptation", arXiv 2210.07558. A rank is drawn once for each
optimizer step and shared by all layers, as in its code. Differs from that code: the draw depends on seed and step alone, so that all processes and a resumed
run draw the same; the optimizer leaves components that were not drawn alone (`mask_optimizer`); a merged layer remembers at which rank it was merged; and with
`r_min` above 1 the lowest rank trains all of its components, since most of them would never be trained otherwise.
"""

import contextlib
import os
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar

import torch
from torch import Tensor

from echelon.adapt.config import DeltaConfig
from echelon.adapt.linear import DeltaLinear, LoraFactors
from echelon.adapt.model import DeltaModel
from echelon.adapt.registration import register
from echelon.linalg.bases import seed_of, uniform
from echelon.linalg.checks import number, one_of, whole
from echelon.registry import method


@method(
    kind="adapter", name="dylora", year=2022, arxiv="2210.07558",
    title="DyLoRA: Parameter-Efficient Tuning of Pretrained Models using Dynamic Search-Free Low Rank Adaptation",
    summary="A LoRA whose first b components are a good LoRA of rank b for every b: the rank is chosen after training.",
    published="GLUE, RoBERTa-base and GPT-2 on E2E, DART, WebNLG: 4 to 7 times as fast as training a LoRA for each rank, without significant loss",
)  # fmt: skip
@dataclass
class DyLoraConfig(DeltaConfig):
    """``y = W x + (lora_alpha / b) B[:, :b] A[:b] dropout(x)``, with another b for each optimizer step.

    The scale is over the rank in use, not over ``r``, in training and behind it. Give HF Trainer an `AdapterCallback`, or call ``begin_step`` in a loop of your
    own: without either, the adapter stays at ``active_rank``. With ``rank_pattern`` a layer of rank r_i uses ceil(b r_i / r) components.

    Attributes:
        r: largest rank.
        r_min: smallest rank that is trained, at most r.
        rank_distribution: `uniform`, or a weight for each rank that is drawn, from r_min up to r in steps of rank_step.
        update: `last` trains only what the drawn rank has beyond the next lower one, the rest of it being constant; `all` trains everything up to it.
        rank_step: ranks are drawn in multiples of this, which must divide r.
        active_rank: rank outside training steps, for merging and export, in 1..r; r by default. `set_rank` changes it.
        mask_optimizer: keep optimizers from moving or decaying what the drawn rank does not train, and their moments as they were; the released code lets them.
    """

    r_min: int = 1
    rank_distribution: Any = "uniform"
    update: str = "last"
    rank_step: int = 1
    active_rank: int | None = None
    mask_optimizer: bool = True

    peft_name: ClassVar[str] = "echelon_dylora"

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("r_min", self.r_min, 1, self.r)
        one_of("update", self.update, ("last", "all"))
        whole("rank_step", self.rank_step, 1, self.r)
        if self.r % self.rank_step:
            raise ValueError(f"rank_step is {self.rank_step}; it must divide r, which is {self.r}")
        self.active_rank = self.r if self.active_rank is None else whole("active_rank", self.active_rank, 1, self.r)
        if isinstance(self.rank_distribution, str):
            one_of("rank_distribution", self.rank_distribution, ("uniform",))
            return
        if len(self.rank_distribution) != len(self.ranks):
            raise ValueError(f"rank_distribution has {len(self.rank_distribution)} weights; it must have {len(self.ranks)}, one for each of {self.ranks}")
        for weight in self.rank_distribution:
            number("rank_distribution", weight, 0, float("inf"), open_high=True)
        if not sum(self.rank_distribution) > 0:
            raise ValueError(f"rank_distribution is {self.rank_distribution!r}; one weight at least must be above 0")

    @property
    def ranks(self) -> list[int]:
        """The ranks that are drawn, in ascending order."""
        return [rank for rank in range(self.rank_step, self.r + 1, self.rank_step) if rank >= self.r_min]

    def draw(self, step: int) -> int:
        """The rank of an optimizer step, the same on every process."""
        weights = [1.0] * len(self.ranks) if isinstance(self.rank_distribution, str) else [float(weight) for weight in self.rank_distribution]
        sums = list(accumulate(weights))
        place = uniform(seed_of(self.seed, "rank", step)) * sums[-1]
        return self.ranks[next(i for i, reached in enumerate(sums) if place < reached)]

    def below(self, rank: int) -> int:
        """The next lower rank that is drawn, or 0."""
        place = bisect_left(self.ranks, rank)
        return self.ranks[place - 1] if place else 0


class DyLoraLinear(DeltaLinear):
    """A linear layer with adapters of which the first components are in use.

    Attributes:
        spans: by adapter, the components in use: those up to the second number, of which those from the first on are trained.
    """

    prefix = "echelon_dylora_"
    kept = ("spans",)
    spans: dict[str, tuple[int, int]]

    def start(self, name: str, config: Any) -> dict[str, Tensor]:
        self.use(name, config.active_rank, config)
        rank = self.ranks[name]
        noise = torch.empty(self.out_features, rank).uniform_(-1, 1, generator=self.generator(config, "B")) * rank**-0.5
        return {"A": self.kaiming(rank, config, "A"), "B": torch.zeros_like(noise) if config.init_weights else noise}

    def use(self, name: str, rank: int, config: Any) -> None:
        """Take a rank of the config into use; a merged layer is unmerged first."""
        if name in self.merged_adapters:
            self.unmerge()
        own = self.ranks[name]
        low, high = (-(-b * own // config.r) for b in (config.below(rank) if config.update == "last" else 0, rank))
        self.spans[name] = low, high

    def factors(self, name: str) -> LoraFactors:
        low, high = self.spans[name]
        A, B = self.part("A", name)[:high], self.part("B", name)[:, :high]
        if low:
            A, B = torch.cat([A[:low].detach(), A[low:]]), torch.cat([B[:, :low].detach(), B[:, low:]], 1)
        return LoraFactors(A, B, self.alphas[name] / high)


class DyLoraModel(DeltaModel):
    """A model with DyLoRA adapters; :meth:`set_rank` chooses the rank."""

    prefix = "echelon_dylora_"
    tuner_layer_cls = DyLoraLinear

    def set_rank(self, rank: int, adapter_name: str | None = None) -> None:
        """Use this rank from now on, at no cost; it is saved with the adapter. Layers that are merged are unmerged.

        Args:
            rank: in 1..r.
            adapter_name: of one adapter; all active ones by default.

        Raises:
            ValueError: if the rank is out of range.
        """
        for name in self.active_adapters if adapter_name is None else [adapter_name]:
            config = self._config(name)
            if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= config.r:
                raise ValueError(f"rank is {rank!r}; adapter {name} can be used at every rank in 1..{config.r}")
            config.active_rank = rank
            self._use(name, rank)

    def sample_rank(self, step: int, adapter_name: str | None = None) -> int:
        """Take the rank of an optimizer step into use and return it: of one adapter, or of the first active one, all of which draw."""
        names = self.active_adapters if adapter_name is None else [adapter_name]
        drawn = [self._config(name).draw(step) for name in names]
        for name, rank in zip(names, drawn, strict=True):
            self._use(name, rank)
        return drawn[0]

    def begin_training(self, optimizer: torch.optim.Optimizer) -> None:
        self.end_training()
        if any(self._config(name).mask_optimizer for name in self.active_adapters):
            self._masks = self.mask_optimizer(optimizer)

    def begin_step(self, step: int) -> None:
        self.sample_rank(step)

    def end_step(self, step: int) -> None:
        """Back to ``active_rank``, so that evaluation between steps does not depend on the draw."""
        for name in self.active_adapters:
            self._use(name, self._config(name).active_rank)

    def end_training(self) -> None:
        for handle in self.__dict__.pop("_masks", ()):
            handle.remove()

    def mask_optimizer(self, optimizer: torch.optim.Optimizer) -> list[Any]:
        """From now on let an optimizer change only the components that the rank in use trains, and its moments of these; handles that undo it.

        A zero gradient is a step like any other to an optimizer with momentum or weight decay. Adapters without ``mask_optimizer`` are left to it. Bias
        corrections count all steps, not those of a component.
        """
        kept: list[tuple[Tensor, Tensor]] = []

        def before(*_: Any) -> None:
            kept.clear()
            masked = [name for name in self.active_adapters if self._config(name).mask_optimizer]
            for name, layer in [(adapter, layer) for adapter in masked for _, layer in self.layers(adapter)]:
                low, high = layer.spans[name]
                for parameter, dim in ((layer.part("A", name), 0), (layer.part("B", name), 1)):
                    for tensor in (parameter.detach(), *_moments(optimizer, parameter)):
                        outside = tensor.narrow(dim, 0, low), tensor.narrow(dim, high, tensor.shape[dim] - high)
                        kept.extend((view, view.clone()) for view in outside)

        def after(*_: Any) -> None:
            for view, value in kept:
                view.copy_(value)
            kept.clear()

        return [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]

    def export_lora(self, rank: int, path: str | os.PathLike[str], adapter_name: str = "default") -> None:
        """Write the first ``rank`` components as a plain LoRA of that rank, which needs PEFT alone; what is in use stays.

        Raises:
            ValueError: if the rank is out of range.
            UserError: if the folder cannot be written.
        """
        config = self._config(adapter_name)
        whole("rank", rank, 1, config.r)
        with self._at(adapter_name):
            for _, layer in self.layers(adapter_name):
                layer.spans[adapter_name] = 0, -(-rank * layer.ranks[adapter_name] // config.r)
            self.save_lora(path, adapter_name)

    def _use(self, name: str, rank: int) -> None:
        for _, layer in self.layers(name):
            layer.use(name, rank, self._config(name))

    @contextlib.contextmanager
    def _at(self, name: str) -> Iterator[None]:
        """The components in use as they were, afterwards."""
        before = [(layer, layer.spans[name]) for _, layer in self.layers(name)]
        try:
            yield
        finally:
            for layer, span in before:
                layer.spans[name] = span


def rank_report(
    model: Any, metric: Callable[[Any], float], ranks: Iterable[int] | None = None, adapter_name: str = "default"
) -> dict[int, float]:  # fmt: skip
    """A metric of the model at every rank; its rank is as before afterwards.

    Args:
        model: what ``get_peft_model`` returned.
        metric: of the model, given it at one rank.
        ranks: which; all from 1 on by default.
        adapter_name: of the adapter.

    Raises:
        ValueError: if the model has no such DyLoRA adapter, or a rank is out of range.
    """
    tuner = next((module for module in model.modules() if isinstance(module, DyLoraModel)), None)
    if tuner is None:
        raise ValueError(f"the model is a {type(model).__name__} without DyLoRA adapters; give what get_peft_model returned")
    config = tuner._config(adapter_name)
    before = config.active_rank
    wanted: Sequence[int] = range(1, config.r + 1) if ranks is None else list(ranks)
    found = {}
    try:
        for rank in wanted:
            tuner.set_rank(rank, adapter_name)
            found[rank] = float(metric(model))
    finally:
        tuner.set_rank(before, adapter_name)
    return found


def _moments(optimizer: torch.optim.Optimizer, parameter: Tensor) -> list[Tensor]:
    """What an optimizer keeps of every number of a parameter."""
    state = optimizer.state.get(parameter, {})
    return [value for value in state.values() if isinstance(value, Tensor) and value.shape == parameter.shape]


register("echelon_dylora", DyLoraConfig, DyLoraModel)
