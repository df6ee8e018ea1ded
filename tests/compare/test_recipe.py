"""A recipe is checked whole before anything runs, and every complaint names the thing, its value and what is allowed."""

import pytest

from echelon.compare import load_recipe
from echelon.errors import UserError

GOOD = {"task": "generate", "methods": ["nucleus", {"name": "rankgen", "knobs": {"beam_size": 3}, "label": "wide"}], "metrics": ["overlap"]}


def test_a_recipe_from_a_mapping_a_file_and_by_name(tmp_path, monkeypatch):
    made = load_recipe(GOOD)
    assert [(m.name, m.label, m.knobs) for m in made.methods] == [("nucleus", "nucleus", {}), ("rankgen", "wide", {"beam_size": 3})]
    (tmp_path / "r.yaml").write_text("task: generate\nmethods: [nucleus]\nmetrics: [overlap]\ndata: {test: '${PLACE}/t.jsonl'}\n")
    (tmp_path / "t.jsonl").write_text("")
    monkeypatch.setenv("PLACE", str(tmp_path))
    assert load_recipe(tmp_path / "r.yaml").data == {"test": f"{tmp_path}/t.jsonl"}
    assert len(load_recipe("quick").methods) >= 8


def test_recipes_that_differ_have_other_digests():
    assert load_recipe(GOOD).digest() == load_recipe(dict(GOOD)).digest() != load_recipe({**GOOD, "seeds": [1]}).digest()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"taks": 1}, "unknown key 'taks'.*did you mean 'task'"),
        ({"task": "generat"}, "unknown task 'generat'.*did you mean 'generate'"),
        ({"methods": ["nuclues"]}, "unknown decoder 'nuclues'.*did you mean 'nucleus'"),
        ({"methods": [{"name": "rankgen", "knobs": {"beamsize": 1}}]}, "unknown knob 'beamsize' of rankgen.*did you mean 'beam_size'"),
        ({"methods": [{"name": "nucleus", "knobs": {"top_p": 2}}]}, r"top_p is 2; it must be in \(0, 1\]"),
        ({"methods": [{"name": "nucleus", "knob": {}}]}, "unknown key 'knob'.*did you mean 'knobs'"),
        ({"methods": [{"knobs": {}}]}, "method 1 is .* must be a name"),
        ({"methods": []}, "methods is empty"),
        ({"methods": ["greedy", "greedy"]}, "two methods are called 'greedy'"),
        ({"baseline": "nucleos"}, "baseline is 'nucleos'.*did you mean 'nucleus'"),
        ({"seeds": []}, "seeds is"),
        ({"seeds": [1, 1]}, "seeds is"),
        ({"seeds": "0"}, "seeds is '0'; it must be a list"),
        ({"isolation": "docker"}, "isolation is 'docker'; it must be process, worker or none"),
        ({"timeout": 0}, "timeout must be above 0"),
        ({"metrics": ["mauv"]}, "unknown metric 'mauv'.*did you mean 'mauve'"),
        ({"metrics": ["mauve"], "data": {"prompts": 20}}, "data.prompts is 20; the metric mauve needs at least 100"),
        ({"metrics": []}, "metrics is empty"),
        ({"data": {"promts": 3}}, "unknown key 'promts' under data.*did you mean 'prompts'"),
        ({"data": {"prompts": 0}}, "data.prompts is 0"),
        ({"data": {"test": "absent.jsonl"}}, "no file absent.jsonl"),
        ({"budget": {"max_new_tokens": -5}}, "budget.max_new_tokens is -5"),
        ({"data": {"test": "${NOT_SET_ANYWHERE}/x"}}, r"uses \$\{NOT_SET_ANYWHERE\}, which is not set"),
    ],
)
def test_what_is_wrong_is_named(change, said):
    with pytest.raises(ValueError, match=said):
        load_recipe({**GOOD, **change})


@pytest.mark.parametrize(
    ("content", "said"),
    [("", "is empty"), ("task: [generate", r"is not YAML \(line"), ("- a\n- b", "is a list; a recipe is a mapping"), ("task: generate", "lacks methods")],
)
def test_broken_files_are_refused_in_one_line(tmp_path, content, said):
    (tmp_path / "r.yaml").write_text(content)
    with pytest.raises(UserError, match=said) as caught:
        load_recipe(tmp_path / "r.yaml")
    assert "\n" not in str(caught.value)


def test_a_missing_or_binary_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="no recipe 'quik'.*did you mean 'quick'"):
        load_recipe("quik")
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        load_recipe(tmp_path / "r.yaml")
