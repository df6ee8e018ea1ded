"""What EoRA promises beyond the contract: the least output error of its rank, whatever the solver, from the inputs that really arrive."""

import copy

import pytest
import torch

import small_models
from echelon.calibrate import Moments, calibration_batches
from echelon.compress import RTN, ActS, EoRA, LoRC, Pruning
from echelon.compress.eora import DecayedMoment, MeanMagnitude

Q = RTN(w_bits=3, group_size=16)
FIRST = "model.layers.0.self_attn.q_proj"


def problem(m=20, n=14, tokens=300, seed=0, rank=None):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, rank or n, generator=generator, dtype=torch.float64) @ torch.randn(rank or n, n, generator=generator, dtype=torch.float64)
    return torch.randn(m, n, generator=generator, dtype=torch.float64), x


def seen(x, kind=Moments.of):
    made = kind(x.shape[1], "cpu")
    made.update(x)
    return made


def lost(error, factors, x):
    return float((x @ (error - factors.up @ factors.down).T).square().sum(1).mean())


@pytest.mark.parametrize("solver", ["eigh", "cholesky", "gram"])
@pytest.mark.parametrize("rank", [1, 5, 13])
def test_what_is_left_of_the_outputs_is_the_sum_of_dropped_squared_singular_values_of_x_e(solver, rank):
    error, x = problem()
    values = torch.linalg.svdvals(x @ error.T) / len(x) ** 0.5
    assert lost(error, EoRA(solver=solver).factor(error, seen(x), rank), x) == pytest.approx(float(values[rank:].square().sum()), rel=1e-4)


def test_all_solvers_give_one_product_and_the_scale_of_the_data_does_not_matter():
    error, x = problem()
    dense = [EoRA(solver=s).factor(error, seen(scale * x), 4).dense() for s in ("eigh", "cholesky", "gram") for scale in (1.0, 30.0)]
    for other in dense[1:]:
        torch.testing.assert_close(other, dense[0], rtol=1e-8, atol=1e-8)


def test_it_beats_act_s_and_the_plain_svd_on_the_data_that_it_saw():
    error, x = problem(seed=3)
    for rank in (2, 6):
        own = lost(error, EoRA().factor(error, seen(x), rank), x)
        assert own < lost(error, ActS().factor(error, seen(x, MeanMagnitude), rank), x)
        assert own < lost(error, LoRC().factor(error, None, rank), x)


def test_white_inputs_give_the_plain_svd():
    error, _ = problem()
    white = Moments(10, torch.zeros(14, dtype=torch.float64), 50 * torch.eye(14, dtype=torch.float64))
    torch.testing.assert_close(EoRA().factor(error, white, 5).dense(), LoRC().factor(error, None, 5).dense(), rtol=1e-9, atol=1e-9)


def test_act_s_is_the_svd_in_scaled_inputs():
    error, x = problem()
    s = x.abs().mean(0)
    u, values, v = torch.linalg.svd(error * s)
    expected = (u[:, :4] * values[:4]) @ v[:4] / s
    torch.testing.assert_close(ActS().factor(error, seen(x, MeanMagnitude), 4).dense(), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("solver", ["eigh", "gram"])
def test_full_rank_is_exact_on_the_inputs_seen_and_everywhere_if_they_span_all(solver):
    error, x = problem(rank=5)
    made = EoRA(solver=solver).factor(error, seen(x), 14)
    assert lost(error, made, x) < 1e-9 * float((x @ error.T).square().sum(1).mean())
    unseen = torch.linalg.svd(x)[2][5:]
    leaves = (unseen @ made.dense().T).norm() / (unseen @ error.T).norm()
    assert float(leaves) < 1e-6 if solver == "eigh" else float(leaves) > 1e-3  # the pseudo-inverse leaves alone what it has not seen
    error, x = problem()
    torch.testing.assert_close(EoRA(solver=solver).factor(error, seen(x), 14).dense(), error, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("solver", ["eigh", "gram"])
def test_factors_are_balanced(solver):
    error, x = problem()
    made = EoRA(solver=solver).factor(error, seen(x), 6)
    if solver == "gram":
        torch.testing.assert_close(made.up.norm(dim=0), made.down.norm(dim=1))
    else:
        values = torch.linalg.svdvals(x @ error.T / len(x) ** 0.5)
        torch.testing.assert_close(made.up.norm(dim=0), values[:6].sqrt(), rtol=1e-6, atol=1e-9)


def test_cholesky_says_what_to_use_where_directions_are_missing():
    error, x = problem(rank=5)
    with pytest.raises(ValueError, match="solver must be eigh or gram"):
        EoRA(solver="cholesky").factor(error, seen(x[:4]), 3)


def hooked(model, name, batches):
    """Inputs of a layer as plain hooks see them, pads left out."""
    found = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda m, a: found.append(a[0].detach()))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    return torch.cat([x[batch["attention_mask"].bool()] for x, batch in zip(found, batches, strict=True)])


def test_each_block_is_solved_in_its_original_form_on_what_the_repaired_blocks_before_it_make():
    shown = calibration_batches([[5, 6, 7, 8] * 6, [9, 10, 11] * 4, [12, 5] * 11] * 4)  # rows of three lengths: pads
    original, model = small_models.model("llama"), Q.compress(small_models.model("llama")).model
    result = EoRA(r=4).compensate(original, model, shown)
    # The same by hand: block 0 repaired and block 1 original, put together in one plain model.
    mixed = small_models.model("llama")
    base = result.model.get_base_model()
    for name, module in base.model.layers[0].named_modules():
        if hasattr(module, "lora_A"):
            weight = module.base_layer.dense() + module.lora_B["default"].weight @ module.lora_A["default"].weight
            mixed.model.layers[0].get_submodule(name).weight.data.copy_(weight)
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"):
        full = f"model.layers.1.{name}"
        x, module = hooked(mixed, full, shown.batches).double(), base.get_submodule(full)
        assert len(x) == shown.tokens
        error = original.get_submodule(full).weight.double() - module.base_layer.dense().double()
        left = error - module.lora_B["default"].weight.double() @ module.lora_A["default"].weight.double()
        values = torch.linalg.svdvals(x @ error.T) / len(x) ** 0.5
        told = result.report.modules[full]
        assert told["before"] == pytest.approx(float(values.square().sum()), rel=1e-3)
        assert told["after"] == pytest.approx(float((x @ left.T).square().sum(1).mean()), rel=1e-3)
        assert told["after"] == pytest.approx(float(values[4:].square().sum()), rel=1e-3) == told["bound"]


def test_without_the_sequence_all_inputs_are_those_of_the_original_model():
    shown = calibration_batches(small_models.data("llama"))
    original = small_models.model("llama")
    result = EoRA(r=4, sequential=False).compensate(original, Q.compress(small_models.model("llama")).model, shown)
    name = "model.layers.1.mlp.down_proj"
    x, module = hooked(original, name, shown.batches).double(), result.model.get_base_model().get_submodule(name)
    values = torch.linalg.svdvals(x @ (original.get_submodule(name).weight.double() - module.base_layer.dense().double()).T) / len(x) ** 0.5
    assert result.report.modules[name]["after"] == pytest.approx(float(values[4:].square().sum()), rel=1e-3)


def test_order_matters_with_decay_alone():
    rows = small_models.data("llama", rows=10)

    def made(data, **knobs):
        result = EoRA(r=4, **knobs).compensate(small_models.model("llama"), Q.compress(small_models.model("llama")).model, calibration_batches(data))
        module = result.model.get_base_model().get_submodule(FIRST)
        return module.lora_B["default"].weight @ module.lora_A["default"].weight

    torch.testing.assert_close(made(rows), made(rows[::-1]), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(made(rows, accumulate="decay"), made(rows[::-1], accumulate="decay"), rtol=1e-2, atol=1e-3)


def test_decay_is_the_running_sum_of_the_published_code():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 5, 3, generator=generator)
    mask = torch.ones(6, 5, dtype=torch.bool)
    mask[2, 3:] = False
    made = DecayedMoment(3, "cpu", 6)
    made.update(x[:4], mask[:4])
    made.update(x[4:], None)
    expected = torch.zeros(3, 3, dtype=torch.float64)
    for row, shown in zip(x.double(), mask, strict=True):
        expected = expected * 6 / 7 + row[shown].T @ row[shown] / 6
    torch.testing.assert_close(made.second_moment, expected)


def test_a_rank_for_each_kind_of_layer_and_none_for_what_is_not_named():
    data = small_models.data("llama")
    result = EoRA(r={"mlp": 3, "q_proj": 5}).compensate(small_models.model("llama"), Q.compress(small_models.model("llama")).model, data)
    ranks = {name.rpartition(".")[2]: told["rank"] for name, told in result.report.modules.items()}
    assert ranks == {"q_proj": 5, "gate_proj": 3, "up_proj": 3, "down_proj": 3}
    for name, told in result.report.modules.items():
        module = result.model.get_base_model().get_submodule(name)
        assert module.r["default"] == told["rank"] and module.scaling["default"] == 1
    with pytest.raises(ValueError, match="'mpl' is for none of the layers"):
        EoRA(r={"mpl": 3}).fit(small_models.model("llama"), Q.compress(small_models.model("llama")).model, data)


def test_ranks_by_energy_cost_no_more_and_leave_less():
    # One layer is hurt far more than the rest.
    damaged = RTN(w_bits=2, group_size=-1, target_modules=["up_proj"]).compress(small_models.model("llama")).model
    damaged = RTN(w_bits=8, group_size=16).compress(damaged).model
    data = small_models.data("llama")
    even = EoRA(r=4, sequential=False).compensate(small_models.model("llama"), copy.deepcopy(damaged), data).report
    found = EoRA(r=4, sequential=False, rank_allocation="energy").compensate(small_models.model("llama"), damaged, data).report
    assert found.parameters <= even.parameters
    total = [sum(told["after"] for told in report.modules.values()) for report in (even, found)]
    assert total[1] < 0.7 * total[0]
    ranks = {name.rpartition(".")[2]: told["rank"] for name, told in found.modules.items()}
    assert ranks["up_proj"] > 4 > ranks["k_proj"]


@pytest.mark.parametrize(("bits", "worse"), [(8, 1.01), (4, 1.6), (3, 3)])
def test_factors_of_few_bits_lie_on_their_grid(bits, worse):
    data = small_models.data("llama")
    fine = EoRA(r=4).compensate(small_models.model("llama"), Q.compress(small_models.model("llama")).model, data).report
    result = EoRA(r=4, factor_bits=bits).compensate(small_models.model("llama"), Q.compress(small_models.model("llama")).model, data)
    for module in result.model.modules():
        if hasattr(module, "lora_A"):
            for factor in (module.lora_A["default"].weight, module.lora_B["default"].weight):
                assert all(len(row.unique()) <= 2**bits - 1 for row in factor.detach())
    before, after = (sum(told["after"] for told in report.modules.values()) for report in (fine, result.report))
    assert before <= after <= worse * before
    assert result.report.packed_bytes < result.report.bytes


def test_task_text_takes_its_share_of_the_rows():
    original = small_models.model("llama")
    general, task = [[5] * 8 for _ in range(20)], [[9] * 8 for _ in range(20)]

    def shown(share, **texts):
        made = EoRA(r=2, nsamples=8, seqlen=8, task_fraction=share)._calibration(original, texts.get("general"), texts.get("task"), None, 0)
        rows = [int(row[0]) for batch in made.batches for row in batch["input_ids"]]
        return rows.count(5), rows.count(9)

    assert shown(0.25, general=general, task=task) == (6, 2)
    assert shown(0.25, general=general) == (8, 0) and shown(0.25, task=task) == (0, 8)
    assert shown(1.0, general=general, task=task) == (0, 8) and shown(0.0, general=general, task=task) == (8, 0)
    result = EoRA(r=2, nsamples=8, seqlen=8).compensate(original, Q.compress(small_models.model("llama")).model, general, task_data=task)
    assert result.report.source == "20 list items and 20 list items" and result.report.tokens == 64


def test_the_zero_pattern_of_a_pruned_layer_stays():
    model = Pruning(pattern="2:4").compress(small_models.model("llama")).model
    before = {name: module.dense() == 0 for name, module in model.named_modules() if hasattr(module, "mask")}
    tuned = EoRA(r=4).fit(small_models.model("llama"), model, small_models.data("llama"))
    after = {name.replace(".base_layer", ""): m.dense() == 0 for name, m in tuned.get_base_model().named_modules() if hasattr(m, "mask")}
    assert before and all(torch.equal(after[name], zeros) for name, zeros in before.items())


@pytest.mark.parametrize(
    ("knobs", "error"),
    [
        ({"r": 0}, "r is 0"), ({"r": {"mlp": 0}}, "r is 0"), ({"accumulate": "mean"}, "accumulate is 'mean'"), ({"solver": "svd"}, "solver is 'svd'"),
        ({"rtol": 1.0}, "rtol is 1.0"), ({"factor_bits": 5}, "factor_bits is 5"), ({"task_fraction": 1.5}, "task_fraction is 1.5"),
        ({"rank_allocation": "even"}, "rank_allocation is 'even'"), ({"nsamples": 0}, "nsamples is 0"),
    ],
)  # fmt: skip
def test_bad_knobs_are_named(knobs, error):
    with pytest.raises(ValueError, match=error):
        EoRA(**knobs)
