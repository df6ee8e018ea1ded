"""The shipped prose is what it says: enough of it, of the right length, in several genres, split without overlap."""

from collections import Counter

import pytest

from echelon.data.passages import passages
from echelon.errors import UserError


def test_there_are_at_least_200_passages_of_120_to_200_words_in_several_genres():
    found = passages()
    assert len(found) >= 200
    assert all(120 <= len(p.text.split()) <= 200 for p in found)
    assert len({p.genre for p in found}) >= 6
    assert min(Counter(p.genre for p in found).values()) >= 10


def test_ids_and_texts_are_unique_and_no_long_phrase_is_shared():
    found = passages()
    assert len({p.id for p in found}) == len({p.text for p in found}) == len(found)
    owners: dict[tuple[str, ...], set[str]] = {}
    for p in found:
        words = p.text.lower().split()
        for i in range(len(words) - 9):
            owners.setdefault(tuple(words[i : i + 10]), set()).add(p.id)
    assert not [gram for gram, ids in owners.items() if len(ids) > 1]


def test_the_halves_cover_everything_once_and_each_is_large_enough_for_mauve():
    calibration, test = passages("calibration"), passages("test")
    assert not {p.id for p in calibration} & {p.id for p in test}
    assert len(calibration) + len(test) == len(passages())
    assert min(len(calibration), len(test)) >= 90


def test_another_split_is_refused():
    with pytest.raises(UserError, match="'train'.*calibration and test"):
        passages("train")
