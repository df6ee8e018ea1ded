"""A model on this machine as an engine: what it scores and writes is what one plain forward after the other would give."""

import functools
import itertools
import math

import numpy as np
import peft
import pytest
import torch
import transformers

import small_models
import tiny
from echelon.llm import LocalEngine, Permutation, Prompt, parse_permutation, resolve
from echelon.llm.base import Engine
from echelon.llm.permutation import ranking_text
from echelon.models import load

REUSING = ["llama", "gpt2", "opt", "gpt_neox", "qwen3", "phi"]
ALONE = ["mistral", "t5", "mamba", "bloom", "gpt_neo"]
WIDE = {"vocab_size": tiny.VOCAB, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}


@functools.cache
def network(family):
    if family == "t5":
        return tiny.model("t5")
    if family in ("mamba", "bloom", "gpt_neo"):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            if family == "mamba":
                made = transformers.MambaForCausalLM(transformers.MambaConfig(**WIDE, hidden_size=16, num_hidden_layers=2, state_size=4)).eval()
            elif family == "gpt_neo":  # which keeps everything and looks back over a window all the same
                config = transformers.GPTNeoConfig(**WIDE, hidden_size=32, num_layers=2, attention_types=[[["global", "local"], 1]], num_heads=4, window_size=6)
                made = transformers.GPTNeoForCausalLM(config).eval()
            else:
                made = transformers.BloomForCausalLM(transformers.BloomConfig(**WIDE, hidden_size=32, n_layer=2, n_head=4)).eval()
            for parameter in made.parameters():
                parameter.data.mul_(3.0 if parameter.ndim == 2 else 1.0)
        return made
    return small_models.model(family)


def engine(family="llama", **knobs):
    return LocalEngine((network(family), tiny.tokenizer()), **knobs)


def words(*numbers):
    return " ".join(f"w{n}" for n in numbers)


@functools.cache
def prompts():
    """Of the shape of pairwise questions: queries, a first and a second text, of different lengths; one is the beginning of others."""
    made = []
    for query in (words(*range(20)), words(*range(5, 30)), words(*range(12), 30)):
        texts = [words(7), words(*range(9, 20)), words(3, 1, 4, 1, 5)]
        made += [Prompt((("user", f"{query} {a} w35 {b}"),), "w33") for a in texts for b in texts]
    return tuple([*made, Prompt((("user", words(*range(5, 20))),)), Prompt((("user", words(*range(5, 30))),)), made[0]])


def sequence(family, prompt, text):
    """Encoder and decoder tokens by hand; the tokenizer splits at white space."""
    ids = tiny.tokenizer().convert_tokens_to_ids
    shown, said = ids(prompt.messages[0][1].split()), ids(f"{prompt.answer_prefix}{text}".split())
    return (shown, [0, *said]) if family == "t5" else ([], shown + said)


@torch.no_grad()
def plain_logits(family, source, ids):
    model = network(family)
    if source:
        return model(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([ids])).logits[0].float()
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()


def plain_score(family, prompt, text):
    source, ids = sequence(family, prompt, text)
    logits = plain_logits(family, source, ids).log_softmax(-1)
    count = len(text.split())
    return sum(logits[len(ids) - count + k - 1, ids[len(ids) - count + k]].item() for k in range(count))


CHOICES = [[" w1", " w2", " w3"], [" w4 w9", " w5", " w6 w7 w8"], [" w9 w8 w7"], [], [" w20", " w21"]]


@pytest.mark.parametrize("family", REUSING + ALONE)
@pytest.mark.parametrize("knobs", [{}, {"batch_tokens": 90}, {"prefix_cache": False}], ids=["together", "little memory", "without sharing"])
def test_scores_are_those_of_one_plain_forward_after_the_other(family, knobs):
    choices = [CHOICES[i % len(CHOICES)] for i in range(len(prompts()))]
    found = engine(family, **knobs).score_choices(prompts(), choices)
    for prompt, texts, scores in zip(prompts(), choices, found, strict=True):
        assert scores.dtype == np.float32 and scores.shape == (len(texts),)
        np.testing.assert_allclose(scores, [plain_score(family, prompt, text) for text in texts], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family", REUSING + ALONE)
@pytest.mark.parametrize("knobs", [{}, {"batch_tokens": 150}], ids=["together", "little memory"])
def test_greedy_texts_are_those_of_generate_alone(family, knobs):
    model, few = network(family), [*prompts()[:4], *prompts()[-3:]]
    found = engine(family, **knobs).generate(few, max_new_tokens=9)
    for prompt, texts in zip(few, found, strict=True):
        source, ids = sequence(family, prompt, "")
        first = {"input_ids": torch.tensor([source or ids])} | ({"decoder_input_ids": torch.tensor([ids])} if source else {})
        written = model.generate(**first, max_new_tokens=9, do_sample=False, pad_token_id=0)[0, len(ids) :].tolist()
        ended = written.index(1) if 1 in written else None
        assert len(texts) == 1 and texts[0].text == tiny.tokenizer().decode(written[:ended], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert (texts[0].tokens, texts[0].finish) == ((9, "length") if ended is None else (ended + 1, "stop"))


def watched(made):
    """The mask and the new tokens of every forward."""
    seen = []
    handle = made.network.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((tuple(kwargs["attention_mask"].shape), kwargs["input_ids"].numel())), with_kwargs=True
    )
    return seen, handle


def test_what_prompts_begin_with_in_common_is_forwarded_once():
    question = words(*range(30))
    asked = [Prompt((("user", f"{question} {words(*[a] * 20)} w35 {words(*[b] * 5)}"),)) for a in (1, 2, 3) for b in (4, 5, 6, 7)]
    counts = {}
    for share in (True, False):
        made = engine(prefix_cache=share)
        seen, handle = watched(made)
        made.score_choices(asked, [[" w1", " w2"]] * 12)
        handle.remove()
        counts[share] = sum(tokens for _, tokens in seen)
    assert counts == {True: 30 + 3 * 21 + 12 * 5, False: 12 * 56}


def test_choices_behind_one_prompt_stand_in_one_row():
    made, choices = engine(), [f" w{i} w{i + 20}" for i in range(1, 11)]
    seen, handle = watched(made)
    [scores] = made.score_choices([Prompt((("user", words(*range(30))),))], [choices])
    handle.remove()
    assert seen == [((1, 30), 30), ((1, 1, 10, 40), 10)]
    alone = engine(prefix_cache=False).score_choices([Prompt((("user", words(*range(30))),))], [choices])
    np.testing.assert_allclose(scores, alone[0], atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_no_batch_is_larger_than_its_tokens_allow(family):
    made = engine(family, batch_tokens=170)
    seen, handle = watched(made)
    made.score_choices(prompts(), [[" w1", " w2 w3"]] * len(prompts()))
    made.generate(prompts()[:6], max_new_tokens=4, n=2)
    handle.remove()
    assert all(rows * columns <= 170 for (rows, *_, columns), _ in seen if rows > 1) and max(rows for (rows, *_), _ in seen) > 2


def test_on_a_cpu_batches_that_are_scored_are_small_and_those_that_are_written_are_not(monkeypatch):
    monkeypatch.setattr("echelon.llm.reading._CACHED", 200)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    made = engine()
    seen, handle = watched(made)
    made.score_choices(prompts(), [[" w1", " w2"]] * len(prompts()))
    scored = [rows * columns for (rows, *_, columns), _ in seen]
    made.generate(prompts(), max_new_tokens=2)
    handle.remove()
    assert max(scored) <= 400 < max(rows * columns for (rows, *_, columns), _ in seen[len(scored) :])


def test_answers_do_not_depend_on_order_and_company():
    mixed = torch.randperm(len(prompts()), generator=torch.Generator().manual_seed(1)).tolist()
    choices = [CHOICES[i % 3] for i in range(len(prompts()))]
    found = engine().score_choices(prompts(), choices)
    again = engine().score_choices([prompts()[i] for i in mixed], [choices[i] for i in mixed])
    for place, scores in zip(mixed, again, strict=True):
        np.testing.assert_allclose(scores, found[place], atol=1e-5)
    assert engine().score_choices([], []) == [] and engine().generate([], max_new_tokens=3) == []


def test_equal_logits_are_ties():
    model = small_models.model("llama")
    rows = model.lm_head.weight.data
    rows[9] = rows[8]
    scores = LocalEngine((model, tiny.tokenizer())).score_choices(prompts(), [[" w4", " w5", " w6"]] * len(prompts()))
    assert all(found[0] == found[1] != found[2] for found in scores)


@pytest.mark.parametrize("family", ["llama", "mistral", "t5"])
def test_draws_depend_on_seed_and_prompt_alone_and_leave_the_global_noise_be(family):
    state = torch.get_rng_state()
    few = list(prompts()[:3])
    knobs = {"max_new_tokens": 6, "temperature": 1.3, "n": 3, "seed": 5}
    found = engine(family).generate(few, **knobs)
    assert torch.equal(torch.get_rng_state(), state)
    assert [engine(family).generate([prompt], **knobs)[0] for prompt in few] == found == engine(family, batch_tokens=1).generate(few, **knobs)
    assert engine(family).generate(few, **{**knobs, "n": 2}) == [texts[:2] for texts in found]
    assert engine(family).generate(few, **{**knobs, "seed": 6}) != found and len({text.text for text in found[0]}) > 1


def test_draws_follow_the_model():
    prompt, many, temperature = prompts()[0], 3000, 2.0
    source, ids = sequence("llama", prompt, "")
    expected = (plain_logits("llama", source, ids)[-1].double() / temperature).softmax(-1)
    texts = engine().generate([prompt], max_new_tokens=1, temperature=temperature, n=many)[0]
    counts = np.array([sum(text.text.strip() == word for text in texts) for word in tiny.WORDS])[3:]
    share = expected.numpy()[3:]
    assert np.abs(counts / many - share).max() < 5 * math.sqrt(share.max() * (1 - share.max()) / many)
    assert (counts > 0).sum() > 5


def test_stop_texts_end_a_text_and_are_no_part_of_it():
    prompt = prompts()[3]
    whole = engine().generate([prompt], max_new_tokens=12)[0][0]
    third, fifth = whole.text.split("w")[3], whole.text.split("w")[5]
    found = engine().generate([prompt, prompts()[0]], max_new_tokens=12, stop=[f"w{fifth}", f"w{third}"])[0][0]
    assert found.finish == "stop" and found.text == whole.text[: whole.text.index(f"w{third}")] and found.tokens < whole.tokens


def test_a_text_ends_where_the_context_does():
    long = Prompt((("user", words(*[3] * 125)),))
    found = engine().generate([long, prompts()[0]], max_new_tokens=50)
    assert found[0][0].tokens <= 3 and found[0][0].finish == "length" and found[1][0].tokens > 3
    for ask in (lambda p: engine().generate([p], max_new_tokens=1), lambda p: engine().score_choices([p], [["w1", "w2"]])):
        with pytest.raises(ValueError, match=r"a prompt has 128 tokens; the context of .* holds 128"):
            ask(Prompt((("user", words(*[3] * 128)),)))


@pytest.mark.parametrize("task", ["score", "generate"])
def test_when_memory_runs_out_batches_are_halved(task):
    made = engine()
    plain, given = made.network.forward, []

    def short_of_memory(*args, **kwargs):
        if len(kwargs["input_ids"]) > 3:
            raise torch.OutOfMemoryError("out of memory")
        given.append(len(kwargs["input_ids"]))
        return plain(*args, **kwargs)

    def run(ran):
        if task == "score":
            return np.stack(ran.score_choices(prompts(), [[" w1", " w2"]] * len(prompts())))
        return [texts[0].text for texts in ran.generate(prompts(), max_new_tokens=3)]

    expected = run(engine())
    made._reader.model.forward = short_of_memory
    try:
        found = run(made)
        if task == "score":
            np.testing.assert_allclose(found, expected, atol=1e-5)
        else:
            assert found == expected
        assert max(given) == 3 and made._reader.batch_tokens < made.batch_tokens
        made._reader.model.forward = lambda *args, **kwargs: (_ for _ in ()).throw(torch.OutOfMemoryError("out of memory"))
        with pytest.raises(torch.OutOfMemoryError):
            run(made)
    finally:
        del made._reader.model.forward


# -- text ---------------------------------------------------------------------------------------------------------------

CHAT = (
    "{% if enable_thinking is defined and enable_thinking %}THINK {% endif %}{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}<|{{ m.role }}|> {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
TALK = Prompt((("system", "be kind"), ("user", "who are you"), ("assistant", "a bot"), ("user", "which of [1] and [2] is more")), "Passage")


def embedded(chat=None, begins=False):
    loaded = load("embedded")
    if begins:
        from tokenizers.processors import TemplateProcessing

        loaded.tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    loaded.tokenizer.chat_template = chat
    return LocalEngine(loaded)


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("template", [CHAT, CHAT.replace("{{ bos_token }}", ""), CHAT.replace("{{ bos_token }}", "{{ bos_token }}{{ bos_token }}"), None])
def test_there_is_one_token_for_the_beginning_and_none_for_the_end(template, begins):
    made = embedded(template, begins)
    ids = made._tokens([TALK], [" A"])[0][0]
    expected = begins or (template is not None and "bos_token" in template)
    assert ids.count(0) == expected and (ids[0] == 0) == expected
    assert 1 not in ids and made.prompt_tokens(TALK) == len(made._tokens([TALK], [""])[0][0])
    assert made.tokenizer.decode(ids).endswith("Passage A")


def test_chat_templates_are_applied_with_thinking_off_and_the_answer_begun():
    text = embedded(CHAT).prompt_text(TALK)
    assert text == "<s><|user|> be kind\n\nwho are you <|assistant|> a bot <|user|> which of [1] and [2] is more <|assistant|> Passage"
    assert embedded().prompt_text(TALK) == "be kind\n\nwho are you\n\na bot\n\nwhich of [1] and [2] is more\n\nPassage"
    only = CHAT.replace("{% if m.role == 'system' %}", "{% if m.role != 'x' %}")
    with pytest.raises(ValueError, match="refuses the prompt: no system here"):
        embedded(only).prompt_text(TALK)


def test_choices_are_tokenised_with_what_they_stand_behind():
    """Against the whole text's tokens, read one after the other."""
    made = embedded()
    texts = [" A", " B"], ["1]", "12]", "2]"], [" a wolf in sheep's clothing"]
    for prefix, choices in zip(("Passage", "The best is [", "Query:"), texts, strict=True):
        prompt = Prompt((("user", "Which?"),), prefix)
        rows = [made.tokenizer(f"Which?\n\n{prefix}{choice}").input_ids for choice in choices]
        begin = len(made.tokenizer(f"Which?\n\n{prefix}").input_ids)
        assert all(row[:begin] == rows[0][:begin] for row in rows)
        with torch.no_grad():
            expected = [
                sum(made.network(torch.tensor([row])).logits[0].log_softmax(-1)[at - 1, row[at]].item() for at in range(begin, len(row))) for row in rows
            ]
        np.testing.assert_allclose(made.score_choices([prompt], [choices])[0], expected, atol=1e-4)


def test_what_choices_begin_with_in_common_counts_as_the_prompt():
    made = embedded()
    prompt = Prompt((("user", "Which is more relevant?"),))
    apart = made.score_choices([Prompt(prompt.messages, "Passage")], [[" A", " B"]])[0]
    np.testing.assert_allclose(made.score_choices([prompt], [["Passage A", "Passage B"]])[0], apart, atol=1e-5)


@pytest.mark.parametrize("choices", [[" w1", " w1"], [" w1", ""], [""], [" w1", "  w1"]])
def test_choices_that_cannot_be_told_apart_are_refused(choices):
    with pytest.raises(ValueError, match="their tokens behind the prompt must differ"):
        engine().score_choices([prompts()[0]], [choices])


def test_truncated_texts_are_beginnings_of_so_many_tokens():
    made = embedded()
    text = "Ünïcode wörds – 日本語 and [12] numbers, once   more\n\n" * 3
    for count in range(0, 60, 7):
        cut = made.truncate(text, count)
        assert text.startswith(cut) and made.count_tokens(cut) <= count and (count == 0) == (cut == "")
    assert made.truncate("a few words", 50) == "a few words"
    assert 0 < made.count_tokens(made.truncate("word " * 1_000_000, 100)) <= 100


# -- constraints --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "identifiers"), [(1, "number"), (3, "number"), (12, "number"), (4, "letter")])
def test_a_constraint_gives_a_permutation_whatever_the_model_would_write(count, identifiers):
    made = embedded()
    asked = [Prompt((("user", f"Rank {topic}"),)) for topic in ("wolves", "the ships of the sea")]
    for temperature in (0.0, 3.0):
        for texts in made.generate(asked, max_new_tokens=120, temperature=temperature, constraint=[Permutation(count, identifiers)] * 2):
            assert parse_permutation(texts[0].text, count, identifiers).status == "complete" and texts[0].finish == "stop"
            assert texts[0].text == ranking_text(parse_permutation(texts[0].text, count, identifiers).order, identifiers)


def test_a_constraint_takes_the_best_token_of_those_that_lead_to_a_permutation():
    made, prompt = embedded(), Prompt((("user", "Rank the wolves by the length of their teeth"),))
    begin = made.tokenizer("Rank the wolves by the length of their teeth\n\n").input_ids
    whole = [made.tokenizer(ranking_text(order)).input_ids for order in itertools.permutations(range(11), 3)]  # the first three of eleven
    written = []
    while len(written) < 8:
        legal = sorted({ids[len(written)] for ids in whole if ids[: len(written)] == written and len(ids) > len(written)})
        with torch.no_grad():
            logits = made.network(torch.tensor([begin + written])).logits[0, -1]
        written.append(legal[int(logits[legal].argmax())])
    text = made.generate([prompt], max_new_tokens=8, constraint=[Permutation(11)])[0][0]
    assert text.text == made.tokenizer.decode(written) and text.finish == "length"


# -- what it is ---------------------------------------------------------------------------------------------------------


def test_capabilities_are_those_of_the_model():
    assert engine("llama").capabilities == {"logprobs", "constrained", "attention", "prefix_cache"}
    assert "prefix_cache" not in engine("mistral").capabilities | engine("mamba").capabilities | engine("bloom").capabilities
    assert engine("t5").capabilities == {"logprobs", "constrained", "encoder_decoder"} and engine("t5").context_length is None
    assert "chat" in embedded(CHAT).capabilities and "chat" not in embedded().capabilities and embedded().context_length == 512
    assert {"<s>", "</s>"} <= set(embedded().special_tokens)


def with_adapter():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return peft.get_peft_model(small_models.model("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()


def test_identities_name_all_that_an_answer_depends_on():
    def of(model, chat=None):
        tokenizer = tiny.tokenizer()
        made = LocalEngine((model, tokenizer))
        made.__dict__["_chat_template"] = chat
        return made.identity

    base = of(small_models.model("llama"))
    assert base == of(small_models.model("llama")) != of(small_models.model("llama"), "{{ x }}")
    moved = small_models.model("llama")
    moved.model.layers[1].mlp.up_proj.weight.data.add_(1e-3)
    adapted = with_adapter()
    with adapted.disable_adapter():
        off = of(adapted)
    names = [base, of(moved), of(small_models.model("llama").bfloat16()), of(adapted), off, of(small_models.model("qwen3"))]
    assert len(set(names)) == len(names) and all("/" not in name.split("@")[0] for name in names)


def test_adapted_models_are_read_with_their_adapters():
    adapted = with_adapter()
    asked, choices = list(prompts()[:5]), [[" w1", " w2"]] * 5
    found = np.stack(LocalEngine((adapted, tiny.tokenizer())).score_choices(asked, choices))
    merged = np.stack(LocalEngine((adapted.merge_and_unload(), tiny.tokenizer()), prefix_cache=False).score_choices(asked, choices))
    np.testing.assert_allclose(found, merged, atol=1e-4)
    assert np.abs(found - np.stack(engine().score_choices(asked, choices))).max() > 1e-3


def test_users_name_engines_in_many_ways(tmp_path):
    made = engine()
    assert resolve(made) is made and isinstance(resolve("embedded"), LocalEngine)
    assert resolve((network("llama"), tiny.tokenizer()), batch_tokens=7).batch_tokens == 7
    served = resolve("http://localhost:8000/v1#some/model", concurrency=2)
    assert isinstance(served, Engine) and served.name == "http://localhost:8000/v1#some/model" and served.concurrency == 2
    for spec, options, said in [
        (3, {}, "int is no engine"), ("http://localhost:8000/v1", {}, "names no model"), ("embedded", {"nosuch": 1}, "nosuch"),
        (made, {"batch_tokens": 3}, "is made already"), ("embedded", {"batch_tokens": 0}, "batch_tokens is 0"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=said):
            resolve(spec, **options)
    with pytest.raises(ValueError, match="cannot load model"):
        resolve(str(tmp_path / "nowhere")).count_tokens("x")


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda e: e.generate(prompts()[:1], max_new_tokens=0), "max_new_tokens is 0"),
        (lambda e: e.generate(prompts()[:1], max_new_tokens=1, n=0), "n is 0"),
        (lambda e: e.generate(prompts()[:1], max_new_tokens=1, temperature=float("nan")), "temperature is nan"),
        (lambda e: e.generate(prompts()[:1], max_new_tokens=1, temperature=-1), "temperature is -1"),
        (lambda e: e.generate(prompts()[:2], max_new_tokens=1, constraint=[Permutation(2)]), "constraint has 1 entries for 2 prompts"),
        (lambda e: e.generate(prompts()[:1], max_new_tokens=1, constraint=[Permutation(27, "letter")]), "at most 26 for letters"),
        (lambda e: e.score_choices(prompts()[:2], [["w1"]]), "choices has 1 entries for 2 prompts"),
    ],
)
def test_bad_arguments_are_named(ask, said):
    with pytest.raises(ValueError, match=said):
        ask(engine())
