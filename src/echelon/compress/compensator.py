"""What every compensator shares: given a model before and after its compression, the low-rank path beside each layer that gives back what was lost.

The result is a PEFT LoRA on the compressed model (``lora_alpha`` = rank, so that nothing is scaled, and no dropout), whose own weights are not touched. Plain
``PeftModel.from_pretrained`` reads it where layers are quantised or pruned; on low-rank layers :func:`echelon.compress.load_lora` does.

``echelon compress --method eora --model COMPRESSED --original ORIGINAL --data FILE --out ADAPTER`` runs one: it is a step of its own, since it must not
matter who compressed the model.
"""

import json
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from echelon.calibrate import Calibration, InputObserver, LayerWalker, Moments, calibration_batches
from echelon.calibrate.rows import row_length
from echelon.calibrate.statistics import observe_whole
from echelon.compress.export import whole_folder
from echelon.compress.lora import lora_config
from echelon.compress.packed import PackedLinear
from echelon.linalg.lowrank import Factors, spectrum
from echelon.models import LoadedModel, load
from echelon.models.modules import LowRankLinear, dense_weight, is_linear
from echelon.models.targets import Targets, blocks, linear_targets

REPORT = "compensation_report.json"


@dataclass
class CompensationReport:
    """What was given back, layer by layer, and what it costs.

    Attributes:
        method: its name.
        modules: for each layer its ``rank``; ``before`` and ``after``, the squared error of its weight in the norm that the method minimises
            (with calibration text: of its outputs, for one token on average), after with the factors as they are stored; ``bound``, the least
            that unrounded factors of this rank leave; and ``captured``, the share of ``before`` that the best rank 1, 2, 4, ... would take.
        skipped: ``{"name", "reason"}`` of layers whose adapter is zero.
        parameters: numbers in all factors.
        bytes: what they take in the adapter file.
        packed_bytes: what they would take in the bits that they were rounded to.
        tokens: calibration tokens, without pads.
        source: where these came from.
        seconds: that it took.
    """

    method: str = ""
    modules: dict[str, dict[str, Any]] = field(default_factory=dict)
    skipped: list[dict[str, str]] = field(default_factory=list)
    parameters: int = 0
    bytes: int = 0
    packed_bytes: int = 0
    tokens: int = 0
    source: str = ""
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def summary(self) -> str:
        """One line."""
        before, after = (sum(told[key] for told in self.modules.values()) for key in ("before", "after"))
        gain = f"error {before:.4g} -> {after:.4g}" + (f" ({after / before:.1%})" if before else "")
        return f"{gain}, {self.parameters:,} parameters in {self.bytes:,} bytes beside {len(self.modules)} layers, {self.seconds:.1f} s"


@dataclass(frozen=True)
class Compensated:
    """The compressed model with its adapter, and the report on that."""

    model: PeftModel
    report: CompensationReport

    def save(self, folder: str | os.PathLike[str], tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Write the adapter, tokenizer and report to a folder that is whole or absent."""
        with whole_folder(folder, "adapter_config.json") as aside:
            self.model.save_pretrained(str(aside), save_embedding_layers=False)
            if tokenizer is not None:
                tokenizer.save_pretrained(aside)
            (aside / REPORT).write_text(self.report.to_json(), encoding="utf-8")


@dataclass
class Pair:
    """One layer in both models.

    Attributes:
        name: in both.
        error: original minus compressed weight, as the compressed layer really multiplies, float64.
        seen: what the method asked to know about the layer's inputs; None where it asks for nothing.
    """

    name: str
    error: Float[Tensor, "out in"]
    seen: Any = None

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.error.shape)  # type: ignore[return-value]


class Compensator(ABC):
    """Base of all compensators: frozen dataclasses whose fields are the knobs.

    A method says which rank each layer gets (:meth:`ranks`), what it wants to know of inputs (:meth:`watch`), and the factors of one layer
    (:meth:`factor`).

    The plain attributes below are defaults; a method that lets the user choose declares a field of the same name.

    Attributes:
        needs_data: whether it must be shown calibration text.
        needs_spectra: whether :meth:`ranks` wants the singular values of errors.
        target_modules: as for compressors; None for the layers that compression changed.
        sequential: take the inputs of each block behind the blocks already compensated, else from the original model.
        task_fraction: share of the rows that come from the task, where there is task text.
        nsamples: rows of calibration text.
        seqlen: tokens a row.
    """

    method_name: ClassVar[str]
    needs_data: ClassVar[bool] = False

    target_modules: Targets = None
    sequential: bool = True
    task_fraction: float = 0.5
    nsamples: int = 64
    seqlen: int = 2048

    @property
    def needs_spectra(self) -> bool:
        return False

    @abstractmethod
    def ranks(self, shapes: Mapping[str, tuple[int, int]], spectra: Mapping[str, Float[Tensor, " k"]]) -> dict[str, int]:
        """The rank of each layer's path; a layer that is not named gets none."""

    @abstractmethod
    def factor(self, error: Float[Tensor, "out in"], seen: Any, rank: int) -> Factors:
        """Factors of one error in float64, balanced; ``seen`` is what :meth:`watch` made."""

    def watch(self, rows: int) -> Callable[[int, Any], Any]:
        """Makes an accumulator of inputs, given their width and device: second moments by default.

        It has ``update(x, mask)``; ``rows`` is how many will come.
        """
        return Moments.of

    def norm(self, seen: Any) -> Float[Tensor, "in in"] | None:
        """The H of the norm trace(E H E^T) that is minimised; None for the Frobenius norm."""
        return None

    def quantized(self, factors: Factors, seen: Any) -> tuple[Factors, float]:
        """The factors rounded to few bits, if the method does so, and the bytes they take then; 0 for those of their dtype."""
        return factors, 0.0

    def fit(
        self, original: LoadedModel | PreTrainedModel | str, compressed: LoadedModel | PreTrainedModel | str, data: Any = None,
        tokenizer: PreTrainedTokenizerBase | None = None, **arguments: Any,
    ) -> PeftModel:  # fmt: skip
        """The compressed model with an adapter that makes up for its compression; see :meth:`compensate`, which also reports."""
        return self.compensate(original, compressed, data, tokenizer, **arguments).model

    def compensate(
        self, original: LoadedModel | PreTrainedModel | str, compressed: LoadedModel | PreTrainedModel | str, data: Any = None,
        tokenizer: PreTrainedTokenizerBase | None = None, *, task_data: Any = None, seed: int = 0,
        on_progress: Callable[[dict[str, Any]], None] | None = None,
    ) -> Compensated:  # fmt: skip
        """Solve for the adapter.

        Args:
            original: the model as it was; it is read only.
            compressed: what became of it: the same layers of the same sizes under the same names. It gets the adapter; its weights stay.
            data: calibration data, anything that :func:`echelon.calibrate.calibration_batches` takes.
            tokenizer: for texts.
            task_data: more of it, from the task that matters; ``task_fraction`` of the rows are taken from it.
            seed: of the choice of rows.
            on_progress: called with ``{"step", "done", "of"}``.

        Raises:
            ValueError: if the models do not belong together, the method needs data and has none, or a rank is out of range. The compressed model
                is unchanged then.
        """
        started = time.perf_counter()
        old, tokenizer = _model(original, tokenizer)
        new, tokenizer = _model(compressed, tokenizer)
        if old is new:
            raise ValueError("original and compressed are the same object; load the original model again")
        if self.needs_data and data is None and task_data is None:
            raise ValueError(f"{self.method_name} needs calibration data; give texts, token ids or the path of either")
        pairs = pair_up(old, new, self.target_modules)
        calibration = self._calibration(old, data, task_data, tokenizer, seed) if self.needs_data else None
        report = CompensationReport(self.method_name)
        spectra: dict[str, Tensor] = {}
        if self.needs_spectra or not self.sequential:
            self._observe(old, pairs, calibration)
        if self.needs_spectra:
            spectra = {name: spectrum(pair.error, self.norm(pair.seen)) for name, pair in pairs.items()}
        ranks = self.ranks({name: pair.shape for name, pair in pairs.items()}, spectra)
        pairs = {name: pairs[name] for name in ranks}
        training = old.training, new.training
        old.eval()
        tuned = _attached(new.eval(), ranks)
        try:
            done = 0
            for names in self._solvable(old, new, pairs, calibration):
                for name in names:
                    self._solve(tuned, pairs[name], ranks[name], report)
                    pairs[name].seen = None
                    done += 1
                    if on_progress is not None:
                        on_progress({"step": "layers", "done": done, "of": len(pairs)})
        except BaseException:
            tuned.unload()  # type: ignore[operator]
            raise
        finally:
            old.train(training[0])
            new.train(training[1])
        if calibration is not None:
            report.tokens, report.source = calibration.tokens, calibration.source
        report.seconds = time.perf_counter() - started
        return Compensated(tuned, report)

    def _solvable(
        self, old: PreTrainedModel, new: PreTrainedModel, pairs: Mapping[str, Pair], calibration: Calibration | None
    ) -> Iterator[list[str]]:  # fmt: skip
        """Names of layers whose inputs are known, group by group; each group must be solved before the next is asked for."""
        if calibration is None or not self.sequential:
            yield list(pairs)
            return
        rows = _rows(calibration)
        left = set(pairs)
        for block in LayerWalker(new, calibration, sequential=True):
            inside = [name for name in pairs if name.startswith(block.name + ".")]
            if inside:
                # The original block on the inputs that the compensated blocks before it make.
                observer = block.observe(inside, old.get_submodule(block.name), self.watch(rows))
                _given(pairs, inside, observer)
                left -= set(inside)
                yield inside
        outside = [name for name in pairs if name in left]
        if outside:
            _given(pairs, outside, observe_whole(new, {name: new.get_submodule(name) for name in outside}, calibration, self.watch(rows)))
            yield outside

    def _observe(self, old: PreTrainedModel, pairs: Mapping[str, Pair], calibration: Calibration | None) -> None:
        if calibration is None:
            return
        make, chain = self.watch(_rows(calibration)), [name for name, _ in blocks(old)]
        outside = [name for name in pairs if not any(name.startswith(block + ".") for block in chain)]
        if len(outside) < len(pairs):
            for block in LayerWalker(old, calibration):
                inside = [name for name in pairs if name.startswith(block.name + ".")]
                if inside:
                    _given(pairs, inside, block.observe(inside, make=make))
        if outside:
            _given(pairs, outside, observe_whole(old, {name: old.get_submodule(name) for name in outside}, calibration, make))

    def _solve(self, tuned: PeftModel, pair: Pair, rank: int, report: CompensationReport) -> None:
        layer: Any = tuned.get_base_model().get_submodule(pair.name)
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        seen = self.norm(pair.seen)
        if seen is not None and not bool(seen.any()):
            raise ValueError(f"the inputs of {pair.name} are all zero on the calibration data, or there were none; give other text")
        before = _error(pair.error, seen)
        told: dict[str, Any] = {"rank": rank, "before": before, "after": before, "bound": before, "captured": {}}
        stored = 0.0
        if before > 0:
            values = spectrum(pair.error, seen).square()
            told["captured"] = {str(2**k): float(values[: 2**k].sum() / values.sum()) for k in range((len(values) - 1).bit_length() + 1)}
            factors = self.factor(pair.error, pair.seen, rank)
            told["bound"] = float(values[rank:].sum())
            factors, stored = self.quantized(factors, pair.seen)
            kept = replace(factors, up=factors.up.to(up.dtype).double(), down=factors.down.to(down.dtype).double())
            told["after"] = _error(pair.error - kept.up.to(pair.error) @ kept.down.to(pair.error), seen)
        if told["after"] < before:
            with torch.no_grad():
                down.copy_(kept.down)
                up.copy_(kept.up)
        else:
            told["after"] = before
            report.skipped.append({"name": pair.name, "reason": "compression did not change it" if before == 0 else "rounding its factors costs all they gain"})
        report.modules[pair.name] = told
        report.parameters += up.numel() + down.numel()
        size = (up.numel() + down.numel()) * up.element_size()
        report.bytes += size
        report.packed_bytes += round(stored) or size

    def _calibration(
        self, model: PreTrainedModel, data: Any, task_data: Any, tokenizer: PreTrainedTokenizerBase | None, seed: int
    ) -> Calibration:  # fmt: skip
        asked = {"seqlen": row_length(model, self.seqlen), "seed": seed}
        share = 0.0 if task_data is None else 1.0 if data is None else self.task_fraction
        of_task = round(share * self.nsamples)
        parts = []
        if of_task < self.nsamples:
            parts.append(calibration_batches(data, tokenizer, nsamples=self.nsamples - of_task, **asked))
        if of_task:
            parts.append(calibration_batches(task_data, tokenizer, nsamples=of_task, **asked))
        return Calibration([batch for part in parts for batch in part.batches], sum(part.tokens for part in parts), " and ".join(p.source for p in parts))


def weight_of(module: nn.Module) -> Float[Tensor, "out in"]:
    """The matrix that a linear layer of any kind multiplies by, in float64: of packed and factored ones the dense one, of foreign ones (other libraries'
    formats) what they make of the unit vectors.

    Raises:
        ValueError: if a foreign module is no linear layer.
    """
    with torch.no_grad():
        if isinstance(module, PackedLinear):
            return module.dense().double()
        if isinstance(module, LowRankLinear):
            return module.product().double()
        if is_linear(module):
            return dense_weight(module).double()
        width = getattr(module, "in_features", None)
        if not isinstance(width, int):
            raise ValueError(f"{type(module).__name__} is no linear layer: it has no in_features")
        tensor = next((t for t in [*module.parameters(), *module.buffers()] if t.is_floating_point()), torch.zeros(()))
        unit = torch.eye(width, dtype=tensor.dtype, device=tensor.device)
        return (module(unit).double() - module(torch.zeros_like(unit[:1])).double()).T


def pair_up(original: PreTrainedModel, compressed: PreTrainedModel, target_modules: Targets = None) -> dict[str, Pair]:
    """The layers of both models and their errors; without targets those that differ, or all if none does.

    Raises:
        ValueError: if a layer is missing in the compressed model, has another size or dtype there, or a weight holds NaN or infinity.
    """
    names, skipped = linear_targets(original, target_modules)
    if skipped and not names:
        raise ValueError("original has no layer to compare with; the first is {}: {}".format(*next(iter(skipped.items()))))
    known = dict(compressed.named_modules())
    pairs = {}
    for name in names:
        if name not in known:
            raise ValueError(f"the compressed model has no {name}; it is of another architecture, or its layers were removed")
        old, new = weight_of(original.get_submodule(name)), weight_of(known[name])
        if old.shape != new.shape:
            raise ValueError(f"{name} is {tuple(old.shape)} in the original model and {tuple(new.shape)} in the compressed one; sizes must be the same")
        for which, weight in (("original", old), ("compressed", new)):
            if not weight.isfinite().all():
                raise ValueError(f"the weight of {name} in the {which} model holds NaN or infinity")
        pairs[name] = Pair(name, old.to(new.device) - new)
    if original.dtype != compressed.dtype:
        raise ValueError(f"original is {original.dtype} and compressed is {compressed.dtype}; load both in the same dtype")
    differing = {name: pair for name, pair in pairs.items() if bool(pair.error.any())}
    return differing if target_modules is None and differing else pairs


def uniform(rank: int, shapes: Mapping[str, tuple[int, int]], knob: str) -> dict[str, int]:
    """The same rank for all. Raises: ValueError: if one layer is too small for it."""
    for name, shape in shapes.items():
        if rank > min(shape):
            raise ValueError(f"{knob} is {rank}; it must be at most {min(shape)} for {name}, which is {shape[0]} x {shape[1]}")
    return dict.fromkeys(shapes, rank)


def _model(given: LoadedModel | PreTrainedModel | str, tokenizer: Any) -> tuple[PreTrainedModel, Any]:
    if isinstance(given, str):
        given = load(given)
    if isinstance(given, LoadedModel):
        given, tokenizer = given.model, tokenizer or given.tokenizer
    if not isinstance(given, PreTrainedModel):
        raise ValueError(f"{type(given).__name__} is no transformers model; merge adapters and unwrap it first")
    return given, tokenizer


def _attached(model: PreTrainedModel, ranks: Mapping[str, int]) -> PeftModel:
    """The model with adapters that do nothing yet."""
    most = max(set(ranks.values()), key=list(ranks.values()).count)
    others = {name: rank for name, rank in ranks.items() if rank != most}
    task = {"task_type": "CAUSAL_LM"} if model.can_generate() else {}
    config = lora_config(
        model, r=most, lora_alpha=most, lora_dropout=0.0, rank_pattern=others, alpha_pattern=dict(others), target_modules=list(ranks), **task
    )  # fmt: skip
    devices = [model.device.index or 0] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        tuned = get_peft_model(model, config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for name in ranks:
            layer: Any = model.get_submodule(name)
            layer.lora_A["default"].weight.zero_()
    return tuned.eval()  # type: ignore[return-value]


def _given(pairs: Mapping[str, Pair], names: list[str], observer: InputObserver) -> None:
    for name in names:
        if observer.leader.get(name) not in observer.moments:
            raise ValueError(f"{name} does not run on the calibration data; leave it out of target_modules")
        pairs[name].seen = observer.moments[observer.leader[name]]


def _rows(calibration: Calibration) -> int:
    return sum(len(next(iter(batch.values()))) for batch in calibration.batches)


def _error(error: Float[Tensor, "out in"], seen: Float[Tensor, "in in"] | None) -> float:
    return float(((error if seen is None else error @ seen.to(error)) * error).sum())
