"""MoDeGPT: shrink what is inside a block's three modules (MLP, query-key, value-output), each jointly and by its own decomposition.

Source: "MoDeGPT: Modular Decomposition for Large Language Model Compression", arXiv 2408.09632.
Differs from it, or chooses where it is silent (no code was published): the ridge of the leverage scores is relative to the mean energy of a
hidden unit, since an absolute one tells nothing apart where a few units are huge; layers above the cap of sparsity hand what is over to the
others; queries and keys are scored before they are rotated; rotary dimensions are kept in pairs, and one set serves a key head and all of
its queries; query heads that share a value head are fitted together (`vo_joint`); a bias of the values becomes part of the output's bias,
which is exact; the products are decomposed without inverting a covariance.
"""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from echelon import linalg
from echelon.calibrate import LayerWalker, Moments
from echelon.compress.base import Compressed, Compressor, Job
from echelon.compress.inside import Affine, Inside
from echelon.compress.modular import ModularAttention, become_plain, refuse_plain
from echelon.compress.schedules import block_redundancy
from echelon.models.families import SUPPORTED, AttentionShape, Block, FamilyAdapter, UnsupportedFamily, adapter, bias, matrix, put, sizes
from echelon.models.modules import Spec, build
from echelon.models.reload import detach
from echelon.registry import method

MODULES = ("mlp", "qk", "vo")


@dataclass(frozen=True)
class Sizes:
    """What is left inside a block.

    Attributes:
        hidden: units of the MLP.
        qk: width of a query and key head.
        rotated: how many of these positions rotate.
        vo: width of a value head.
    """

    hidden: int
    qk: int
    rotated: int
    vo: int


@dataclass(frozen=True)
class _State:
    """Attributes: influence: of each block, zeros if all get the same; shared: scores of query and key dimensions over the whole model, if asked for."""

    influence: list[float]
    shared: Float[Tensor, " d"] | None = None


@method(
    kind="compressor", name="modegpt", title="MoDeGPT: Modular Decomposition for Large Language Model Compression", arxiv="2408.09632", year=2024,
    summary="Choose hidden units and query-key dimensions, and factor value-output pairs, so that each module's output changes least.",
    needs="calibration text; a decoder-only model",
    published="90-95 % of zero-shot performance at 25-30 % compression of Llama-2, Llama-3 and OPT, up to 46 % more throughput (abstract)",
)  # fmt: skip
@dataclass(frozen=True)
class MoDeGPT(Compressor):
    """Shrink the MLP's hidden width, the query-key width and the value width of every block; the residual stream stays as wide as it is.

    MLP: keep the units of highest ridge leverage, and regress the others on them (Nystrom). Query-key: keep the dimensions with the largest
    product of energies (CR). Value-output: the best low-rank product under the inputs' second moment (SVD). No gradients, no matrices in
    addition; the key-value cache shrinks too. The share that is removed is the same for the three modules of a block, and larger in
    blocks that change the stream less. Embeddings and head are untouched, so the whole model shrinks by less than `compression_ratio`.

    Attributes:
        compression_ratio: mean share of the blocks' inner sizes to remove, in [0, 1).
        allocation_temperature: of the softmax over block influence; a large one takes the same from all blocks. The paper gives no value
            for all models, 0.02 to 0.2 are worth a search.
        max_sparsity: most that is taken from one block, in (0, 1].
        modules: which modules to shrink: `mlp`, `qk` and `vo`, joined by commas.
        nystrom_ridge: ridge of the leverage scores, relative to the mean energy of a hidden unit.
        solve_damp: added to the diagonal when dropped units are regressed on kept ones, relative to their mean energy.
        vo_joint: where query heads share a value head, fit them together; if not, keep the principal axes of the values (the paper's appendix).
        qk_pair_score: score of a rotary pair: `product` adds the products of its two dimensions, `invariant` multiplies the energies of
            the whole pairs, which no rotation changes.
        sequential: take each block's statistics behind the blocks already compressed.
        uniform: take the same from all blocks and keep the same query and key dimensions in all heads; the result is a plain
            Hugging Face model with a smaller `head_dim` and intermediate size (with `mlp` alone in every family).
        round_to: sizes are rounded down to a multiple of this; 8 or 16 suits tensor cores.
        nsamples: rows of calibration data.
        seqlen: tokens a row.
        strict: raise where there are fewer tokens than hidden units.

    Raises:
        UnsupportedFamily: (a ValueError and NotImplementedError) from :meth:`compress`, if this architecture is not handled.
    """

    budget_knob: ClassVar[str] = "compression_ratio"
    budget_range: ClassVar[tuple[float, float]] = (0.0, 0.95)
    model_types: ClassVar[tuple[str, ...] | None] = SUPPORTED

    compression_ratio: float = 0.25
    allocation_temperature: float = 0.1
    max_sparsity: float = 0.8
    modules: str = "mlp,qk,vo"
    nystrom_ridge: float = 1e-2
    solve_damp: float = 1e-6
    vo_joint: bool = True
    qk_pair_score: Literal["product", "invariant"] = "product"
    sequential: bool = False
    uniform: bool = False
    round_to: int = 1
    nsamples: int = 128
    seqlen: int = 2048
    strict: bool = False

    def __post_init__(self) -> None:
        """Raises: ValueError: if a knob is out of range."""
        if not 0 <= self.compression_ratio < 1:
            raise ValueError(f"compression_ratio is {self.compression_ratio!r}; it must be at least 0 and below 1")
        if not 0 < self.max_sparsity <= 1:
            raise ValueError(f"max_sparsity is {self.max_sparsity!r}; it must be in (0, 1]")
        if self.compression_ratio > self.max_sparsity:
            raise ValueError(f"compression_ratio is {self.compression_ratio!r}; it must be at most max_sparsity, {self.max_sparsity!r}")
        if not 0 < self.allocation_temperature < math.inf:
            raise ValueError(f"allocation_temperature is {self.allocation_temperature!r}; it must be above 0 and finite")
        for name in ("nystrom_ridge", "solve_damp"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be at least 0 and finite")
        if not self.parts or not self.parts <= set(MODULES):
            raise ValueError(f"modules is {self.modules!r}; it must name one or more of {', '.join(MODULES)}, joined by commas")
        if self.qk_pair_score not in ("product", "invariant"):
            raise ValueError(f"qk_pair_score is {self.qk_pair_score!r}; it must be product or invariant")
        if self.uniform and ("qk" in self.parts) != ("vo" in self.parts):
            raise ValueError(f"modules is {self.modules!r}; with uniform, qk and vo go together, since a plain model has one head_dim for both")
        for name in ("round_to", "nsamples", "seqlen"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be at least 1")

    @property
    def parts(self) -> set[str]:
        """The names in ``modules``."""
        return {part.strip() for part in self.modules.split(",") if part.strip()}

    @property
    def needs_data(self) -> bool:
        return True

    def sparsities(self, influence: Float[Tensor, " blocks"]) -> list[float]:
        """The share that each block loses; their mean is ``compression_ratio``, and a block of less influence never loses less."""
        if self.uniform:
            return [self.compression_ratio] * len(influence)
        return linalg.block_sparsity(influence, self.compression_ratio, self.allocation_temperature, self.max_sparsity).tolist()

    def sizes(self, hidden: int, shape: AttentionShape, sparsity: float) -> Sizes:
        """What is left of a block, given its full sizes and the share it loses.

        Rotary dimensions go in pairs, and rotated and other dimensions (partial rotary) keep their proportion.
        """
        full = shape.head_dim
        kept = min(max(self._rounded((1 - sparsity) * full, 2 if shape.rotary_dims else 1), 2), full) if sparsity else full
        qk, vo = (kept if part in self.parts else full for part in ("qk", "vo"))
        rotated = min(shape.rotary_dims, 2 * math.ceil(qk * shape.rotary_dims / full / 2))
        units = self._rounded(round((1 - sparsity) * hidden), 1) if "mlp" in self.parts and sparsity else hidden
        return Sizes(min(max(units, 1), hidden), qk, rotated, vo)

    def _rounded(self, size: float, step: int) -> int:
        """Down to a multiple of ``step`` and, where that leaves anything, of ``round_to``."""
        coarse = math.lcm(self.round_to, step)
        return math.floor(size / coarse + 1e-9) * coarse or math.floor(size / step + 1e-9) * step

    def compress(self, model: Any, *args: Any, **kwargs: Any) -> Compressed:
        """As :meth:`Compressor.compress`; with ``uniform`` the model then needs nothing of Echelon to be loaded."""
        made = super().compress(model, *args, **kwargs)
        if self.uniform:
            detach(made.model)
        return made

    def prepare(self, job: Job) -> _State:
        """How much each block changes the stream; what it is compressed by is collected block by block later, to hold one at a time."""
        family = adapter(job.model)
        self._check(job, family)
        assert job.calibration is not None
        if not self.uniform:
            return _State([1 - cosine for cosine in block_redundancy(family, job.calibration)])
        if "qk" not in self.parts:
            return _State([0.0] * len(family.blocks))
        refuse_plain(job.model.config)
        shared = torch.zeros(family.attention_shape.head_dim, dtype=torch.float64)
        for walked in LayerWalker(job.model, job.calibration):
            scores = self.scores(family, Inside.of(family, walked, {"qk"})).sum(0).cpu()
            shared += scores / scores.sum().clamp_min(1e-300)
        return _State([0.0] * len(family.blocks), shared)

    def _check(self, job: Job, family: FamilyAdapter) -> None:
        if job.calibration is None:
            raise ValueError("modegpt looks inside the blocks of the running model, so statistics are not enough; give calibration data")
        if not job.calibration.tokens:
            raise ValueError(f"calibration data ({job.calibration.source}) holds nothing but pads; give text")
        if "qk" in self.parts and getattr(job.model.config, "qk_layernorm", False):
            raise UnsupportedFamily("this model has a LayerNorm over each query and key head, which cannot be shortened; use modules='mlp,vo'")
        for block in family.blocks:
            for module in (*block.attention_in, block.attention_out, *block.mlp_in, block.mlp_out):
                if not isinstance(module, nn.Linear | Conv1D) or isinstance(block.attention, ModularAttention):
                    raise UnsupportedFamily("nn.Linear or Conv1D in the family's own attention is expected; start from the uncompressed model")
        for name, parameter in job.model.named_parameters():
            if not parameter.isfinite().all():
                raise ValueError(f"{name} holds NaN or infinity")
        hidden = max(sizes(block.mlp_out)[1] for block in family.blocks)
        if "mlp" in self.parts and job.calibration.tokens < hidden:
            told = f"modegpt saw {job.calibration.tokens} tokens, fewer than the {hidden} hidden units that are regressed on each other; give more text"
            if self.strict:
                raise ValueError(told)
            warnings.warn(told, stacklevel=4)

    def plan(self, family: FamilyAdapter, state: _State) -> list[Sizes]:
        """What is left of each block."""
        shares = self.sparsities(torch.tensor(state.influence, dtype=torch.float64))
        return [self.sizes(sizes(block.mlp_out)[1], family.attention_shape, share) for block, share in zip(family.blocks, shares, strict=True)]

    def specs(self, job: Job, state: _State) -> dict[str, Spec]:
        family, made = adapter(job.model), {}
        roles, shape = family.roles, family.attention_shape
        for index, (block, left) in enumerate(zip(family.blocks, self.plan(family, state), strict=True)):
            if min(left.qk, left.vo) < shape.head_dim:
                made[f"{roles.layers}.{index}.{_owner(roles.attention_out)}"] = self._attention_spec(block, left)
            if left.hidden < sizes(block.mlp_out)[1]:
                for name, module in zip((*roles.mlp_in, roles.mlp_out), (*block.mlp_in, block.mlp_out), strict=True):
                    outputs, inputs = sizes(module)
                    side = {"in": left.hidden, "out": outputs} if module is block.mlp_out else {"in": inputs, "out": left.hidden}
                    made[f"{roles.layers}.{index}.{name}"] = {"kind": "modular.linear", **side, "bias": module.bias is not None}
        return made

    def _attention_spec(self, block: Block, left: Sizes) -> Spec:
        made: Spec = {"kind": "modular.attention", "qk": left.qk, "rotated": left.rotated, "vo": left.vo}
        # Qwen2 has a bias in its values and no place for one in its output, so a plain model of this family must keep it where it is.
        return made | ({"value_bias": True} if self.uniform and block.attention_in[-1].bias is not None and block.attention_out.bias is None else {})

    @torch.no_grad()
    def apply(self, job: Job, state: _State, specs: Mapping[str, Spec]) -> None:
        assert job.calibration is not None
        family = adapter(job.model)
        roles, plan = family.roles, self.plan(family, state)
        for walked in LayerWalker(job.model, job.calibration, sequential=self.sequential):
            left, block = plan[walked.index], family.blocks[walked.index]
            attention, mlp = f"{walked.name}.{_owner(roles.attention_out)}", f"{walked.name}.{roles.mlp_out}"
            wanted = {part for part in self.parts if (mlp if part == "mlp" else attention) in specs}
            if wanted:
                seen = Inside.of(family, walked, wanted)
            if mlp in specs:
                job.report.modules[mlp] = self.shrink_mlp(block, seen, left.hidden)
            if attention in specs:
                job.report.modules[attention] = self.shrink_attention(family, block, seen, specs[attention], state.shared)
            job.progress("blocks", walked.index + 1, len(plan))
        if self.uniform and specs:
            self._become_plain(family, plan[0])

    def shrink_mlp(self, block: Block, seen: Inside, units: int) -> dict[str, Any]:
        """Keep the units of highest leverage, in place; what is lost, in the mean square of the MLP's output."""
        chosen = linalg.nystrom(seen.hidden.second_moment, matrix(block.mlp_out), units, self.nystrom_ridge, damp=self.solve_damp)
        for reader in block.mlp_in:
            shift = bias(reader)
            put(reader, matrix(reader)[chosen.indices], None if shift is None else shift[chosen.indices])
        put(block.mlp_out, chosen.weight, bias(block.mlp_out))
        return {"rank": units, "lost": chosen.report["tail"], "tail_energy": chosen.report["rel_err"] ** 2, "rel_err": chosen.report["rel_err"]}

    def shrink_attention(
        self, family: FamilyAdapter, block: Block, seen: Inside, spec: Spec, shared: Float[Tensor, " d"] | None
    ) -> dict[str, Any]:  # fmt: skip
        """Shorten the heads, in place; what is lost of the values' part in the mean square of the output, and of the queries' of the scores."""
        shape, told = family.attention_shape, {"qk_rank": spec["qk"], "rank": spec["vo"]}
        query, key, value = family.split_qkv(block)
        out = matrix(block.attention_out), bias(block.attention_out)
        kept = None
        if spec["qk"] < shape.head_dim:
            scores = self.scores(family, seen) if shared is None else shared.to(query[0].device).expand(shape.heads, -1) / shape.heads
            groups = shape.heads // shape.kv_heads
            kept = choose(scores, spec["qk"], spec["rotated"], shape.rotary_dims, groups if shared is None else shape.heads)
            kept = kept.expand(shape.kv_heads, -1)
            told["qk_tail_energy"] = 1 - float(scores.gather(1, kept.repeat_interleave(groups, 0)).sum() / scores.sum().clamp_min(1e-300))
            query, key = _rows(query, kept.repeat_interleave(groups, 0), shape.head_dim), _rows(key, kept, shape.head_dim)
        if spec["vo"] < shape.head_dim:
            value, out, lost = self.factor_values(value, out, seen.entering, shape, spec["vo"], spec.get("value_bias", False))
            told |= lost
        else:
            told |= {"lost": 0.0, "tail_energy": 0.0, "rel_err": 0.0}
        made: Any = build(spec, block.attention)
        for module, (weight, shift) in zip((*made.projections, block.attention_out), (query, key, value, out), strict=True):
            put(module, weight, shift)
        if made.kept is not None and kept is not None:
            made.kept = kept.to(made.kept.device).contiguous()
        return told

    def scores(self, family: FamilyAdapter, seen: Inside) -> Float[Tensor, "heads d"]:
        """How much each dimension of each query head adds to the attention scores: mean square of the query there times that of its key."""
        shape = family.attention_shape
        queries, keys = seen.queries, seen.keys.repeat_interleave(shape.heads // shape.kv_heads, 0)
        scores = queries * keys
        if self.qk_pair_score == "invariant" and shape.rotary_dims:
            queries, keys = (x[:, : shape.rotary_dims].unflatten(1, (2, -1)).sum(1) for x in (queries, keys))
            scores = torch.cat([(queries * keys / 2).repeat(1, 2), scores[:, shape.rotary_dims :]], 1)
        return scores

    def factor_values(
        self, value: Affine, out: Affine, entering: Moments, shape: AttentionShape, width: int, keep_bias: bool = False
    ) -> tuple[Affine, Affine, dict[str, float]]:
        """Value and output projections with heads of another width, and what is lost.

        Args:
            value: rows of all key heads.
            out: columns of all query heads.
            entering: moments of the inputs.
            shape: sizes of attention.
            width: of a value head.
            keep_bias: leave a bias to the values, fitted as the weight of one more input that is always 1. By default it goes into the
                output's, which changes nothing, since attention weights sum to 1.
        """
        groups = shape.heads // shape.kv_heads
        heads = value[0].unflatten(0, (shape.kv_heads, -1))
        outs = out[0].unflatten(1, (shape.kv_heads, groups, -1)).permute(1, 2, 0, 3)  # (key heads, queries of it, out, head)
        spread, shift = entering.second_moment, out[1]
        if value[1] is not None and keep_bias:
            heads = torch.cat([heads, value[1].view(shape.kv_heads, -1, 1)], 2)
            corner = torch.cat([entering.mean, entering.mean.new_ones(1)])
            spread = torch.cat([torch.cat([spread, entering.mean[:, None]], 1), corner[None]], 0)
        elif value[1] is not None:
            constant = torch.einsum("kgoh,kh->o", outs, value[1].view(shape.kv_heads, -1))
            shift = constant if shift is None else shift + constant
        values, columns, lost, whole = [], [], 0.0, 0.0
        for head, writers in zip(heads, outs, strict=True):
            stacked, middle = writers.flatten(0, 1), head @ spread @ head.T
            if self.vo_joint or groups == 1:
                factors = linalg.product_svd(stacked, head, width, spread, dtype=torch.float64)
                up, tail = factors.up, factors.report["tail"]
            else:
                factors = linalg.output_pca(head, spread, width, centered=False, dtype=torch.float64)
                up = stacked @ factors.up
                error = stacked - up @ factors.up.T
                tail = max(0.0, float(((error @ middle) * error).sum()))
            values.append(factors.down)
            columns.append(up.unflatten(0, (groups, -1)).transpose(0, 1).flatten(1))
            lost, whole = lost + tail, whole + float(((stacked @ middle) * stacked).sum())
        weight, kept_bias = torch.cat(values), None
        if value[1] is not None and keep_bias:
            weight, kept_bias = weight[:, :-1], weight[:, -1]
        share = lost / whole if whole > 0 else 0.0
        return (weight, kept_bias), (torch.cat(columns, 1), shift), {"lost": lost, "tail_energy": share, "rel_err": math.sqrt(share)}

    def _become_plain(self, family: FamilyAdapter, left: Sizes) -> None:
        config: Any = family.model.config
        if left.qk < family.attention_shape.head_dim:
            become_plain(family.model)
        for name in ("intermediate_size", "ffn_dim", "n_inner"):
            if hasattr(config, name):
                setattr(config, name, left.hidden)


def choose(scores: Float[Tensor, "heads d"], width: int, rotated: int, rotary: int, share: int) -> Int[Tensor, "sets width"]:
    """The dimensions to keep, one set for each ``share`` heads: whole rotary pairs (all first halves before all second ones), then the others."""
    parts = [linalg.select_columns(scores[:, :rotary], rotated, linalg.rope_pairs(rotary), share)] if rotated else []
    if width > rotated:
        parts.append(rotary + linalg.select_columns(scores[:, rotary:], width - rotated, share=share))
    return torch.cat(parts, 1)


def _rows(affine: Affine, kept: Int[Tensor, "heads width"], head_dim: int) -> Affine:
    rows = (kept + head_dim * torch.arange(len(kept), device=kept.device)[:, None]).flatten()
    return affine[0][rows], None if affine[1] is None else affine[1][rows]


def _owner(name: str) -> str:
    return name.rpartition(".")[0]
