"""Filters: what they let through, and what is no filter."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echelon.errors import UserError
from echelon.retrieve import Filter
from echelon.retrieve.filters import filterable

META = {"year": 1990, "lang": "en", "score": 2.5, "draft": False, "note": "it's", "größe": 1, "none": None, "list": ["en"]}


@pytest.mark.parametrize(
    ("told", "holds"),
    [
        ("year = 1990", True), ("year=1990.0", True), ("year != 1990", False), ("year <> 1991", True), ("year > 1989 and year < 1991", True),
        ("YEAR = 1990", False), ("year IN (1, 1990)", True), ("year in (1,2)", False), ("score >= 2.5", True), ("score > 25e-1", False), ("score>-3", True),
        ("lang = 'en'", True), ("lang in ('de', 'en') AND draft = false", True), ("lang < 'fr'", True), ("lang != 'fr'", True), ("note = 'it''s'", True),
        ("draft = true", False), ("draft != true", True), ("draft in (true, false)", True), ("größe = 1", True),
        ("year = '1990'", False), ("year != '1990'", False), ("draft = 0", False), ("year = true", False), ("missing != 1", False), ("none != 1", False),
        ("list = 'en'", False), ("lang in (1, 'en', true)", True),
    ],
)  # fmt: skip
def test_what_a_filter_lets_through(told, holds):
    assert Filter.parse(told).matches(META) is holds


@pytest.mark.parametrize("told", [
    "", "  ", "year", "year >", "> 5", "year 5", "year > 5 or lang = 'en'", "lang in 'en'", "lang in ()", "lang in ('en'", "lang in ('en',)", "a = b",
    "a = 1 and", "a = 1 b = 2", "'a' = 1", 'a = "x"', "a = 'x", "a = 1; drop table", "a.b = 1", "a == 1", "draft > true", "a = 12x", "a in (1 2)", "and = = 1",
])  # fmt: skip
def test_what_is_no_filter_is_one_line_with_an_example(told):
    with pytest.raises(UserError, match="a filter is like: year >= 1990|have no order") as error:
        Filter.parse(told)
    assert "\n" not in str(error.value)


@given(st.text("abc'\\\"% é", max_size=8))
def test_any_text_can_be_written_in_quotes(text):
    told = "x = '" + text.replace("'", "''") + "'"
    assert Filter.parse(told).matches({"x": text}) and not Filter.parse(told).matches({"x": text + "."})


@given(st.one_of(st.integers(-(10**12), 10**12), st.floats(-1e12, 1e12)))
def test_any_number_can_be_written_as_python_does(number):
    assert Filter.parse(f"x = {number!r}").matches({"x": number})


def test_only_texts_numbers_and_truths_can_be_filtered_by():
    assert filterable({**META, "nan": float("nan"), "huge": float("inf"), "whole": 2.0}) == {
        "year": 1990, "lang": "en", "score": 2.5, "draft": False, "note": "it's", "größe": 1, "whole": 2}  # fmt: skip
    assert type(filterable({"whole": 2.0})["whole"]) is int
