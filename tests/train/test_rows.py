"""Rows, their order, and held-out loss, against sums made one token at a time."""

import hashlib
import math

import pytest
import torch

import small_models
import tiny
from echelon.errors import UserError
from echelon.train.rows import Reading, document_rows, held_out_loss, packed_rows

EOS = 1


def words(*numbers):
    """A text whose token ids are these."""
    return " ".join(tiny.WORDS[number] for number in numbers)


def texts(count=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [words(*torch.randint(4, 40, (5 + 3 * i % 17,), generator=generator).tolist()) for i in range(count)]


def test_documents_are_joined_by_the_end_token_and_the_incomplete_row_is_dropped():
    rows = packed_rows([words(4, 5, 6), words(7, 8), words(9, 10, 11)], tiny.tokenizer(), 4)
    assert rows.ids.tolist() == [[4, 5, 6, EOS], [7, 8, EOS, 9]] and rows.text_tokens == 10  # of 4 5 6 1 | 7 8 1 9 | 10 11
    assert rows.text_bytes == len("w0 w1 w2") + len("w3 w4") + len("w5 w6 w7")
    batch = rows.batch([1, 0])
    assert batch["input_ids"].tolist() == [[7, 8, EOS, 9], [4, 5, 6, EOS]] and torch.equal(batch["labels"], batch["input_ids"]) and len(batch) == 2


def test_a_text_shorter_than_a_row_is_refused_with_both_numbers():
    with pytest.raises(UserError, match=r"has 3 tokens; one row takes 4 \(seqlen\)"):
        packed_rows([words(4, 5, 6)], tiny.tokenizer(), 4)


def test_without_an_end_token_several_documents_cannot_be_joined():
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=tiny.tokenizer().backend_tokenizer)
    assert packed_rows([words(4, 5, 6, 7)], bare, 2).ids.tolist() == [[4, 5], [6, 7]]
    with pytest.raises(UserError, match="no end-of-text token"):
        packed_rows([words(4, 5, 6), words(7)], bare, 2)


def test_documents_fill_rows_with_pads_that_do_not_count():
    rows = document_rows([words(4, 5, 6, 7, 8), words(9, 10), words(11)], tiny.tokenizer(), 4)
    batch = rows.batch([0, 1])
    assert batch["input_ids"].tolist() == [[4, 5, 6, 7], [9, 10, 0, 0]] and batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[4, 5, 6, 7], [9, 10, -100, -100]] and len(rows) == 2
    with pytest.raises(UserError, match="none of the 1 documents has two tokens"):
        document_rows([words(4)], tiny.tokenizer(), 4)


def test_every_row_is_read_once_before_any_is_read_twice_and_the_order_is_the_seeds():
    rows = packed_rows(texts(), tiny.tokenizer(), 8)
    count = len(rows)
    reading = Reading(rows, 2 * count + 3, seed=5)
    places = reading.places.tolist()
    assert sorted(places[:count]) == sorted(places[count : 2 * count]) == list(range(count)) and places[:count] != places[count : 2 * count]
    assert Reading(rows, 2 * count + 3, seed=5).places.tolist() == places != Reading(rows, 2 * count + 3, seed=6).places.tolist()
    assert torch.equal(reading[3]["input_ids"], rows.ids[places[3]].long()) and len(reading) == 2 * count + 3
    by_hand = hashlib.sha256(b"".join(int(token).to_bytes(4, "little") for n in range(len(reading)) for token in reading[n]["input_ids"]))
    assert reading.digest() == by_hand.hexdigest() and reading.tokens() == 8 * (2 * count + 3)


def test_pads_are_no_tokens():
    rows = document_rows([words(4, 5, 6), words(7, 8)], tiny.tokenizer(), 4)
    assert Reading(rows, 4, seed=0).tokens() == 2 * (3 + 2)


def one_by_one(model, rows):
    """Minus the log-probability of each token, from forwards on single unpadded rows in float64."""
    found = []
    for place in range(len(rows)):
        ids = rows.ids[place].long()
        ids = ids[: int(rows.mask[place].sum())] if rows.mask is not None else ids
        log = model.double()(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)
        found.append([-log[i, ids[i + 1]].item() for i in range(len(ids) - 1)])
    model.float()
    return found


@pytest.mark.parametrize("make", [packed_rows, document_rows])
def test_the_loss_is_the_mean_over_tokens_whatever_the_batch(make):
    model, rows = small_models.model("llama"), make(texts(), tiny.tokenizer(), 12)
    with torch.no_grad():
        expected = [value for row in one_by_one(small_models.model("llama"), rows) for value in row]
    for size in (1, 3, 64):
        found = held_out_loss(model, rows, size)
        assert found.tokens == len(expected) and found.loss == pytest.approx(sum(expected) / len(expected), rel=1e-5)
        assert found.perplexity() == pytest.approx(math.exp(sum(expected) / len(expected)), rel=1e-4)
    share = rows.text_tokens / rows.text_bytes
    assert found.byte_perplexity() == pytest.approx(math.exp(share * sum(expected) / len(expected)), rel=1e-4)


def test_the_legacy_loss_averages_batches_over_one_too_many():
    model = small_models.model("llama")
    packed = packed_rows(texts(), tiny.tokenizer(), 8).first(8 * 8)
    assert len(packed) == 8
    found = held_out_loss(model, packed, 2)
    assert found.legacy == pytest.approx(found.loss * 4 / 5, rel=1e-9)  # four batches of equally many tokens
    uneven = document_rows(texts(), tiny.tokenizer(), 12)
    with torch.no_grad():
        rows = one_by_one(small_models.model("llama"), uneven)
    means = [sum(sum(row) for row in rows[i : i + 4]) / sum(len(row) for row in rows[i : i + 4]) for i in range(0, len(rows), 4)]
    assert held_out_loss(model, uneven, 4).legacy == pytest.approx(sum(means) / (len(means) + 1), rel=1e-5)


def test_reading_held_out_text_leaves_the_mode_and_a_limit_keeps_whole_rows():
    model, rows = small_models.model("gpt2").train(), document_rows(texts(), tiny.tokenizer(), 12)
    held_out_loss(model, rows)
    assert model.training
    lengths = rows.mask.sum(1).tolist()
    assert rows.first(sum(lengths[:3])).ids.tolist() == rows.ids[:3].tolist() and len(rows.first(1)) == 1
    assert len(packed_rows(texts(), tiny.tokenizer(), 8).first(17)) == 2
