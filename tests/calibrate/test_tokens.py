"""Calibration batches from whatever users have."""

import datasets
import pytest
import torch

import tiny
from echelon.calibrate import Calibration, calibration_batches
from echelon.errors import UserError

TEXTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9"]


def ids(made):
    """Rows without their pads."""
    return [row[mask.bool()].tolist() for batch in made.batches for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]


def test_packed_rows_hold_the_joined_text_without_pads():
    made = calibration_batches(TEXTS, tiny.tokenizer(), seqlen=4, batch_size=2)
    joined = tiny.tokenizer()(" ".join(TEXTS)).input_ids
    assert ids(made) == [joined[:4], joined[4:8]]
    assert made.tokens == 8 and all(b["attention_mask"].all() for b in made.batches)


def test_padded_rows_are_the_texts():
    made = calibration_batches(TEXTS, tiny.tokenizer(), seqlen=4, packing="padded")
    assert ids(made) == [tiny.tokenizer()(text).input_ids[:4] for text in TEXTS]
    assert made.tokens == 3 + 1 + 4


def test_less_text_than_a_row_is_one_short_row():
    assert ids(calibration_batches(["w1 w2"], tiny.tokenizer(), seqlen=100)) == [tiny.tokenizer()("w1 w2").input_ids]


def test_rows_beyond_nsamples_are_drawn_by_the_seed():
    rows = [[i, i + 1] for i in range(4, 34)]
    first, again, other = (ids(calibration_batches(rows, nsamples=5, seed=s)) for s in (0, 0, 1))
    assert first == again != other and len(first) == 5 and all(row in rows for row in first)


def test_every_source_gives_the_same_rows(tmp_path):
    text, lines = tmp_path / "t.txt", tmp_path / "t.jsonl"
    text.write_text("w1 w2 w3 w4")
    lines.write_text('{"text": "w1 w2 w3 w4"}\n')
    expected = ids(calibration_batches(["w1 w2 w3 w4"], tiny.tokenizer()))
    for data in (text, str(lines), datasets.Dataset.from_dict({"text": ["w1 w2 w3 w4"]}), torch.tensor(expected)):
        assert ids(calibration_batches(data, tiny.tokenizer())) == expected
    made = calibration_batches(text, tiny.tokenizer())
    assert made.source == str(text)
    assert calibration_batches(made) is made


def test_ready_inputs_stay_as_they_are():
    made = calibration_batches([{"pixel_values": torch.zeros(2, 3, 4, 4)}])
    assert isinstance(made, Calibration) and made.batches[0]["pixel_values"].shape == (2, 3, 4, 4)


@pytest.mark.parametrize(
    ("data", "settings", "error"),
    [
        ([], {}, "is empty"), ([""], {}, "no token"), (["w1"], {"nsamples": 0}, "nsamples is 0"), (["w1"], {"packing": "tight"}, "packing is 'tight'"),
        ("no/such/file.txt", {}, "cannot read"),
    ],
)  # fmt: skip
def test_bad_data_is_one_clear_error(data, settings, error):
    with pytest.raises(ValueError, match=error):
        calibration_batches(data, tiny.tokenizer(), **settings)
    if error == "no token":
        with pytest.raises(UserError):
            calibration_batches(data, tiny.tokenizer())
