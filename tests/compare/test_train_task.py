"""The bake-off of ways to train: equal tokens in an equal order, learning rates chosen aside from the test, and counted memory."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers

import small_folders
from echelon.compare import compare, documents, load_recipe, recommend, tuning, write_report
from echelon.compare.recipe import MethodEntry
from echelon.compare.results import per_unit, read_results
from echelon.compare.runner import plan
from echelon.compare.statistics import summary_of
from echelon.compare.tasks import train as task
from echelon.data.files import read_texts
from echelon.errors import UserError
from echelon.registry import card
from echelon.train.language import fit
from echelon.train.optimizers import AdamW
from echelon.train.training import Training

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
STEP = 4 * 16


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bakeoff")
    small_folders.language_model(folder / "lm")
    for name, first, count in (("train", 0, 20), ("tune", 40, 4), ("test", 50, 6)):
        lines = [json.dumps({"text": small_folders.document(first + number, 4 + number % 5)}) for number in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return {
        "task": "train", "model": str(folder / "lm"), "isolation": "none", "timing_rounds": 1, "baseline": "adamw",
        "data": {"model": SHAPE, **{name: str(folder / f"{name}.jsonl") for name in ("train", "tune", "test")}},
        "budget": {"tokens": 30 * STEP, "tune_tokens": 6 * STEP, "batch_size": 4, "seqlen": 16},
        "methods": [
            {"name": "adamw", "sweep": {"lr": [0.0, 0.003, 0.03]}},
            {"name": "galore", "knobs": {"rank": 8, "update_proj_gap": 10, "lr": 0.05}},
            {"name": "low_rank", "knobs": {"rank": 8, "lr": 0.02, "reset_every": 15}},
        ],
    }  # fmt: skip


@pytest.fixture(scope="module")
def done(told, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    recipe = load_recipe(told)
    results = compare(recipe, out)
    return out, {result["run"]["label"]: result for result in results}, summary_of(out, recipe, results)


def test_every_method_trains_and_all_see_the_same_tokens_in_the_same_order(told, done):
    _, results, summary = done
    assert {label: result["run"]["error"] for label, result in results.items()} == {"adamw": None, "galore": None, "low_rank": None}
    budgets = [result["budget"] for result in results.values()]
    assert len({budget["order"] for budget in budgets}) == 1 and all(budget["used"] == budget["allowed"] == 30 * STEP for budget in budgets)
    for row in summary.rows:
        [points] = summary.curves[row.label].values()
        assert [x for x, _ in points] == [STEP * (step + 1) for step in range(30)]
        assert np.mean([y for _, y in points[-5:]]) < 0.85 * points[0][1]
    assert "llama" in summary.scale and "6 held-out documents" in summary.scale


def test_another_seed_reads_in_another_order_from_other_weights(told, tmp_path):
    recipe = load_recipe({**told, "seeds": [0, 1], "methods": [{"name": "adamw"}, {"name": "galore", "knobs": {"rank": 8}}], "timing_rounds": 0})
    results = compare(recipe, tmp_path)
    orders = {(r["run"]["seed"], r["budget"]["order"]) for r in results}
    assert len(orders) == 2
    first = {(r["run"]["seed"], r["curves"]["training loss against tokens"][0][1]) for r in results}
    assert len(first) == 2  # the first loss is that of the weights: equal for the methods of a seed


def test_the_loss_is_that_of_a_model_trained_by_hand(told, done, tmp_path):
    out, results, summary = done
    tokenizer = small_folders.tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=len(tokenizer), tie_word_embeddings=True, pad_token_id=0, eos_token_id=1, bos_token_id=2, **SHAPE,
            )
        )  # fmt: skip
    lr = results["adamw"]["tuning"]["chosen"]["lr"]
    texts = read_texts(told["data"]["train"])
    fit(model, tokenizer, texts, tmp_path / "run", AdamW(lr=lr), Training(steps=30, batch_size=4, seqlen=16))
    total, count, each = 0.0, 0, []
    for text in read_texts(told["data"]["test"]):
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        with torch.no_grad():
            logits = model.eval()(torch.cat([torch.tensor([[2]]), ids], 1)).logits[0, :-1].log_softmax(-1)
        each.append(-logits.gather(1, ids[0, :, None]).sum().item())
        total, count = total + each[-1], count + ids.shape[1]
    assert summary.row("adamw").values["loss"].mean == pytest.approx(total / count, abs=1e-4)
    units = per_unit(out, results["adamw"], "loss")
    np.testing.assert_allclose(units, np.array(each) / (count / 6), rtol=1e-4)


def test_memory_is_counted_and_stands_beside_the_formula(done):
    _, results, summary = done
    vocabulary, width, inner, layers = len(small_folders.WORDS), 32, 48, 2
    embedding, norms = vocabulary * width, (2 * layers + 1) * width
    dense = embedding + norms + layers * (4 * width * width + 3 * width * inner)
    tensors = 2 + layers * 9
    cost = results["adamw"]["cost"]
    assert cost["weights_bytes"] == cost["gradients_bytes"] == 4 * dense
    assert cost["formula_bytes"] == 16 * dense and cost["published_convention_bytes"] == 6 * dense
    assert 0 <= cost["optimizer_state_bytes"] - 8 * dense <= 64 * tensors  # counters
    galore = results["galore"]["cost"]
    shapes = [(width, width)] * 4 + [(width, inner)] * 3
    state = 2 * (embedding + norms) + layers * sum(8 * min(shape) + 2 * 8 * max(shape) for shape in shapes)
    assert galore["formula_bytes"] == 4 * (2 * dense + state) and galore["formula_bytes"] < cost["formula_bytes"]
    factors = embedding + norms + layers * sum(8 * sum(shape) for shape in shapes)
    assert results["low_rank"]["cost"]["formula_bytes"] == 16 * factors
    for label in results:
        parts = [results[label]["cost"][f"{part}_bytes"] for part in ("weights", "gradients", "optimizer_state")]
        assert results[label]["cost"]["training_bytes"] == sum(parts) >= results[label]["cost"]["formula_bytes"]
        assert results[label]["cost"]["stalled_seconds"] >= 0 and summary.row(label).cost["seconds_per_step"] > 0


def test_a_sweep_is_decided_on_the_tuning_documents_and_its_winner_is_trained_anew(told, done, tmp_path):
    _, results, summary = done
    tuning = results["adamw"]["tuning"]
    losses = {one["knobs"]["lr"]: one["loss"] for one in tuning["tried"]}
    assert list(losses) == [0.0, 0.003, 0.03] and losses[tuning["chosen"]["lr"]] == min(losses.values())
    assert losses[0.0] == pytest.approx(np.log(len(small_folders.WORDS)), abs=0.1)  # untrained: every word as likely
    assert tuning["cost"]["tokens"] == 3 * 6 * STEP == results["adamw"]["cost"]["tuning_tokens"] and tuning["cost"]["seconds"] > 0
    assert tuning["at_edge"] == (["lr"] if tuning["chosen"]["lr"] == 0.03 else [])
    assert summary.row("adamw").knobs == tuning["chosen"] and "tuning" not in results["galore"]
    plain = load_recipe({**told, "methods": [{"name": "adamw", "knobs": tuning["chosen"]}], "timing_rounds": 0})
    [again] = compare(plain, tmp_path)
    assert again["quality"]["loss"]["value"] == results["adamw"]["quality"]["loss"]["value"]


def test_a_sweep_is_made_once_for_all_seeds_and_kept(told, tmp_path, monkeypatch):
    seen, train = [], task.train

    def watched(context, method, tokens, seed):
        seen.append((tokens // STEP, seed))
        return train(context, method, tokens, seed)

    monkeypatch.setattr(task, "train", watched)
    recipe = load_recipe({**told, "seeds": [0, 1], "methods": [{"name": "adamw", "sweep": {"lr": [0.003, 0.03]}}], "timing_rounds": 0})
    first = compare(recipe, tmp_path)
    assert seen == [(6, 0), (6, 0), (30, 0), (30, 1)] and first[0]["tuning"] == first[1]["tuning"]
    shutil.rmtree(tmp_path / "runs")
    again = compare(recipe, tmp_path)
    assert len(seen) == 4 and [r["quality"] for r in again] == [r["quality"] for r in first]
    whole = {**recipe.to_dict(), "budget": {name: value for name, value in told["budget"].items() if name != "tune_tokens"}}
    results = compare(load_recipe(whole), tmp_path)  # the best try is the run of the first seed
    assert seen[4:] == [(30, 0), (30, 0), (30, 1)] and results[0]["quality"]["loss"]["value"] == first[0]["quality"]["loss"]["value"]
    whole["methods"][0]["sweep"]["lr"] = [0.003, 0.01, 0.03]
    [wider, _] = compare(load_recipe(whole), tmp_path)
    assert seen[7:].count((30, 0)) == 1 and len(wider["tuning"]["tried"]) == 3
    assert wider["tuning"]["cost"]["tokens"] == 3 * 30 * STEP and wider["tuning"]["cost"]["seconds"] > results[0]["tuning"]["cost"]["seconds"]


@pytest.mark.parametrize(
    ("values", "chosen", "edge"),
    [([1, 2, 3], 2, []), ([1, 2, 3], 3, ["x"]), ([3, 1, 2], 1, ["x"]), ([2], 2, []), ([2, 2], 2, []), (["a", "b"], "b", [])],
)
def test_an_optimum_at_the_edge_of_the_grid_is_flagged(values, chosen, edge):
    assert tuning.at_edge({"x": values}, {"x": chosen}) == edge
    told = {"chosen": {"lr": chosen}, "tried": [{"knobs": {"lr": chosen}, "loss": 1.0}], "at_edge": edge, "cost": {"seconds": 1.0, "tokens": 64}}
    assert any("grid too narrow" in note for note in task.notes("adamw", told)) == bool(edge)


def test_a_setting_that_diverges_is_not_chosen_and_one_that_nobody_survives_is_an_error(told, tmp_path):
    methods = [{"name": "adamw", "sweep": {"lr": [1e30, 0.01]}}, {"name": "adamw", "label": "hopeless", "sweep": {"lr": [1e30, 1e35]}}]
    results = {r["run"]["label"]: r for r in compare(load_recipe({**told, "methods": methods, "baseline": "", "timing_rounds": 0}), tmp_path)}
    tried = results["adamw"]["tuning"]["tried"]
    assert tried[0]["loss"] is None and "step" in tried[0]["error"] and results["adamw"]["tuning"]["chosen"] == {"lr": 0.01}
    assert any("diverged" in note for note in results["adamw"]["notes"])
    assert results["hopeless"]["run"]["status"] == "failed" and "no setting of the sweep of hopeless trained" in results["hopeless"]["run"]["error"]


def test_the_report_and_the_table_show_tuning_published_figures_and_memory(done, tmp_path):
    _, results, summary = done
    advice = recommend(summary, "loss")
    write_report(summary, advice, tmp_path)
    for file in ("table.md", "report.html"):
        told = (tmp_path / file).read_text()
        assert "published, with other models and budgets (arXiv 2403.03507)" in told and "34.88/25.36/18.95/15.64" in told
        assert "tuned: lr" in told and "optimizer state" in told
    assert "training loss against tokens" in (tmp_path / "report.html").read_text()
    assert any("published" in note for note in results["low_rank"]["notes"]) and card("low_rank", "layer").published in results["low_rank"]["notes"][0]
    assert summary.cost_axis == "training_bytes" and summary.best("loss").label in results
    words = task.Task().command(summary.recipe, "adamw", summary.row("adamw").knobs)
    assert words[:2] == ["train", "--model"] and "--scratch" in words and words[words.index("--steps") + 1] == "30"
    assert float(words[words.index("--method.lr") + 1]) == results["adamw"]["tuning"]["chosen"]["lr"]


def test_what_is_trained_tuned_and_tested_on_is_kept_apart(told, tmp_path):
    own = {**told, "data": {key: value for key, value in told["data"].items() if key != "tune"}}
    context = task.Task().prepare(load_recipe(own))
    assert len(context.tune) == 2 and len(context.train) == 18 and not set(context.tune) & set(context.train)
    swept_not = {**own, "methods": ["adamw"]}
    assert len(task.Task().prepare(load_recipe(swept_not)).train) == 20
    for change, said in (
        ({"test": told["data"]["train"]}, "data.train and data.test share documents"),
        ({"tune": told["data"]["test"]}, "data.tune and data.test share documents"),
        ({"tune": told["data"]["train"]}, "data.train and data.tune share documents"),
    ):
        with pytest.raises(UserError, match=said):
            task.Task().prepare(load_recipe({**told, "data": {**told["data"], **change}}))
    lone = tmp_path / "one.txt"
    lone.write_text("Sea waits.")
    with pytest.raises(UserError, match="a sweep needs a second one"):
        task.Task().prepare(load_recipe({**told, "data": {**own["data"], "train": str(lone)}}))


def test_long_documents_are_cut_and_few_are_taken_evenly(told, tmp_path):
    text = "\n\n".join(f"word{number}" for number in range(1000))
    found = documents.pieces(text)
    assert [len(piece.split()) for piece in found] == [300, 300, 300, 100] and " ".join(found).split() == text.split()
    assert documents.pieces("  ") == [] and documents.pieces("one two") == ["one two"] and "word0\n\nword1" in found[0]
    assert task.evenly(list(range(10)), 5) == [0, 2, 4, 6, 8] and task.evenly([1, 2], 5) == [1, 2]
    few = task.Task().prepare(load_recipe({**told, "data": {**told["data"], "documents": 3}}))
    assert len(few.test) == 3
    big = tmp_path / "big.jsonl"
    big.write_text("".join(json.dumps({"text": small_folders.document(100 + number, 8)}) + "\n" for number in range(2000)))
    taken = task.Task().prepare(load_recipe({**told, "data": {**told["data"], "train": str(big)}})).train
    assert 8 * 30 * STEP <= sum(map(len, taken)) < 1.1 * 8 * 30 * STEP + 1000  # enough text for the tokens, and no more


def test_the_shape_may_be_that_of_the_recipe_s_model(told):
    context = task.Task().prepare(load_recipe({**told, "data": {**told["data"], "model": "same"}}))
    there = transformers.AutoConfig.from_pretrained(told["model"])
    made, again, other = context.fresh(0), context.fresh(0), context.fresh(1)
    assert made.config.hidden_size == there.hidden_size == 16
    stored = transformers.AutoModelForCausalLM.from_pretrained(told["model"])
    assert not torch.equal(made.lm_head.weight, stored.lm_head.weight)  # random weights, not those there
    assert torch.equal(made.lm_head.weight, again.lm_head.weight) and not torch.equal(made.lm_head.weight, other.lm_head.weight)


def test_an_edited_sweep_runs_again(told):
    keys = {run.entry.label: run.key for run in plan(load_recipe(told))}
    methods = [{"name": "adamw", "sweep": {"lr": [0.0, 0.003]}}, *told["methods"][1:]]
    changed = {run.entry.label: run.key for run in plan(load_recipe({**told, "methods": methods}))}
    assert changed["adamw"] != keys["adamw"] and changed["galore"] == keys["galore"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"budget": {"token": 5}}, "unknown key 'token' under budget.*did you mean 'tokens'"),
        ({"budget": {"tokens": 63, "batch_size": 4, "seqlen": 16}}, "budget.tokens is 63; it must be a whole number of at least 64"),
        ({"budget": {"tune_tokens": 1, "batch_size": 4, "seqlen": 16}}, "budget.tune_tokens is 1"),
        ({"budget": {"seqlen": 0}}, "budget.seqlen is 0"),
        ({"budget": {"warmup": 2}}, r"budget: warmup is 2; it must be in \[0, 1\]"),
        ({"budget": {"seqlen": 65}}, "budget.seqlen is 65; the model has max_position_embeddings 64"),
        ({"data": {"modle": {}}}, "unknown key 'modle' under data.*did you mean 'model'"),
        ({"data": {"model": {"hidden": 3}}}, "unknown key 'hidden' under data.model"),
        ({"data": {"model": {"hidden_size": 30, "num_attention_heads": 4}}}, "no Llama can be made of it"),
        ({"data": {"model": "other"}}, "data.model is 'other'; it must be settings of a Llama's config, or the word same"),
        ({"data": {"train": "no.txt"}}, "data.train: no file no.txt"),
        ({"data": {"documents": -1}}, "data.documents is -1"),
        ({"metrics": ["perplexity"]}, "unknown metric 'perplexity'; the metric is loss"),
        ({"methods": ["adamww"], "baseline": ""}, "unknown optimizer or layer 'adamww'.*did you mean 'adamw'"),
        ({"methods": [{"name": "galore", "knobs": {"rnak": 3}}], "baseline": ""}, "unknown knob 'rnak' of galore.*did you mean 'rank'"),
        ({"methods": [{"name": "galore", "knobs": {"rank": 0}}], "baseline": ""}, "rank is 0"),
        ({"methods": [{"name": "adamw", "sweep": {"lr": [0.1, -1]}}]}, "lr is -1"),
        ({"methods": [{"name": "adamw", "sweep": {"lr": 0.1}}]}, "the sweep of adamw has lr 0.1; it must be a list"),
        ({"methods": [{"name": "adamw", "sweep": {"lr": []}}]}, r"the sweep of adamw has lr \[\]; it must be a list"),
        ({"methods": [{"name": "adamw", "knobs": {"lr": 0.1}, "sweep": {"lr": [0.1]}}]}, "lr of adamw stands under knobs and under sweep"),
        ({"task": "generate", "data": {}, "budget": {}, "metrics": ["overlap"], "methods": [{"name": "nucleus", "sweep": {"top_p": [0.9]}}], "baseline": ""},
         "nucleus has a sweep; the methods of this task are not tuned"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_anything_runs(told, change, said):
    nested = {key: {**told[key], **change[key]} if change[key] and key in ("data", "budget") else change[key] for key in change}
    with pytest.raises(ValueError, match=said):
        load_recipe({**told, **nested})


def test_a_method_that_does_not_suit_the_model_is_a_row_of_its_own(told, tmp_path):
    methods = ["adamw", {"name": "low_rank", "knobs": {"rank": 33}}]
    results = {r["run"]["label"]: r for r in compare(load_recipe({**told, "methods": methods, "timing_rounds": 0}), tmp_path)}
    assert "rank is 33" in results["low_rank"]["run"]["error"] and results["adamw"]["run"]["status"] == "finished"
    assert len(read_results(tmp_path)) == 2


def test_the_built_in_recipes_are_sound(monkeypatch, tmp_path):
    books = tmp_path / "classic_books"
    books.mkdir()
    for name in ("train", "valid"):
        (books / f"{name}.jsonl").write_text(json.dumps({"text": "A line."}) + "\n")
    monkeypatch.setenv("ECHELON_DATA", str(tmp_path))
    for name in ("train", "train_quick"):
        recipe = load_recipe(name)
        assert "adamw" in [entry.name for entry in recipe.methods] and all(len(entry.sweep["lr"]) >= 3 for entry in recipe.methods)


def test_at_equal_state_each_method_gets_the_largest_rank_whose_real_state_fits(told):
    recipe = load_recipe({**told, "budget": {**told["budget"], "optimizer_state": 0.6}})
    context = task.Task().prepare(recipe)
    model = context.fresh(0)

    def state(method, model):
        if method.method_name in ("low_rank", "sltrain"):
            method.convert(model)
        optimizer = method.optimizer(model)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        return sum(t.numel() for s in optimizer.state.values() for t in s.values() if t.ndim)

    whole = state(AdamW(), context.fresh(0))
    assert whole == 2 * model.num_parameters()
    for name, knob in (("galore", "rank"), ("low_rank", "rank"), ("sltrain", "r"), ("fira", "rank")):
        found, share = task.sized(context, MethodEntry(name, {}, name))
        at = {rank: state(task.built(name, {knob: rank}), context.fresh(0)) / whole for rank in (found[knob], found[knob] + 1)}
        assert at[found[knob]] <= 0.6 < at[found[knob] + 1]
        assert share == pytest.approx(at[found[knob]], abs=1e-3)
    assert task.sized(context, MethodEntry("adamw", {"state_bits": 8}, "eight")) == ({}, 0.25)
    with pytest.raises(UserError, match=r"plain takes 100\.0 % of AdamW's state at the least; budget\.optimizer_state allows 0\.6"):
        task.sized(context, MethodEntry("adamw", {}, "plain"))
    with pytest.raises(UserError, match="budget.optimizer_state is 1.5"):
        load_recipe({**told, "budget": {**told["budget"], "optimizer_state": 1.5}})
