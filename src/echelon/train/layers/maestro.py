"""Maestro: train factored layers so that their components sort themselves by importance, and let the ranks shrink on the way.

Source: "Maestro: Uncovering Low-Rank Structures via Trainable Decomposition", arXiv 2308.14929.
Differs from its code: the cut layer is drawn first and its rank second, as in the paper (`pairs` is the code's way); ranks travel as whole numbers, which
rounding cannot change; a batch's draw follows from the step and the seed alone; the penalty has a finite gradient at zero and a proximal form. The paper's
threshold (1e-7) could not be confirmed; the default is the code's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from echelon.linalg.checks import number, one_of, whole
from echelon.linalg.lowrank import svd
from echelon.models.factored_conv import conv_spec, is_convolution
from echelon.models.modules import Spec, dense_weight
from echelon.models.targets import blocks
from echelon.registry import method
from echelon.train.layers.base import LayerMethod, reset_moments, rewrite, stored
from echelon.train.layers.ordered import OrderedConv, export, ordered, ordered_dropout, root, set_cuts, tails

SAMPLERS = ("layer_uniform", "pairs", "independent", "none")


@method(
    kind="layer", name="maestro", title="Maestro: Uncovering Low-Rank Structures via Trainable Decomposition", arxiv="2308.14929", year=2023,
    summary="Train factored layers with ordered dropout, so that any prefix of their components works and ranks shrink by themselves.",
    published="CIFAR-10, ResNet-18 (unconfirmed): 94.19 at 4.1M parameters, 93.86 dense at 11.2M",
)  # fmt: skip
@dataclass(frozen=True)
class Maestro(LayerMethod):
    """``W = A B`` at full rank; in every step one layer is cut to its first components, which therefore carry most.

    Training starts dearer than dense, twice the parameters of a square layer and with `full_pass` two passes, and gets cheaper as ranks shrink. A rank holds
    for all micro-batches of an optimizer step, and for what gradient checkpointing runs again. Weight decay acts on the factors, which is not decay of W.

    Attributes:
        target_modules: layers to factor: `all` for linear layers and convolutions, `all-linear` for the linear ones inside the blocks, `attention`, `mlp`, a
            regular expression, or a list of names or their ends; embeddings and language-modelling heads never are.
        sampler: what is cut in a step: `layer_uniform`, one layer, then its rank, both evenly; `pairs`, one of all pairs of layer and rank, without
            repetition; `independent`, every layer for itself, which is not the paper's method; `none`; or `fixed:0.25` to keep that share of every rank from
            the start and cut nothing.
        full_pass: train the whole network on the labels, and the cut one on the whole one's predictions; without, the cut one on the labels.
        group_lasso: factor of the group lasso; raise it until ranks shrink (from 1e-6 to 5e-3).
        hierarchical: penalise, and judge by, the norms of all components from each one on, in place of those of single ones.
        proximal: shrink the groups behind each optimizer step by exactly the penalty, which can reach zero, in place of adding it to the loss.
        importance_threshold: components are dropped where the product of the norms in both factors is below it.
        shrink_every: optimizer steps between two looks at the importances; an epoch is meant. 0 for never.
        ignore_first: layers to leave dense at the start of the model.
        ignore_last: leave a last linear layer outside the blocks dense, such as a classifier.
        init: `svd` of the weight that is there, which changes nothing that the model computes, or `random`.
        merge_if_larger: at the end, make layers dense whose factors have as many parameters or more.
    """

    target_modules: str | list[str] = "all"
    sampler: str = "layer_uniform"
    full_pass: bool = True
    group_lasso: float = 0.0
    hierarchical: bool = True
    proximal: bool = False
    importance_threshold: float = 1e-5
    shrink_every: int = 400
    ignore_first: int = 0
    ignore_last: bool = False
    init: Literal["svd", "random"] = "svd"
    merge_if_larger: bool = True

    convolutions: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.share is None:
            one_of("sampler", self.sampler, (*SAMPLERS, "fixed:SHARE with a share in (0, 1]"))
        number("group_lasso", self.group_lasso, 0, float("inf"), open_high=True)
        number("importance_threshold", self.importance_threshold, 0, float("inf"), open_low=True, open_high=True)
        whole("shrink_every", self.shrink_every, 0)
        whole("ignore_first", self.ignore_first, 0)
        one_of("init", self.init, ("svd", "random"))

    @property
    def share(self) -> Fraction | None:
        """Of the full rank, under a fixed sampler."""
        word, _, share = self.sampler.partition(":")
        try:
            found = Fraction(share) if word == "fixed" else None
        except (ValueError, ZeroDivisionError):
            return None
        return found if found is not None and 0 < found <= 1 else None

    def targets(self, model: nn.Module) -> list[str]:
        names = super().targets(model)[self.ignore_first :]
        if self.ignore_last and names:
            outside = not any(names[-1].startswith(block + ".") for block, _ in blocks(model))
            names = names[:-1] if outside and not is_convolution(model.get_submodule(names[-1])) else names
        if not names:
            raise ValueError(f"ignore_first is {self.ignore_first} and ignore_last is {self.ignore_last}; no layer is left to factor")
        return names

    def spec(self, name: str, module: Any) -> Spec:
        if is_convolution(module):
            conv_spec(name, module, "nc", 1)
            return {"kind": "ordered.convolution", "rank": min(module.weight.flatten(1).shape)}
        rows, columns = dense_weight(module).shape
        made: Spec = {"kind": "ordered.linear", "in": columns, "out": rows, "rank": min(rows, columns), "bias": module.bias is not None}
        return made | ({"transposed": True} if isinstance(module, Conv1D) else {})

    def fill(self, new: Any, old: Any, generator: torch.Generator) -> None:
        dense = old.weight.flatten(1) if isinstance(new, OrderedConv) else dense_weight(old)
        if self.init == "svd":
            factors = svd(dense, min(dense.shape), balance="sqrt")
            new.up.weight.copy_(factors.up.view_as(new.up.weight))
            new.down.weight.copy_(factors.down.view_as(new.down.weight))
        else:
            for factor in (new.up.weight, new.down.weight):
                bound = factor[0].numel() ** -0.5  # Kaiming with a = sqrt(5)
                factor.copy_((2 * torch.rand(factor.shape, generator=generator) - 1) * bound)
        if new.bias is not None:
            new.bias.copy_(old.bias)
        new.kept.fill_(new.rank if self.share is None else max(1, int(self.share * new.rank)))

    def sample(self, ranks: Mapping[str, int], step: int) -> dict[str, int]:
        """The layers that are cut in a step, and to which rank; the same on all processes.

        Args:
            ranks: of all layers; those of rank 0 are left alone.
            step: optimizer steps done.
        """
        left = [(name, rank) for name, rank in ranks.items() if rank > 0]
        if not left or self.sampler == "none" or self.share is not None:
            return {}
        if self.sampler == "pairs":
            total = sum(rank for _, rank in left)
            turn, place = divmod(step, total)
            chosen = int(torch.randperm(total, generator=_generator(self.seed, total, turn))[place])
            for name, rank in left:
                if chosen < rank:
                    return {name: chosen + 1}
                chosen -= rank
        generator = _generator(self.seed, 0, step)
        if self.sampler == "layer_uniform":
            left = [left[_draw(len(left), generator)]]
        return {name: 1 + _draw(rank, generator) for name, rank in left}

    def begin_step(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        layers = ordered(model)
        chosen = self.sample({name: module.kept_rank() for name, module in layers.items()}, step)
        for name, module in layers.items():
            module.planned = chosen.get(name)

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """The loss of the cut network, or of the whole and the cut one, and the group lasso; in evaluation mode the model's own.

        Raises:
            ValueError: if the cut network is to learn from the whole one, and the model's output has no logits.
        """
        if not model.training:
            return model(**batch).loss
        layers = ordered(model)
        chosen: dict[str, int | None] = {name: module.planned for name, module in layers.items() if module.planned is not None}
        if not chosen:
            total = model(**batch).loss
        elif not self.full_pass:
            with ordered_dropout(model, chosen):  # type: ignore[arg-type]
                made = model(**batch)
            total = made.loss
            _again(total, layers, chosen)
        else:
            whole_made = model(**batch)
            with ordered_dropout(model, chosen):  # type: ignore[arg-type]
                cut_made = model(**batch)
            if getattr(cut_made, "logits", None) is None:
                raise ValueError("full_pass is True; the model's output has no logits to learn from, so it must be False")
            distilled = distillation(cut_made.logits, whole_made.logits.detach(), batch, _is_causal(model))
            # Backward takes the later pass first: checkpointed layers are run again at its ranks, and then at those of the whole one.
            _again(whole_made.loss, layers, {})
            _again(distilled, layers, chosen)
            total = whole_made.loss + distilled
        if self.group_lasso and not self.proximal:
            total = total + self.group_lasso * self.penalty(model).to(total)
        return total

    def penalty(self, model: nn.Module) -> Float[Tensor, ""]:
        """The group lasso without its factor: norms of the groups of all layers, both factors, in float32 at least."""
        norm = tails if self.hierarchical else root
        return torch.stack([norm(squares).sum() for module in ordered(model).values() for squares in module.squared_norms()]).sum()

    def before_update(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        set_cuts(ordered(model), {})

    def end_step(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        if self.proximal and self.group_lasso:
            self._shrink_groups(model, optimizer)
        if self.shrink_every and step % self.shrink_every == 0:
            self.shrink(model, optimizer)

    @torch.no_grad()
    def shrink(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, int]:
        """Drop the components of too little importance, for good; the ranks that are left.

        The parameters keep their size. Where single components are judged, those that stay move to the front, in the parameters and the optimizer's moments.
        """
        for module in ordered(model).values():
            up, down = module.squared_norms()
            norm = tails if self.hierarchical else root
            stay = norm(up) * norm(down) >= self.importance_threshold
            if not self.hierarchical and bool((stay[1:] & ~stay[:-1]).any()):
                order = torch.cat([stay.nonzero()[:, 0], (~stay).nonzero()[:, 0], torch.arange(len(stay), module.rank, device=stay.device)])
                for factor, axis in ((module.up.weight, 1), (module.down.weight, 0)):
                    _reorder(factor, axis, order, optimizer)
            module.keep(int(stay.sum()))
        return {name: module.kept_rank() for name, module in ordered(model).items()}

    def finish(self, model: nn.Module) -> None:
        """Cut the parameters to what is left; the layers stay factored unless that is larger, see :func:`echelon.train.layers.ordered.export`."""
        export(model, self.merge_if_larger)

    @torch.no_grad()
    def _shrink_groups(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        rates = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
        for module in ordered(model).values():
            for factor, axis, squares in zip((module.up.weight, module.down.weight), (1, 0), module.squared_norms(), strict=True):
                scales = proximal(squares.sqrt(), rates.get(id(factor), 0.0) * self.group_lasso, self.hierarchical)
                scales = nn.functional.pad(scales, (0, module.rank - len(scales)), value=1.0)
                shape = [-1 if i == axis else 1 for i in range(factor.ndim)]
                value = stored(optimizer, factor)
                rewrite(optimizer, factor, value * scales.view(shape).to(value.dtype))


def proximal(norms: Float[Tensor, " k"], threshold: float, hierarchical: bool) -> Float[Tensor, " k"]:
    """What each component is multiplied with to minimise half its squared change plus ``threshold`` times the group lasso, exactly.

    Nested groups are shrunk from the innermost outwards ("Proximal Methods for Hierarchical Sparse Coding", arXiv 1009.2139).
    """
    if not hierarchical:
        return (1 - threshold / norms.clamp_min(1e-300 if norms.dtype == torch.float64 else 1e-38)).clamp_min(0)
    factors, tail = [], 0.0
    for norm in reversed(norms.tolist()):
        group = (norm * norm + tail * tail) ** 0.5
        tail = max(0.0, group - threshold)
        factors.append(tail / group if group > 0 else 0.0)
    return torch.tensor(factors[::-1], dtype=norms.dtype, device=norms.device).cumprod(0)


def distillation(
    cut: Float[Tensor, "*batch classes"], full: Float[Tensor, "*batch classes"], batch: Mapping[str, Any], causal: bool
) -> Float[Tensor, ""]:  # fmt: skip
    """Cross-entropy of the cut network against the whole one's distribution, over the positions that have a label.

    Args:
        cut: logits of the cut network.
        full: logits of the whole one, detached.
        batch: what the model was called with.
        causal: whether a position's label is the next token.
    """
    entropies = -(full.float().softmax(-1) * cut.float().log_softmax(-1)).sum(-1)
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and labels.shape == entropies.shape:
        if causal:
            labels = nn.functional.pad(labels, (0, 1), value=-100)[..., 1:]
        counted = labels != -100
    else:
        counted = torch.ones_like(entropies, dtype=torch.bool)
    total = (entropies * counted).sum()
    return total / (batch.get("num_items_in_batch") or counted.sum().clamp_min(1))


def _is_causal(model: nn.Module) -> bool:
    inner = getattr(model, "module", model)
    return isinstance(inner, PreTrainedModel) and inner.loss_type in (None, "ForCausalLM")  # as transformers picks its loss


def _again(loss: Tensor, layers: Mapping[str, Any], ranks: Mapping[str, int | None]) -> None:
    """Let what is run again in this loss's backward pass use these ranks."""
    if loss.requires_grad:
        loss.register_hook(lambda _: set_cuts(layers, ranks))


def _reorder(factor: nn.Parameter, axis: int, order: Tensor, optimizer: torch.optim.Optimizer | None) -> None:
    factor.copy_(factor.index_select(axis, order))
    states = getattr(optimizer, "optimizer", optimizer).state if optimizer is not None else {}
    if any(key.endswith("_scale") for key in states.get(factor, {})):
        reset_moments(optimizer, [factor])  # type: ignore[arg-type]  # eight-bit blocks do not follow components
    for value in states.get(factor, {}).values():
        if isinstance(value, Tensor) and value.shape == factor.shape:
            value.copy_(value.index_select(axis, order))


def _generator(*numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(hash(numbers))


def _draw(below: int, generator: torch.Generator) -> int:
    return int(torch.randint(below, (), generator=generator))
