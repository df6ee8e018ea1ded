"""Training Rank-R1: what is rewarded, what a set holds, the prompts, and small runs of both trainings."""

import json
from collections import Counter

import pytest
from peft import LoraConfig, PeftModel

import tiny_chat
from echelon.data.documents import Doc
from echelon.errors import UserError
from echelon.llm import LocalEngine
from echelon.llm.templates import Message, Template
from echelon.models import LoadedModel
from echelon.rerank.rank_r1 import RankR1
from echelon.rerank.training import GRPO, SetwiseExample, answer_reward, reasoning_rows, setwise_examples, train_rank_r1, train_setwise

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.mark.parametrize(
    ("completion", "label", "reward"),
    [
        ("<think>a</think> <answer>[3]</answer>", "[3]", 1),
        ("<think>first\nthen\n</think>\n\n<answer>\n[3]\n</answer>", "[3]", 1),
        ("Well. <think>a</think><answer>[3]</answer> That is it.", "[3]", 1),
        ("<think></think> <answer>[3]</answer>", "[3]", 1),
        ("<think>a</think> <answer>[3]</answer> <think>b</think> <answer>[2]</answer>", "[3]", 1),
        ("<think>a</think> <answer>[3]</answer> <think>b</think> <answer>[2]</answer>", "[2]", 0),
        ("<think>a</think> <answer>3</answer>", "[3]", 0),
        ("<think>a</think> <answer>[3]: the best</answer>", "[3]", 0),
        ("<answer>[3]</answer>", "[3]", 0),
        ("<think>a <answer>[3]</answer>", "[3]", 0),
        ("a</think> <answer>[3]</answer>", "[3]", 0),
        ("<think>a</think> so <answer>[3]</answer>", "[3]", 0),
        ("<THINK>a</THINK> <ANSWER>[3]</ANSWER>", "[3]", 0),
        ("<think>a</think> <answer>[3], [2]</answer>", "[3]", 0),
        ("<think>a</think> <answer>[12]</answer>", "[1]", 0),
        ("<think>a</think> <answer>[1]</answer>", "[12]", 0),
        ("<think>a</think> <answer>[3]", "[3]", 0),
        ("", "[3]", 0),
    ],
)
def test_nothing_but_the_right_label_behind_closed_reasoning_is_rewarded(completion, label, reward):
    for template in ("rank_r1_v0.1", "rank_r1_v0.2"):
        assert answer_reward(template)(prompts=["", ""], completions=[completion, "no"], answer=[label, label], query=["q", "q"]) == [reward, 0]


def row(number, good=2, bad=30):
    def passages(count, start):
        return [{"docid": f"{number}-{start + i}", "title": f"t{i}", "text": f"text {start + i}"} for i in range(count)]

    return {"query_id": str(number), "query": f"query {number}", "positive_passages": passages(good, 0), "negative_passages": passages(bad, 100)}


def relevant(example):
    return [doc.id.split("-")[1] in ("0", "1") for doc in example.docs]


def test_a_set_is_one_relevant_document_among_hard_negatives_in_a_drawn_order():
    rows = [row(i) for i in range(60)]
    made = setwise_examples(rows)
    assert all(len(example.docs) == len({doc.id for doc in example.docs}) == 20 and relevant(example).index(True) == example.answer for example in made)
    assert all(sum(relevant(example)) == 1 for example in made) and made[0].docs[0].title
    assert len({example.answer for example in made}) > 12 and len({example.docs[example.answer].id.split("-")[1] for example in made}) == 2
    assert setwise_examples(rows) == made != setwise_examples(rows, seed=1)
    assert setwise_examples(rows[:3]) == made[:3], "what is drawn for a row must not depend on the others"
    [few] = setwise_examples([row(0, bad=4)])
    assert len(few.docs) == 5


def test_sets_of_varied_size_are_the_more_likely_the_larger_they_are():
    sizes = Counter(len(example.docs) - 1 for example in setwise_examples([row(i, bad=12) for i in range(900)], num_negatives=9, vary=True))
    assert set(sizes) == set(range(1, 10))
    for size in (3, 6, 9):
        assert sizes[size] / 900 == pytest.approx(size / 45, abs=0.04)


def test_a_document_is_never_both_relevant_and_not():
    mixed = row(0, good=1, bad=3)
    mixed["negative_passages"] += [mixed["positive_passages"][0], mixed["negative_passages"][0]]
    [example] = setwise_examples([mixed])
    assert len(example.docs) == 4


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"query": "q"}, r"row 1 is not in Tevatron's form .*'positive_passages'"),
        ({**row(0), "negative_passages": [{"text": "x"}]}, r"row 1 is not in Tevatron's form .*'docid'"),
        (row(0, good=0), r"row 1 \('query 0'\) has 0 relevant and 30 other documents"),
        (row(0, bad=0), r"row 1 \('query 0'\) has 2 relevant and 0 other documents"),
    ],
)
def test_rows_that_make_no_set_are_named(bad, said):
    with pytest.raises(UserError, match=said):
        setwise_examples([bad])


def examples():
    docs = tuple(Doc(f"d{i}", text) for i, text in enumerate(["the rain [2]", "wind and sea", "passage"]))
    return [SetwiseExample("rain", docs, 0), SetwiseExample("sea", docs, 1), SetwiseExample("sea", docs[::-1], 1)]


def test_prompts_are_those_of_ranking_and_answers_are_their_labels():
    engine = tiny_chat.engine()
    rows = reasoning_rows(engine, examples())
    assert [row["answer"] for row in rows] == ["[1]", "[2]", "[2]"] and [row["query"] for row in rows] == ["rain", "sea", "sea"]
    assert all("<think>" in row["prompt"] and row["prompt"].startswith("<s>") and "[1] the rain (2)\n" in row["prompt"] for row in rows[:2])
    with pytest.raises(UserError, match="template 'rankllm' asks a list question"):
        reasoning_rows(engine, examples(), "rankllm")


TURN = Message("user", "{query}\n{passages}\n{count} {example}")
SHORT = Template("short", "set", (TURN,), label="[{id}]", pattern="<answer>(.*?)</answer>", sanitize=("brackets",))
EVERYWHERE = LoraConfig(r=16, lora_alpha=64, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "lm_head"])


def test_the_baseline_learns_its_answers_and_ranks_by_them(tmp_path):
    engine = tiny_chat.engine()
    done = train_setwise(
        engine, examples(), tmp_path / "out", template=SHORT, adapter=EVERYWHERE, learning_rate=1e-2, num_train_epochs=30, gradient_accumulation_steps=1,
        per_device_train_batch_size=3,
    )  # fmt: skip
    assert done["loss"][-1] < 0.1
    again = LocalEngine(LoadedModel(PeftModel.from_pretrained(tiny_chat.model(), tmp_path / "out").eval(), engine.tokenizer))
    for example in examples():
        [[written]] = again.generate([SHORT.render(again, example.query, example.docs)], max_new_tokens=30)
        assert written.text == f"<answer>[{example.answer + 1}]</answer>" and written.finish == "stop"


def test_the_default_adapter_and_template_are_the_papers(tmp_path):
    engine = tiny_chat.engine(context=4096)
    done = train_rank_r1(
        engine, examples()[:1], tmp_path / "r1",
        knobs=GRPO(num_generations=2, per_device_train_batch_size=2, gradient_accumulation_steps=1, max_completion_length=2, max_steps=1),
    )  # fmt: skip
    told = json.loads((tmp_path / "r1" / "adapter_config.json").read_text())
    assert (told["r"], told["lora_alpha"], told["lora_dropout"], sorted(told["target_modules"])) == (16, 32, 0.05, ["q_proj", "v_proj"])
    assert done["steps"] == 1 and done["beta"] == 0.04
    made = GRPO()
    assert (made.num_generations, made.temperature, made.learning_rate, made.max_completion_length, made.num_iterations) == (8, 1.0, 1e-5, 2048, 1)


def test_the_adapter_ranks(tmp_path):
    engine = tiny_chat.engine(context=4096)
    train_setwise(engine, examples(), tmp_path / "out", max_steps=1)
    adapted = PeftModel.from_pretrained(tiny_chat.model(context=4096), tmp_path / "out").eval()
    reranker = RankR1(LoadedModel(adapted, engine.tokenizer), reasoning=False, scoring="likelihood", num_child=2)
    assert sorted(hit["corpus_id"] for hit in reranker.rank("sea", ["rain", "wind", "sea"])) == [0, 1, 2]
