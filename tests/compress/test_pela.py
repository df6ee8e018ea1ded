"""What PELA promises beyond the contract."""

import copy
import math

import numpy as np
import pytest
import torch
import transformers

import small_models
from echelon.compress import PELA, LowRankLinear, WeightPerturbation, from_config
from echelon.models.modules import factored, put


def layer(m, p, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return torch.nn.Linear(p, m)


def whole(family="opt", name="model.decoder.layers.0.fc1"):
    """A model and a copy in which one layer is two factors that are exactly the layer."""
    teacher = small_models.model(family)
    student = copy.deepcopy(teacher)
    dense = student.get_submodule(name)
    made = LowRankLinear(dense.in_features, dense.out_features, dense.in_features, True)
    made.fill(dense.weight, torch.eye(dense.in_features), dense.bias)
    put(student, name, made)
    return student, teacher, made, teacher.get_submodule(name)


@pytest.mark.parametrize("ratio", [1.01, 1.5, 2, 3.7])
def test_ranks_are_the_largest_that_keep_a_share_of_one_in_c(ratio):
    model = small_models.model("llama")
    shapes = {name: module.weight.shape for name, module in model.named_modules() if name.endswith("_proj")}
    report = PELA(compress_ratio=ratio).compress(model).report
    assert set(report.modules) == set(shapes)
    for name, told in report.modules.items():
        m, p = shapes[name]
        fitting = [r for r in range(1, min(m, p) + 1) if r * (m + p) * ratio <= m * p + 1e-9]
        assert told["rank"] == fitting[-1]
        module = model.get_submodule(name)
        assert module.up.weight.numel() + module.down.weight.numel() <= m * p / ratio


@pytest.mark.parametrize(("m", "p"), [(20, 12), (12, 20)])
def test_the_product_is_the_best_of_its_rank_and_both_factors_have_columns_of_norm_root_sigma(m, p):
    dense = layer(m, p)
    made = PELA().factor(dense.weight, dense.bias, None, 5)
    u, s, v = np.linalg.svd(dense.weight.detach().double().numpy(), full_matrices=False)
    np.testing.assert_allclose(made.up @ made.down, (u[:, :5] * s[:5]) @ v[:5], atol=1e-6)
    np.testing.assert_allclose(made.up.norm(dim=0).square(), s[:5], rtol=1e-6)
    np.testing.assert_allclose(made.down.norm(dim=1).square(), s[:5], rtol=1e-6)


def test_a_rank_of_zero_stays_dense_with_a_warning_or_an_error():
    model = small_models.model("llama")  # keys and values are 16 x 32
    with pytest.warns(UserWarning, match="cannot compress 4 of its targets.*k_proj: its rank would be 0"):
        report = PELA(compress_ratio=12).compress(model).report
    assert {entry["name"].rpartition(".")[2] for entry in report.skipped} == {"k_proj", "v_proj"}
    assert isinstance(model.model.layers[0].self_attn.k_proj, torch.nn.Linear) and {told["rank"] for told in report.modules.values()} == {1}
    with pytest.raises(ValueError, match="rank would be 0"):
        PELA(compress_ratio=12, strict=True).compress(small_models.model("llama"))


def test_biases_are_kept_and_excluded_names_and_tiny_heads_are_untouched():
    dense, model = small_models.model("vit"), small_models.model("vit")
    report = PELA(exclude_modules=["attention.o_proj", r"1.*intermediate"], target_modules=".*").compress(model).report
    names = {name for name, _ in factored(model)}
    assert names == set(report.modules) and names
    for name, module in dense.named_modules():
        if isinstance(module, torch.nn.Linear):
            found = model.get_submodule(name)
            left = "attention.o_proj" in name or ("intermediate" in name and ".1." in name) or name == "classifier"  # 5 outputs
            assert (name not in names) == left
            assert torch.equal(found.bias, module.bias)
            assert not left or torch.equal(found.weight, module.weight)
    reasons = {entry["name"]: entry["reason"] for entry in report.skipped}
    assert "min_out_features=10" in reasons["classifier"]
    with pytest.raises(ValueError, match="leave no layer"):
        PELA(exclude_modules=["layer"]).compress(small_models.model("vit"))


def test_a_layer_in_two_places_is_factored_once():
    model = small_models.model("gpt2")
    model.transformer.h[1].mlp = model.transformer.h[0].mlp
    report = PELA().compress(model).report
    assert model.transformer.h[1].mlp.c_fc is model.transformer.h[0].mlp.c_fc
    assert isinstance(model.transformer.h[0].mlp.c_fc, LowRankLinear)
    assert len(report.modules) == 6 and report.parameters_after == sum(p.numel() for p in model.parameters())


def test_at_full_rank_features_agree_and_the_penalty_is_eps_squared():
    student, teacher, *_ = whole()
    distiller = PELA(perturb_eps=0.01).distiller(student, teacher)
    _, terms = distiller.loss(small_models.batch("opt"))
    assert terms["features"] == 0 and terms["perturbation"] == pytest.approx(1e-4, rel=1e-5)
    assert WeightPerturbation(student, teacher, eps=0.01, hinge=True)() == 0


@pytest.mark.parametrize("norm", ["max_abs", "max_row_sum", "fro"])
@pytest.mark.parametrize("hinge", [False, True])
def test_the_penalty_and_its_gradient_are_those_of_the_formula(norm, hinge):
    teacher, student = small_models.model("opt"), small_models.model("opt")
    PELA(target_modules=["fc1", "k_proj"]).compress(student)
    made = [(module, teacher.get_submodule(name).weight) for name, module in factored(student)]
    gaps = [module.up.weight @ module.down.weight - weight for module, weight in made]
    norms = {"max_abs": lambda gap: gap.abs().max(), "max_row_sum": lambda gap: torch.linalg.matrix_norm(gap, math.inf), "fro": torch.linalg.matrix_norm}
    eps = float(sum(norms[norm](gap).detach() for gap in gaps)) / 4  # above some deviations, below others
    excess = torch.stack([norms[norm](gap) for gap in gaps]) - eps
    expected = torch.where((excess < 0) & hinge, 0, excess).square().sum() / 4
    parameters = [p for module, _ in made for p in (module.up.weight, module.down.weight)]
    value = WeightPerturbation(student, teacher, eps, norm, hinge)()
    torch.testing.assert_close(value, expected)
    for found, wanted in zip(torch.autograd.grad(value, parameters), torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_the_gradient_of_the_largest_entry_is_in_one_row_and_one_column():
    student, teacher = small_models.model("opt"), small_models.model("opt")
    PELA(target_modules=["fc1"]).compress(student)
    WeightPerturbation(student, teacher)().backward()
    for name, module in factored(student):
        gap = (module.up.weight @ module.down.weight - teacher.get_submodule(name).weight).abs()
        row, column = np.unravel_index(int(gap.argmax()), gap.shape)
        assert module.up.weight.grad.any(1).nonzero().flatten().tolist() == [row]
        assert module.down.weight.grad.any(0).nonzero().flatten().tolist() == [column]
        assert module.up.weight.grad[row].all() and module.down.weight.grad[:, column].all()


def test_the_penalty_may_be_left_out_at_most_steps():
    student, teacher, *_ = whole()
    penalty = WeightPerturbation(student, teacher, every=3)
    assert [penalty() is not None for _ in range(7)] == [True, False, False, True, False, False, True]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_training_inside_compress_brings_the_features_back(family):
    original, data = small_models.model(family), small_models.data(family)
    state = torch.random.get_rng_state()
    seen, trained = [], small_models.model(family)
    knobs = {"steps": 60, "learning_rate": 3e-3, "batch_size": 12}
    report = PELA(**knobs).compress(trained, data, on_progress=lambda e: seen.append(e["step"])).report
    assert torch.equal(state, torch.random.get_rng_state()) and seen.count("training") == 60
    plain = PELA().compress(small_models.model(family)).model
    assert report.tokens == 12 * 24 and not trained.training and all(p.grad is None for p in trained.parameters())
    ids = torch.tensor(data)
    with torch.no_grad():
        losses = [float(model(input_ids=ids, labels=ids).loss) for model in (original, plain, trained)]
        blocks = [model(input_ids=ids, output_hidden_states=True).hidden_states[1] for model in (original, plain, trained)]
    assert losses[2] < losses[1]
    assert (blocks[2] - blocks[0]).norm() < 0.95 * (blocks[1] - blocks[0]).norm()
    again = PELA(**knobs).compress(small_models.model(family), data).model
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), again.parameters(), strict=True))


def test_models_without_text_learn_from_labels_or_from_features_alone():
    shown = [batch | {"labels": torch.arange(4)} for batch in small_models.data("vit")]
    PELA(steps=3, perturb_weight=0).compress(small_models.model("vit"), shown)
    PELA(steps=3, perturb_weight=0).compress(small_models.model("vit"), small_models.data("vit"))
    PELA(steps=3).compress(small_models.model("bert"), small_models.data("bert"))
    with pytest.raises(ValueError, match="nothing to learn from"):
        PELA(steps=3, perturb_weight=0, feature_weight=0).compress(small_models.model("vit"), small_models.data("vit"))
    with pytest.raises(ValueError, match="needs calibration data"):
        PELA(steps=3).compress(small_models.model("vit"))


def test_the_surgery_without_its_values_takes_a_trained_state():
    model = small_models.model("qwen3")
    PELA(steps=5, learning_rate=1e-2).compress(model, small_models.data("qwen3"))
    with torch.random.fork_rng():
        empty = from_config(model.config).eval()
    assert not torch.equal(small_models.logits(empty, "qwen3"), small_models.logits(model, "qwen3"))
    empty.load_state_dict(model.state_dict())
    assert torch.equal(small_models.logits(empty, "qwen3"), small_models.logits(model, "qwen3"))


@pytest.mark.parametrize(
    ("knobs", "error"),
    [
        ({"compress_ratio": 1.0}, "compress_ratio is 1.0; it must be above 1"), ({"compress_ratio": math.nan}, "compress_ratio is nan"),
        ({"exclude_modules": ["("]}, r"exclude_modules holds '\('"), ({"min_out_features": -1}, "min_out_features is -1"), ({"steps": -1}, "steps is -1"),
        ({"perturb_weight": -1}, "perturb_weight is -1"), ({"perturb_eps": -1e-3}, "perturb_eps is -0.001"), ({"perturb_norm": "inf"}, "perturb_norm is 'inf'"),
        ({"perturb_every": 0}, "perturb_every is 0"), ({"feature_weight": -1}, "feature_weight is -1"), ({"logit_weight": -1}, "logit_weight is -1"),
        ({"feature_layers": []}, "feature_layers is \\[\\]"), ({"learning_rate": 0}, "learning_rate is 0"), ({"weight_decay": -1}, "weight_decay is -1"),
    ],
)  # fmt: skip
def test_bad_knobs_are_named(knobs, error):
    with pytest.raises(ValueError, match=error):
        PELA(**knobs)


def test_it_needs_factored_layers_of_the_teacher():
    plain = small_models.model("opt")
    with pytest.raises(ValueError, match="no factored layer that is dense in the teacher"):
        PELA().distiller(plain, small_models.model("opt"))
    assert isinstance(plain, transformers.OPTForCausalLM)
