"""The papers' formulas: against the published shapes, and against the bytes that a real optimizer holds."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import small_models
from echelon.train.layers import LoRA, LowRank, ReLoRA
from echelon.train.memory import formula, on_meta
from echelon.train.optimizers import Adafactor, AdamW, GaLore

SHAPES = {"60M": (512, 1376, 8, 8), "130M": (768, 2048, 12, 12), "350M": (1024, 2736, 24, 16), "1B": (2048, 5461, 24, 32)}
RANKS = {"60M": 128, "130M": 256, "350M": 256, "1B": 512}
PUBLISHED = {  # weights and Adam's state in bfloat16, decimal gigabytes, from the shapes of arXiv 2505.22922
    "full": (0.35, 0.80, 2.21, 8.03), "low_rank": (0.26, 0.56, 1.11, 3.66), "galore": (0.28, 0.61, 1.39, 4.76), "lora": (0.31, 0.73, 1.72, 6.07),
}  # fmt: skip
COUNTERS = 3 * 8  # step, index and offset of every parameter that was stepped


def paper_model(size):
    width, inner, layers, heads = SHAPES[size]
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            LlamaConfig(vocab_size=32000, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads)
        )


@pytest.mark.parametrize("size", list(SHAPES))
def test_the_table_of_published_shapes(size):
    model, rank, place = paper_model(size), RANKS[size], list(SHAPES).index(size)
    methods = {"full": AdamW(), "low_rank": LowRank(rank=rank), "galore": GaLore(rank=rank), "lora": LoRA(r=rank)}
    for name, method in methods.items():
        assert formula(model, method).published / 1e9 == pytest.approx(PUBLISHED[name][place], abs=0.0051), name
    assert all(p.is_meta for p in model.parameters()) and not hasattr(model.config, "quantization_config")


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])  # a square and two oblong matrices, Conv1D, tied embeddings
@pytest.mark.parametrize(
    "method",
    [
        AdamW(), Adafactor(), Adafactor(betas=(0.9, 0.999)), GaLore(rank=8), GaLore(rank=8, proj_type="reverse_std"), GaLore(rank=8, proj_type="full"),
        GaLore(rank=8, proj_type="left"), GaLore(rank=40), GaLore(rank=8, base="adafactor"), GaLore(rank=8, base="adafactor", betas=(0.0, 0.999)),
        LowRank(rank=8), LoRA(r=8), ReLoRA(r=8),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:rank 40")
def test_the_formula_is_what_a_real_optimizer_holds(family, method):
    model = small_models.model(family)
    told = formula(model, method)
    if hasattr(method, "convert"):
        method.convert(model)
    optimizer = method.optimizer(model)
    ids = torch.tensor(small_models.data(family, rows=2, length=12))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert told.weights == sum(p.numel() for p in model.parameters())
    assert told.gradients == sum(p.grad.numel() for p in model.parameters() if p.grad is not None)
    stepped = sum(bool(state) for state in optimizer.state.values())
    assert 4 * told.state == optimizer.state_bytes() - COUNTERS * stepped
    parts = told.bytes(4)
    assert parts["total"] == 4 * (told.weights + told.gradients + told.state) and told.bytes(2, 1)["optimizer_state"] == told.state


def test_the_model_is_left_alone_and_another_optimizer_may_train_a_layer():
    model = small_models.model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain, small = formula(model, LowRank(rank=8)), formula(model, LowRank(rank=8), optimizer=Adafactor())
    assert plain.weights == small.weights and plain.state == 2 * plain.gradients and small.state < plain.state
    assert model.state_dict().keys() == before.keys() and all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_a_copy_without_values_keeps_ties_and_what_trains():
    model = small_models.model("qwen2")
    model.model.norm.weight.requires_grad_(False)
    shapes = on_meta(model)
    assert shapes.lm_head.weight is shapes.model.embed_tokens.weight and shapes.lm_head.weight.is_meta
    assert not shapes.model.norm.weight.requires_grad and shapes.model.layers[0].mlp.up_proj.weight.requires_grad
    assert not any(p.is_meta for p in model.parameters())
