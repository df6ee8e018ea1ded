"""RankGen's objective and its trainer: the loss against other hands, gradient caching against plain gradients, and runs that were broken off."""

import copy
import json
import math

import pytest
import torch
from safetensors.torch import load_file

import small_folders
from echelon.data.rankgen_pairs import Pair
from echelon.errors import UserError
from echelon.score import RankGenEncoder, RankGenScorer, ScoreItem
from echelon.train import RankGenTrainer, contrastive_loss
from echelon.train.rankgen import not_negatives


def vectors(rows=6, width=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(rows, width, generator=generator, dtype=torch.float64) for _ in range(3))


def by_hand(prefixes, continuations, generated=None, negatives="both"):
    total = 0.0
    for i, p in enumerate(prefixes):
        own = math.exp(p @ continuations[i])
        others = [math.exp(p @ c) for j, c in enumerate(continuations) if j != i] if negatives != "generative" else []
        made = [math.exp(p @ g) for g in generated] if negatives != "inbook" else []
        total -= math.log(own / (own + sum(others) + sum(made)))
    return total / len(prefixes)


@pytest.mark.parametrize("negatives", ["both", "inbook", "generative"])
def test_the_loss_is_the_formula_summed_by_hand(negatives):
    loss, logits = contrastive_loss(*vectors(), negatives=negatives)
    assert loss.item() == pytest.approx(by_hand(*vectors(), negatives), abs=1e-9)
    assert logits.shape == (6, 6 if negatives == "inbook" else 12)


@pytest.mark.parametrize("negatives", ["both", "inbook"])
def test_the_loss_equals_multiple_negatives_ranking_of_sentence_transformers(negatives):
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from sentence_transformers.util import dot_score

    theirs = MultipleNegativesRankingLoss(None, scale=1.0, similarity_fct=dot_score)
    columns = list(vectors(9))[: 3 if negatives == "both" else 2]
    expected = theirs.compute_loss_from_embeddings(columns, torch.tensor([]))
    assert contrastive_loss(*columns, negatives=negatives)[0].item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("negatives", ["both", "inbook", "generative"])
def test_the_order_of_the_batch_does_not_matter(negatives):
    mixed = torch.randperm(6, generator=torch.Generator().manual_seed(3))
    loss = contrastive_loss(*vectors(), negatives=negatives)[0]
    again = contrastive_loss(*(column[mixed] for column in vectors()), negatives=negatives)[0]
    assert loss.item() == pytest.approx(again.item(), abs=1e-12)


def test_alone_without_generated_texts_the_loss_is_exactly_0():
    p, c, _ = vectors(1)
    assert contrastive_loss(p, c, negatives="inbook")[0].item() == 0


def test_generated_texts_equal_to_the_continuations_add_log_2():
    p, c, _ = vectors()
    inbook = contrastive_loss(p, c, negatives="inbook")[0]
    assert contrastive_loss(p, c, c)[0].item() == pytest.approx(math.log(2) + inbook.item(), abs=1e-12)
    assert contrastive_loss(p[:1], c[:1], c[:1])[0].item() == pytest.approx(math.log(2), abs=1e-12)


def test_one_direction_only():
    p, c, _ = vectors()
    assert contrastive_loss(p, c, negatives="inbook")[0].item() != pytest.approx(contrastive_loss(c, p, negatives="inbook")[0].item(), abs=1e-3)


def test_ignored_candidates_are_as_if_they_were_not_there():
    p, c, g = vectors(3)
    ignore = torch.zeros(3, 6, dtype=torch.bool)
    ignore[0, 1] = ignore[0, 5] = True
    kept = [math.exp(p[0] @ c[0]), math.exp(p[0] @ c[2]), math.exp(p[0] @ g[0]), math.exp(p[0] @ g[1])]
    plain = by_hand(p, c, g)
    alone = sum(math.exp(p[0] @ v) for v in (*c, *g))
    expected = plain + (math.log(sum(kept)) - math.log(alone)) / 3
    assert contrastive_loss(p, c, g, ignore=ignore)[0].item() == pytest.approx(expected, abs=1e-9)


def test_generated_texts_may_not_be_missing():
    with pytest.raises(ValueError, match="negatives is 'both', but there are no generated texts"):
        contrastive_loss(*vectors()[:2])


def test_equal_and_overlapping_continuations_are_no_negatives():
    rows = [
        Pair("a", "p", "One. Two.", 1, 3), Pair("a", "p", "Two. Three.", 2, 4), Pair("a", "p", "Three.", 3, 4),
        Pair("b", "p", "Two. Three.", 1, 3), Pair("b", "p", "Nine.", 3, 4),
    ]  # fmt: skip
    pairs = {(i, j) for i, j in not_negatives(rows).nonzero().tolist()}
    assert pairs == {(0, 1), (1, 0), (1, 2), (2, 1), (1, 3), (3, 1)}
    assert {(i, j) for i, j in not_negatives(rows, overlap=False).nonzero().tolist()} == {(1, 3), (3, 1)}


def rows(count=10):
    sentences = small_folders.document(1, 2 * count + 1).split(". ")
    return [Pair("d", f"{sentences[i]}.", f"{sentences[i + 1]}. {sentences[i + 2]}.", i + 1, i + 3, f"{sentences[-i - 1]}.") for i in range(count)]


@pytest.mark.parametrize("family", ["bert", "t5"])
@pytest.mark.parametrize("negatives", ["both", "inbook", "generative"])
def test_gradient_caching_equals_plain_gradients(family, negatives):
    backbone = {"bert": small_folders.bert, "t5": small_folders.t5}[family]()
    plain = RankGenEncoder(backbone, small_folders.tokenizer(), prefix_max_length=32, suffix_max_length=32).eval().double()
    batch = rows()
    columns = [plain(plain.tokens([getattr(row, name) for row in batch], side)) for name, side in
               (("prefix", "prefix"), ("continuation", "suffix"), ("generated", "suffix"))]  # fmt: skip
    ignore = torch.tensor([[i != j and (abs(i - j) < 2 or a.continuation == b.continuation) for j, b in enumerate(batch)] for i, a in enumerate(batch)])
    scores = [columns[0] @ columns[1].T]
    scores[0] = scores[0].masked_fill(ignore, -math.inf)
    if negatives == "generative":
        scores[0] = scores[0].masked_fill(~torch.eye(10, dtype=torch.bool), -math.inf)
    if negatives != "inbook":
        scores.append(columns[0] @ columns[2].T)
    loss = -torch.cat(scores, 1).log_softmax(1).diagonal().mean()
    loss.backward()
    for chunk in (3, 4, 64):
        cached = copy.deepcopy(plain)
        cached.zero_grad()
        told = RankGenTrainer(negatives=negatives, cache_chunk=chunk)._step(cached, batch)
        assert told["loss"] == pytest.approx(loss.item(), abs=1e-5)
        for (name, expected), (_, found) in zip(plain.named_parameters(), cached.named_parameters(), strict=True):
            if expected.grad is not None:
                torch.testing.assert_close(found.grad, expected.grad, atol=2e-5, rtol=1e-3, msg=name)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    small_folders.encoder(folder / "encoder")
    small_folders.encoder(folder / "t5", "t5")
    small_folders.language_model(folder / "lm")
    with open(folder / "data.jsonl", "w") as file:
        for number in range(3):
            file.write(json.dumps({"text": small_folders.document(number)}) + "\n")
    return folder


def trainer(place, **knobs):
    small = {"generator": str(place / "lm"), "batch_size": 8, "cache_chunk": 5, "steps": 6, "suffix_words": (4, 12), "prefix_words": 20,
             "prefix_max_length": 40, "suffix_max_length": 24, "save_every": 0.0}  # fmt: skip
    return RankGenTrainer(**small | knobs)


def trained(place, out, model="encoder", on_step=None, **knobs):
    return trainer(place, **knobs).train(str(place / model), place / "data.jsonl", out, 0, on_step)


def steps(out):
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in (out / "log.jsonl").read_text().splitlines()]


def same_weights(a, b):
    files = [path.relative_to(a) for path in a.rglob("*.safetensors")]
    assert files and files == [path.relative_to(b) for path in b.rglob("*.safetensors")]
    for file in files:
        one, other = load_file(a / file), load_file(b / file)
        assert one.keys() == other.keys()
        for name in one:
            torch.testing.assert_close(one[name], other[name], atol=1e-6, rtol=1e-5)


def test_a_trained_folder_scores_and_says_how_it_was_made(place, tmp_path):
    before = torch.random.get_rng_state()
    result = trained(place, tmp_path / "out")
    assert torch.equal(before, torch.random.get_rng_state())
    assert result["steps"] == 6 and result["rows"] > 30 and math.isfinite(result["loss"])
    assert set(steps(tmp_path / "out")[0]) == {"step", "loss", "inbook_accuracy", "generated_accuracy", "same_document"}
    assert not list((tmp_path / "out").glob("checkpoint*")) and not list((tmp_path / "out").glob(".*"))
    scores = RankGenScorer(str(tmp_path / "out")).score([ScoreItem("Sea waits.", text) for text in ("Boat turns.", "Lamp burns.")])
    assert scores.isfinite().all() and scores[0] != scores[1]
    assert trained(place, tmp_path / "out") == result  # a finished run is not done again


def test_the_loss_falls_on_the_rows_that_it_learns(place, tmp_path):
    trained(place, tmp_path / "out", negatives="inbook", steps=60, learning_rate=3e-3)
    losses = [step["loss"] for step in steps(tmp_path / "out")]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


@pytest.mark.parametrize(("model", "knobs"), [("encoder", {}), ("encoder", {"lora_rank": 2}), ("t5", {})])
def test_broken_off_and_started_again_it_equals_an_unbroken_run(place, tmp_path, model, knobs):
    def break_off(entry):
        if entry.get("step") == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(place, tmp_path / "broken", model, break_off, **knobs)
    assert (tmp_path / "broken" / "checkpoint.safetensors").is_file() and not (tmp_path / "broken" / "result.json").exists()
    seen = []
    trained(place, tmp_path / "broken", model, lambda entry: seen.append(entry.get("step")), **knobs)
    assert seen == [4, 5, 6]  # three steps were saved before the fourth was told
    trained(place, tmp_path / "whole", model, **knobs)
    assert steps(tmp_path / "broken") == steps(tmp_path / "whole")
    same_weights(tmp_path / "broken", tmp_path / "whole")


def test_negatives_that_were_half_written_are_finished_and_equal(place, tmp_path):
    with open(tmp_path / "long.jsonl", "w") as file:
        for number in range(20):
            file.write(json.dumps({"text": small_folders.document(number, 15)}) + "\n")
    maker, told = trainer(place), []
    maker.rows(tmp_path / "long.jsonl", tmp_path / "whole", 0, told.append)
    assert [entry["rows"] for entry in told] == [256, 280]
    whole = (tmp_path / "whole" / "rows.jsonl").read_text()
    cut = tmp_path / "broken" / "rows.jsonl"
    cut.parent.mkdir()
    cut.write_text(whole[: whole.index("\n", len(whole) * 19 // 20) + 9])  # in the middle of a line of the second piece
    told.clear()
    maker.rows(tmp_path / "long.jsonl", tmp_path / "broken", 0, told.append)
    assert [entry["rows"] for entry in told] == [280]
    assert cut.read_text() == whole
    maker.rows(tmp_path / "long.jsonl", tmp_path / "broken", 0, told.append)
    assert len(told) == 1  # all are there: no model is asked


def test_without_generated_negatives_no_language_model_is_needed(place, tmp_path):
    result = trained(place, tmp_path / "out", negatives="inbook", generator="/no/such/model", steps=2)
    assert result["rows"] == 39 and not (tmp_path / "out" / "rows.jsonl").exists()  # 13 boundaries in each of 3 documents
    assert {step["generated_accuracy"] for step in map(lambda s: {k: str(v) for k, v in s.items()}, steps(tmp_path / "out"))} == {"nan"}
    with pytest.raises(UserError, match="cannot load model '/no/such/model'"):
        trained(place, tmp_path / "other", generator="/no/such/model")


def test_generative_negatives_leave_the_rest_of_the_book_out(place, tmp_path):
    trained(place, tmp_path / "out", negatives="generative", steps=2)
    for step in steps(tmp_path / "out"):
        assert 0 <= step["generated_accuracy"] <= 1 and math.isnan(step["inbook_accuracy"])


def test_rows_of_each_document_can_be_limited(place):
    made = trainer(place, rows_per_document=4, negatives="inbook").rows(place / "data.jsonl", place, 0, print)
    assert [row.doc_id for row in made] == ["1"] * 4 + ["2"] * 4 + ["3"] * 4
    assert len({(row.doc_id, row.start) for row in made}) == 12


def test_cut_after_a_word_a_rows_texts_have_one_length_and_may_be_unfinished(place, tmp_path):
    whole = trainer(place).rows(place / "data.jsonl", tmp_path, 0, print)
    short = trainer(place, cut="word").rows(place / "data.jsonl", tmp_path, 0, print)
    assert len(short) == len(whole)
    for long, row in zip(whole, short, strict=True):
        assert len(row.continuation.split()) == len(row.generated.split()) <= 12
        assert long.continuation.startswith(row.continuation) and " ".join(long.generated.split()).startswith(row.generated)
        assert (row.prefix, row.start, row.stop) == (long.prefix, long.start, long.stop)
    assert any(not row.continuation.endswith(".") for row in short)
    with pytest.raises(ValueError, match="cut is 'line'; it must be one of sentence, word"):
        trainer(place, cut="line")


def test_a_folder_with_another_run_is_refused_and_one_with_a_typing_error_is_not(place, tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        trainer(place, negatives="inbook", steps=1).train(str(place / "encoder"), place / "dta.jsonl", tmp_path / "out")
    trained(place, tmp_path / "out", negatives="inbook", steps=1)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="holds a run with other knobs or data"):
        trained(place, tmp_path / "out", negatives="inbook", steps=2)
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}


def test_a_loss_that_is_no_number_stops_the_run(place, tmp_path):
    with pytest.raises(UserError, match=r"the loss is (nan|inf) at step \d; lower learning_rate"):
        trained(place, tmp_path / "out", negatives="inbook", learning_rate=1e30)


def test_documents_without_sentences_are_refused(place, tmp_path):
    (tmp_path / "one.txt").write_text("Only one sentence.")
    with pytest.raises(UserError, match="gives 0 training rows; it needs documents of several sentences"):
        trainer(place).train(str(place / "encoder"), tmp_path / "one.txt", tmp_path / "out")


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"negatives": "hard"}, "negatives is 'hard'; it must be one of both, inbook, generative"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd'"),
        ({"prefix_words": 0}, "prefix_words is 0"),
        ({"rows_per_document": -1}, "rows_per_document is -1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"cache_chunk": 0}, "cache_chunk is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"lora_rank": -1}, "lora_rank is -1"),
        ({"projection_scale": 0.0}, "projection_scale is 0.0"),
        ({"suffix_words": (9, 3)}, r"suffix_words is \(9, 3\)"),
        ({"suffix_words": (0, 3)}, r"suffix_words is \(0, 3\)"),
    ],
)
def test_knobs_out_of_range_are_named(knobs, said):
    with pytest.raises(ValueError, match=said):
        RankGenTrainer(**knobs)
