"""The tree of token sequences: every sequence is in it, and what is shared stands once."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echelon.llm import prefixes
from echelon.llm.prefixes import prefix_tree, single_nodes


def paths(nodes, before=()):
    """What every node stands for, and the sequences that end there."""
    for node in nodes:
        ids = (*before, *node.ids)
        assert node.ids and node.start == len(before) and node.end == len(ids)
        yield ids, node
        yield from paths(node.children, ids)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), max_size=30), st.sampled_from([1, 3, 32]), st.sampled_from([0, 1, 8]))
def test_every_sequence_is_a_way_from_a_root(sequences, worth, levels):
    given_worth, given_levels = prefixes._WORTH, prefixes._LEVELS
    prefixes._WORTH, prefixes._LEVELS = worth, levels
    try:
        made = list(paths(prefix_tree(sequences)))
    finally:
        prefixes._WORTH, prefixes._LEVELS = given_worth, given_levels
    ends = {}
    for ids, node in made:
        for number in node.members:
            assert tuple(sequences[number][: node.end]) == ids
            if len(sequences[number]) == node.end:
                ends.setdefault(number, []).append(ids)
    assert sorted(ends) == list(range(len(sequences))) and all(len(found) == 1 for found in ends.values())
    assert sum(len(node.ids) for _, node in made) <= sum(len(ids) for ids in {tuple(ids) for ids in sequences})
    inner = [(ids, node) for ids, node in made if node.children]
    assert all((len(node.members) - 1) * len(node.ids) >= worth for _, node in inner)


def test_everything_shared_stands_once_where_it_is_worth_it():
    sequences = [[7] * 40 + [a] * 40 + [b] for a in (1, 2) for b in (3, 4, 5)]
    (root,) = prefix_tree(sequences)
    assert root.ids == [7] * 40 and [len(node.ids) for node in root.children] == [40, 40]
    assert [[leaf.ids for leaf in node.children] for node in root.children] == [[[3], [4], [5]]] * 2
    assert all(not node.children for node in prefix_tree([[7] * 5 + [b] for b in (1, 2, 3)]))  # 10 tokens would be saved


def test_a_beginning_is_not_shared_where_masked_attention_behind_it_costs_more():
    sequences = [[7] * 40 + [a] * 1000 for a in range(8, 12)]  # saves 3 * 40 tokens; 4 * 1000^2 / (12 * 4096) are 81, at width 512 they are 651
    assert [len(node.children) for node in prefix_tree(sequences, 4096)] == [4]
    assert [(len(node.ids), node.children) for node in prefix_tree(sequences, 512)] == [(1040, [])] * 4
    choices = [[*ids, end] for ids in sequences for end in (1, 2)]
    assert [(len(node.ids), len(node.children)) for node in prefix_tree(choices, 512)] == [(1040, 2)] * 4


def test_sequences_within_sequences_do_not_go_deeper_than_is_kept():
    def depth(nodes):
        return 1 + max(depth(node.children) for node in nodes) if nodes else 0

    nested = [list(range(length)) for length in range(1, 2000)]
    tree = prefix_tree(nested)
    assert depth(tree) <= prefixes._LEVELS + 1
    assert sorted(number for ids, node in paths(tree) for number in node.members if len(nested[number]) == len(ids)) == list(range(1999))


def test_equal_sequences_are_read_once_unless_their_sources_differ():
    nodes = single_nodes([[1, 2], [1, 2], [1, 2, 3]], [(5,), (6,), (5,)])
    assert [(node.ids, node.source, node.members) for node in nodes] == [([1, 2], (5,), [0]), ([1, 2], (6,), [1]), ([1, 2, 3], (5,), [2])]
    assert [node.members for node in single_nodes([[1], [2], [1]])] == [[0, 2], [1]]
    assert prefix_tree([]) == [] and [node.members for node in prefix_tree([[1], [2], [1]])] == [[0, 2], [1]]


@pytest.mark.parametrize("a", ["", "abc", "abd"])
def test_common_length(a):
    assert prefixes.common_length(a, "abc") == {"": 0, "abc": 3, "abd": 2}[a]
