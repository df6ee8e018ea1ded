"""The sensitivity study: every setting once, on a copy, with classes and averages as the paper takes them."""

import math

import pytest
import torch

import small_models
from echelon.compress import RTN
from echelon.compress.sensitivity import sensitivity_class, study, table


def distance(scale):
    """Stands for a perplexity: 10 for the model as it is, more for others."""
    expected = small_models.logits(small_models.model("llama"), "llama")
    return lambda model: 10 + scale * float((small_models.logits(model, "llama") - expected).norm())


def rows(**arguments):
    settings = {"base": RTN(group_size=16, pad_groups=True), "lorc_rank": (0, 6)} | arguments
    return study(small_models.model("llama"), {"a": distance(1.0), "b": distance(3.0)}, **settings)


def test_every_setting_appears_once_and_the_model_as_it_is_comes_first():
    model = small_models.model("llama")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    made = study(model, {"a": distance(1.0)}, w_bits=(4, 8, 16), a_bits=(8, 16), group_size=(-1, 16), lorc_rank=(0, 4))
    settings = [(row.w_bits, row.a_bits, row.group_size, row.lorc_rank) for row in made]
    expected = {(w, a, g, r) for w in (4, 8) for a in (8, 16) for g in (-1, 16) for r in (0, 4)} | {(16, 8, -1, 0), (16, 16, -1, 0)}
    assert len(settings) == len(set(settings)) and set(settings) == expected and settings[0] == (16, 16, -1, 0)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert getattr(model.config, "quantization_config", None) is None


def test_the_average_is_of_perplexities_and_fewer_bits_hurt_more():
    made = {(row.w_bits, row.a_bits, row.group_size, row.lorc_rank): row for row in rows(w_bits=(3, 8), a_bits=(8, 16), group_size=(-1, 16))}
    for row in made.values():
        assert row.perplexity == pytest.approx((row.perplexities["a"] + row.perplexities["b"]) / 2)
        assert row.increase == pytest.approx(row.perplexity - 10)
    assert made[8, 16, -1, 0].increase < made[3, 16, 16, 0].increase < made[3, 16, -1, 0].increase
    for group in (-1, 16):
        assert made[3, 16, group, 6].increase < made[3, 16, group, 0].increase
        assert made[3, 16, group, 0].bytes < made[3, 16, group, 6].bytes < made[16, 16, -1, 0].bytes


def test_without_compensation_a_row_is_what_rtn_gives():
    row = rows(w_bits=(4,), a_bits=(8,), group_size=(16,), lorc_rank=(0,))[1]
    model = RTN(w_bits=4, a_bits=8, group_size=16, pad_groups=True).compress(small_models.model("llama")).model
    assert row.perplexities["a"] == pytest.approx(distance(1.0)(model), rel=1e-6)


@pytest.mark.parametrize(("increase", "expected"), [(-1, 1), (0.1, 1), (0.11, 2), (0.5, 2), (0.51, 3), (math.inf, 3), (math.nan, 3)])
def test_the_classes_are_the_paper_s(increase, expected):
    assert sensitivity_class(increase) == expected


def test_the_table_has_a_line_for_each_row():
    made = rows(w_bits=(4,), a_bits=(16,), group_size=(-1, 16))
    lines = table(made).splitlines()
    assert len(lines) == 2 + len(made) and {line.count("|") for line in lines} == {10}
    assert lines[2].startswith("| W16A16 | - | 0 | 10.00 | 10.00 | 10.00 | +0.00 | - |") and "| W4A16 | row | 6 |" in lines[4] and "Class-" in lines[4]


def test_nothing_to_measure_on_is_an_error():
    with pytest.raises(ValueError, match="evaluate is empty"):
        study(small_models.model("llama"), {})
