"""DSFormer: each block of columns of a weight is a sparse combination of a small dense basis, learned through the factorizer.

Source: "DSFormer: Effective Compression of Text-Transformers by Dense-Sparse Weight Factorization", arXiv 2312.13211 (encoders on language understanding).
No code was published, and the paper leaves constants open. Ours are: the widths of blocks, how many coefficients a row has, the alternation that
factors (see :func:`echelon.linalg.sparse_code`), the keeping of old supports, and its schedule; do not expect its numbers. Embeddings stay as they are.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.pytorch_utils import Conv1D

import echelon
from echelon import linalg
from echelon.compress.base import Compressed, Job, refuse
from echelon.compress.dense_sparse import learning
from echelon.compress.distill import labelled
from echelon.compress.linear import Layer, LinearCompressor
from echelon.compress.recovery import recover
from echelon.compress.report import Report
from echelon.linalg.checks import number, one_of
from echelon.linalg.dictionary import SparseCode
from echelon.models.modules import Spec, build, put
from echelon.models.reload import attach, local_names
from echelon.models.targets import Targets
from echelon.registry import method

CANDIDATES = (2, 4, 8)  # coefficients of a row that are tried
TRIAL_ITERATIONS = 5


@dataclass
class SparseLayer(Layer):
    """A layer, and how many coefficients its rows would best have at the compression that was asked for (0: any)."""

    nnz: int = 0


@method(
    kind="compressor", name="dsformer", title="DSFormer: Effective Compression of Text-Transformers by Dense-Sparse Weight Factorization",
    arxiv="2312.13211", year=2023, summary="Rows as sparse combinations of a dense basis, learned while fine-tuning.",
    needs="training data with steps; without, weights alone are factored",
    published="BERT-base 2 to 3.57 times smaller; up to 40 % better compression than low-rank factorizers (abstract)",
)  # fmt: skip
@dataclass(frozen=True)
class DSFormer(LinearCompressor):
    """Replace ``W (out, in)`` by ``C_b (out, r) D_b (r, B)`` for each block b of B columns, with `nnz` non-zeros in every row of ``C_b``.

    Each row uses its own few atoms of the basis, so rows from many subspaces cost no more than rows from one; nnz = r would be low rank by block. The
    matrix takes 1/`compression` of its bytes, indices included. It saves memory, not time.

    With `steps` the dense weights are trained on the task while the forward sees their factors and the gradient passes straight through the factorizer,
    here and with a plain loop; under a ``Trainer`` use :meth:`begin`, :class:`STFCallback` and :meth:`finish`. A causal language model learns to
    predict its text; other models need batches with ``labels``. Without `steps` the result is the start of that training, for comparison.

    Attributes:
        compression: how many times fewer bytes each matrix takes, above 1; it decides `basis`.
        block_size: columns of a block; the last one of a matrix may be narrower.
        nnz: coefficients of each row in each block; if None 2, 4 or 8, whichever loses least of the first block of the matrix.
        basis: atoms of each block, in place of what `compression` gives.
        init_iters: alternations of the factorizer at the start.
        stf_iters: those at each time during training, from the factors before.
        refactor_every: training steps from one time to the next.
        solver: of the codes: `omp`; `topk`, the largest coefficients of a dense fit; `exact`, all supports, for at most 12 atoms.
        hysteresis: share of a row's squared error that other atoms must save to replace the old ones during training, in [0, 1).
        finetune_factors_steps: further steps on basis and coefficients, with the supports fixed.
        train_mode: what `steps` train: `stf` as above, `direct` the factors with fixed supports, `none` nothing.
        index_bits: least bits of an index, 8 or 16; more than 256 atoms take 16.
        steps: updates of the training; 0 for none.
        learning_rate: of AdamW, at most; small, since supports jump.
        weight_decay: of AdamW, on what is trained.
        batch_size: rows a step.
        target_modules: layers to take: `all-linear` inside the blocks, `attention`, `mlp`, a regular expression, or a list of name ends.
        nsamples: rows of training text.
        seqlen: tokens a row.
        strict: raise where a layer would be left dense because the compression leaves no room for a basis.
    """

    budget_knob: ClassVar[str] = "compression"
    budget_range: ClassVar[tuple[float, float]] = (1.0001, 16.0)

    compression: float = 2.8
    block_size: int = 64
    nnz: int | None = None
    basis: int | None = None
    init_iters: int = 20
    stf_iters: int = 1
    refactor_every: int = 1
    solver: Literal["omp", "topk", "exact"] = "omp"
    hysteresis: float = 0.01
    finetune_factors_steps: int = 0
    train_mode: Literal["stf", "direct", "none"] = "stf"
    index_bits: Literal[8, 16] = 8
    steps: int = 0
    learning_rate: float = 3e-5
    weight_decay: float = 0.0
    batch_size: int = 8
    target_modules: Targets = None
    nsamples: int = 128
    seqlen: int = 2048
    strict: bool = False

    def __post_init__(self) -> None:
        """Raises: ValueError: if a knob is out of range."""
        if not 1 < self.compression < float("inf"):
            raise ValueError(f"compression is {self.compression!r}; it must be above 1")
        least = {"block_size": 1, "init_iters": 0, "stf_iters": 0, "refactor_every": 1, "finetune_factors_steps": 0, "steps": 0, "batch_size": 1}
        for name, low in (least | {name: 1 for name in ("nnz", "basis") if getattr(self, name) is not None}).items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be at least {low}")
        if self.basis is not None and not (self.nnz or 1) <= self.basis <= 2**15:
            raise ValueError(f"basis is {self.basis!r}; it must be from nnz, {self.nnz or 1}, to {2**15}")
        one_of("solver", self.solver, ("omp", "topk", "exact"))
        one_of("train_mode", self.train_mode, ("stf", "direct", "none"))
        number("hysteresis", self.hysteresis, 0, 1, open_high=True)
        number("learning_rate", self.learning_rate, 0, float("inf"), open_low=True, open_high=True)
        number("weight_decay", self.weight_decay, 0, float("inf"), open_high=True)
        if self.index_bits not in (8, 16):
            raise ValueError(f"index_bits is {self.index_bits!r}; it must be 8 or 16")

    @property
    def trains(self) -> bool:
        return self.train_mode != "none" and (self.steps > 0 or self.finetune_factors_steps > 0)

    @property
    def needs_data(self) -> bool:
        return self.trains

    def prepare(self, job: Job) -> dict[str, Layer]:
        layers: dict[str, Layer] = {}
        for done, (name, layer) in enumerate((found := super().prepare(job)).items(), 1):
            if self.block_size > layer.shape[1]:
                raise ValueError(f"block_size is {self.block_size}; it must be at most {layer.shape[1]}, the inputs of {name}")
            layers[name] = SparseLayer(name, layer.module, nnz=self._best_nnz(layer))
            job.progress("trials", done, len(found))
        return layers

    def specs(self, job: Job, state: dict[str, Layer]) -> dict[str, Spec]:
        made: dict[str, Spec] = {}
        for name, layer in state.items():
            (rows, columns), sizes = layer.shape, self._sizes(layer, getattr(layer, "nnz", 0))
            if sizes is None:
                job.refuse(name, f"{rows} x {columns} in blocks of {self.block_size} has no room for a basis at compression={self.compression:.4g}")
                continue
            made[name] = {"kind": "dense_sparse.linear", "in": columns, "out": rows, "bias": layer.bias is not None, "block": self.block_size}
            made[name] |= {"basis": sizes[0], "nnz": sizes[1], "index_bits": sizes[2]} | ({"transposed": True} if isinstance(layer.module, Conv1D) else {})
        if state and not made:
            raise ValueError(f"compression is {self.compression:.4g}; it leaves no room for a basis in any layer")
        return made

    def replace(self, layer: Layer, spec: Spec) -> tuple[nn.Module, dict[str, Any]]:
        module: Any = build(spec, layer.module)
        code = self._code(layer, spec["basis"], spec["nnz"], self.init_iters)
        module.fill(code, layer.bias)
        return module, _told(spec["basis"], spec["nnz"], code.report["tail"], code.report["rel_err"])

    def apply(self, job: Job, state: dict[str, Layer], specs: Mapping[str, Spec]) -> None:
        straight = self.trains and self.train_mode == "stf" and self.steps > 0
        if straight:
            self._install_latent(job, state, specs)
            self._train(job, self.steps)
            refactor(job.model)
            job.report.modules |= settle(job.model)
        else:
            super().apply(job, state, specs)
        later = self.finetune_factors_steps + (0 if straight else self.steps)
        if self.trains and later:
            self._train(job, later)

    def begin(self, model: PreTrainedModel, *, seed: int = 0) -> list[str]:
        """Put layers that learn through the factorizer into a model, for training it elsewhere; their names.

        What the layers hold is in checkpoints, and a model that was saved loads and trains on. `STFCallback` keeps factors up to date, :meth:`finish`
        ends it.

        Raises:
            ValueError: as :meth:`compress`.
        """
        refuse(model)
        job = Job(model, None, None, Report(), seed)
        state = self.prepare(job)
        specs = self.specs(job, state)
        for name, reason in job.refused.items():
            if self.strict:
                raise ValueError(f"{self.method_name} cannot compress {name}: {reason}")
            warnings.warn(f"{self.method_name} cannot compress {name}: {reason}; it stays as it is", stacklevel=2)
        latent = self._install_latent(job, state, specs)
        knobs = {name: getattr(self, name) for name in self.__dataclass_fields__}
        attach(model, latent, {"method": self.method_name, "knobs": knobs, "seed": seed, "tokens": 0, "source": "", "echelon": echelon.__version__})
        return list(latent)

    @staticmethod
    def finish(model: PreTrainedModel) -> Compressed:
        """Turn the layers of :meth:`begin` into small ones, in place, and forget the latent weights.

        Raises:
            ValueError: if there are none.
        """
        refactor(model)
        report = Report(method=DSFormer.method_name)
        report.measure(model, "before", None, None)
        report.modules = settle(model)
        if not report.modules:
            raise ValueError("the model has no layers that learn through the factorizer; DSFormer(...).begin(model) makes them")
        report.measure(model, "after", None, None)
        noted: Any = model.config.quantization_config
        small: dict[str, Any] = dict(model.named_modules())
        noted.modules = local_names(model, noted.modules) | {name: small[name].spec() for name in report.modules}
        return Compressed(model, report)

    def _install_latent(self, job: Job, state: dict[str, Layer], specs: Mapping[str, Spec]) -> dict[str, Spec]:
        how = {"solver": self.solver, "iterations": self.stf_iters, "hysteresis": self.hysteresis}
        made = {name: spec | {"kind": "dense_sparse.latent"} | how for name, spec in specs.items()}
        for done, (name, spec) in enumerate(made.items(), 1):
            layer = state.pop(name)
            module: Any = build(spec, layer.module)
            module.fill(self._code(layer, spec["basis"], spec["nnz"], self.init_iters), layer.bias)
            with torch.no_grad():
                module.latent.copy_(layer.weight)
            _put(job.model, name, layer.module, module)
            job.progress("layers", done, len(made))
        return made

    def _train(self, job: Job, steps: int) -> None:
        assert job.calibration is not None

        def after(entry: dict[str, Any]) -> None:
            if entry["done"] % self.refactor_every == 0 and entry["done"] < steps:
                refactor(job.model)
            job.progress("training", entry["done"], steps)

        recover(
            job.model, job.calibration.batches, steps=steps, learning_rate=self.learning_rate, seed=job.seed, loss=task_loss,
            batch_size=self.batch_size, weight_decay=self.weight_decay, on_progress=after,
        )  # fmt: skip

    def _code(self, layer: Layer, basis: int, nnz: int, iterations: int, columns: int | None = None) -> SparseCode:
        weight = layer.weight[:, :columns]
        return linalg.sparse_code(weight, basis, nnz, self.block_size, iterations=iterations, solver=self.solver, dtype=torch.float64)

    def _best_nnz(self, layer: Layer) -> int:
        if self.nnz is not None or self.basis is not None:
            return 0
        lost: dict[int, float] = {}
        for nnz in CANDIDATES:
            sizes = self._sizes(layer, nnz)
            if sizes is not None and sizes[1] == nnz:
                lost[nnz] = self._code(layer, sizes[0], nnz, TRIAL_ITERATIONS, self.block_size).report["tail"]
        return min(lost, key=lambda nnz: lost[nnz]) if lost else 0

    def _sizes(self, layer: Layer, preferred: int = 0) -> tuple[int, int, int] | None:
        """Atoms, coefficients of a row and bits of an index; None where there is no room. Fewer coefficients than preferred where those do not fit."""
        options = (self.nnz,) if self.nnz is not None else tuple(n for n in (*reversed(CANDIDATES), 1) if n <= (preferred or n))
        for nnz in options:
            small = min(self._room(layer, nnz, 8), 256) if self.index_bits == 8 else 0
            large = min(self._room(layer, nnz, 16), 2**15)
            atoms, bits = (large, 16) if large > max(small, 256) or self.index_bits == 16 else (small, 8)
            if self.basis is not None:
                fits = nnz <= self.basis <= atoms
                bits = 16 if self.basis > 256 else self.index_bits
                if self.nnz is not None:
                    fits = self._bits(layer, self.basis, nnz, bits) < self._bits(layer, layer.shape[0], 0, bits)
                atoms = self.basis if fits else 0
            if atoms >= nnz:
                return atoms, nnz, bits
        return None

    def _room(self, layer: Layer, nnz: int, bits: int) -> int:
        """How many atoms fit beside the coefficients."""
        value = 8 * layer.weight.element_size()
        allowed = layer.weight.numel() * value / self.compression - self._bits(layer, 0, nnz, bits)
        return int((allowed + 1e-6) // (layer.shape[1] * value))

    def _bits(self, layer: Layer, basis: int, nnz: int, bits: int) -> int:
        """What basis, coefficients and indices take."""
        (rows, columns), value = layer.shape, 8 * layer.weight.element_size()
        return basis * columns * value + rows * -(-columns // self.block_size) * nnz * (value + bits)


class STFCallback(TrainerCallback):
    """Makes the factors of all learning layers anew after optimizer steps (not after each batch that is accumulated), and once more at the end.

    With several processes the first one's factors go to all.

    Args:
        refactor_every: optimizer steps from one time to the next.
    """

    def __init__(self, refactor_every: int = 1):
        if refactor_every < 1:
            raise ValueError(f"refactor_every is {refactor_every!r}; it must be at least 1")
        self.refactor_every = refactor_every

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % self.refactor_every == 0:
            refactor(model)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % self.refactor_every:
            refactor(model)


@torch.no_grad()
def refactor(model: nn.Module) -> None:
    """Bring the factors of all learning layers up to date with their latent weights."""
    for _, module in learning(model):
        module.refactor()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for tensor in (module.basis, module.values, module.indices):
                torch.distributed.broadcast(tensor, 0)


def settle(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Replace all learning layers by small ones with their factors; what a report says of each, in comparison with its latent weight."""
    told = {}
    for name, module in list(learning(model)):
        with torch.no_grad():
            lost, total = float((module.latent - module.dense()).double().square().sum()), float(module.latent.double().square().sum())
        _put(model, name, module, module.settled())
        told[name] = _told(len(module.basis), module.nnz, lost, (lost / max(total, 1e-300)) ** 0.5)
    return told


def task_loss(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """The model's own loss.

    Raises:
        ValueError: if the batch has no ``labels`` and the model is no causal language model.
    """
    loss = getattr(model(**labelled(model, batch)), "loss", None)
    if loss is None:
        raise ValueError(f"{type(model).__name__} gives no loss; training it needs batches with labels")
    return loss


def _told(basis: int, nnz: int, lost: float, error: float) -> dict[str, Any]:
    return {"basis": basis, "nnz": nnz, "lost": lost, "tail_energy": error**2, "rel_err": error}


def _put(model: nn.Module, name: str, old: nn.Module, new: nn.Module) -> None:
    put(model, name, new, [(parent, child) for parent in model.modules() for child, module in parent._modules.items() if module is old])
