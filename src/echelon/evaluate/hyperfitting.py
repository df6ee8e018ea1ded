"""What hyperfitting did to a model: sharpness, variety and quotation of its greedy texts, side by side with those of the model before.

Source of the measures: "The Hyperfitting Phenomenon: Sharpening and Stabilizing LLMs for Open-Ended Text Generation", arXiv 2412.04318. Self-BLEU is BLEU-4
over token ids; what is quoted is counted from five tokens on. Preferences of people or judges, which the paper reports too, are not among them.
"""

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from peft import PeftModel
from torch import Tensor

from echelon.data.files import read_text, write_whole
from echelon.data.text import tail_ttr
from echelon.evaluate.likelihood import perplexity
from echelon.evaluate.text import rep_n, self_bleu
from echelon.generate import Decoder, Greedy, Nucleus
from echelon.generate.citations import CitationBlocker, Citations
from echelon.models import LoadedModel, load
from echelon.train.hyperfit import Hyperfit, Sequences, ends, sharpness

RUNS = (5, 6, 8, 12, 16)  # lengths of quoted runs that are counted


def hyperfitting_report(
    recipe: Hyperfit, sequences: Sequences, base: LoadedModel, fitted: LoadedModel, seed: int = 0, on_progress: Callable[[str], None] | None = None
) -> dict[str, Any]:  # fmt: skip
    """Compare two models on the validation texts of a recipe, and on what they write behind the beginnings of these.

    Args:
        recipe: says how much is read and written.
        sequences: what was fitted, and what is validated on.
        base: the model before.
        fitted: the model after.
        seed: of the sampled texts.
        on_progress: told what is being done.

    Returns:
        ``sharpness`` of each model ({loss, entropy}), ``top1_agreement`` of the two, ``texts``: for each way of writing what `measured` says, and ``samples``
        with ``context``, ``reference`` and one text for each way.
    """
    tell = on_progress or (lambda _: None)
    contexts, citations = recipe.contexts(sequences), Citations(sequences.train.tolist(), RUNS[0])
    ways: dict[str, tuple[Decoder, LoadedModel, list[Any]]] = {
        "base, greedy": (Greedy(), base, []), "base, top-p 0.9": (Nucleus(top_p=0.9), base, []), "hyperfitted, greedy": (Greedy(), fitted, []),
    }  # fmt: skip
    if recipe.max_citation is not None:
        kept = citations if recipe.max_citation == RUNS[0] else Citations(sequences.train.tolist(), recipe.max_citation)
        ways[f"hyperfitted, greedy, at most {recipe.max_citation} tokens quoted"] = (Greedy(), fitted, [CitationBlocker(kept, recipe.max_citation)])
    tell("reading validation texts")
    size = recipe.per_device_train_batch_size
    made: dict[str, Any] = {
        "sharpness": {name: sharpness(m.model, sequences.validation, size)._asdict() for name, m in (("base", base), ("hyperfitted", fitted))},
        "top1_agreement": top1_agreement(base.model, fitted.model, sequences.validation, size), "texts": {},
    }  # fmt: skip
    samples = [{"context": base.tokenizer.decode(context), "texts": {}} for context in contexts]
    for sample, row in zip(samples, sequences.validation.tolist(), strict=False):
        sample["reference"] = base.tokenizer.decode(row[recipe.gen_context_len : recipe.gen_total_len])
    for name, (decoder, loaded, processors) in ways.items():
        tell(f"writing: {name}")
        written = continuations(decoder, loaded, contexts, recipe.gen_total_len - recipe.gen_context_len, seed, processors)
        made["texts"][name] = measured(written, contexts, citations, base, recipe.ttr_window, ends(loaded))
        for sample, ids in zip(samples, written, strict=True):
            sample["texts"][name] = loaded.tokenizer.decode(ids, skip_special_tokens=True)
    return made | {"samples": samples}


def write_report(
    recipe: Hyperfit, model: str, data: Any, out: str | os.PathLike[str], seed: int = 0, on_progress: Callable[[str], None] | None = None
) -> dict[str, Any]:  # fmt: skip
    """Make the report of a folder that :class:`~echelon.train.hyperfit.Hyperfit` has written, and put it there as ``report.json``, once.

    Args:
        recipe: as it was trained.
        model: name of what it was trained from.
        data: as it was trained on.
        out: the folder.
        seed: of the sampled texts.
        on_progress: told what is being done.

    Returns:
        The figures of the greedy texts before and after.

    Raises:
        UserError: if something cannot be read or written.
    """
    file = Path(out) / "report.json"
    if not file.is_file():
        base = load(model)
        found = hyperfitting_report(recipe, recipe.sequences(data, base.tokenizer), base, _fitted(model, Path(out)), seed, on_progress)
        looks = [json.loads(line) for line in read_text(Path(out) / "validation.jsonl").splitlines()]
        write_whole(file, json.dumps({"knobs": vars(recipe), "validation": looks, **found}, indent=2, ensure_ascii=False) + "\n")
    texts = json.loads(read_text(file))["texts"]
    return {f"{name}_{when}": texts[f"{way}, greedy"][name] for name in ("ttr", "self_bleu") for when, way in (("before", "base"), ("after", "hyperfitted"))}


def continuations(
    decoder: Decoder, loaded: LoadedModel, contexts: Sequence[Sequence[int]], count: int, seed: int = 0, processors: Sequence[Any] = ()
) -> list[list[int]]:  # fmt: skip
    """At most so many new ids behind each context, under logits processors."""
    session = decoder.open(loaded.model, loaded.tokenizer, seed=seed, processors=processors)
    session.prefill(contexts, room=count)
    return [group[0].token_ids for group in decoder.decode(session, count)]


def measured(
    written: Sequence[Sequence[int]], contexts: Sequence[Sequence[int]], citations: Citations, reader: LoadedModel, window: int, ignored: set[int]
) -> dict[str, Any]:  # fmt: skip
    """Variety and quotation of some texts.

    Returns:
        ``ttr`` over the last ``window`` tokens, ``empty_texts`` that it leaves out, ``rep_4``, ``self_bleu`` (0 to 1, lower is more varied), ``tokens`` of a
        text, ``perplexity`` under the reader behind the contexts (a check of sanity only), and of ``citations`` the ``longest`` run, ``mean_longest`` of a
        text, and ``shares`` of the runs of each length that stand in the cited sequences. A figure that does not exist is null.
    """
    texts = [[token for token in ids if token not in ignored] for ids in written]
    ttr, empty = tail_ttr(texts, window)
    runs = [citations.runs(text) for text in texts]
    places = {length: sum(max(0, len(text) - length + 1) for text in texts) for length in RUNS}
    strings = [[reader.tokenizer.decode(ids) for ids in part] for part in (texts, contexts)]
    return {
        "ttr": None if math.isnan(ttr) else ttr, "empty_texts": empty, "rep_4": rep_n(texts, 4), "self_bleu": float(self_bleu(texts, 4, limit=None).mean()),
        "tokens": sum(map(len, texts)) / len(texts), "perplexity": perplexity(reader, *strings).value if any(strings[0]) else None,
        "citations": {
            "longest": max((max(run, default=0) for run in runs), default=0), "mean_longest": sum(max(run, default=0) for run in runs) / len(runs),
            "shares": {str(n): sum(found >= n for run in runs for found in run) / places[n] if places[n] else None for n in RUNS},
        },
    }  # fmt: skip


@torch.no_grad()
def top1_agreement(one: Any, other: Any, ids: Int[Tensor, "rows length"], batch_size: int = 8) -> float:
    """Share of places at which two models give the highest probability to the same next token."""
    same = 0
    for rows in ids.split(batch_size):
        first, second = (model(input_ids=rows.to(model.device), use_cache=False).logits[:, :-1].argmax(-1).cpu() for model in (one, other))
        same += int((first == second).sum())
    return same / ids[:, 1:].numel()


def _fitted(model: str, out: Path) -> LoadedModel:
    if (out / "config.json").is_file():
        return load(str(out))
    base = load(model)
    tuned: Any = PeftModel.from_pretrained(base.model, str(out))
    return LoadedModel(tuned.merge_and_unload().eval(), base.tokenizer)
