"""What adapters are trained and measured on: texts and meanings for language models, sentences with labels for encoders."""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.special import log_softmax
from sklearn.metrics import f1_score, matthews_corrcoef
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from echelon.compare.task import Quality
from echelon.compare.tuning import evenly
from echelon.data.e2e import Meaning
from echelon.data.glue import Labelled
from echelon.data.question_answers import prompt_and_text
from echelon.edit.rows import collated, unlearning_rows
from echelon.evaluate.likelihood import token_scores
from echelon.evaluate.text import pooled_bleu, rouge_l
from echelon.models import LoadedModel, load
from echelon.models.batching import padded
from echelon.models.loading import embedded_encoder_dir
from echelon.models.randomness import own_randomness

Row = dict[str, list[int]]
METRICS = {"text": ["loss"], "e2e": ["loss", "bleu", "rouge_l"], "sst2": ["accuracy"], "rte": ["accuracy"], "mrpc": ["accuracy", "f1"], "cola": ["matthews"]}
TEMPLATE = "{question}\n{answer}"
MAX_LENGTH = 256
_BATCH = 64
_READ = 4  # sentences of a meaning whose likelihood is measured: there are between one and forty, which would decide what a meaning counts


@dataclass(frozen=True)
class Measured:
    """Metrics by name, and texts to show."""

    quality: dict[str, Quality]
    samples: list[dict[str, str]]


class Downstream(ABC):
    """One thing to adapt a model to.

    Attributes:
        name: as recipes call it.
        task_type: what PEFT calls it.
        model: name of the model.
    """

    name: str
    task_type: str
    model: str

    @abstractmethod
    def fresh(self, seed: int) -> LoadedModel:
        """The model as it is before; the head of a classifier has new weights from the seed."""

    @abstractmethod
    def rows(self, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
        """What is trained on."""

    @abstractmethod
    def collate(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """A batch."""

    @abstractmethod
    def tuning_loss(self, loaded: LoadedModel) -> float:
        """What knobs are chosen by."""

    @abstractmethod
    def measure(self, loaded: LoadedModel) -> Measured:
        """The metrics on what is tested."""


@dataclass(frozen=True)
class Written(Downstream):
    """Sentences behind meanings, or, where the meanings are empty, texts alone.

    Attributes:
        name: as recipes call it.
        model: name of the model.
        train: what is trained on, each sentence by itself.
        tune: what knobs are chosen on.
        test: what is tested on.
        max_new_tokens: of a sentence that the model writes; 0 where it writes none.
        max_length: tokens of a row that is trained on.
    """

    name: str
    model: str
    train: list[Meaning]
    tune: list[Meaning]
    test: list[Meaning]
    max_new_tokens: int = 0
    max_length: int = MAX_LENGTH

    task_type = "CAUSAL_LM"

    def fresh(self, seed: int) -> LoadedModel:
        return load(self.model)

    def rows(self, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
        told = [{"question": m.meaning, "answer": text} if m.meaning else {"text": text} for m in self.train for text in m.references]
        return unlearning_rows(told, tokenizer, template=TEMPLATE, max_length=self.max_length)

    def collate(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        return collated(rows)

    def tuning_loss(self, loaded: LoadedModel) -> float:
        return float(self.losses(loaded, self.tune).mean())

    def losses(self, loaded: LoadedModel, units: Sequence[Meaning]) -> Float[np.ndarray, " units"]:
        """Loss of each meaning's first four sentences, scaled so that the mean over meanings is the loss over all tokens."""
        read = [m.references[:_READ] for m in units]
        pairs = [prompt_and_text(m.meaning, text, TEMPLATE) if m.meaning else ("", text) for m, texts in zip(units, read, strict=True) for text in texts]
        prompts, texts = ([pair[side] for pair in pairs] for side in (0, 1))
        scores = token_scores(loaded, texts, prompts if any(prompts) else None)
        starts = np.cumsum([0, *(len(texts) for texts in read[:-1])])
        return -np.add.reduceat(scores.log_prob, starts) * len(units) / scores.tokens.sum()

    def measure(self, loaded: LoadedModel) -> Measured:
        per_unit = self.losses(loaded, self.test)
        loss = float(per_unit.mean())
        quality = {"loss": Quality(loss, "nats/token", False, per_unit, f"of the sentences, weighted by tokens; perplexity {np.exp(min(loss, 700)):.2f} here")}
        if not self.max_new_tokens:
            return Measured(quality, [])
        from echelon.generate import Greedy

        texts: list[str] = []
        for start in range(0, len(self.test), _BATCH):
            prompts = [prompt_and_text(m.meaning, "", TEMPLATE)[0] for m in self.test[start : start + _BATCH]]
            texts += [text.strip() for text in Greedy().generate(loaded, prompts, max_new_tokens=self.max_new_tokens).texts]
        ours, theirs = [words(text) for text in texts], [[words(text) for text in m.references] for m in self.test]
        overlap = np.array([rouge_l(text, references) for text, references in zip(ours, theirs, strict=True)])
        note = "greedy texts, words and marks in lower case; "
        quality["bleu"] = Quality(pooled_bleu(ours, theirs), "share", True, None, note + "BLEU-4 over all texts, all references")
        quality["rouge_l"] = Quality(float(overlap.mean()), "share", True, overlap, note + "F1 with the nearest reference")
        shown = [
            {"unit": f"{self.name} {number}", "prompt": m.meaning, "reference": m.references[0], "text": text}
            for number, (m, text) in enumerate(zip(self.test, texts, strict=True))
        ]
        return Measured(quality, evenly(shown, 20))


@dataclass(frozen=True)
class Classified(Downstream):
    """Sentences, or pairs of them, with two labels.

    Attributes:
        name: as recipes call it.
        model: name or folder of an encoder.
        train: what is trained on.
        tune: what knobs are chosen on.
        test: what is tested on.
        max_length: tokens of a row.
    """

    name: str
    model: str
    train: list[Labelled]
    tune: list[Labelled]
    test: list[Labelled]
    max_length: int = MAX_LENGTH

    task_type = "SEQ_CLS"

    def fresh(self, seed: int) -> LoadedModel:
        path = str(embedded_encoder_dir()) if self.model == "embedded" else self.model
        with own_randomness(seed):
            model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(path, num_labels=2, dtype=torch.float32)
        return LoadedModel(model.eval(), AutoTokenizer.from_pretrained(path))

    def rows(self, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
        return [self._row(tokenizer, one) for one in self.train]

    def collate(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        ids, mask = padded([row["input_ids"] for row in rows])
        made = {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([row["label"][0] for row in rows])}
        return made | ({"token_type_ids": padded([row["token_type_ids"] for row in rows])[0]} if "token_type_ids" in rows[0] else {})

    def tuning_loss(self, loaded: LoadedModel) -> float:
        logits, labels = self.logits(loaded, self.tune), [one.label for one in self.tune]
        return float(-log_softmax(logits, axis=1)[np.arange(len(labels)), labels].mean())

    @torch.inference_mode()
    def logits(self, loaded: LoadedModel, units: Sequence[Labelled]) -> Float[np.ndarray, "units labels"]:
        """What the model says of each unit; those of similar length are read together."""
        rows = [self._row(loaded.tokenizer, one) for one in units]
        order = sorted(range(len(rows)), key=lambda number: len(rows[number]["input_ids"]))
        found = np.zeros((len(rows), 2))
        loaded.model.eval()
        for start in range(0, len(order), _BATCH):
            here = order[start : start + _BATCH]
            batch = self.collate([rows[number] for number in here])
            batch.pop("labels")
            found[here] = loaded.model(**{name: value.to(loaded.model.device) for name, value in batch.items()}).logits.double().cpu().numpy()
        return found

    def measure(self, loaded: LoadedModel) -> Measured:
        said, labels = self.logits(loaded, self.test).argmax(1), np.array([one.label for one in self.test])
        right = (said == labels).astype(float)
        share = f"the commoner label is {max(labels.mean(), 1 - labels.mean()):.3f} of the test"
        every = {
            "accuracy": Quality(float(right.mean()), "share", True, right, share),
            "f1": Quality(float(f1_score(labels, said)), "share", True, None, "of label 1"),
            "matthews": Quality(float(matthews_corrcoef(labels, said)), "correlation", True, None, "0 is chance"),
        }
        return Measured({name: every[name] for name in METRICS[self.name]}, [])

    def _row(self, tokenizer: PreTrainedTokenizerBase, one: Labelled) -> Row:
        told: Any = tokenizer(*one.texts, truncation=True, max_length=self.max_length)
        return {name: list(told[name]) for name in ("input_ids", "token_type_ids") if name in told} | {"label": [one.label]}


def words(text: str) -> list[str]:
    """Words and marks in lower case.

    >>> words("The Eagle's near.")
    ['the', 'eagle', "'", 's', 'near', '.']
    """
    return re.findall(r"\w+|[^\w\s]", text.lower())
