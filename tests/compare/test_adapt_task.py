"""The bake-off of adapters: equal trained parameters, equal batches, learning rates chosen aside from the test, for language models and encoders."""

import csv
import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from sklearn.metrics import f1_score, matthews_corrcoef
from transformers import AutoModelForCausalLM

import small_folders
import small_models
from echelon.cli import main
from echelon.compare import adapted as adapting
from echelon.compare import compare, load_recipe
from echelon.compare.downstream import Classified, Written
from echelon.compare.results import per_unit
from echelon.compare.statistics import summary_of
from echelon.compare.tasks.adapt import Task
from echelon.compare.tuning import tries
from echelon.data.e2e import Meaning, read_e2e
from echelon.data.glue import Labelled, read_glue
from echelon.errors import UserError
from echelon.models import load
from echelon.models.randomness import own_randomness
from echelon.registry import cards

EVERY = [card.name for kind in adapting.KINDS for card in cards(kind)] + [adapting.ADALORA]
NOUNS, VERBS = small_folders.NOUNS, small_folders.VERBS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("adapt")
    small_folders.language_model(made / "lm", width=32)
    small_folders.encoder(made / "encoder")
    for name, first in (("devset", 0), ("testset_w_refs", 6)):
        with (made / f"{name}.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["mr", "ref"])
            for noun in NOUNS[first : first + 6]:
                for verb in VERBS[:2]:
                    rows.writerow([f"pre[{noun}], and[{verb}]", f"{noun} {verb} slowly."])
                    rows.writerow([f"pre[{noun}], and[{verb}]", f"then {noun} {verb}."])
    for name, first, count in (("train", 0, 40), ("test", 100, 12)):
        texts = [(small_folders.document(first + number, 1).split()[0], number % 2) for number in range(count)]
        both = [(f"{noun} {VERBS[label]} {'then ' * (n % 3)}and {NOUNS[n % 16]}.", label) for n, (noun, label) in enumerate(texts)]
        (made / f"sst2_{name}.tsv").write_text("sentence\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in both))
        (made / f"mrpc_{name}.txt").write_text("﻿Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n" + "".join(f"{y}\t1\t2\t{x}\t{x}\r\n" for x, y in both))
        (made / f"rte_{'dev' if name == 'test' else name}.tsv").write_text(
            "index\tsentence1\tsentence2\tlabel\n" + "".join(f"{n}\t{x}\tSea waits.\t{'not_' * y}entailment\n" for n, (x, y) in enumerate(both))
        )
        lines = "".join(f"gj04\t{y}\t\t{x}\n" for x, y in both)
        (made / ("cola_dev.tsv" if name == "test" else "cola_public_in_domain_train.tsv")).write_text(lines)
    (made / "sst2_dev.tsv").write_text("sentence\tlabel\n" + "".join(f"Tower {VERBS[n % 2]}{' slowly' * n}.\t{n % 2}\n" for n in range(6)))
    return made


def told(folder, tasks, methods, **changes):
    model = folder / ("lm" if tasks[0] in ("e2e", "text") else "encoder")
    budget = {"lora_rank": 4, "steps": 12, "tune_steps": 4, "batch_size": 4, "max_new_tokens": 6} | changes.pop("budget", {})
    data = {"tasks": tasks, "e2e": str(folder), "glue": str(folder), "units": 8, "tune_units": 4} | changes.pop("data", {})
    return {"task": "adapt", "model": str(model), "isolation": "none", "timing_rounds": 0, "methods": methods, "data": data, "budget": budget, **changes}


@pytest.fixture(scope="module")
def written(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("e2e")
    methods = [{"name": "lora", "sweep": {"lr": [1e-6, 0.02]}}, {"name": "dylora", "knobs": {"lr": 0.02}}]
    recipe = load_recipe(told(folder, ["e2e"], methods, seeds=[0, 1]))
    results = compare(recipe, out)
    return out, recipe, results, summary_of(out, recipe, results)


def test_all_see_the_same_batches_and_another_seed_other_ones(written):
    _, _, results, _ = written
    assert [r["run"]["error"] for r in results] == [None] * 4
    orders = {(r["run"]["seed"], r["budget"]["order"]) for r in results}
    assert len(orders) == 2 and all(r["budget"]["used"] == r["budget"]["allowed"] for r in results)
    for result in results:
        [points] = result["curves"].values()
        assert [x for x, _ in points] == list(range(1, 13)) and points[-1][1] < points[0][1]


def test_metrics_of_sentences_are_those_computed_by_hand(written, folder):
    out, _, results, summary = written
    tokenizer, result = small_folders.tokenizer(), next(r for r in results if r["run"]["label"] == "lora" and r["run"]["seed"] == 0)
    lr = result["tuning"]["chosen"]["lr"]
    task = Task()
    context = task.prepare(load_recipe(told(folder, ["e2e"], [{"name": "lora", "sweep": {"lr": [lr, lr]}}])))
    made, _ = task._train(context, context.tasks[0], "lora", {"r": 4, "lr": lr}, 12, 0)
    totals, counts = [], []
    for meaning in context.tasks[0].test:
        total = count = 0
        for text in meaning.references:
            head, tail = (tokenizer(part, add_special_tokens=False).input_ids for part in (meaning.meaning, "\n" + text))
            with torch.no_grad():
                log_p = made.loaded.model(torch.tensor([head + tail])).logits[0, len(head) - 1 : -1].log_softmax(-1)
            total, count = total - log_p.gather(1, torch.tensor(tail)[:, None]).sum().item(), count + len(tail)
        totals.append(total)
        counts.append(count)
    units = per_unit(out, result, "loss_e2e")
    np.testing.assert_allclose(units, np.array(totals) / (sum(counts) / len(counts)), rtol=1e-4)
    assert result["quality"]["loss_e2e"]["value"] == pytest.approx(sum(totals) / sum(counts), rel=1e-4)
    assert set(summary.metrics) == {"loss_e2e", "bleu_e2e", "rouge_l_e2e"} and len(summary.texts) == 8
    assert result["quality"]["rouge_l_e2e"]["value"] == pytest.approx(per_unit(out, result, "rouge_l_e2e").mean())


def test_the_rate_is_chosen_once_on_other_units_and_its_cost_is_shown(written):
    _, _, results, summary = written
    mine = [r for r in results if r["run"]["label"] == "lora"]
    tuning = [r["tuning"] for r in mine]
    assert tuning[0] == tuning[1] and tuning[0]["chosen"] == {"lr": 0.02} and tuning[0]["at_edge"] == ["lr"]
    assert tuning[0]["cost"]["steps"] == 2 * 4 == mine[0]["cost"]["tuning_steps"] and tuning[0]["cost"]["seconds"] > 0
    assert [one["task"] for one in tuning[0]["tried"]] == ["e2e"] * 2 and "tuning" not in next(r for r in results if r["run"]["label"] == "dylora")
    assert any("tuned: lr 0.02 of lr 1e-06" in note and "4 steps each" in note for note in summary.row("lora").notes)
    assert summary.row("lora").knobs == {"lr": 0.02}


def test_the_loop_is_that_of_a_plain_lora(folder):
    task = Written("text", str(folder / "lm"), [Meaning("", (small_folders.document(n, 1),)) for n in range(9)], [], [])
    rows = task.rows(small_folders.tokenizer())
    batches = adapting.Batches(rows, 3, 8, seed=5)
    made = adapting.adapted(task, batches, adapting.config_of("lora", {"r": 3}, ["q_proj", "down_proj"]), lr=0.02, warmup=0.25, seed=7)
    with own_randomness(7):
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "lm"), LoraConfig(r=3, lora_alpha=16, target_modules=["q_proj", "down_proj"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, weight_decay=0.0)
    seen = []
    for step, here in enumerate(batches):
        width = max(len(row["input_ids"]) for row in here)
        ids = torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in here])
        labels = torch.tensor([row["labels"] + [-100] * (width - len(row["labels"])) for row in here])
        loss = model(input_ids=ids, attention_mask=(ids != 0).long(), labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * [1 / 2, 1, 6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7][step]
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.item())
    assert made.losses == pytest.approx(seen, rel=1e-5)


def test_batches_read_every_row_once_a_round_and_keep_like_lengths_together():
    rows = [{"input_ids": [0] * (1 + 7 * n % 50)} for n in range(60)]
    batches = adapting.Batches(rows, 5, 24, seed=1)
    seen = [place for places in batches.places for place in places.tolist()]
    assert sorted(seen[:60]) == sorted(seen[60:]) == list(range(60)) and seen[:60] != seen[60:]
    spread = np.mean([np.ptp([len(rows[place]["input_ids"]) for place in places.tolist()]) for places in batches.places])
    assert spread < 8  # some 33 for batches drawn at random
    assert batches.digest() == adapting.Batches(rows, 5, 24, seed=1).digest() != adapting.Batches(rows, 5, 24, seed=2).digest()


@pytest.mark.parametrize("name", EVERY)
def test_every_size_is_the_nearest_and_what_is_counted_is_what_trains(name):
    model = small_models.model("llama")
    targets = ["q_proj", "k_proj", "up_proj", "down_proj"]
    shapes = [tuple(m.weight.shape) for key, m in model.named_modules() if key.endswith(tuple(targets))]
    wanted = adapting.trained_parameters(model, "lora", {"r": 4}, targets)
    assert wanted == 4 * sum(map(sum, shapes))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    knobs, used = adapting.sized(model, name, {}, targets, wanted, 32)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())  # only shapes were looked at
    knob = adapting.SIZES.get(name, "r")
    for other in {max(1, knobs[knob] - 1), knobs[knob] + 1}:
        if knob == "num_basis" or other <= 32:
            try:
                near = adapting.trained_parameters(model, name, {**adapting.size_knobs(name, other, {}), knob: other}, targets)
            except ValueError:
                continue
            assert abs(near - wanted) >= abs(used - wanted)
    formula = {  # PEFT marks AdaLoRA's count of ranks as trained, one number a layer
        "lora": lambda r: r * sum(map(sum, shapes)), "dora": lambda r: r * sum(map(sum, shapes)) + sum(out for out, _ in shapes),
        "vera": lambda r: sum(out for out, _ in shapes) + r * len(shapes), "lora_sb": lambda r: r * r * len(shapes), "nola": lambda k: 2 * k * len(shapes),
        "adalora": lambda r: r * (sum(map(sum, shapes)) + len(shapes)) + len(shapes), "increlora": lambda r: r * (sum(map(sum, shapes)) + len(shapes)),
    }  # fmt: skip
    if name in formula:
        assert used == formula[name](knobs[knob])
    if name in ("lora", "rslora", "pissa", "dylora", "nola"):
        assert abs(used / wanted - 1) <= 0.005


def test_every_method_trains_and_says_how_near_it_came_to_the_budget(folder, tmp_path):
    methods = [{"name": name, "knobs": {"lr": 3e-4 if name in ("lora_sb", "randlora") else 1e-2}} for name in EVERY]
    recipe = load_recipe(told(folder, ["text"], methods, budget={"steps": 3}, data={"units": 2}, baseline="lora"))
    results = {r["run"]["label"]: r for r in compare(recipe, tmp_path)}
    assert {label: r["run"]["error"] for label, r in results.items()} == dict.fromkeys(EVERY)
    for label, result in results.items():
        share = result["budget"]["used"] / result["budget"]["allowed"]
        assert ("no setting comes nearer" in result["notes"][0]) == (abs(share - 1) > 0.005), label
        assert result["cost"]["trained_parameters"] == result["budget"]["used"] and result["cost"]["adapter_kb"] > 0
    assert results["lora"]["cost"]["adapter_kb"] * 1e3 == pytest.approx(4 * results["lora"]["budget"]["used"], rel=0.4)
    values = [r["quality"]["loss_text"]["value"] for r in results.values()]
    assert np.isfinite(values).all() and len(set(values)) == len(values)
    assert any("published" in note for note in results["nola"]["notes"])


def test_an_encoder_learns_to_tell_labels_apart_with_a_head_at_a_rate_of_its_own(folder):
    task = Task().prepare(load_recipe(told(folder, ["sst2"], ["lora"], budget={"steps": 80}, data={"units": 0}))).tasks[0]
    batches, heads = adapting.Batches(task.rows(small_folders.tokenizer()), 4, 80, 0), {}
    for lr in (1e-9, 0.02):
        config = adapting.config_of("lora", {"r": 4}, "all-linear", task_type="SEQ_CLS")
        made = adapting.adapted(task, batches, config, lr=lr, head_lr=0.02)
        heads[lr] = made.loaded.model.classifier.modules_to_save.default.weight.detach()
    assert task.measure(made.loaded).quality["accuracy"].value >= 0.85
    linear = [m for name, m in task.fresh(0).model.named_modules() if isinstance(m, torch.nn.Linear) and name != "classifier"]
    counted = [adapting.trained_parameters(task.fresh(0).model, "lora", {"r": r}, "all-linear", task.task_type) for r in (1, 4)]
    assert counted == [r * sum(m.in_features + m.out_features for m in linear) for r in (1, 4)]  # without the head
    nearest = min(range(1, 17), key=lambda r: abs(r * r * len(linear) - counted[1]))
    assert adapting.sized(task.fresh(0).model, "lora_sb", {}, "all-linear", counted[1], 16, task.task_type)[0] == {"r": nearest}
    assert (heads[1e-9] - task.fresh(0).model.classifier.weight).abs().max() > 0.05  # it moved where the adapter could not


def test_one_run_goes_through_all_tasks_of_a_recipe(folder, tmp_path):
    tasks = ["sst2", "rte", "mrpc", "cola"]
    methods = [{"name": "lora", "sweep": {"lr": [1e-5, 0.01]}}]
    [result] = compare(load_recipe(told(folder, tasks, methods, budget={"steps": 3, "tune_steps": 2})), tmp_path)
    assert result["run"]["error"] is None
    assert set(result["quality"]) == {"accuracy_sst2", "accuracy_rte", "accuracy_mrpc", "f1_mrpc", "matthews_cola"}
    assert set(result["tuning"]["chosen"]) == {f"lr on {task}" for task in tasks} and result["tuning"]["cost"]["steps"] == 4 * 2 * 2
    assert per_unit(tmp_path, result, "accuracy_sst2").mean() == result["quality"]["accuracy_sst2"]["value"]
    only = load_recipe(told(folder, tasks, ["lora"], metrics=["matthews_cola"], budget={"steps": 2}))
    assert set(compare(only, tmp_path / "only")[0]["quality"]) == {"matthews_cola"}


def test_metrics_of_labels_are_those_computed_by_hand(folder):
    test = read_glue(folder, "mrpc", "test")
    task = Classified("mrpc", str(folder / "encoder"), [], test[:3], test)
    loaded = task.fresh(0)
    with torch.no_grad():
        logits = torch.cat([loaded.model(**loaded.tokenizer(*one.texts, return_tensors="pt")).logits for one in test])
    labels = np.array([one.label for one in test])
    said = logits.argmax(1).numpy()
    found = task.measure(loaded).quality
    np.testing.assert_array_equal(found["accuracy"].per_unit, said == labels)
    assert found["f1"].value == f1_score(labels, said)
    assert Classified("cola", str(folder / "encoder"), [], [], test).measure(loaded).quality["matthews"].value == matthews_corrcoef(labels, said)
    assert task.tuning_loss(loaded) == pytest.approx(torch.nn.functional.cross_entropy(logits[:3], torch.tensor(labels[:3])).item(), rel=1e-5)
    assert not torch.equal(task.fresh(1).model.classifier.weight, loaded.model.classifier.weight)


def test_what_is_trained_tuned_and_tested_on_is_kept_apart(folder, tmp_path):
    swept = [{"name": "lora", "sweep": {"lr": [0.1, 0.2]}}]
    for tasks in (["e2e"], ["sst2", "cola"]):
        context = Task().prepare(load_recipe(told(folder, tasks, swept)))
        for task in context.tasks:
            parts = [{str(unit) for unit in part} for part in (task.train, task.tune, task.test)]
            assert all(parts) and not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    unswept = Task().prepare(load_recipe(told(folder, ["e2e"], ["lora"])))
    assert len(unswept.tasks[0].train) == 12 and not unswept.tasks[0].tune
    for name in ("testset_w_refs", "devset"):
        (tmp_path / f"{name}.csv").write_text((folder / "devset.csv").read_text())
    with pytest.raises(UserError, match="all that could be trained on is tested"):
        Task().prepare(load_recipe(told(folder, ["e2e"], ["lora"], data={"e2e": str(tmp_path), "units": 0})))


def test_the_command_line_of_the_winner_runs(folder, tmp_path, capsys):
    recipe = load_recipe(told(folder, ["text"], [{"name": "dylora", "sweep": {"lr": [0.01, 0.02]}}]))
    words = Task().command(recipe.to_dict(), "dylora", {"lr": 0.02, "update": "all"})
    assert words[words.index("--lr") + 1] == "0.02" and words[words.index("--method.update") + 1] == "all"
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": small_folders.document(n)}) + "\n" for n in range(6)))
    words = [{"FILE": str(data), "FOLDER": str(tmp_path / "out"), "12": "2"}.get(word, word) for word in words]
    assert main([*words, "--seqlen", "16"]) == 0 and (tmp_path / "out" / "adapter_config.json").is_file()
    assert Task().command(load_recipe(told(folder, ["sst2"], ["lora"])).to_dict(), "lora", {}) == []
    capsys.readouterr()


def test_files_are_read_as_they_circulate_and_others_are_refused(folder, tmp_path):
    assert read_e2e(folder / "devset.csv")[0] == Meaning("pre Sea; and waits", ("Sea waits slowly.", "then Sea waits."))
    assert len(read_e2e(folder / "devset.csv")) == 12
    assert read_glue(folder, "rte", "train")[1].label == 1 and read_glue(folder, "rte", "train")[1].texts[1] == "Sea waits."
    assert read_glue(folder, "mrpc", "tune") == [] and len(read_glue(folder, "cola", "train")) == 40
    assert read_glue(folder, "sst2", "test")[0] == Labelled((read_glue(folder, "cola", "test")[0].texts[0],), 0)
    bad = tmp_path / "sst2_train.tsv"
    bad.write_text("sentence\tlabel\ngood\tyes\n")
    with pytest.raises(UserError, match=r"sst2_train\.tsv, line 2: not a row of sst2"):
        read_glue(tmp_path, "sst2", "train")
    bad.write_text("sentence\tlabel\n")
    with pytest.raises(UserError, match="holds no rows of sst2"):
        read_glue(tmp_path, "sst2", "train")
    (tmp_path / "x.csv").write_text("mr,text\na,b\n")
    with pytest.raises(UserError, match="line 2: a row needs an 'mr' and a 'ref'"):
        read_e2e(tmp_path / "x.csv")


def test_tries_of_a_method_that_diverge_are_told(folder, tmp_path):
    methods = [{"name": "lora", "sweep": {"lr": [0.01, 1e30]}}]
    [result] = compare(load_recipe(told(folder, ["e2e"], methods, budget={"steps": 3})), tmp_path)
    assert result["tuning"]["chosen"] == {"lr": 0.01} and result["tuning"]["tried"][1]["loss"] is None
    assert len(tries(load_recipe(told(folder, ["e2e"], methods)).methods[0])) == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data": {"task": []}}, "unknown key 'task' under data.*did you mean 'tasks'"), ({"budget": {"step": 3}}, "unknown key 'step' under budget"),
        ({"data": {"tasks": []}}, r"data.tasks is \[\]"), ({"data": {"tasks": ["e2"]}}, "unknown task 'e2' in data.tasks.*did you mean 'e2e'"),
        ({"data": {"tasks": ["e2e", "sst2"]}}, "compare them in two recipes"), ({"data": {"units": -1}}, "data.units is -1"),
        ({"budget": {"steps": 0}}, "budget.steps is 0"), ({"budget": {"lora_rank": 1.5}}, "budget.lora_rank is 1.5"),
        ({"budget": {"warmup": 2}}, "budget.warmup is 2"), ({"budget": {"head_lr": 0}}, "budget.head_lr is 0"),
        ({"metrics": ["accuracy_e2e"]}, "unknown metric 'accuracy_e2e'"), ({"data": {"e2e": "nowhere"}}, "data: no file nowhere"),
        ({"methods": ["loral"]}, "unknown adapter 'loral'.*did you mean 'lora'"),
        ({"methods": [{"name": "lora", "knobs": {"r": 4}}]}, "r of lora is solved for"),
        ({"methods": [{"name": "nola", "knobs": {"num_basis": 4}}]}, "num_basis of nola is solved for"),
        ({"methods": [{"name": "lora", "knobs": {"target_modules": "x"}}]}, "target_modules of lora is the budget's"),
        ({"methods": [{"name": "lora", "sweep": {"lr": [0.1, -1]}}]}, "lr of lora is -1"),
        ({"methods": [{"name": "lora", "knobs": {"alpha": 1}}]}, "unknown knob 'alpha'"),
        ({"methods": [{"name": "adalora", "knobs": {"lora_alhpa": 1}}]}, "unknown knob 'lora_alhpa' of adalora.*did you mean 'lora_alpha'"),
        ({"methods": [{"name": "adalora", "knobs": {"warmup": 0.6}}]}, "final is 0.5"),
    ],
)  # fmt: skip
def test_what_could_not_run_is_refused_before_anything_does(folder, change, said):
    recipe = told(folder, ["e2e"], ["lora"])
    made = {**recipe, **change, "data": recipe["data"] | change.get("data", {}), "budget": recipe["budget"] | change.get("budget", {})}
    with pytest.raises(ValueError, match=said):
        load_recipe(made)


def test_no_size_at_all_is_an_error():
    with pytest.raises(UserError, match="can be put on none of these layers"):
        adapting.sized(load("embedded").model, "lora", {}, ["nothing"], 100, 8)
