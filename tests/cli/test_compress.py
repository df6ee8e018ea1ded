"""`echelon compress` from text to a folder that loads, and its complaints."""

import json

import pytest
import torch
import transformers

import small_folders


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    small_folders.language_model(folder / "lm")
    (folder / "text.txt").write_text(" ".join(small_folders.document(number, 60) for number in range(3)))
    return folder


def compressing(place, out, *more, method="lord", rank=0.3):
    knobs = [f"--method.rank={rank}", "--method.round_rank=1"] if method == "lord" else []
    return ["compress", "--model", place / "lm", "--method", method, *knobs, "--data", place / "text.txt", "--out", out, *more]


def test_it_writes_a_model_its_tokenizer_and_its_report(echelon, place, tmp_path):
    ran = echelon(*compressing(place, tmp_path / "out", "--json", "--eval", place / "text.txt"))
    assert ran.code == 0, ran.err
    told = json.loads(ran.out)
    assert told["method"] == "lord" and told["parameters_after"] < told["parameters_before"]
    assert told["perplexity_before"] > 1 and told["perplexity_after"] != told["perplexity_before"]
    assert told["source"] == str(place / "text.txt") and told["tokens"] > 100
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert sum(p.numel() for p in model.parameters()) == told["parameters_after"]
    written = echelon("generate", "--model", tmp_path / "out", "--method", "greedy", "--max-new-tokens", "3", "Sea waits")
    assert written.code == 0 and written.out.strip()


def test_without_json_it_is_one_line(echelon, place, tmp_path):
    ran = echelon(*compressing(place, tmp_path / "out"))
    assert ran.code == 0 and ran.out.startswith(f"{tmp_path / 'out'}: ") and ran.out.count("\n") == 1


def test_statistics_are_written_once_and_read_again(echelon, place, tmp_path):
    first = echelon(*compressing(place, tmp_path / "a", "--statistics", tmp_path / "s"))
    assert first.code == 0 and (tmp_path / "s").is_file(), first.err
    words = compressing(place, tmp_path / "b", "--statistics", tmp_path / "s")
    del words[words.index("--data") : words.index("--data") + 2]
    assert echelon(*words).code == 0
    one, other = (transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in "ab")
    assert all(torch.equal(value, other[key]) for key, value in one.items())


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (("--out",), "--out is missing"), (("--data",), "--data is missing"), (("--method.rank=0.3", "--method.rank=7.5"), "rank is 7.5"),
        (("--method.round_rank=1", "--method.round_ranks=1"), "did you mean '--method.round_rank'"), (("lord", "lrod"), "did you mean 'lord'"),
    ],
)  # fmt: skip
def test_bad_arguments_are_one_line(echelon, place, tmp_path, change, error):
    words = [str(word) for word in compressing(place, tmp_path / "out")]
    at = words.index(change[0])
    words[at : at + (2 if len(change) == 1 else 1)] = change[1:]
    assert error in echelon(*words).refused()
    assert not (tmp_path / "out").exists()


def test_an_impossible_size_and_a_folder_of_something_else_are_one_line(echelon, place, tmp_path):
    assert "cannot reach" in echelon(*compressing(place, tmp_path / "out", "--parameters", "0.001")).refused()
    assert not (tmp_path / "out").exists()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    assert "exists and is no model" in echelon(*compressing(place, tmp_path / "thesis")).refused()
