"""What IncreLoRA promises beyond the adapter contract: which layers grow, when, and that growth is as if the new components were parameters of their own."""

import copy
import itertools
import json
import math
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import nn

import small_models
from echelon.adapt import AdapterCallback, IncreLoraConfig

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.filterwarnings("ignore:r is .* adds nothing:UserWarning")]
NAMES = ["a", "b", "c"]


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Toy(nn.Module):
    """Three layers with a tanh between them, in float64."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 5), nn.Linear(5, 7), nn.Linear(7, 4)
        self.double()
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(noise(*p.shape, seed=10 + i) * 0.5)

    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


X, Y = noise(9, 6, seed=2), noise(9, 4, seed=3)


def toy(**knobs):
    """A wrapped toy and its layers. The first values are larger than usual, so that a short run moves."""
    usual = {"r": 6, "target_r": 3, "lora_alpha": 4.0, "target_modules": NAMES, "init_warmup": 2, "interval": 3, "top_h": 2, "lr_restart": False}
    model = get_peft_model(Toy(), IncreLoraConfig(**(usual | knobs)))
    layers = {name: getattr(model.base_model.model, name) for name in NAMES}
    for i, layer in enumerate(layers.values()):
        for j, part in enumerate("AB"):
            p = layer.part(part, "default")
            p.data.copy_(noise(*p.shape, seed=20 + 2 * i + j) * 0.4)
    return model, layers


def train(model, steps, optimizer, scheduler=None, each=lambda step: None, micro=lambda: [(X, Y)]):
    tuner = model.base_model
    model.train()
    tuner.begin_training(optimizer)
    for step in range(steps):
        tuner.begin_step(step)
        batches = micro()
        for x, y in batches:
            ((model(x) - y).square().mean() / len(batches)).backward()
        tuner.before_update(step, optimizer)
        each(step)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad()
        tuner.end_step(step + 1)
    tuner.end_training()


def linear(t, warmup, total):
    return t / warmup if t < warmup else (total - t) / (total - warmup)


def written_out(first, config, steps, make, peak, warmup):
    """The method with dense updates, tensors that are added as they are needed, and a group of its own for each generation of them."""
    base = Toy()
    layers = {name: {"parts": [], "n": config.init_r, "I": 0.0, "U": 0.0} for name in NAMES}
    k, h, target = config.rank_increment, config.top_h, config.target(len(NAMES))

    def append(name, count, reserve, born):
        new = []
        for _ in range(count):
            i = len(layers[name]["parts"])
            A, B = first[name][0][i : i + 1].clone(), first[name][1][:, i : i + 1].clone()
            E = torch.full((1, 1), 1e-5 if reserve and config.advance_learn else 0.0, dtype=torch.float64)
            free = config.advance_learn or not reserve
            part = {"A": nn.Parameter(A, free), "B": nn.Parameter(B, free), "E": nn.Parameter(E, not reserve)}
            layers[name]["parts"].append(part)
            new += part.values()
        return {"params": new, "born": born}

    optimizer = make([append(name, config.init_r, False, None) for name in NAMES])
    seen = []
    for t in range(steps):
        deltas, norms, x = {}, [], X
        for name, layer in layers.items():
            A, E = (torch.cat([part[key] for part in layer["parts"]]) for key in "AE")
            B = torch.cat([part["B"] for part in layer["parts"]], 1)
            divisor = config.target_r if config.scale_mode == "fixed" else layer["n"] + 1e-5
            deltas[name] = B @ (A * E) * (config.lora_alpha / divisor)
            deltas[name].retain_grad()
            x = x @ (getattr(base, name).weight.detach() + deltas[name]).T + getattr(base, name).bias.detach()
            x = torch.tanh(x) if name != "c" else x
            eye = torch.eye(len(A), dtype=torch.float64)
            norms += [(A @ A.T - eye).square().sum().sqrt(), (B.T @ B - eye).square().sum().sqrt()]
        ((x - Y).square().mean() + config.orth_reg_weight * sum(norms) / len(norms)).backward()
        total = sum(layer["n"] for layer in layers.values())
        if total < target:
            for name, layer in layers.items():
                s = float((deltas[name] * deltas[name].grad).detach().abs().sum()) / math.sqrt(deltas[name].numel())
                layer["I"] = config.beta1 * layer["I"] + (1 - config.beta1) * s
                layer["U"] = config.beta2 * layer["U"] + (1 - config.beta2) * abs(s - layer["I"])
            if t == 0:
                for name in NAMES:
                    optimizer.add_param_group(append(name, k, True, 1))
            if t > config.init_warmup and t % config.interval == 0:
                best = sorted(NAMES, key=lambda name: layers[name]["I"] * layers[name]["U"], reverse=True)
                for name in best[: min(h, target - total)]:
                    layer, grown = layers[name], min(k, target - total)
                    for part in layer["parts"][layer["n"] : layer["n"] + grown]:
                        for p in part.values():
                            p.requires_grad_(True)
                    layer["n"] += grown
                    total += grown
                    optimizer.add_param_group(append(name, grown, True, t + 1))
            if total == target:
                for layer in layers.values():
                    for part in layer["parts"][layer["n"] :]:
                        part["E"].data.zero_()
        seen.append({name: (layer["n"], layer["I"] * layer["U"]) for name, layer in layers.items()})
        for group in optimizer.param_groups:
            main = peak * linear(t, warmup, steps) if warmup else peak
            own = group["born"] is not None and config.lr_restart
            group["lr"] = peak * linear(max(0, t - group["born"]), warmup, steps - group["born"]) if own else main
        optimizer.step()
        optimizer.zero_grad()
    final = {}
    for name, layer in layers.items():
        parts = layer["parts"][: layer["n"]]
        divisor = config.target_r if config.scale_mode == "fixed" else layer["n"] + 1e-5
        final[name] = sum(part["B"] @ (part["A"] * part["E"]) for part in parts).detach() * (config.lora_alpha / divisor)
    return seen, final


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.03, weight_decay=0.1, eps=1e-14)


@pytest.mark.parametrize(("make", "knobs", "warmup"), [
    (sgd, {}, 0), (sgd, {"rank_increment": 2, "top_h": 1, "target_total_rank": 8}, 0), (sgd, {"scale_mode": "fixed", "init_r": 2}, 0),
    (sgd, {"advance_learn": False}, 0), (adamw, {}, 0), (adamw, {"lr_restart": True}, 4), (adamw, {"lr_restart": True, "advance_learn": False}, 3),
], ids=["sgd", "sgd-two-at-a-time", "sgd-fixed", "sgd-no-advance", "adamw", "adamw-restart", "adamw-restart-no-advance"])  # fmt: skip
def test_a_run_is_that_of_the_method_written_out(make, knobs, warmup):
    """Scores, the layers that grow, ranks at every step and the final updates, against dense updates and separate parameter groups."""
    model, layers = toy(**knobs)
    config, steps = model.peft_config["default"], 24
    first = {name: (layer.part("A", "default").detach().clone(), layer.part("B", "default").detach().clone()) for name, layer in layers.items()}
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: linear(t, warmup, steps)) if warmup else None
    model.base_model.total_steps, model.base_model.warmup_steps = steps, warmup
    found = []

    def look(step):
        ranks, importance = model.rank_pattern(), model.importance()
        found.append({name: (ranks[name], importance[name]) for name in NAMES})

    peak = optimizer.param_groups[0].get("initial_lr", optimizer.param_groups[0]["lr"])
    train(model, steps, optimizer, scheduler, look)
    seen, final = written_out(first, config, steps, make, peak, warmup)
    for step in range(steps):
        for name in NAMES:
            assert found[step][name][0] == seen[step][name][0], (step, name)
            assert found[step][name][1] == pytest.approx(seen[step][name][1], rel=1e-3, abs=1e-30)
    assert sum(model.rank_pattern().values()) == config.target(3) > 3 * config.init_r
    assert len(set(model.rank_pattern().values())) > 1  # the layers did differ
    for name, layer in layers.items():
        assert final[name].norm() > 1e-2
        torch.testing.assert_close(layer.get_delta_weight("default"), final[name], rtol=1e-3, atol=1e-6)


def test_a_fresh_adapter_adds_nothing_and_its_reserve_next_to_nothing():
    for advance in (True, False):
        model = get_peft_model(Toy(), IncreLoraConfig(target_modules=["c"], lr_restart=False, interval=5, advance_learn=advance))
        layer, optimizer = model.base_model.model.c, torch.optim.SGD(model.parameters(), lr=0.0)
        assert torch.equal(model.train()(X), Toy()(X))
        train(model, 1, optimizer)
        difference = (model.train()(X) - Toy()(X)).detach()
        A, B = layer.part("A", "default")[1:2], layer.part("B", "default")[:, 1:2]
        hidden = torch.tanh(Toy().b(torch.tanh(Toy().a(X))))
        torch.testing.assert_close(difference, 16 / (1 + 1e-5) * (1e-5 if advance else 0) * (hidden @ A.T @ B.T).detach(), rtol=1e-6, atol=1e-15)
        assert bool(difference.any()) == advance and difference.abs().max() < 1e-5 * 4e-4 * 16 * 50
        assert torch.equal(model.eval()(X), Toy()(X))


@pytest.mark.parametrize("knobs", [
    {"rank_increment": 3, "top_h": 2, "target_total_rank": 10}, {"rank_increment": 2, "rank_pattern": {"a": 2, "b": 3}, "target_total_rank": 11, "top_h": 3},
    {"top_h": 5, "init_warmup": 0, "interval": 1, "target_r": 6}, {"init_r": 2, "target_r": 2}, {"init_warmup": 7, "interval": 4, "max_r": 3, "r": 9},
])  # fmt: skip
def test_the_budget_is_spent_exactly_and_only_when_growth_is_due(knobs):
    model, layers = toy(**knobs)
    config = model.peft_config["default"]
    history = [[config.init_r] * 3]
    optimizer = sgd(model.parameters())
    train(model, 40, optimizer, each=lambda step: history.append(list(model.rank_pattern().values())))
    assert sum(history[-1]) == config.target(3)
    limits = [config.rank_pattern.get(name, 3 if "max_r" in knobs else 6) for name in NAMES]
    for step, (before, now) in enumerate(itertools.pairwise(history)):
        assert sum(now) <= config.target(3) and all(n <= limit for n, limit in zip(now, limits, strict=True))
        assert all(0 <= b - a <= config.rank_increment for a, b in zip(before, now, strict=True))
        if now != before:
            assert step > config.init_warmup and step % config.interval == 0
            assert sum(a != b for a, b in zip(before, now, strict=True)) <= config.top_h
    assert not any(layer.scored for layer in layers.values())


def test_where_no_layer_matters_ties_go_by_name():
    model, _ = toy(advance_learn=False, target_modules=["c", "b", "a"], target_r=2)
    train(model, 4, torch.optim.SGD(model.parameters(), lr=0.0))
    assert set(model.importance().values()) == {0.0}
    assert model.rank_pattern() == {"a": 2, "b": 2, "c": 1}


def test_the_layer_that_needs_rank_gets_it():
    """Three maps side by side, of which the data ask only one to change, by a matrix of rank four."""

    class Beside(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(6, 6).double() for _ in NAMES)
            with torch.no_grad():
                for i, p in enumerate(self.parameters()):
                    p.copy_(noise(*p.shape, seed=i))

        def forward(self, x):
            return torch.cat([self.a(x), self.b(x), self.c(x)], 1)

    x = noise(64, 6, seed=40)
    y = Beside()(x).detach()
    y[:, 6:12] += x @ (noise(6, 4, seed=41) @ noise(4, 6, seed=42)).T
    model = get_peft_model(Beside(), IncreLoraConfig(target_modules=NAMES, interval=20, top_h=1, lr_restart=False, orth_reg_weight=0.01))
    train(model, 120, torch.optim.Adam(model.parameters(), lr=0.05), micro=lambda: [(x, y)])
    assert model.rank_pattern() == {"a": 1, "b": 4, "c": 1}


def trained_llama(steps=14, **knobs):
    usual = {"target_modules": ["q_proj", "k_proj", "down_proj"], "interval": 2, "top_h": 2, "alpha_pattern": {"k_proj": 5.0}, "lr_restart": False}
    model = get_peft_model(small_models.model("llama"), IncreLoraConfig(**(usual | knobs)))
    batch = small_models.batch("llama")
    batch = batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}
    tuner, optimizer = model.base_model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    model.train()
    tuner.begin_training(optimizer)
    for step in range(steps):
        tuner.begin_step(step)
        model(**batch).loss.backward()
        tuner.before_update(step, optimizer)
        optimizer.step()
        optimizer.zero_grad()
    tuner.end_training()
    return model


@torch.no_grad()
def logits(model):
    return model(**small_models.batch("llama")).logits


def test_what_was_grown_is_merged_saved_and_exported_without_its_reserve(tmp_path):
    model = trained_llama()
    ranks = model.rank_pattern()
    assert sum(ranks.values()) == 12 and len(set(ranks.values())) > 1
    in_training, kept = logits(model.train()), logits(model.eval())
    torch.testing.assert_close(in_training, kept, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path / "own")
    again = PeftModel.from_pretrained(small_models.model("llama"), tmp_path / "own")
    assert again.rank_pattern() == ranks and again.importance() == model.importance() and torch.equal(logits(again), kept)
    lora_config, tensors = model.base_model.to_lora()
    for name, layer in model.base_model.layers():
        n, alpha = ranks[name], 5.0 if name.endswith("k_proj") else 16.0
        A, E, B = (layer.part(part, "default").detach() for part in "AEB")
        assert torch.equal(tensors[f"base_model.model.{name}.lora_A.weight"], A[:n])
        torch.testing.assert_close(tensors[f"base_model.model.{name}.lora_B.weight"], B[:, :n] @ E[:n, 0].diag() * (alpha / (n + 1e-5)))
        assert lora_config.rank_pattern.get(name, lora_config.r) == n == lora_config.alpha_pattern.get(name, lora_config.lora_alpha)
    model.save_lora(tmp_path / "lora")
    torch.testing.assert_close(logits(PeftModel.from_pretrained(small_models.model("llama"), tmp_path / "lora")), kept, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(copy.deepcopy(model).merge_and_unload()), kept, rtol=1e-5, atol=1e-5)
    assert model.rank_pattern() == ranks


def test_sensitivity_is_a_mean_over_micro_batches():
    """Each by finite differences of its loss in every entry of what the layer adds."""
    model, layers = toy(interval=100)
    for layer in layers.values():
        layer.part("E", "default").data[:1] = 0.7
    halves = [(X[:4], Y[:4]), (X[4:], Y[4:])]
    train(model, 1, torch.optim.SGD(model.parameters(), lr=0.0), micro=lambda: halves)
    for layer in layers.values():
        delta, sensitivities = layer.factors("default").dense().detach(), []
        for x, y in halves:
            changed = model.eval()
            total = 0.0
            weight = layer.base_layer.weight
            for i in range(len(delta)):
                for j in range(delta.shape[1]):
                    losses = []
                    for h in (1e-5, -1e-5):
                        with torch.no_grad():
                            weight[i, j] += h
                            losses.append(float((changed(x) - y).square().mean()))
                            weight[i, j] -= h
                    total += abs(float(delta[i, j]) * (losses[0] - losses[1]) / 2e-5)
            sensitivities.append(total / math.sqrt(delta.numel()))
        s = sum(sensitivities) / 2
        sensitivity = 0.15 * s
        torch.testing.assert_close(layer.part("scores", "default").tolist(), [sensitivity, 0.15 * (s - sensitivity)], rtol=1e-4, atol=1e-12)


def test_gradient_checkpointing_gives_the_same_scores_once():
    found = []
    for way in (None, True, False):
        model = get_peft_model(small_models.model("llama"), IncreLoraConfig(target_modules=["q_proj", "down_proj"], interval=50, lr_restart=False))
        if way is not None:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": way})
        for _, layer in model.base_model.layers():
            layer.part("E", "default").data[:1] = 0.5
        batch = small_models.batch("llama")
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
        tuner = model.base_model
        model.train()
        tuner.begin_training(optimizer)
        model(**batch, labels=batch["input_ids"]).loss.backward()
        tuner.before_update(0, optimizer)
        found.append(model.importance())
    assert all(value > 0 for value in found[0].values())
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-4)


@pytest.mark.parametrize("make", [
    lambda ps: torch.optim.Adam(ps, lr=0.02, weight_decay=0.3), lambda ps: torch.optim.SGD(ps, lr=0.02, momentum=0.9, weight_decay=0.3), adamw,
], ids=["adam", "sgd", "adamw"])  # fmt: skip
def test_what_is_not_in_use_stays_put_whatever_the_optimizer(make):
    model, layers = toy(interval=4, target_r=2)
    start = {name: {part: layer.part(part, "default").detach().clone() for part in "AEB"} for name, layer in layers.items()}
    optimizer = make([p for p in model.parameters() if p.requires_grad])

    def look(step):
        if step < 1:
            return
        for name, layer in layers.items():
            n = model.rank_pattern()[name]
            assert torch.equal(layer.part("A", "default")[n + 1 :], start[name]["A"][n + 1 :])
            assert torch.equal(layer.part("B", "default")[:, n + 1 :], start[name]["B"][:, n + 1 :])
            assert not layer.part("E", "default")[n + 1 :].any()
            assert layer.part("E", "default")[n:].tolist()[0] in ([1e-5], [0.0])
            assert not torch.equal(layer.part("A", "default")[0], start[name]["A"][0])

    train(model, 14, optimizer, each=look)
    assert sum(model.rank_pattern().values()) == 6


def rows():
    return [{"input_ids": row, "labels": row} for row in torch.tensor(small_models.data("llama", rows=8, length=10))]


def trainer(folder, model, **arguments):
    usual = {
        "max_steps": 12, "per_device_train_batch_size": 2, "learning_rate": 0.02, "warmup_steps": 2, "report_to": [], "use_cpu": True, "save_steps": 6,
        "disable_tqdm": True, "weight_decay": 0.1,
    }  # fmt: skip
    arguments = transformers.TrainingArguments(str(folder), **(usual | arguments))
    return transformers.Trainer(model, arguments, train_dataset=rows(), callbacks=[AdapterCallback()])


def grown():
    return get_peft_model(small_models.model("llama"), IncreLoraConfig(target_modules=["q_proj", "down_proj"], lora_dropout=0.0))


def test_a_trainer_grows_by_itself_and_a_resumed_run_is_the_same(tmp_path):
    whole = grown()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # the schedule that is made from max_steps does reach the budget
        trainer(tmp_path, whole).train()
    assert sum(whole.rank_pattern().values()) == 8 and max(whole.rank_pattern().values()) > 1
    resumed = grown()
    trainer(tmp_path, resumed).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert resumed.rank_pattern() == whole.rank_pattern()
    state = resumed.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in whole.state_dict().items())
    middle = PeftModel.from_pretrained(small_models.model("llama"), tmp_path / "checkpoint-6")
    assert middle.rank_pattern() != {name: 1 for name in whole.rank_pattern()}


def test_processes_agree_on_the_ranks(tmp_path):
    """Two of them, each with data that would make another layer grow; and with the same data, as one process."""
    code = f"""
import json, sys
import torch
import torch.distributed as dist
sys.path.insert(0, {str(Path(__file__).parent)!r}); sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from test_increlora import NAMES, X, Y, sgd, toy
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + {str(tmp_path / "meet")!r}, rank=rank, world_size=2)
said = {{}}
for name, x, y in (("same", X, Y), ("other", X[4 * rank : 4 * rank + 4], Y[4 * rank : 4 * rank + 4])):
    model, layers = toy()
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    optimizer, tuner = sgd([p for p in model.parameters() if p.requires_grad]), model.base_model
    wrapped.train()
    tuner.begin_training(optimizer)
    own = []
    for step in range(16):
        tuner.begin_step(step)
        (wrapped(x) - y).square().mean().backward()
        own.append([float(layer.gathered["default"]) if "default" in layer.gathered else 0.0 for layer in layers.values()])
        tuner.before_update(step, optimizer)
        optimizer.step()
        optimizer.zero_grad()
    said[name] = [model.rank_pattern(), model.importance(), own]
print(json.dumps(said))
"""
    running = [subprocess.Popen([sys.executable, "-W", "ignore", "-c", code, str(rank)], stdout=subprocess.PIPE, text=True) for rank in range(2)]
    first, second = (json.loads(process.communicate(timeout=120)[0].splitlines()[-1]) for process in running)
    assert first["other"][:2] == second["other"][:2] and first["other"][2] != second["other"][2]
    assert first["same"] == second["same"]
    model, _ = toy()
    train(model, 16, sgd([p for p in model.parameters() if p.requires_grad]))
    assert model.rank_pattern() == first["same"][0]
    assert sum(first["other"][0].values()) == 9


@pytest.mark.parametrize("steps", [60, 97, 1000, 86_000])
@pytest.mark.parametrize(("layers", "knobs"), [
    (72, {"top_h": 18, "target_r": 8}), (6, {}), (12, {"rank_increment": 3, "target_r": 7}), (4, {"init_warmup": 9}), (5, {"init_r": 2, "target_r": 2}),
])  # fmt: skip
def test_a_schedule_made_from_the_length_of_training_spends_the_budget_by_half_of_it(steps, layers, knobs):
    config = IncreLoraConfig(target_modules=["q"], r=16, **knobs)
    warmup, interval = config.schedule(layers, steps)
    spent = config.init_r * layers
    for step in range(steps // 2 + 1):
        if step > warmup and step % interval == 0:
            spent += min(config.top_h * config.rank_increment, config.target(layers) - spent)
    assert spent == config.target(layers)
    assert knobs.get("init_warmup", interval) == warmup


def test_a_budget_that_training_is_too_short_for_is_warned_of():
    for total, short in ((9, True), (10, False)):  # growth at 3 and 6 and 9 gives the six that are missing
        model, _ = toy()
        model.base_model.total_steps = total
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train(model, total, sgd(model.parameters()))
        assert [("need 10 steps to reach a total rank of 9; training has 9" in str(w.message)) for w in caught] == [True] * short
        assert (sum(model.rank_pattern().values()) == 9) != short


@pytest.mark.parametrize(("knobs", "said"), [
    ({"top_h": 0}, "top_h is 0; it must be a whole number of at least 1"), ({"init_r": 3}, "target_r is 2; it must be a whole number of at least 3"),
    ({"target_r": 9}, "r is 8; it must be a whole number of at least 9"), ({"max_r": 1}, "max_r is 1; it must be a whole number of at least 2"),
    ({"rank_increment": 0}, "rank_increment is 0"), ({"interval": 0}, "interval is 0"), ({"init_warmup": -1}, "init_warmup is -1"),
    ({"init_r": 0}, "init_r is 0"), ({"beta1": 1.0}, "beta1 is 1.0"), ({"beta2": 0}, "beta2 is 0"), ({"orth_reg_weight": -0.1}, "orth_reg_weight is -0.1"),
    ({"target_total_rank": 0}, "target_total_rank is 0"), ({"scale_mode": "none"}, "it must be one of active, fixed"),
])  # fmt: skip
def test_bad_knobs(knobs, said):
    with pytest.raises(ValueError, match=said):
        IncreLoraConfig(target_modules=["q"], **knobs)


def test_targets_that_the_layers_cannot_reach_and_unknown_lengths_are_refused():
    for knobs in ({"target_total_rank": 2}, {"target_total_rank": 19}, {"rank_pattern": {"a": 1, "b": 1}, "target_total_rank": 9}):
        with pytest.raises(ValueError, match="the target is a total rank of .*; 3 layers can have 3 .init_r. to (18|8) .r, rank_pattern. together"):
            toy(**knobs)
    with pytest.raises(ValueError, match="r of a is 1; it must be a whole number of at least 2"):
        toy(init_r=2, rank_pattern={"a": 1})
    for knobs, said in (({"lr_restart": True}, "lr_restart needs the length of training"), ({"interval": None}, "interval is null and the length")):
        model, _ = toy(**knobs)
        with pytest.raises(ValueError, match=said):
            model.base_model.begin_training(sgd(model.parameters()))
