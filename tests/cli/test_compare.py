"""`echelon compare`: recipes that are wrong, results that stay, and the same command going on where it stopped."""

import errno
import json
import os

import pytest

import small_folders
from echelon.generate import Ancestral


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    small_folders.language_model(folder / "lm")
    with open(folder / "texts.jsonl", "w") as file:
        for number in range(4):
            file.write(json.dumps({"text": small_folders.document(number, 40)}) + "\n")
    (folder / "r.yaml").write_text(
        f"task: generate\nmodel: {folder}/lm\nmethods: [greedy, ancestral]\nmetrics: [overlap]\ntiming_rounds: 0\n"
        f"data: {{test: {folder}/texts.jsonl, prompts: 4, prompt_words: 25}}\nbudget: {{max_new_tokens: 6}}\n"
    )
    return folder / "r.yaml"


def kept(out):
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_a_bake_off_prints_its_table_and_advice_and_writes_its_files(echelon, recipe, tmp_path):
    ran = echelon("compare", recipe, "--out", tmp_path, "--in-process")
    assert ran.code == 0 and "greedy" in ran.out and "ancestral" in ran.out
    assert ran.err.splitlines()[-1] == f"report: {tmp_path}/report.html"
    assert {"results.jsonl", "recipe.json", "table.md", "report.html", "runs"} <= set(os.listdir(tmp_path))
    assert {result["run"]["label"]: result["run"]["status"] for result in kept(tmp_path)} == {"greedy": "finished", "ancestral": "finished"}
    again = echelon("compare", recipe, "--out", tmp_path, "--in-process", "--json")
    assert [json.loads(line) for line in again.out.splitlines()] == kept(tmp_path)
    unchanged = echelon("compare", recipe, "--out", tmp_path, "--in-process", "--against", tmp_path)
    assert unchanged.out.endswith(f"nothing changed since {tmp_path}\n")


def test_a_dry_run_lists_and_does_nothing(echelon, recipe, tmp_path):
    ran = echelon("compare", recipe, "--out", tmp_path / "out", "--dry-run")
    assert ran.code == 0 and not (tmp_path / "out").exists()
    assert sorted(line.split()[-1] for line in ran.out.splitlines()) == ["ancestral", "greedy"] and ran.out.count("to do") == 2


def test_the_method_that_is_picked_comes_as_a_command(echelon, recipe, tmp_path):
    ran = echelon("compare", recipe, "--out", tmp_path, "--in-process", "--pick", "overlap")
    assert ran.code == 0 and ran.out.startswith("echelon generate ") and ran.out.count("\n") == 1
    assert "oberlap" in echelon("compare", recipe, "--out", tmp_path, "--in-process", "--pick", "oberlap").refused()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty; a recipe has at least task and methods"),
        (b"task: [generate", "is not YAML (line 1"),
        (b"a: b: c", "is not YAML (line 1"),
        (b"- a\n- b\n", "is a list; a recipe is a mapping"),
        (b"\xff\xfe\x00", "not UTF-8 text"),
        (b"task: generate\n", "lacks methods"),
        (b"task: generate\nmethods: [nuclues]\nmetrics: [overlap]\n", "unknown decoder 'nuclues' (did you mean 'nucleus'?)"),
        (b"task: generate\nmethods: [{name: nucleus, knobs: {top_q: 1}}]\nmetrics: [overlap]\n", "unknown knob 'top_q' of nucleus (did you mean 'top_p'?)"),
        (b"task: generate\nmethods: [{name: nucleus, knobs: {top_p: 3}}]\nmetrics: [overlap]\n", "top_p is 3; it must be in (0, 1]"),
        (b"task: generate\nmethds: [nucleus]\n", "unknown key 'methds' (did you mean 'methods'?)"),
    ],
)
def test_a_recipe_that_is_wrong_is_one_line_and_nothing_is_begun(echelon, tmp_path, content, said):
    (tmp_path / "r.yaml").write_bytes(content)
    assert said in echelon("compare", tmp_path / "r.yaml", "--out", tmp_path / "out").refused()
    assert not (tmp_path / "out").exists()


def test_a_recipe_that_is_not_there_is_named(echelon, tmp_path):
    assert "no recipe 'quik' (did you mean 'quick'?)" in echelon("compare", "quik").refused()
    assert "Is a directory" in echelon("compare", tmp_path).refused()


def test_a_folder_that_cannot_be_written_is_one_line(echelon, recipe, tmp_path):
    (tmp_path / "file").write_text("kept")
    assert "cannot write to" in echelon("compare", recipe, "--out", tmp_path / "file" / "out", "--in-process").refused()
    assert (tmp_path / "file").read_text() == "kept"


def test_a_full_disk_is_one_line_and_earlier_results_stay(echelon, recipe, tmp_path, monkeypatch):
    assert echelon("compare", recipe, "--out", tmp_path, "--in-process").code == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    ran = echelon("compare", recipe, "--out", tmp_path, "--in-process")
    monkeypatch.undo()
    assert "No space left on device" in ran.refused()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_ctrl_c_keeps_what_is_finished_and_the_same_command_goes_on(echelon, recipe, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    order = [line.split()[-1] for line in echelon("compare", recipe, "--out", tmp_path, "--dry-run").out.splitlines()]
    monkeypatch.setattr(Ancestral, "decode", interrupt)
    ran = echelon("compare", recipe, "--out", tmp_path, "--in-process")
    assert ran.code == 130 and ran.out == "" and ran.err == f"echelon: stopped; finished runs are in {tmp_path}, and the same command goes on from there\n"
    monkeypatch.undo()
    finished = {result["run"]["label"] for result in kept(tmp_path)} if (tmp_path / "results.jsonl").exists() else set()
    assert finished == set(order[: order.index("ancestral")])
    assert echelon("compare", recipe, "--out", tmp_path, "--in-process").code == 0
    assert {result["run"]["label"] for result in kept(tmp_path)} == {"greedy", "ancestral"}
