"""A method declares itself once; the cards are read without importing it."""

import dataclasses
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from echelon import registry
from echelon.errors import UserError


def test_every_card_leads_to_a_class_that_has_its_knobs():
    for card in registry.cards():
        cls = registry.get(card.name, card.kind)
        assert cls.__name__ == card.attribute
        assert cls.method_name == card.name
        assert {knob.name for knob in card.knobs} == {field.name for field in dataclasses.fields(cls)}
        assert card.summary and card.title and card.doc
        assert 1900 < card.year < 2100
        assert not card.summary.count("\n")


def test_every_knob_is_explained():
    silent = [f"{card.name}.{knob.name}" for card in registry.cards() for knob in card.knobs if not knob.help]
    assert not silent


def test_cards_are_read_without_torch():
    code = "import sys, echelon.registry as r; r.cards(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_wrong_name_gets_the_nearest_one():
    with pytest.raises(UserError, match="did you mean 'nucleus'"):
        registry.card("nuclues", "decoder")
    with pytest.raises(UserError, match="did you mean 'decoder'"):
        registry.cards("decodr")
    with pytest.raises(UserError, match="unknown knob 'beem_size' of rankgen.*did you mean 'beam_size'"):
        registry.build("rankgen", "decoder", {"beem_size": 2})


def test_the_table_in_the_readme_is_not_stale():
    spec = importlib.util.spec_from_file_location("table", Path(__file__).parents[1] / "docs" / "table.py")
    table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(table)
    readme = table.README.read_text()
    assert table.with_table(readme) == readme, "run `python docs/table.py`"
