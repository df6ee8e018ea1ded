"""`echelon train` makes a ranker that `echelon generate` and `echelon evaluate` then use; broken off, it goes on."""

import errno
import json
import os
import signal
import time

import pytest

import small_folders


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    small_folders.encoder(folder / "encoder")
    small_folders.language_model(folder / "lm")
    with open(folder / "data.jsonl", "w") as file:
        for number in range(3):
            file.write(json.dumps({"text": small_folders.document(number, 30)}) + "\n")
    return folder


def training(place, out, *more, steps=3):
    knobs = {"generator": place / "lm", "batch_size": 8, "steps": steps, "suffix_words": "[4,12]", "prefix_words": 20, "prefix_max_length": 40,
             "suffix_max_length": 24, "save_every": 0}  # fmt: skip
    return ["train", "--method", "rankgen", "--model", place / "encoder", "--data", place / "data.jsonl", "--out", out,
            *(f"--method.{name}={value}" for name, value in knobs.items()), *more]  # fmt: skip


@pytest.fixture(scope="module")
def ranker(place):
    from echelon.cli import main

    assert main([str(word) for word in training(place, place / "ranker")]) == 0
    return place / "ranker"


def test_training_prints_its_result_alone_and_json_parses(echelon, place, tmp_path):
    ran = echelon(*training(place, tmp_path / "out"))
    assert ran.code == 0 and ran.err == "" and ran.out.startswith(f"{tmp_path}/out: rows ") and ran.out.count("\n") == 1
    told = json.loads(echelon(*training(place, tmp_path / "out"), "--json").out)
    assert told["out"] == f"{tmp_path}/out" and told["steps"] == 3 and {"loss", "inbook_accuracy", "generated_accuracy", "seconds"} <= set(told)


def test_the_trained_folder_is_a_scorer_for_decoders(echelon, place, ranker):
    words = ["generate", "--model", place / "lm", "--method", "rankgen", "--max_new_tokens", "8", "--json", "Sea waits."]
    ran = echelon(*words, "--method.scorer", ranker)
    assert ran.code == 0
    best = json.loads(ran.out)["results"][0]["candidates"][0]
    from echelon.score import RankGenScorer, ScoreItem

    assert best["score"] == pytest.approx(RankGenScorer(str(ranker)).score([ScoreItem("Sea waits .", best["text"])]).item(), abs=1e-3)
    assert best != json.loads(echelon(*words, "--method.scorer", "unigram_overlap").out)["results"][0]["candidates"][0]


def test_ctrl_c_is_status_130_and_one_line_and_the_same_command_goes_on(echelon, process, place, tmp_path):
    out = tmp_path / "out"
    words = training(place, out, steps=150)
    running = process.start(*words)
    until = time.monotonic() + 90
    while not (out / "checkpoint.safetensors").exists() and running.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    said, err = running.communicate(timeout=60)
    assert (running.returncode, said, err) == (130, "", "echelon: interrupted; what was finished is kept\n")
    done = len((out / "log.jsonl").read_text().splitlines())
    assert 1 <= done < 150 and not (out / "result.json").exists() and not list(out.glob(".*"))
    assert echelon(*words).code == 0
    assert [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()] == list(range(1, 151))
    assert echelon(*training(place, tmp_path / "unbroken", steps=150)).code == 0
    losses = [[json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()] for folder in (out, tmp_path / "unbroken")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_another_run_in_the_same_folder_is_refused_and_a_typing_error_leaves_it_free(echelon, place, tmp_path):
    out = tmp_path / "out"
    assert "cannot read" in echelon(*training(place, out, "--data", place / "dta.jsonl")).refused()
    assert echelon(*training(place, out)).code == 0
    before = (out / "projection.safetensors").read_bytes()
    assert f"{out} holds a run with other knobs or data" in echelon(*training(place, out, steps=4)).refused()
    assert (out / "projection.safetensors").read_bytes() == before


def test_a_full_disk_is_one_line_and_training_goes_on_when_there_is_room(echelon, place, tmp_path, monkeypatch):
    real, calls = os.fsync, []

    def soon_full(handle):
        calls.append(handle)
        if len(calls) > 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(os, "fsync", soon_full)
    ran = echelon(*training(place, tmp_path / "out", steps=8))
    monkeypatch.undo()
    assert "No space left on device" in ran.refused() and (tmp_path / "out" / "checkpoint.safetensors").exists()
    assert echelon(*training(place, tmp_path / "out", steps=8)).code == 0
    assert [json.loads(line)["step"] for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()] == list(range(1, 9))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file or directory"),
        (b"", "holds no documents"),
        (b"\xff\xfe", "not UTF-8 text"),
        (b'{"text": "a"}\n{"txt": 1}\n', "line 2: not a JSON object with a 'text'"),
        (b'{"text": "Only one sentence."}\n', "it needs documents of several sentences"),
    ],
)
def test_documents_that_are_missing_empty_or_broken_are_refused(echelon, place, tmp_path, content, said):
    if content is not None:
        (tmp_path / "d.jsonl").write_bytes(content)
    assert said in echelon(*training(place, tmp_path / "out", "--data", tmp_path / "d.jsonl")).refused()
    assert not (tmp_path / "out" / "result.json").exists()


def test_an_encoder_and_a_generator_that_are_missing_are_named(echelon, place, tmp_path):
    absent = training(place, tmp_path / "a", "--model", "/no/such/encoder", "--method.negatives", "inbook")
    assert "cannot load encoder '/no/such/encoder'" in echelon(*absent).refused()
    assert "cannot load model '/no/such/lm'" in echelon(*training(place, tmp_path / "b", "--method.generator", "/no/such/lm")).refused()
    long = training(place, tmp_path / "c", "--method.negatives", "inbook", "--method.prefix_max_length", "65")
    assert "prefix_max_length is 65; it must be in [4, 64]" in echelon(*long).refused()


def evaluation(place, ranker, *more):
    return ["evaluate", "--data", place / "data.jsonl", "--model", place / "lm", "--rankgen", ranker, "--scorers", "rankgen,unigram_overlap,likelihood",
            "--method.questions", "9", "--method.prefix_words", "20", "--method.suffix_words", "6", "--method.negatives", "3", *more]  # fmt: skip


def test_evaluation_prints_a_table_and_json_with_the_same_numbers(echelon, place, ranker):
    words = evaluation(place, ranker, "--scorers", "rankgen,unigram_overlap", "--method.generator", place / "lm")
    ran = echelon(*words)
    assert ran.code == 0 and ran.err == ""
    head, rule, *rows = ran.out.splitlines()
    assert head == "| scorer | inbook | inbook_all | generated |" and rule == "|---|---|---|---|"
    told = json.loads(echelon(*words, "--json").out)
    assert list(told) == ["rankgen", "unigram_overlap"] and [row.split(" | ")[0] for row in rows] == ["| rankgen", "| unigram_overlap"]
    for row, measured in zip(rows, told.values(), strict=True):
        cells = [f"{100 * m['value']:.1f} ({100 * m['low']:.1f} to {100 * m['high']:.1f})" for m in measured.values()]
        assert row == f"| {' | '.join([row.split(' | ')[0][2:], *cells])} |"


def test_an_empty_generator_leaves_that_column_out(echelon, place, ranker):
    told = json.loads(echelon(*evaluation(place, ranker, "--scorers", "unigram_overlap", "--method.generator", "", "--json")).out)
    assert set(told["unigram_overlap"]) == {"inbook", "inbook_all"}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--scorers", "rankgn"], "unknown scorer 'rankgn' in --scorers; there are rankgen; unigram_overlap"),
        (["--data", "/no/such/file"], "cannot read /no/such/file"),
        (["--data", "{empty}"], "the documents are too short"),
        (["--data", "{folder}"], "holds no documents"),
        (["--model", "/no/such/model"], "cannot load model '/no/such/model'"),
        (["--rankgen", "{folder}", "--method.generator", ""], "there is neither rankgen.json nor config.json"),
    ],
)
def test_what_is_wrong_with_an_evaluation_is_named(echelon, place, ranker, tmp_path, more, said):
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.txt").write_text("")
    words = [word.format(empty=tmp_path / "empty.txt", folder=tmp_path / "folder") for word in more]
    if "--scorers" not in words:
        words += ["--scorers", "rankgen"]
    assert said in echelon(*evaluation(place, ranker, *words)).refused()
