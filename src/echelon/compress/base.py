"""What every compressor shares: the order of events, and what is checked, measured and noted on the way."""

import dataclasses
import os
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import echelon
from echelon.calibrate import Calibration, Statistics, calibration_batches
from echelon.calibrate.rows import row_length
from echelon.compress.budget import solve
from echelon.compress.report import Report
from echelon.models import LoadedModel, load
from echelon.models.families import UnsupportedFamily
from echelon.models.modules import Spec
from echelon.models.reload import EchelonConfig, attach


@dataclass
class Job:
    """One compression: the model and what a method needs beside it.

    Attributes:
        model: edited in place.
        calibration: batches to show it, or None.
        statistics: moments that were collected earlier, or None.
        report: to be filled in.
        seed: of all randomness.
        on_progress: called with ``{"step", "done", "of"}``.
        refused: targets that cannot be taken, and why; there will be a warning, or an error under ``strict``.
    """

    model: PreTrainedModel
    calibration: Calibration | None
    statistics: Statistics | None
    report: Report
    seed: int = 0
    on_progress: Callable[[dict[str, Any]], None] | None = None
    refused: dict[str, str] = field(default_factory=dict)

    def generator(self) -> torch.Generator:
        """A fresh generator of this seed, on the CPU."""
        return torch.Generator().manual_seed(self.seed)

    def refuse(self, name: str, reason: str) -> None:
        """Leave a target as it is although the user asked for it."""
        self.refused[name] = reason
        self.report.skip(name, reason)

    def progress(self, step: str, done: int, of: int) -> None:
        if self.on_progress is not None:
            self.on_progress({"step": step, "done": done, "of": of})

    def quiet(self) -> "Job":
        """The same, with a report of its own that nobody reads: for trying things out."""
        return dataclasses.replace(self, report=Report(), on_progress=None, refused={})


@dataclass(frozen=True)
class Compressed:
    """A compressed model (the very object that was given) and the report on it."""

    model: PreTrainedModel
    report: Report

    def save(self, folder: str | os.PathLike[str], tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Write model, tokenizer and report to a folder that is whole or absent; after ``import echelon``, ``from_pretrained`` reads it."""
        from echelon.compress.export import save

        save(self.model, folder, tokenizer, self.report)


class Compressor(ABC):
    """Base of all compressors: frozen dataclasses whose fields are the knobs.

    A method says what it needs to know (:meth:`prepare`, the slow part, which must not depend on ``budget_knob``), what becomes of every module
    (:meth:`specs`, cheap), and makes it so (:meth:`apply`). Linear layer by linear layer: derive from
    :class:`echelon.compress.linear.LinearCompressor`.

    The plain attributes below are defaults; a method that lets the user choose declares a field of the same name.

    Attributes:
        budget_knob: the knob that is solved for when the size is given.
        budget_range: the settings between which it is looked for; two integers make it an integer.
        model_types: values of ``config.model_type`` that it works on; None for all.
        shrinks: which of parameters, bytes and macs (multiply-accumulates) it reduces; the first is what ``budget_knob`` sets.
        needs_data: whether it must be shown calibration data.
        nsamples: rows of calibration data.
        seqlen: tokens a row.
        strict: raise where a module would otherwise be left as it is with a warning.
    """

    method_name: ClassVar[str]
    budget_knob: ClassVar[str]
    budget_range: ClassVar[tuple[float, float]] = (1e-4, 1.0)
    model_types: ClassVar[tuple[str, ...] | None] = None
    shrinks: ClassVar[tuple[str, ...]] = ("parameters", "bytes", "macs")

    nsamples: int = 128
    seqlen: int = 2048
    strict: bool = False

    @property
    def needs_data(self) -> bool:
        return False

    @abstractmethod
    def prepare(self, job: Job) -> Any:
        """Collect and compute whatever the size of the result does not depend on."""

    @abstractmethod
    def specs(self, job: Job, state: Any) -> dict[str, Spec]:
        """Name and spec (see :mod:`echelon.models.modules`) of every module that will be replaced; ``state`` is what :meth:`prepare` returned."""

    @abstractmethod
    def apply(self, job: Job, state: Any, specs: Mapping[str, Spec]) -> None:
        """Edit the model accordingly."""

    def compress(
        self,
        model: LoadedModel | PreTrainedModel | str,
        data: Any = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        seed: int = 0,
        on_progress: Callable[[dict[str, Any]], None] | None = None,
        statistics: Statistics | str | os.PathLike[str] | None = None,
        parameters: float | None = None,
        bytes: float | None = None,
        evaluate: Callable[[PreTrainedModel], float | Mapping[str, float]] | None = None,
    ) -> Compressed:
        """Compress a model in place.

        Args:
            model: a model, a loaded one with its tokenizer, or a name for :func:`echelon.models.load`.
            data: calibration data, anything that :func:`echelon.calibrate.calibration_batches` takes.
            tokenizer: for texts.
            seed: of the choice of rows and of whatever the method draws.
            on_progress: called with ``{"step", "done", "of"}``.
            statistics: moments of an earlier run, or their file; ``data`` is then needed only by a sequential method.
            parameters: how many the whole model may have, or a share of what it has if at most 1; sets the method's ``budget_knob``.
            bytes: the same for what is stored.
            evaluate: gives the perplexity of a model, or other metrics by name; called before and after.

        Raises:
            ValueError: if the method needs data and has none, the model cannot be compressed, or a size cannot be reached. Where this happens
                before the first module is replaced, the model is unchanged.
        """
        if isinstance(model, str):
            model = load(model)
        if isinstance(model, LoadedModel):
            model, tokenizer = model.model, tokenizer or model.tokenizer
        refuse(model)
        if self.model_types is not None and model.config.model_type not in self.model_types:
            raise UnsupportedFamily(f"{self.method_name} does not support model_type {model.config.model_type!r}; it supports {', '.join(self.model_types)}")
        if self.needs_data and data is None and statistics is None:
            raise ValueError(f"{self.method_name} needs calibration data; give texts, token ids or the path of either")
        if isinstance(statistics, (str, os.PathLike)):
            statistics = Statistics.load(statistics)
        calibration = None if data is None else self.calibration(model, data, tokenizer, seed)
        batch = calibration.batches[0] if calibration else None
        report = Report(method=self.method_name)
        report.measure(model, "before", batch, None if evaluate is None else evaluate(model))
        job = Job(model, calibration, statistics, report, seed, on_progress)
        started = time.perf_counter()
        state = self.prepare(job)
        chosen, specs = self.settle(job, state, parameters, bytes)
        chosen.apply(job, state, specs)
        chosen.note(job, specs)
        report.seconds = time.perf_counter() - started
        report.measure(model, "after", batch, None if evaluate is None else evaluate(model))
        return Compressed(model, report)

    def settle(self, job: Job, state: Any, parameters: float | None = None, bytes: float | None = None) -> tuple["Compressor", dict[str, Spec]]:
        """This method with its ``budget_knob`` set for the size, if one is given, and what it will make of the modules.

        Raises:
            ValueError: if the size cannot be reached or, under ``strict``, a target cannot be taken.
        """
        chosen = self
        if parameters is not None or bytes is not None:
            targets = {"parameters": (parameters, job.report.parameters_before), "bytes": (bytes, job.report.bytes_before)}
            chosen = solve(self, job, state, **{name: round(v * of if v <= 1 else v) for name, (v, of) in targets.items() if v is not None})
        specs = chosen.specs(job, state)
        if job.refused:
            told = f"{self.method_name} cannot compress {len(job.refused)} of its targets; the first is {{}}: {{}}".format(*next(iter(job.refused.items())))
            if self.strict:
                raise ValueError(told)
            warnings.warn(f"{told}; they stay as they are, and the report lists them", stacklevel=3)
        return chosen, specs

    def note(self, job: Job, specs: Mapping[str, Spec]) -> None:
        """Write into the model's config what its modules became, and by what."""
        seen: Any = job.calibration or job.statistics
        job.report.tokens, job.report.source = (seen.tokens, seen.source) if seen else (0, "")
        attach(job.model, specs, {
            "method": self.method_name, "knobs": {f.name: getattr(self, f.name) for f in dataclasses.fields(self)},  # type: ignore[arg-type]
            "seed": job.seed, "tokens": job.report.tokens, "source": job.report.source, "echelon": echelon.__version__,
        })  # fmt: skip

    def calibration(self, model: PreTrainedModel, data: Any, tokenizer: PreTrainedTokenizerBase | None, seed: int) -> Calibration:
        """The data as batches, no row longer than the model's context."""
        return calibration_batches(data, tokenizer, nsamples=self.nsamples, seqlen=row_length(model, self.seqlen), seed=seed)


def refuse(model: PreTrainedModel) -> None:
    """Raises: ValueError: if this is no transformers model, has no weights yet, or another library has quantised it."""
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"{type(model).__name__} is no transformers model; merge adapters and unwrap it first")
    if any(p.is_meta for p in model.parameters()):
        raise ValueError("some weights are on the meta device (offloaded or not loaded); load the whole model first")
    noted = getattr(model.config, "quantization_config", None)
    if noted is not None and not isinstance(noted, EchelonConfig):
        raise ValueError(f"the model is already quantised ({getattr(noted, 'quant_method', noted)}); compress the original one")
