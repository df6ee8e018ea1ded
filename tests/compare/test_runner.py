"""Nothing is lost and nothing is run twice, whatever happens to a run or to the runner."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from echelon.compare import compare, load_recipe, read_results
from echelon.compare.results import per_unit, samples
from echelon.compare.runner import ratios
from echelon.errors import UserError

TESTS = Path(__file__).parents[1]


def recipe(*methods, **changes):
    entries = [m if isinstance(m, dict) else {"name": m} for m in methods]
    return load_recipe({"task": "fake_task:FakeTask", "methods": entries, "isolation": "none", "timing_rounds": 0, **changes})


def lines(path):
    return Counter(path.read_text().splitlines()) if path.exists() else Counter()


def stable(out):
    """What must not depend on interruptions: everything but times and memory."""
    kept = []
    for result in read_results(out):
        kept.append({k: v for k, v in result.items() if k not in ("cost", "identity")})
    arrays = {r["run"]["key"]: per_unit(out, r, "score").tolist() for r in read_results(out)}
    return kept, arrays, [samples(out, r) for r in read_results(out)]


def test_results_have_their_parts(tmp_path):
    [result] = compare(recipe("plain"), tmp_path)
    assert set(result) == {"schema", "run", "quality", "cost", "budget", "curves", "identity"}
    assert result["run"]["status"] == "finished"
    assert result["quality"]["score"]["n"] == 40 and result["quality"]["loss"]["per_unit"] is None
    assert result["identity"]["packages"]["torch"]
    assert per_unit(tmp_path, result, "score").shape == (40,) and per_unit(tmp_path, result, "loss") is None


def test_asking_again_runs_nothing_and_editing_a_knob_runs_that_method_alone(tmp_path):
    log = tmp_path / "log"
    data = {"log": str(log)}
    first = compare(recipe("aa", "bbb", seeds=[0, 1], data=data), tmp_path / "out")
    assert sum(lines(log).values()) == 4
    again = compare(recipe("aa", "bbb", seeds=[0, 1], data=data), tmp_path / "out")
    assert sum(lines(log).values()) == 4
    assert {tuple(result["quality"]) for result in [*first, *again]} == {("score", "loss")}  # the first one is what the recommendation is about
    compare(recipe("aa", {"name": "bbb", "knobs": {"mean": 1}}, seeds=[0, 1], data=data), tmp_path / "out")
    assert lines(log) == {"aa 0": 1, "aa 1": 1, "bbb 0": 2, "bbb 1": 2}
    renamed = compare(recipe("aa", {"name": "bbb", "knobs": {"mean": 1}, "label": "other"}, seeds=[0, 1], data=data), tmp_path / "out")
    assert sum(lines(log).values()) == 6 and "other" in {r["run"]["label"] for r in renamed}


@pytest.mark.parametrize("isolation", ["worker", "process"])
def test_a_run_that_raises_dies_hangs_or_gives_nan_is_a_row_and_the_others_finish(tmp_path, isolation):
    methods = ["raises", "dies", "exits", "hangs", "nan", "fine"] if isolation == "worker" else ["dies", "fine"]
    made = compare(recipe(*methods, isolation=isolation, timeout=9), tmp_path)
    errors = {r["run"]["label"]: r["run"]["error"] for r in made}
    expected = {
        "raises": "RuntimeError: no such thing as a second line", "dies": "killed (SIGKILL", "exits": "its process ended with status 3",
        "hangs": "no answer within the timeout of 9 s", "nan": "score is not finite for unit 7", "fine": None,
    }  # fmt: skip
    for label in methods:
        assert errors[label] == expected[label] if expected[label] is None else expected[label] in errors[label]
    assert [r["run"]["error"] for r in read_results(tmp_path)] == [r["run"]["error"] for r in made]
    fine = next(r for r in made if r["run"]["label"] == "fine")
    assert fine["cost"]["peak_rss_bytes"] > 10e6


def test_a_failed_run_is_tried_again(tmp_path):
    data = {"flag": str(tmp_path / "flag")}
    assert compare(recipe("fails_once", data=data), tmp_path / "out")[0]["run"]["error"] == "not today"
    assert compare(recipe("fails_once", data=data), tmp_path / "out")[0]["run"]["status"] == "finished"


def start(folder, out):
    code = (
        "import json, sys; from echelon.compare import compare, load_recipe; compare(load_recipe(json.loads(sys.argv[1])), sys.argv[2])"
    )
    told = {"task": "fake_task:FakeTask", "methods": ["aa", "bbb", "cccc"], "seeds": [0, 1, 2], "isolation": "none", "timing_rounds": 0,
            "data": {"seconds": 0.15}}  # fmt: skip
    path = os.pathsep.join([str(TESTS), str(TESTS.parent / "src")])
    return told, subprocess.Popen(
        [sys.executable, "-c", code, json.dumps(told), str(out)], env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.PIPE, text=True
    )


def test_killed_at_random_moments_and_started_again_it_equals_an_unbroken_run(tmp_path):
    moments = random.Random(5)
    kills = 0
    while True:
        told, process = start(tmp_path, tmp_path / "broken")
        deadline = time.monotonic() + 60
        while process.poll() is None and not (tmp_path / "broken" / "recipe.json").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(moments.uniform(0.1, 0.7))
        if kills < 3 and process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
            continue
        _, complaint = process.communicate()
        assert process.returncode == 0, complaint
        break
    assert kills == 3
    compare(load_recipe(told), tmp_path / "unbroken")
    assert stable(tmp_path / "broken") == stable(tmp_path / "unbroken")


def test_a_second_process_on_the_same_folder_is_refused(tmp_path):
    _, process = start(tmp_path, tmp_path / "out")
    try:
        while not (tmp_path / "out" / "recipe.json").exists():
            assert process.poll() is None
            time.sleep(0.01)
        with pytest.raises(UserError, match="another comparison is writing to"):
            compare(recipe("aa"), tmp_path / "out")
    finally:
        process.kill()
        process.communicate()


def test_timing_goes_round_all_methods_and_a_drift_of_the_machine_cancels(tmp_path):
    compare(recipe("aa", {"name": "bbb", "knobs": {"mean": 1.0}}, timing_rounds=3, baseline="aa"), tmp_path)
    told = json.loads((tmp_path / "timing.json").read_text())
    assert {label: len(times) for label, times in told["rounds"].items()} == {"aa": 3, "bbb": 3}
    assert told["ratios"] == {"aa": 1.0, "bbb": pytest.approx(2.0)}
    # a machine that becomes 0.4 % slower with every measurement, methods measured in turn
    clock = [1.004**i for i in range(15)]
    measured = {name: [cost * clock[3 * r + k] for r in range(5)] for k, (name, cost) in enumerate({"a": 1, "b": 2, "c": 3}.items())}
    found = ratios(measured, "a")
    assert found["b"] == pytest.approx(2, rel=0.05) and found["c"] == pytest.approx(3, rel=0.05)
    assert ratios({"a": [0.0], "b": [2.0]}, "a") == {} and ratios({"a": [0.0], "b": [2.0]}, "b") == {"a": 0.0, "b": 1.0}


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"):
        compare(recipe("aa"), tmp_path / "file" / "out")


def test_a_full_disk_leaves_earlier_results_intact(tmp_path, monkeypatch):
    compare(recipe("aa"), tmp_path)
    before = (tmp_path / "results.jsonl").read_text()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        compare(recipe("aa", "bbb"), tmp_path)
    monkeypatch.undo()
    assert (tmp_path / "results.jsonl").read_text() == before
    assert len(compare(recipe("aa", "bbb"), tmp_path)) == 2
