"""Train the reranker that ships with Echelon: MiniLM reads query and passage together, through a LoRA.

    ECHELON_DATA=... python embedded/reranker/train.py --work RUN_DIR

Queries are made from the passages themselves: a sentence is taken out of a passage, and some of its words are dropped. What it teaches is how BM25 and the
embedded encoder, taken together, order what the two find for it, with a bonus for the passage that the sentence is from. No test collection is used.
"""

import argparse
import csv
import json
import os
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from echelon.data.documents import Doc
from echelon.models.loading import embedded_encoder_dir
from echelon.retrieve import BM25, Dense


def passages(folder: Path) -> list[tuple[str, list[str]]]:
    """Titles and sentences of the paragraphs, each once."""
    found: dict[str, list[str]] = {}
    for file in sorted(folder.glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            for title, sentences in json.loads(line)["context"]:
                found.setdefault(title, [sentence.strip() for sentence in sentences if sentence.strip()])
    return [(title, sentences) for title, sentences in found.items() if len(sentences) > 1]


def examples(config: dict[str, Any], texts: list[tuple[str, list[str]]]) -> list[tuple[str, list[str], list[float]]]:
    """Queries, their candidates, and the scores that teach."""
    chance = random.Random(config["seed"])
    docs = [Doc(str(place), " ".join(sentences), title) for place, (title, sentences) in enumerate(texts)]
    queries: dict[str, str] = {}
    rest: dict[str, str] = {}
    for place in chance.sample(range(len(texts)), min(config["queries"], len(texts))):
        _, sentences = texts[place]
        taken = chance.randrange(len(sentences))
        words = sentences[taken].rstrip(".").split()
        kept = [word for word in words if chance.random() >= config["dropped_words"]][:24]
        if len(kept) >= 4:
            queries[str(place)] = " ".join(kept)
            rest[str(place)] = " ".join(sentences[:taken] + sentences[taken + 1 :])
    lists = [method.index(docs).search(queries, config["found"]) for method in (BM25(stopwords="english", stemmer="english"), Dense())]
    made = []
    for qid, query in queries.items():
        union = list(dict.fromkeys([*lists[0][qid], *lists[1][qid]]))
        others = [name for name in union if name != qid]
        names = [qid, *chance.sample(others, min(len(others), config["candidates"] - 1))]
        made.append((qid, query, names))
    small = [(query, [Doc(name, rest[qid] if name == qid else docs[int(name)].text, docs[int(name)].title) for name in names]) for qid, query, names in made]
    return list(zip([query for query, _ in small], [[doc.content for doc in shown] for _, shown in small], taught(config, docs, small), strict=True))


def taught(config: dict[str, Any], docs: list[Doc], asked: list[tuple[str, list[Doc]]]) -> list[list[float]]:
    """Standardised scores of both retrievers added up; the words' rarity is that in all passages."""
    from echelon.retrieve.encoders import resolve_encoder

    encoder = resolve_encoder("embedded")
    sources = [Doc(f"{number}*", shown[0].text, shown[0].title) for number, (_, shown) in enumerate(asked)]
    words = BM25(stopwords="english", stemmer="english").index([*docs, *sources])
    texts = [*docs, *sources]
    row = {doc.id: place for place, doc in enumerate(texts)}
    vectors = encoder.encode_documents(texts)
    of_queries = encoder.encode_queries([query for query, _ in asked])
    by_words = words.search({str(number): query for number, (query, _) in enumerate(asked)}, 1000)
    made = []
    for number, (_, shown) in enumerate(asked):
        names = [f"{number}*", *(doc.id for doc in shown[1:])]
        columns = [np.array([by_words[str(number)].get(name, 0.0) for name in names]), vectors[[row[name] for name in names]] @ of_queries[number]]
        score = sum((column - column.mean()) / (column.std() + 1e-6) for column in columns)
        score[0] += config["source_bonus"]
        made.append(score.tolist())
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path(__file__).parent / "config.yaml")
    parser.add_argument("--work", type=Path, required=True, help="folder for the examples, the log and the result")
    args = parser.parse_args()
    config = yaml.safe_load(args.config.read_text())
    args.work.mkdir(parents=True, exist_ok=True)
    kept = args.work / "examples.json"
    if not kept.exists():
        kept.write_text(json.dumps(examples(config, passages(Path(os.environ["ECHELON_DATA"]) / config["data"]))))
    rows = json.loads(kept.read_text())
    rows = [row for row in rows if len(row[1]) == config["candidates"]]
    torch.manual_seed(config["seed"])
    path = str(embedded_encoder_dir())
    tokenizer = AutoTokenizer.from_pretrained(path)
    base = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype=torch.float32)
    adapter = LoraConfig(
        r=config["lora_rank"], lora_alpha=2 * config["lora_rank"], task_type="SEQ_CLS", modules_to_save=["classifier", "pooler"],
        target_modules=["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"],
    )  # fmt: skip
    model = get_peft_model(base, adapter).train()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config["learning_rate"], weight_decay=0.01)
    size, steps = config["batch_size"], len(rows) // config["batch_size"]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config["learning_rate"], total_steps=steps, pct_start=0.1)
    started, curve = time.time(), []
    for step in range(steps):
        batch = rows[step * size : (step + 1) * size]
        pairs = [(query, text) for query, texts, _ in batch for text in texts]
        cut = {"truncation": "only_second", "max_length": config["max_length"], "padding": True, "return_tensors": "pt"}
        told = tokenizer([query for query, _ in pairs], [text for _, text in pairs], **cut)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            scores = model(**told).logits
        scores = scores.float().view(len(batch), -1)
        wanted = torch.tensor([scores_of for _, _, scores_of in batch]).softmax(-1)
        loss = torch.nn.functional.cross_entropy(scores, wanted) - torch.distributions.Categorical(probs=wanted).entropy().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        right = (scores.argmax(-1) == wanted.argmax(-1)).float().mean()
        curve.append((step, loss.item(), right.item()))
        if step % 25 == 24:
            last = curve[-25:]
            print(json.dumps({"step": step + 1, "of": steps, "loss": sum(x[1] for x in last) / 25, "best_first": sum(x[2] for x in last) / 25}), flush=True)
    model.peft_config["default"].base_model_name_or_path = "embedded"
    model.to(torch.bfloat16).save_pretrained(args.work / "adapter")  # type: ignore[operator]
    (args.work / "adapter" / "README.md").unlink()  # a template without content
    with open(args.work / "curve.csv", "w", newline="") as file:
        csv.writer(file).writerows([("step", "loss", "best_first"), *curve])
    (args.work / "result.json").write_text(json.dumps({"examples": len(rows), "steps": steps, "seconds": time.time() - started}, indent=2) + "\n")


if __name__ == "__main__":
    main()
