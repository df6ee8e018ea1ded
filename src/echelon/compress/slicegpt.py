"""SliceGPT: turn the residual stream into its principal axes, and delete those along which little happens.

Source: "SliceGPT: Compress Large Language Models by Deleting Rows and Columns", arXiv 2401.15024; layer-wise schedules after "Change Is the
Only Constant: Dynamic LLM Slicing based on Layer Redundancy", arXiv 2411.03513.
Differs from the authors' code: embeddings are centred only where the norms subtract the mean (elsewhere it changes the model), the norms'
epsilon is the model's own, a layer is run once instead of twice (slicing what attention writes is linear, hence slicing its output is the
same), the last block writes in the model's own basis unless ``slice_head`` (final norm and head then stay as they are), and shortcuts are
left out where both sides share a basis.
"""

import functools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from echelon.calibrate import Block, Calibration, LayerWalker, Moments
from echelon.compress.base import Compressed, Compressor, Job
from echelon.compress.budget import size
from echelon.compress.rotations import Rotation, back, between, project, random_rotation, read, write
from echelon.compress.schedules import block_redundancy, by_redundancy, linear_ends
from echelon.compress.sliced import PaddedDropout, become_sliced, keep_whole, set_shortcut
from echelon.linalg.lowrank import eig_basis
from echelon.models.families import SUPPORTED, FamilyAdapter, adapter, bias, epsilon, matrix, put
from echelon.models.modules import Spec
from echelon.models.reload import detach
from echelon.registry import method


@method(
    kind="compressor", name="slicegpt", title="SliceGPT: Compress Large Language Models by Deleting Rows and Columns", arxiv="2401.15024", year=2024,
    summary="Rotate the residual stream into its principal axes and cut the small ones off every matrix.",
    needs="calibration text; a decoder-only model with norms before its sub-layers",
    published="Llama-2-70B, OPT-66B and Phi-2 keep 99, 99 and 90 % of their zero-shot accuracy at 25 % sparsity",
)  # fmt: skip
@dataclass(frozen=True)
class SliceGPT(Compressor):
    """Narrow the residual stream, and every matrix that reads or writes it.

    What is left runs on dense matrix products. Where a block changes the basis, its residual path gets a small matrix (`shortcut`); at sparsity 0
    none is needed, and the model does not grow. Tied embeddings are untied. Recovery by LoRA is PEFT's: shortcuts are no ``nn.Linear``, so
    adapters leave them frozen.

    Attributes:
        sparsity: share of the stream's width to remove (not of the parameters), in [0, 1).
        round_to: widths are rounded down to a multiple of this; 128 suits tensor cores.
        final_orientation: `pca` keeps the principal axes; `random` turns them among themselves, which spreads outliers before quantising.
        slice_head: let the last block write a narrow stream too, and narrow the head.
        schedule: how layers share the sparsity: `const`; `redundancy` (more where a layer changes its input less; `sparsity` is the mean);
            `linear(first,last)` or one number for each layer, which replace `sparsity`. A block has its width at its input and in its middle.
        pca_on: take the principal axes of the `residual` stream or of the `normalized` one, in which all tokens weigh the same.
        merge_shortcuts: use one rotation for the whole model; needs no shortcuts and gives a plain Hugging Face model where the
            family allows it (Llama, Mistral, Qwen2, Qwen3), at some cost in quality.
        nsamples: rows of calibration data.
        seqlen: tokens a row.

    Raises:
        UnsupportedFamily: (a ValueError and NotImplementedError) from :meth:`compress`, if the stream of this architecture may not be rotated.
    """

    budget_knob: ClassVar[str] = "sparsity"
    budget_range: ClassVar[tuple[float, float]] = (0.0, 0.75)
    model_types: ClassVar[tuple[str, ...] | None] = SUPPORTED

    sparsity: float = 0.25
    round_to: int = 8
    final_orientation: Literal["pca", "random"] = "pca"
    slice_head: bool = False
    schedule: str | list[float] = "const"
    pca_on: Literal["residual", "normalized"] = "residual"
    merge_shortcuts: bool = False
    nsamples: int = 128
    seqlen: int = 2048

    def __post_init__(self) -> None:
        """Raises: ValueError: if a knob is out of range."""
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity is {self.sparsity!r}; it must be at least 0 and below 1")
        for name in ("round_to", "nsamples", "seqlen"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be at least 1")
        for name, legal in (("final_orientation", ("pca", "random")), ("pca_on", ("residual", "normalized"))):
            if getattr(self, name) not in legal:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(legal)}")
        if self.merge_shortcuts and self.schedule != "const":
            raise ValueError(f"schedule is {self.schedule!r}; with merge_shortcuts all layers have one width, so it must be const")
        if isinstance(self.schedule, str):
            if self.schedule not in ("const", "redundancy"):
                linear_ends(self.schedule)
        elif not self.schedule or not all(0 <= share < 1 for share in self.schedule):
            raise ValueError(f"schedule is {self.schedule!r}; a list must hold a number in [0, 1) for each layer")

    def widths(self, family: FamilyAdapter, redundancy: Sequence[float] = ()) -> list[int]:
        """Width of the stream into each block, and out of the last one.

        Args:
            family: the model.
            redundancy: mean cosine between input and output of each block, for the schedule of this name.

        Raises:
            ValueError: if a width would be below 1, or the schedule's list has another length than the model has layers.
        """
        layers = len(family.blocks)
        if isinstance(self.schedule, list):
            if len(self.schedule) != layers:
                raise ValueError(f"schedule has {len(self.schedule)} numbers; this model has {layers} layers")
            shares = self.schedule
        elif self.schedule == "const":
            shares = [self.sparsity] * layers
        elif self.schedule == "redundancy":
            shares = by_redundancy(redundancy, self.sparsity)
        else:
            first, last = linear_ends(self.schedule)
            shares = [first + (last - first) * index / max(layers - 1, 1) for index in range(layers)]
        kept = [self._width(family, share) for share in shares]
        leaving = kept[-1] if self.slice_head or self.merge_shortcuts else family.width
        return [*kept, max(leaving, kept[0]) if family.roles.takes_width else leaving]

    def _width(self, family: FamilyAdapter, share: float) -> int:
        if share == 0:
            return family.width
        step = self.round_to
        if self.merge_shortcuts and not family.roles.layer_norm:  # a plain configuration wants a multiple of the number of heads
            step = math.lcm(step, family.model.config.num_attention_heads)
        width = math.floor((1 - share) * family.width + 1e-9)
        width -= width % step
        if width < 1:
            raise ValueError(f"sparsity {share} leaves less than {step} of {family.width} columns, to which round_to is {self.round_to}; lower one of them")
        return width

    @property
    def needs_data(self) -> bool:
        return True

    def compress(self, model: Any, *args: Any, **kwargs: Any) -> Compressed:
        """As :meth:`Compressor.compress`; with ``merge_shortcuts`` the model may then need nothing of Echelon to be loaded."""
        made = super().compress(model, *args, **kwargs)
        if self.merge_shortcuts and not adapter(made.model).roles.layer_norm:
            detach(made.model)
        return made

    def prepare(self, job: Job) -> list[float]:
        """The redundancy of each block, if the schedule goes by it; the rest depends on what is cut before."""
        family, calibration = self.check(job)
        return block_redundancy(family, calibration) if self.schedule == "redundancy" else []

    def check(self, job: Job) -> tuple[FamilyAdapter, Calibration]:
        """The model and the data, if they will do; weights on the meta device are not looked at.

        Raises:
            ValueError: if they will not.
        """
        family = adapter(job.model)
        family.require_rotatable()
        if job.calibration is None:
            raise ValueError("slicegpt runs the model behind what it has sliced, so statistics are not enough; give calibration data")
        if not job.calibration.tokens:
            raise ValueError(f"calibration data ({job.calibration.source}) holds nothing but pads; give text")
        for name, parameter in job.model.named_parameters():
            if not parameter.is_meta and not parameter.isfinite().all():
                raise ValueError(f"{name} holds NaN or infinity")
        if job.calibration.tokens < family.width:
            told = f"slicegpt saw {job.calibration.tokens} tokens, fewer than the {family.width} axes of the stream; give more text, or some are cut blindly"
            if self.strict:
                raise ValueError(told)
            warnings.warn(told, stacklevel=3)
        return family, job.calibration

    def specs(self, job: Job, state: list[float]) -> dict[str, Spec]:
        family = adapter(job.model)
        roles, full, widths = family.roles, family.width, self.widths(family, state)
        cuts = iter(range(1, 2 * len(widths) + 1))

        def basis(width: int, before: int | None) -> int | None:
            """A number for each basis, 0 for a whole rotation, None for the identity: as :meth:`Points.choose` will have them."""
            if self.merge_shortcuts:
                return 1
            return next(cuts) if width < full else before if not before else None

        made: dict[str, Spec] = {name: {"kind": "sliced.embedding", "width": widths[0]} for name in (roles.embed, roles.positions) if name}
        entering = basis(widths[0], 0 if self.final_orientation == "random" else None)
        for index, block in enumerate(family.blocks):
            middle = entering if roles.parallel else basis(widths[index], entering)
            leaving = basis(widths[index + 1], middle)
            after_attention = leaving if roles.parallel else middle
            norms = block.norms
            pairs = ((norms[0], block.attention_in[0]), (norms[-1], block.mlp_in[0]))
            made[f"{roles.layers}.{index}"] = {
                "kind": "sliced.block", "widths": [widths[index], widths[index], widths[index + 1]], "width": full, "eps": epsilon(norms[0]),
                "shortcuts": [entering != after_attention, not roles.parallel and middle != leaving],
                "bias": [reader.bias is not None or getattr(norm, "bias", None) is not None for norm, reader in pairs],
            }  # fmt: skip
            entering = leaving
        if roles.takes_width and widths[-1] > widths[0]:
            made[roles.takes_width] = {"kind": "sliced.padding", "width": widths[-1]}
        if entering is not None:
            norm, head = family.model.get_submodule(roles.final_norm), family.head
            name = next(name for name, module in family.model.named_modules() if module is head)
            made[roles.final_norm] = {"kind": "sliced.norm", "width": full, "eps": epsilon(norm)}
            made[name] = {"kind": "sliced.head", "in": widths[-1], "bias": head.bias is not None or getattr(norm, "bias", None) is not None}
        return made

    def apply(self, job: Job, state: list[float], specs: Mapping[str, Spec]) -> None:
        assert job.calibration is not None
        family, widths = adapter(job.model), self.widths(adapter(job.model), state)
        points = self.begin(job, widths, specs)
        family.center_embeddings()
        if self.merge_shortcuts:
            one_rotation(family, job.calibration, widths[0], points)
        else:
            layer_by_layer(family, job.calibration, widths, points, lambda done: job.progress("blocks", done, len(widths) - 1))
        job.report.modules |= points.cuts

    def begin(self, job: Job, widths: Sequence[int], specs: Mapping[str, Spec]) -> "Points":
        """Untie the head, which may be on the meta device, and tell if that makes the model grow."""
        family = adapter(job.model)
        after, before = size(job.model, specs).parameters, job.report.parameters_before
        if min(widths) < family.width and after > before:
            reason = "a head untied from the embeddings" if job.model.config.tie_word_embeddings else "shortcuts"
            warnings.warn(f"slicegpt makes this model grow from {before:,} to {after:,} parameters, by {reason}; raise sparsity", stacklevel=4)
        family.untie()
        if family.roles.rotary:  # said explicitly, lest anything derive it from a width
            job.model.config.head_dim = family.attention_shape.head_dim
        return Points(family.width, family.roles.layer_norm, self.pca_on == "normalized", self.final_orientation == "random", job.generator())


Cuts = dict[str, dict[str, Any]]


class _Seen:
    """Moments of the stream as it counts for the axes.

    Attributes:
        moments: of what was seen.
    """

    def __init__(self, width: int, device: Any, centered: bool, normalized: bool) -> None:
        self.moments, self.centered, self.normalized = Moments.of(width, device), centered, normalized

    def update(self, x: Float[Tensor, "*rows d"], mask: Tensor | None = None) -> None:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.centered:
            wide = wide - wide.mean(-1, keepdim=True)
        if self.normalized:
            wide = wide / wide.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)
        self.moments.update(wide, None if mask is None else mask.to(x.device))


class Points:
    """Chooses the axes at each point of the stream, and remembers what they cut off.

    Attributes:
        cuts: for each point, under the name of what writes it: ``rank``, its width; ``lost``, the mean squared length of what is cut off
            there; ``tail_energy``, its share of the whole; ``rel_err``, the root of that.
        start: the basis in which the stream begins.
    """

    def __init__(self, full: int, centered: bool, normalized: bool, turned: bool, generator: torch.Generator) -> None:
        self.full, self.turned, self.generator = full, turned, generator
        self.make = functools.partial(_Seen, centered=centered, normalized=normalized)
        self.start: Rotation = random_rotation(full, generator) if turned else None
        self.cuts: Cuts = {}

    def choose(self, name: str, states: Sequence[Tensor], masks: Sequence[Tensor | None], width: int, before: Rotation) -> Rotation:
        """The first ``width`` principal axes of the stream at this point; where nothing is to be cut, the basis of the point before stays."""
        if width == self.full:
            return before if before is None or before.shape[1] == width else None
        seen = self.make(self.full, states[0].device)
        try:
            for state, mask in zip(states, masks, strict=True):
                seen.update(state, mask)
            return self.axes(name, seen.moments, width)
        except ValueError as error:
            raise ValueError(f"the stream behind {name}: {error}") from error

    def axes(self, name: str, moments: Moments, width: int) -> Rotation:
        axes, values = eig_basis(moments.second_moment.cpu())  # float64 is slow on most GPUs
        lost, total = float(values[width:].sum()), float(values.sum())
        self.cuts[name] = {"rank": width, "tail_energy": lost / total, "rel_err": math.sqrt(lost / total), "lost": lost}
        kept = axes[:, :width].contiguous()
        return kept @ random_rotation(width, self.generator) if self.turned else kept


@torch.no_grad()
def layer_by_layer(
    family: FamilyAdapter, calibration: Calibration, widths: Sequence[int], points: Points, tell: Callable[[int], None]
) -> None:
    """Axes of its own for each point of the stream, computed behind all that has been sliced before it.

    A half-block is first run with its full width going out, in the original basis, and sliced then: what comes out is linear in the
    matrices that are to be sliced, so its sliced output needs no second run.
    """
    entering: Rotation = None
    for walked in LayerWalker(family.model, calibration):
        if walked.index == 0:
            entering = slice_embeddings(family, walked.states, walked.masks, widths[0], points)
        entering = slice_block(family, walked, widths, points, entering)
        tell(walked.index + 1)
    takes_width = family.roles.takes_width
    if takes_width and widths[-1] > widths[0]:
        dropout: Any = family.model.get_submodule(takes_width)
        family.model.set_submodule(takes_width, PaddedDropout(widths[-1], dropout.p).train(dropout.training))
    slice_head(family, entering)
    keep_whole(family.model)


@torch.no_grad()
def slice_embeddings(
    family: FamilyAdapter, states: Sequence[Tensor], masks: Sequence[Tensor | None], width: int, points: Points
) -> Rotation:
    """Let the (centred) tables write the leading axes of the stream that they begin; the basis of these."""
    entering = points.choose(family.roles.embed, states, masks, width, points.start)
    for table in family.embeddings:
        put(table, project(table.weight.detach().double(), entering))
    return entering


@torch.no_grad()
def slice_block(family: FamilyAdapter, walked: Block, widths: Sequence[int], points: Points, entering: Rotation) -> Rotation:
    """Slice one block, which the stream enters in the basis ``entering``; the basis in which it leaves.

    The states are in the original basis; those that leave are put into ``walked.outputs``.
    """
    roles, block, masks, states = family.roles, family.blocks[walked.index], walked.masks, walked.states
    dtype = block.attention_out.weight.dtype
    block.module.to(torch.promote_types(dtype, torch.float32))  # type: ignore[arg-type]
    block.fold_norms(family.width)
    layer, middle = become_sliced(block.module, roles), entering
    read(block.attention_in, entering)
    set_shortcut(layer, "attention_shortcut", back(entering))
    if roles.parallel:
        read(block.mlp_in, entering)
        states = walked.keep(_run(layer, walked.calls, states, entering))
    else:
        states = walked.keep(_run(layer.attend, walked.calls, states, entering))
        middle = points.choose(f"{walked.name}.{roles.attention_out}", states, masks, widths[walked.index], entering)
        write(block.attention_out, middle)
        set_shortcut(layer, "attention_shortcut", between(entering, middle))
        read(block.mlp_in, middle)
        set_shortcut(layer, "mlp_shortcut", back(middle))
        states = walked.keep(_run(layer.feed, [((), {})] * len(states), states, middle))
    leaving = points.choose(f"{walked.name}.{roles.mlp_out}", states, masks, widths[walked.index + 1], middle)
    write(block.mlp_out, leaving)
    if roles.parallel:
        write(block.attention_out, leaving)
    set_shortcut(layer, "attention_shortcut" if roles.parallel else "mlp_shortcut", between(middle, leaving))
    block.module.to(dtype)  # type: ignore[arg-type]
    walked.outputs = states
    return leaving


@torch.no_grad()
def slice_head(family: FamilyAdapter, entering: Rotation) -> None:
    """Let the head read the axes in which the last block leaves the stream."""
    if entering is not None:
        family.fold_final_norm()
        read([family.head], entering)


def _run(half: Callable[..., Tensor], calls: Sequence[tuple[Any, Any]], states: Sequence[Tensor], rotation: Rotation) -> Iterator[Tensor]:
    """What half a block makes of the projected stream; computed in float32 at least, given in the stream's own dtype."""
    for state, (args, kwargs) in zip(states, calls, strict=True):
        yield half(project(_wide(state), rotation), *_wide(args), **_wide(kwargs)).to(state.dtype)


def _wide(value: Any) -> Any:
    """Half-precision tensors, also inside tuples and dictionaries, as float32."""
    if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16):
        return value.float()
    if isinstance(value, tuple):
        return tuple(_wide(part) for part in value)
    return {name: _wide(part) for name, part in value.items()} if isinstance(value, dict) else value


@torch.no_grad()
def one_rotation(family: FamilyAdapter, calibration: Calibration, width: int, points: Points) -> None:
    """One set of axes for the whole model, from the stream before every norm of the dense model; it needs no shortcuts."""
    model, roles, full = family.model, family.roles, family.width
    pooled, last = Moments.of(full, model.device), points.make(full, model.device)
    for walked in LayerWalker(model, calibration):
        for seen in walked.observe([f"{walked.name}.{norm}" for norm in roles.norms], make=points.make).moments.values():
            pooled = pooled.merge(seen.moments)
    for state, mask in zip(walked.outputs or (), walked.masks, strict=True):
        last.update(state, mask)
    rotation = points.axes(roles.embed, pooled.merge(last.moments), width)
    kind = type(model.get_submodule(roles.final_norm))
    for table in family.embeddings:
        put(table, project(table.weight.detach().double(), rotation))
    for block in family.blocks:
        dtype = block.attention_out.weight.dtype
        block.module.to(torch.promote_types(dtype, torch.float32))  # type: ignore[arg-type]
        block.fold_norms(full)
        read(block.attention_in + block.mlp_in, rotation)
        write(block.attention_out, rotation)
        write(block.mlp_out, rotation)
        block.module.to(dtype)  # type: ignore[arg-type]
        if roles.layer_norm:
            become_sliced(block.module, roles)
    family.fold_final_norm()
    read([family.head], rotation)
    if roles.layer_norm:
        keep_whole(model)
    else:
        become_plain(family, width, kind)


def become_plain(family: FamilyAdapter, width: int, kind: type[nn.Module]) -> None:
    """Make an RMSNorm model with one rotation an ordinary model of its family, whose hidden size is ``width``.

    The family's norm divides by ``width`` where the original divides by its own width; a weight and another epsilon make up for it.
    """
    model, ratio, shape = family.model, family.width / width, family.attention_shape
    eps = model.config.rms_norm_eps * ratio
    for block in family.blocks:
        for name in family.roles.norms:
            block.module.set_submodule(name, _norm(kind, width, eps, ratio, block.mlp_out))
        if hasattr(block.attention, "q_norm"):  # norms of queries and keys read their epsilon from the same line of the config
            for reader, norm in zip(block.attention_in, (block.attention.q_norm, block.attention.k_norm), strict=False):
                shift = bias(reader)
                put(reader, matrix(reader) * math.sqrt(ratio), None if shift is None else shift * math.sqrt(ratio))
                norm.variance_epsilon = eps  # type: ignore[union-attr, assignment]
        for part in (block.module, *block.module.children()):
            if hasattr(part, "hidden_size"):
                part.hidden_size = width  # type: ignore[assignment]
    model.set_submodule(family.roles.final_norm, _norm(kind, width, eps, ratio, family.head))
    model.config.head_dim = shape.head_dim
    model.config.hidden_size = width
    model.config.rms_norm_eps = eps


def _norm(kind: type[nn.Module], width: int, eps: float, ratio: float, like: nn.Module) -> nn.Module:
    made = kind(width, eps).to(like.weight.device, like.weight.dtype)  # type: ignore[call-arg, union-attr, arg-type]
    made.weight.data.fill_(math.sqrt(ratio))  # type: ignore[union-attr, operator]
    return made
