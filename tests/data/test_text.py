"""Words and sentences."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echelon.data.text import STOP_WORDS, content_words, normalise, split_sentences, truncate_to_sentence


def test_normal_form_has_no_case_punctuation_articles_or_extra_space():
    assert normalise("  The Sea, an  \n old-man's  A-frame; theatre! ") == "sea oldmans aframe theatre"
    assert normalise("") == normalise("The. A, an!") == ""


@given(st.text(max_size=60))
@settings(max_examples=100, deadline=None)
def test_normal_form_is_lower_case_single_spaced_and_without_articles(text):
    made = normalise(text)
    assert made == " ".join(made.split()) and not {"a", "an", "the"} & set(made.split()) and not re.search(r"""[!"#$%&'()*+,./:;<=>?@\[\]^_`{|}~-]""", made)


def test_content_words_leave_out_closed_class_words():
    assert content_words("The captain was not at the wheel of his ship, nor were we.") == ["captain", "wheel", "ship"]
    assert not STOP_WORDS & {"captain", "say", "go"}


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("It rained. The road was", "It rained."),
        ("Why? He; she", "Why? He;"),
        ("It rained.", "It rained."),
        ('"Go!" he said', '"Go!'),
        ("no mark at all", "no mark at all"),
        (".only first", ".only first"),
        ("", ""),
        ("3.14 is", "3."),
        ("One.\n\nTwo! and", "One.\n\nTwo!"),
    ],
)
def test_text_is_cut_behind_its_last_mark(text, cut):
    assert truncate_to_sentence(text) == cut


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One came. Two went! Did three? Yes.", ["One came.", "Two went!", "Did three?", "Yes."]),
        ("Mr. Hyde met Dr. Jekyll. They talked.", ["Mr. Hyde met Dr. Jekyll.", "They talked."]),
        ("J. R. Smith came. He left.", ["J. R. Smith came.", "He left."]),
        ('"Stop!" she cried. "Why?" He left.', ['"Stop!" she cried.', '"Why?"', "He left."]),
        ("It cost 3.50 then. 4 came.", ["It cost 3.50 then.", "4 came."]),
        ("He said e.g. this. and went on", ["He said e.g. this. and went on"]),
        ("A title\n\nThe first line\nwraps here. End", ["A title", "The first line\nwraps here.", "End"]),
        ("(He came.) She went.", ["(He came.)", "She went."]),
        ("", []),
        ("  \n\n \n", []),
    ],
)
def test_sentences(text, sentences):
    assert split_sentences(text) == sentences


@given(st.text(alphabet="AbC .!?\"\n", max_size=80))
@settings(max_examples=300, deadline=None)
def test_sentences_hold_all_of_the_text_in_order(text):
    assert "".join("".join(split_sentences(text)).split()) == "".join(text.split())
    assert all(sentence and sentence == sentence.strip() for sentence in split_sentences(text))
