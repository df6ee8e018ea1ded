"""`echelon generate`: prompts from the command line and from files, what is printed where, and files that cannot be read or written."""

import errno
import json
import os

import pytest

import small_folders
from echelon.generate import Nucleus
from echelon.models import load
from echelon.registry import cards
from echelon.score import Scorer

PROMPT = "The old man looked at the sea and"


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return small_folders.language_model(tmp_path_factory.mktemp("lm"))


def test_the_embedded_model_continues_a_prompt_with_rankgen(process):
    ran = process("generate", "--model", "embedded", "--method", "rankgen", PROMPT)
    assert ran.code == 0 and ran.err == "" and ran.out.endswith("\n")
    text = ran.out.removeprefix(PROMPT)
    assert text != ran.out and 40 < len(text.split()) < 120 and text.startswith(" ")


def test_a_text_equals_what_python_gives(echelon, lm):
    expected = Nucleus(top_p=0.5).generate(load(lm), ["Sea waits"], max_new_tokens=9, seed=4).texts[0]
    ran = echelon("generate", "--model", lm, "--method", "nucleus", "--method.top_p", "0.5", "--max-new-tokens", "9", "--seed", "4", "Sea", "waits")
    assert ran == (0, f"Sea waits{expected}\n", "")


def test_nucleus_with_64_tokens_is_the_default(echelon, lm):
    told = json.loads(echelon("generate", "--model", lm, "--json", "Sea waits").out)
    expected = Nucleus().generate(load(lm), ["Sea waits"], max_new_tokens=64)
    assert told["method"] == "nucleus" and told["results"][0]["text"] == expected.texts[0]


@pytest.mark.parametrize("method", [card.name for card in cards("decoder") if card.name != "contrastive_decoding"])
def test_every_decoder_writes_json_with_candidates_and_costs(echelon, lm, method):
    scorer = ["--method.scorer", "unigram_overlap"] if method.startswith("rankgen") else []
    ran = echelon("generate", "--model", lm, "--method", method, *scorer, "--max_new_tokens", "5", "--json", "Sea waits")
    told = json.loads(ran.out)
    assert ran.code == 0 and told["method"] == method
    [result] = told["results"]
    assert result["prompt"] == "Sea waits" and result["candidates"][0]["text"] == result["text"]
    assert 1 <= len(result["candidates"][0]["token_ids"]) <= 5
    assert told["stats"]["forward_tokens"] > 0 and (told["stats"]["scorer_calls"] > 0) == bool(scorer)


def test_prompts_come_one_a_line_and_blank_lines_are_none(echelon, lm, tmp_path):
    (tmp_path / "prompts.txt").write_text("Sea waits\n\n   \nLamp burns\n")
    told = json.loads(echelon("generate", "--model", lm, "--prompts", tmp_path / "prompts.txt", "--max_new_tokens", "4", "--json").out)
    assert [result["prompt"] for result in told["results"]] == ["Sea waits", "Lamp burns"]
    plain = echelon("generate", "--model", lm, "--prompts", tmp_path / "prompts.txt", "--max_new_tokens", "4").out
    assert plain == "\n\n".join(result["prompt"] + result["text"] for result in told["results"]) + "\n"


def test_streamed_text_is_the_same_text(echelon, lm):
    words = ["generate", "--model", lm, "--method", "rankgen", "--method.scorer", "unigram_overlap", "--method.segment_tokens", "3",
             "--max_new_tokens", "9", "Sea waits"]  # fmt: skip
    assert echelon(*words, "--stream").out == echelon(*words).out
    assert "--stream takes one prompt" in echelon(*words, "--stream", "--json").refused()


def test_a_prompt_that_looks_like_an_option_stands_behind_two_hyphens(echelon, lm):
    assert echelon("generate", "--model", lm, "--max_new_tokens", "2", "--", "--Sea").out.startswith("--Sea")


def test_a_prompt_longer_than_the_context_loses_its_beginning_and_says_so(echelon, lm, recwarn):
    long = " ".join(small_folders.NOUNS * 9)
    ran = echelon("generate", "--model", lm, "--method", "greedy", "--max_new_tokens", "6", "--json", long)
    assert ran.code == 0 and "prompts longer than 90 tokens lose their beginning" in [str(w.message) for w in recwarn]
    end = " ".join(long.split()[-90:])
    kept = echelon("generate", "--model", lm, "--method", "greedy", "--max_new_tokens", "6", "--json", end)
    assert json.loads(ran.out)["results"][0]["candidates"] == json.loads(kept.out)["results"][0]["candidates"]


def test_the_warning_of_a_long_prompt_is_one_line_on_stderr(process, lm, tmp_path):
    (tmp_path / "prompts.txt").write_text(" ".join(small_folders.NOUNS * 9))
    ran = process("generate", "--model", lm, "--max_new_tokens", "6", "--prompts", tmp_path / "prompts.txt")
    assert ran.code == 0 and ran.err == "echelon: prompts longer than 90 tokens lose their beginning\n"


def test_more_new_tokens_than_the_context_holds_are_refused(echelon, lm):
    assert "max_new_tokens is 96; the model's context holds 96 tokens" in echelon("generate", "--model", lm, "--max_new_tokens", "96", "x").refused()
    for few in ("0", "-3"):
        assert f"max_new_tokens is {few}; it must be at least 1" in echelon("generate", "--model", lm, "--max_new_tokens", few, "x").refused()


@pytest.mark.parametrize("method", ["greedy", "nucleus", "beam", "rankgen"])
def test_a_tokenizer_without_pad_and_end_tokens_will_do(echelon, tmp_path, method):
    bare = small_folders.language_model(tmp_path / "bare", bare=True)
    (tmp_path / "prompts.txt").write_text("Sea waits\nLamp burns and then Gull calls\n")
    scorer = ["--method.scorer", "unigram_overlap"] if method == "rankgen" else []
    ran = echelon("generate", "--model", bare, "--method", method, *scorer, "--prompts", tmp_path / "prompts.txt", "--max_new_tokens", "7", "--json")
    assert ran.code == 0
    assert [len(result["candidates"][0]["token_ids"]) for result in json.loads(ran.out)["results"]] == [7, 7]


def test_a_scorer_that_gives_no_number_is_named(echelon, lm, monkeypatch):
    import torch

    from echelon.score import UnigramOverlap

    assert issubclass(UnigramOverlap, Scorer)
    monkeypatch.setattr(UnigramOverlap, "score", lambda self, items: torch.full((len(items),), float("nan")))
    ran = echelon("generate", "--model", lm, "--method", "rankgen", "--method.scorer", "unigram_overlap", "--max_new_tokens", "5", "Sea")
    assert "UnigramOverlap gave nan for" in ran.refused()


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "No such file or directory"), (b"", "no prompt: give one"), (b"\n \n", "no prompt: give one"), (b"\xff\xfe", "not UTF-8 text (byte 0)")],
)
def test_a_file_of_prompts_that_is_missing_empty_or_no_text_is_refused(echelon, tmp_path, content, said):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    assert said in echelon("generate", "--prompts", path).refused()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "no prompt: give one after the options, or a file with one a line by --prompts"),
        ([""], "no prompt"),
        (["--prompts", "/", "x"], "give a prompt or --prompts, not both"),
        (["--prompts", "/"], "cannot read /: Is a directory"),
        (["--model", "/no/such/model", "x"], "cannot load model '/no/such/model'"),
        (["--method", "rankgen", "--method.scorer", "unigram_overlp", "x"], "unknown scorer 'unigram_overlp' (did you mean 'unigram_overlap'?)"),
        (["--method", "rankgen", "--method.scorer", "{empty}", "x"], "there is neither rankgen.json nor config.json"),
        (["--model", "{empty}", "x"], "the folder has no config.json"),
    ],
)
def test_what_is_missing_is_named(echelon, lm, tmp_path, words, said):
    model = [] if "--model" in words else ["--model", lm]
    assert said in echelon("generate", *model, "--max_new_tokens", "5", *(word.format(empty=tmp_path) for word in words)).refused()


def test_a_file_in_place_of_stdout(echelon, lm, tmp_path):
    words = ["generate", "--model", lm, "--max_new_tokens", "4", "Sea waits"]
    ran = echelon(*words, "--out", tmp_path / "new" / "text.txt")
    assert ran == (0, "", "") and (tmp_path / "new" / "text.txt").read_text() == echelon(*words).out


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_or_read_only_disk_is_one_line_and_the_earlier_file_stays(echelon, lm, tmp_path, monkeypatch, error, call):
    path = tmp_path / "text.txt"
    path.write_text("earlier")

    def fail(*_):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, call, fail)
    ran = echelon("generate", "--model", lm, "--max_new_tokens", "4", "--out", path, "Sea waits")
    monkeypatch.undo()
    assert f"cannot write {path}: {os.strerror(error)}" in ran.refused()
    assert path.read_text() == "earlier" and os.listdir(tmp_path) == ["text.txt"]


def test_ctrl_c_leaves_no_half_of_a_file(echelon, lm, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Nucleus, "decode", interrupt)
    ran = echelon("generate", "--model", lm, "--out", tmp_path / "text.txt", "Sea waits")
    assert ran == (130, "", "echelon: interrupted; what was finished is kept\n") and not os.listdir(tmp_path)
