"""What every registered decoder owes: six architectures, padding, company, determinism, the custom_generate contract, clear errors."""

import dataclasses

import pytest
import torch

import tiny
from echelon.errors import UserError
from echelon.generate import generate
from echelon.registry import build, cards, get
from echelon.score import Scorer

FAMILIES = list(tiny.FAMILIES)
DECODERS = [card.name for card in cards("decoder")]
ENCODER_DECODER_TOO = [(name, family) for name in DECODERS for family in FAMILIES if (name, family) != ("contrastive_decoding", "t5")]


class Shortness(Scorer):
    """Stands in for a trained ranker."""

    def score(self, items):
        return torch.tensor([-float(len(item.text)) for item in items])


def decoder(name):
    """With few samples, and a scorer that needs no training."""
    cheap = {"scorer": Shortness(), "num_samples": 3, "segment_tokens": 4, "num_beams": 2}
    return get(name, "decoder")(**{k.name: cheap[k.name] for k in dataclasses.fields(get(name, "decoder")) if k.name in cheap})


@pytest.mark.parametrize(("name", "family"), ENCODER_DECODER_TOO)
def test_ragged_prompts_give_what_each_gives_alone_and_twice_the_same(name, family):
    made = decoder(name)
    arguments = {"tokenizer": tiny.tokenizer(), "max_new_tokens": 6, "seed": 1}
    together = made.generate(tiny.model(family), tiny.prompts(3), **arguments)
    assert all(1 <= len(ids) <= 6 for ids in together.sequences)
    assert together.sequences == made.generate(tiny.model(family), tiny.prompts(3), **arguments).sequences
    assert together.sequences[0] == made.generate(tiny.model(family), tiny.prompts(3)[:1], **arguments).sequences[0]
    assert together.stats.forward_tokens > 0 and together.stats.seconds > 0


@pytest.mark.parametrize(("name", "family"), [(name, family) for name in DECODERS for family in ("llama", "gpt2", "opt")])
def test_transformers_generate_takes_it_and_left_padding_does_not_matter(name, family):
    model, made = tiny.model(family), decoder(name)
    prompts = tiny.prompts(2)
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    settings = {"max_new_tokens": 5, "do_sample": False, "custom_generate": made, "text_codec": tiny.tokenizer(), "seed": 3}
    out = model.generate(ids, attention_mask=mask, **settings)
    direct = made.generate(model, prompts, tiny.tokenizer(), max_new_tokens=5, seed=3).sequences
    assert out[:, :width].tolist() == ids.tolist()
    for row, expected in zip(out[:, width:].tolist(), direct, strict=True):
        assert row == expected + [0] * (len(row) - len(expected))


@pytest.mark.parametrize("name", DECODERS)
def test_the_global_random_state_is_left_alone(name):
    before = torch.random.get_rng_state()
    decoder(name).generate(tiny.model("llama"), tiny.prompts(2), tiny.tokenizer(), max_new_tokens=4)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("name", DECODERS)
def test_no_prompts_give_no_texts_and_an_empty_one_begins_with_the_first_token(name):
    made, model, tokenizer = decoder(name), tiny.model("llama"), tiny.tokenizer()
    assert made.generate(model, [], tokenizer).sequences == []
    assert made.generate(model, [""], tokenizer, max_new_tokens=3).sequences == made.generate(model, [[2]], tokenizer, max_new_tokens=3).sequences


@pytest.mark.parametrize("name", DECODERS)
def test_a_model_in_bfloat16_writes_too(name):
    import copy

    model = copy.deepcopy(tiny.model("qwen2")).to(torch.bfloat16)
    assert len(decoder(name).generate(model, tiny.prompts(2), tiny.tokenizer(), max_new_tokens=4).texts) == 2


@pytest.mark.parametrize("name", DECODERS)
def test_bad_requests_are_one_clear_error(name):
    made, model, tokenizer = decoder(name), tiny.model("llama"), tiny.tokenizer()
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        made.generate(model, tiny.prompts(1), tokenizer, max_new_tokens=0)
    with pytest.raises(ValueError, match="give a list of prompts"):
        made.generate(model, "w1 w2", tokenizer)
    with pytest.raises(ValueError, match="text prompts need a tokenizer"):
        made.generate(model, ["w1"], max_new_tokens=2)
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        made.generate(model, [[]], tokenizer, max_new_tokens=2)
    with pytest.raises(UserError, match=r"unknown knob 'no_such_knob'"):
        build(name, "decoder", {"no_such_knob": 1})


@pytest.mark.parametrize("name", DECODERS)
def test_a_prompt_longer_than_the_context_loses_its_beginning_with_a_warning(name):
    made, model, tokenizer = decoder(name), tiny.model("llama"), tiny.tokenizer()
    long = [4 + i % 30 for i in range(150)]
    with pytest.warns(UserWarning, match="prompts longer than 124 tokens lose their beginning"):
        cut = made.generate(model, [long], tokenizer, max_new_tokens=4)
    assert cut.sequences == made.generate(model, [long[-124:]], tokenizer, max_new_tokens=4).sequences


def test_a_tokenizer_without_pad_and_end_tokens_will_do():
    import copy

    bare = copy.deepcopy(tiny.tokenizer())
    bare.pad_token = bare.eos_token = None
    model = copy.deepcopy(tiny.model("gpt2"))
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = model.config.pad_token_id = None
    made = generate(model, ["w1 w2 w3", "w4"], "nucleus", bare, max_new_tokens=7)
    assert [len(ids) for ids in made.sequences] == [7, 7]


def test_a_decoder_is_found_by_name_with_its_knobs():
    by_name = generate(tiny.model("llama"), tiny.prompts(2), "top_k", tiny.tokenizer(), max_new_tokens=5, top_k=3, seed=4)
    assert by_name.sequences == get("top_k", "decoder")(top_k=3).generate(tiny.model("llama"), tiny.prompts(2), max_new_tokens=5, seed=4).sequences
    with pytest.raises(UserError, match="did you mean 'top_k'"):
        generate(tiny.model("llama"), tiny.prompts(1), "topk", tiny.tokenizer())
