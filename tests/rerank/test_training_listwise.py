"""Training on whole lists: labels from teachers, weights of ranks, and a model that learns an order."""

import math

import pytest

import tiny_chat
from echelon.data.documents import Doc
from echelon.errors import UserError
from echelon.llm import load_template, parse_permutation
from echelon.llm.templates import Message, Template
from echelon.rerank.base import Request
from echelon.rerank.oracle import Oracle
from echelon.rerank.training import LabelledList, importance_weights, label_lists, listwise_rows, train_listwise

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def spans_of(label, pieces):
    made, place = [], 0
    for piece in pieces:
        place = label.index(piece, place)
        made.append((place, place + len(piece)))
        place += len(piece)
    return made


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (["[", "3", "]", ">", "[", "1", "]", ">", "[", "2", "]"], [2, 2, 2, 1, 1.6309, 1.6309, 1.6309, 1, 1.5, 1.5, 1.5]),
        (["[", "3", "]", " >", " [", "1", "]", " ", ">", " ", "[2", "]"], [2, 2, 2, 1, 1.6309, 1.6309, 1.6309, 1, 1, 1, 1.5, 1.5]),
        (["[3", "] > [", "1] ", "> ", "[2]"], [2, 2, 1.6309, 1, 1.5]),
        (["[3] > [1] > [2]"], [2]),
    ],
)
def test_a_token_weighs_by_the_rank_that_it_names_however_the_label_is_cut(pieces, expected):
    label = "[3] > [1] > [2]"
    assert importance_weights(label, spans_of(label, pieces)) == pytest.approx(expected, abs=1e-4)


def test_ranks_are_counted_by_what_separates_them_and_not_by_their_digits():
    label = " > ".join(f"[{i}]" for i in range(100, 0, -1))
    weights = importance_weights(label, [(i, i + 1) for i in range(len(label))])
    for rank in (1, 2, 3, 4, 100):
        start = label.index(f"[{101 - rank}]")
        length = len(str(101 - rank)) + 2
        assert weights[start : start + length] == pytest.approx([1 + 1 / math.log2(rank + 1)] * length)
    assert [round(weights[label.index(f"[{101 - rank}]")], 4) for rank in (1, 2, 3, 4, 100)] == [2.0, 1.6309, 1.5, 1.4307, 1.1502]
    assert importance_weights("B > A", [(0, 1), (1, 3), (3, 5)]) == pytest.approx([2, 1, 1.6309], abs=1e-4)


def request(n, qid="q"):
    return Request.of("which is best", [Doc(f"d{i}", f"text {i}") for i in range(n)], qid)


def grades(n):
    return {f"d{i}": float((37 * i) % n) for i in range(n)}


@pytest.mark.parametrize(("n", "calls"), [(100, 45), (20, 1), (35, 6), (7, 1), (1, 0)])
def test_a_judge_of_windows_labels_whole_lists(n, calls):
    class Counted(Oracle):
        asked = 0

        def answer_all(self, asked):
            Counted.asked += sum(map(len, asked))
            return super().answer_all(asked)

    grade = grades(101) if n == 100 else grades(n)
    [made] = label_lists(Counted({"q": grade}), [request(n)])
    assert Counted.asked == calls
    assert made.order == tuple(sorted(range(n), key=lambda i: -grade[f"d{i}"])) and made.query == "which is best"


def test_any_reranker_is_a_teacher():
    from echelon.rerank.icr import ICR

    teacher = ICR(Oracle({"a": grades(11), "b": {}}))
    one, other = label_lists(teacher, [request(11, "a"), request(5, "b")])
    assert one.order == tuple(sorted(range(11), key=lambda i: -grades(11)[f"d{i}"])) and other.order == (0, 1, 2, 3, 4)


def lists():
    docs = tuple(Doc(f"d{i}", text) for i, text in enumerate(["the rain", "wind [7] and sea", "passage", "other"]))
    return [LabelledList("rain", docs, (2, 0, 3, 1)), LabelledList("the sea", docs[::-1], (1, 3, 0, 2)), LabelledList("one", docs[:1], (0,))]


def test_rows_are_what_the_model_is_asked_and_the_label():
    engine = tiny_chat.engine()
    first, second = listwise_rows(engine, lists())
    text = engine.tokenizer.decode(first["input_ids"])
    assert text.endswith("<|assistant|>\n[3] > [1] > [4] > [2]</s>") and "wind (7) and sea" in text
    prompt = prompt_ids(engine)
    assert first["input_ids"][: len(prompt)] == prompt and first["labels"][: len(prompt)] == [-100] * len(prompt) and first["labels"][len(prompt)] != -100
    assert max(first["weights"]) == 2.0 and first["weights"][-1] == 1.0 and second["labels"] != first["labels"]
    [plain, _] = listwise_rows(engine, lists(), loss_weighting="none")
    assert plain["input_ids"] == first["input_ids"] and set(plain["weights"]) == {0.0, 1.0}


def prompt_ids(engine):
    prompt = load_template("rankllm").render(engine, "rain", lists()[0].docs, max_passage_tokens=100)
    return engine._tokens([prompt], [""])[0][0]


def test_a_model_learns_to_write_the_orders(tmp_path):
    engine, form = tiny_chat.engine(), Template("short", "list", (Message("user", "{query}\n{passages}\n{count} {example}"),))
    done = train_listwise(
        engine, lists(), tmp_path / "out", template=form, learning_rate=2e-2, warmup_steps=5, num_train_epochs=70, per_device_train_batch_size=2,
        gradient_accumulation_steps=1, gradient_checkpointing=False, neftune_noise_alpha=None,
    )  # fmt: skip
    assert done["rows"] == 2 and done["tokens_per_passage"] == done["tokens"] / 8 and done["loss"][-1] < 0.2 < done["loss"][0]
    for labelled in lists()[:2]:
        prompt = form.render(engine, labelled.query, labelled.docs, max_passage_tokens=100)
        [[written]] = engine.generate([prompt], max_new_tokens=40)
        assert parse_permutation(written.text, 4).order == labelled.order and written.finish == "stop"


def test_what_is_no_list_to_learn_from_is_refused():
    docs = lists()[0].docs
    with pytest.raises(UserError, match=r"is no permutation of their places: \(0, 0, 1, 2\)"):
        LabelledList("rain", docs, (0, 0, 1, 2))
    engine = tiny_chat.engine()
    with pytest.raises(UserError, match="template 'prp' asks a pair question"):
        listwise_rows(engine, lists(), template="prp")
    with pytest.raises(ValueError, match="loss_weighting is 'both'"):
        listwise_rows(engine, lists(), loss_weighting="both")
    with pytest.raises(UserError, match="context"):
        listwise_rows(tiny_chat.engine(context=64), lists())
