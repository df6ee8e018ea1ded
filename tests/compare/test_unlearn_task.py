"""The bake-off of unlearning: models that memorised questions are made once, edits start from the same one, and quality stands beside what is left."""

import json
import math

import pytest
import torch
from scipy.stats import ks_2samp

import small_folders
from echelon.compare import compare, load_recipe
from echelon.compare.memorised import Memorising, memorised, small_tofu
from echelon.compare.statistics import summary_of
from echelon.compare.tasks.unlearn import Task
from echelon.data.question_answers import read_question_answers
from echelon.edit.rows import unlearning_rows
from echelon.errors import UserError
from echelon.evaluate.tofu import TOFU, model_utility
from echelon.models import load

NOUNS, VERBS = small_folders.NOUNS, small_folders.VERBS
COUNTS = {"01": 3, "05": 10, "10": 20}


def question(number):
    noun, verb, other = NOUNS[number % 16], VERBS[number // 16 % 8], NOUNS[(3 * number + number // 128) % 16]
    wrong = [f"{NOUNS[(number + shift) % 16]} {VERBS[(number + shift) % 8]} slowly." for shift in (1, 2, 3)]
    right = f"{other} {VERBS[number % 8]}"
    return {"question": f"{noun} {verb} and {other}", "answer": f"{right} slowly.", "paraphrased_answer": f"slowly {right}.", "perturbed_answer": wrong}


@pytest.fixture(scope="module")
def tofu(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tofu")

    def write(name, rows):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    rows = [question(number) for number in range(200)]
    write("retain90", rows[:180])
    write("retain_perturbed", rows[10:40])
    for name, count in COUNTS.items():
        write(f"forget{name}_perturbed", rows[200 - count :])
    write("real_authors_perturbed", [question(number) for number in range(300, 304)])
    write("world_facts_perturbed", [question(number) for number in range(310, 314)])
    return folder


def told(tofu, tmp, methods, **changes):
    model = tmp / "lm"
    if not model.is_dir():
        small_folders.language_model(model, width=32)
    budget = {"forget": [5, 10], "r": 2, "epochs": 3, "batch_size": 2, "memorise_epochs": 6, "memorise_lr": 2e-2, "memorise_batch_size": 10}
    return {
        "task": "unlearn", "model": str(model), "isolation": "none", "timing_rounds": 0, "methods": methods,
        "data": {"tofu": str(tofu), "questions": 100, "asked": 6, "max_new_tokens": 5} | changes.pop("data", {}), "budget": budget | changes.pop("budget", {}),
        **changes,
    }  # fmt: skip


METHODS = [
    "untouched", {"name": "loku", "knobs": {"learning_rate": 0.02, "init_lora_weights": "default"}},
    {"name": "loku", "label": "ascent", "knobs": {"forget_loss": "ga", "learning_rate": 0.05, "init_lora_weights": "default"}},
]  # fmt: skip


@pytest.fixture(scope="module")
def done(tofu, tmp_path_factory):
    tmp = tmp_path_factory.mktemp("unlearn")
    recipe = load_recipe(told(tofu, tmp, METHODS))
    results = compare(recipe, tmp / "out")
    return tmp, {r["run"]["label"]: r for r in results}, summary_of(tmp / "out", recipe, results)


def test_a_part_keeps_the_proportions_and_the_nesting(tofu, tmp_path):
    small_tofu(tofu, 100, tmp_path)
    parts = {path.stem: [row.question for row in read_question_answers(path)] for path in tmp_path.glob("*.jsonl")}
    forget = [set(parts[f"forget{name}_perturbed"]) for name in COUNTS]
    assert [len(part) for part in forget] == [1, 5, 10] and forget[0] < forget[1] < forget[2]
    for name in COUNTS:
        assert set(parts[f"forget{name}_perturbed"]) <= {row.question for row in read_question_answers(tofu / f"forget{name}_perturbed.jsonl")}
    assert len(parts["full"]) == len(set(parts["full"])) == 100 and forget[2] <= set(parts["full"])
    assert set(parts["retain_perturbed"]) == {question(number)["question"] for number in range(10, 40)} <= set(parts["full"])
    assert not forget[2] & set(parts["retain_perturbed"]) and len(parts["real_authors_perturbed"]) == 4
    with pytest.raises(UserError, match="200 questions of the 300"):
        small_tofu(tofu, 300, tmp_path / "more")


def test_models_have_and_have_not_seen_what_is_forgotten_and_are_made_once(tofu, done):
    tmp, _, _ = done
    how = Memorising(str(tmp / "lm"), str(tofu), 100, 6, 2e-2, 10)
    before = {path: path.stat().st_mtime_ns for path in (tmp / "out" / "shared").rglob("*.safetensors")}
    made = memorised(how, [5, 10], tmp / "out" / "shared")
    assert {path: path.stat().st_mtime_ns for path in (tmp / "out" / "shared").rglob("*.safetensors")} == before and len(before) == 3
    assert [len(made.forget(percent)) for percent in (5, 10)] == [5, 10] and [len(made.retain(percent)) for percent in (5, 10)] == [95, 90]

    def loss(folder):
        loaded = load(str(folder))
        rows, total, count = unlearning_rows(made.forget(10), loaded.tokenizer), 0.0, 0
        for row in rows:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"][1:])
            with torch.no_grad():
                log_p = loaded.model(ids).logits[0, :-1].log_softmax(-1)
            kept = labels != -100
            total, count = total - log_p[kept].gather(1, labels[kept][:, None]).sum().item(), count + int(kept.sum())
        return total / count

    assert loss(made.full) < 0.75 * loss(made.retain_only[10]) and loss(made.full) < 0.5 * loss(tmp / "lm")


def test_figures_are_those_of_the_benchmark_on_the_edited_model(tofu, done):
    tmp, results, _ = done
    assert {label: r["run"]["error"] for label, r in results.items()} == dict.fromkeys(["untouched", "loku", "ascent"])
    made = memorised(Memorising(str(tmp / "lm"), str(tofu), 100, 6, 2e-2, 10), [5, 10], tmp / "out" / "shared")
    task = Task()
    task.folder = tmp / "out" / "shared"
    recipe = load_recipe(told(tofu, tmp, METHODS))
    context = task.prepare(recipe)
    edited, report = task._edited(context, recipe.methods[2], 10, 0)
    benchmark = TOFU("forget10", 6, 5)
    found = benchmark.evaluate(made.questions, edited)
    other = benchmark.truth_ratios(load(str(made.retain_only[10])), benchmark.read(made.questions)["forget"])
    quality = results["ascent"]["quality"]
    assert quality["forget_quality_10"]["value"] == pytest.approx(math.log10(ks_2samp(found["truth_ratios"], other).pvalue))
    assert quality["utility_10"]["value"] == pytest.approx(found["model_utility"]) and report["knobs"]["r"] == 2 and report["knobs"]["epochs"] == 3
    assert quality["retain_10"]["value"] == pytest.approx(model_utility(list(found["retain"].values())))
    untouched = benchmark.evaluate(made.questions, load(str(made.full)))
    assert results["untouched"]["quality"]["utility_10"]["value"] == pytest.approx(untouched["model_utility"])
    lost = [results["untouched"]["quality"][name]["value"] - quality[name]["value"] for name in ("retain_05", "retain_10")]
    assert results["ascent"]["cost"]["retain_lost"] == pytest.approx(max(0.0, sum(lost) / 2), abs=1e-6) and results["untouched"]["cost"]["retain_lost"] == 0
    assert found["forget"]["probability"] < untouched["forget"]["probability"]
    context.metrics = ["retain_10", "forget_quality_05"]
    alone = task.run(context, recipe.methods[2], 0).quality
    assert {name: one.value for name, one in alone.items()} == pytest.approx({name: quality[name]["value"] for name in context.metrics})


def test_the_report_has_all_sizes_and_texts_side_by_side(done):
    _, results, summary = done
    assert set(summary.metrics) == {f"{name}_{size}" for name in ("forget_quality", "utility", "retain") for size in ("05", "10")}
    assert summary.cost_axis == "retain_lost" and summary.reference == "untouched" and "100 questions memorised" in summary.scale
    assert len(summary.texts) == 8 and all(set(shown["texts"]) == set(results) for shown in summary.texts.values())
    assert summary.best("retain_10").label != "untouched"
    words = Task().command(summary.recipe, "loku", {"forget_loss": "ga"})
    assert words[:2] == ["edit", "--model"] and words[words.index("--method.epochs") + 1] == "3" and Task().command(summary.recipe, "untouched", {}) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data": {"question": 3}}, "unknown key 'question' under data"), ({"budget": {"forget": [2]}}, r"budget.forget is \[2\]"),
        ({"budget": {"forget": []}}, r"budget.forget is \[\]"), ({"data": {"questions": 150}}, "data.questions is 150; it must be a multiple of 100"),
        ({"data": {"questions": 50}}, "data.questions is 50"), ({"budget": {"r": 0}}, "budget.r is 0"), ({"budget": {"memorise_lr": 0}}, "memorise_lr is 0"),
        ({"data": {"tofu": "nowhere"}}, "data.tofu: no file nowhere"), ({"metrics": ["utility_01"]}, "unknown metric 'utility_01'"),
        ({"methods": [{"name": "loku", "knobs": {"r": 3}}]}, "r of loku is the same for all"), ({"methods": ["lokku"]}, "unknown editor 'lokku'"),
        ({"methods": [{"name": "loku", "knobs": {"forget_loss": "gx"}}]}, "forget_loss is 'gx'"),
    ],
)  # fmt: skip
def test_what_could_not_run_is_refused_before_anything_does(tofu, tmp_path, change, said):
    recipe = told(tofu, tmp_path, METHODS)
    with pytest.raises(ValueError, match=said):
        load_recipe({**recipe, **change, "data": recipe["data"] | change.get("data", {}), "budget": recipe["budget"] | change.get("budget", {})})
