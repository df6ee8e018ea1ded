"""Training on given answers: tokens and weights of an answer, the loss against transformers' own, accumulation, noise, and what is written."""

import json

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

import tiny_chat
from echelon.errors import UserError
from echelon.llm import Prompt
from echelon.rerank.training import AnswerTrainer, answer_row, fit_answers
from echelon.rerank.training.answers import collated, logits_at, training_text

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
PROMPTS = [("Which passage is the best?\n", "[3] > [1] > [2]"), ("Order the passages, please, all of them.\n", "[2] > [1]")]


def rows(weigh=None):
    return [answer_row(tiny_chat.tokenizer(), prompt, answer, weigh) for prompt, answer in PROMPTS]


def trainer(made, out, **arguments):
    told = TrainingArguments(output_dir=str(out), use_cpu=True, report_to="none", **arguments)
    return AnswerTrainer(model=made, args=told)


def test_a_row_is_the_prompts_tokens_the_answers_and_the_end_and_only_the_last_two_count():
    tokenizer, [row, _] = tiny_chat.tokenizer(), rows(lambda answer, spans: [float(end) for _, end in spans])
    asked = tokenizer(PROMPTS[0][0], add_special_tokens=False).input_ids
    wanted = tokenizer(PROMPTS[0][1], add_special_tokens=False, return_offsets_mapping=True)
    assert row["input_ids"] == [*asked, *wanted["input_ids"], tokenizer.eos_token_id]
    assert row["labels"] == [*[-100] * len(asked), *wanted["input_ids"], tokenizer.eos_token_id]
    assert row["weights"] == [*[0.0] * len(asked), *[float(end) for _, end in wanted["offset_mapping"]], 1.0]


def test_where_prompt_and_answer_would_melt_the_answer_has_the_tokens_that_it_has_alone():
    tokenizer = tiny_chat.tokenizer()

    def alone(text):
        return tokenizer(text, add_special_tokens=False).input_ids

    assert alone("t" + "he") != alone("t") + alone("he"), "the tokenizer must know the word"
    row = answer_row(tokenizer, "t", "he", lambda answer, spans: [answer[a:b] == "he" for a, b in spans])
    assert row["input_ids"] == [*alone("t"), *alone("he"), tokenizer.eos_token_id] and row["weights"][1:-1] == [1.0] * len(alone("he"))


@pytest.mark.parametrize("chat", [True, False])
def test_the_text_of_a_prompt_gives_the_tokens_that_the_engine_reads(chat):
    engine = tiny_chat.engine(chat)
    prompt = Prompt((("system", "Rank."), ("user", "the rain [1]\nand wind")), "So: ")
    ids = engine.tokenizer(training_text(engine, prompt), add_special_tokens=False).input_ids
    assert len(ids) == engine.prompt_tokens(prompt) and ids.count(engine.tokenizer.bos_token_id) == chat
    expected = "<|system|>\nRank.</s>\n<|user|>\nthe rain [1]\nand wind</s>\n<|assistant|>\nSo: " if chat else "Rank.\n\nthe rain [1]\nand wind\n\nSo: "
    assert engine.tokenizer.decode(ids).removeprefix("<s>") == expected


def test_with_weights_of_one_the_loss_is_that_of_transformers_over_all_tokens_of_a_batch(tmp_path):
    made, batch = tiny_chat.model(), collated(rows())
    plain = made(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")}).loss
    loss, outputs = trainer(made, tmp_path).compute_loss(made, batch, return_outputs=True)
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=1e-6)
    assert outputs["logits"].shape == ((batch["labels"] != -100).sum(), tiny_chat.VOCAB)
    apart = [trainer(made, tmp_path).compute_loss(made, collated([row])) for row in rows()]
    assert abs(sum(apart) / 2 - loss) > 1e-3, "the mean of means must differ, or the rows are too alike to tell"


def test_the_loss_by_hand_and_the_gradient_of_the_head_from_the_answer_alone(tmp_path):
    made, batch = tiny_chat.model(), collated(rows(lambda answer, spans: [1.0 + start / 10 for start, _ in spans]))
    loss = trainer(made, tmp_path).compute_loss(made, batch)
    loss.backward()
    found = made.lm_head.weight.grad.clone()
    made.zero_grad()
    total, count = 0.0, 0
    logits = made(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    logits.retain_grad()
    for row in range(2):
        for place in range(1, batch["labels"].shape[1]):
            if batch["labels"][row, place] != -100:
                total = total - batch["weights"][row, place] * logits[row, place - 1].log_softmax(-1)[batch["labels"][row, place]]
                count += 1
    torch.testing.assert_close(loss, total / count, rtol=1e-6, atol=1e-6)
    (total / count).backward()
    torch.testing.assert_close(found, made.lm_head.weight.grad, rtol=1e-4, atol=1e-6)
    prompt = batch["labels"][:, 1:] == -100
    assert logits.grad[:, :-1][prompt].abs().max() == 0


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_neox", "qwen3"])
def test_logits_are_made_only_where_they_are_asked_for(family):
    import small_models

    made, inputs = small_models.model(family), small_models.batch(family)
    wanted = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    wanted[0, 3:6] = wanted[1, 2] = True
    with torch.no_grad():
        torch.testing.assert_close(logits_at(made, inputs, wanted), made(**inputs).logits[wanted], rtol=1e-5, atol=1e-5)
        assert made(**inputs).logits.shape[1] == 10


def test_a_step_of_several_batches_is_the_step_of_one(tmp_path):
    states = []
    for size, accumulate in ((2, 1), (1, 2)):
        made = tiny_chat.model()
        fit_answers(
            made, tiny_chat.tokenizer(), rows(), tmp_path / str(size), num_train_epochs=1, per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulate, optim="sgd", learning_rate=0.1, max_grad_norm=1e9,
        )  # fmt: skip
        states.append(made.state_dict())
    moved = max((states[0][name] - value).abs().max().item() for name, value in tiny_chat.model().state_dict().items())
    assert moved > 1e-3
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-4, atol=1e-6)


def test_noise_on_the_embeddings_is_transformers_own_and_goes_when_training_ends(tmp_path):
    losses = []
    for alpha in (None, 50.0):
        made = tiny_chat.model()
        done = fit_answers(made, tiny_chat.tokenizer(), rows(), tmp_path / str(alpha), max_steps=1, learning_rate=1e-9, neftune_noise_alpha=alpha)
        losses += done["loss"]
        assert not made.get_input_embeddings()._forward_hooks
    assert abs(losses[0] - losses[1]) > 1e-3


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_adapter_is_written_as_peft_reads_it_and_the_base_stays(tmp_path, checkpointing):
    made, before = tiny_chat.model(), tiny_chat.model()
    state = torch.random.get_rng_state()
    done = fit_answers(
        made, tiny_chat.tokenizer(), rows(), tmp_path / "out", adapter=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), max_steps=3, learning_rate=1e-2,
        gradient_checkpointing=checkpointing,
    )  # fmt: skip
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator must be left alone"
    assert done["steps"] == 3 and done["loss"][2] < done["loss"][0] and json.loads((tmp_path / "out" / "result.json").read_text()) == done
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "result.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    again = PeftModel.from_pretrained(before, tmp_path / "out")
    ids = torch.tensor([rows()[0]["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, made(input_ids=ids).logits)
        with again.disable_adapter():
            torch.testing.assert_close(again(input_ids=ids).logits, tiny_chat.model()(input_ids=ids).logits)


def test_a_whole_model_is_written_as_transformers_reads_it(tmp_path):
    made = tiny_chat.model()
    fit_answers(made, tiny_chat.tokenizer(), rows(), tmp_path / "out", max_steps=1, gradient_checkpointing=True)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert isinstance(again, transformers.LlamaForCausalLM) and AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tiny_chat.CHAT
    assert all(torch.equal(value, made.state_dict()[name]) for name, value in again.state_dict().items())
    assert not made.training and made.config.use_cache


def test_rows_are_evaluated_as_they_are_learnt(tmp_path):
    from datasets import Dataset

    made = tiny_chat.model()
    told = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", per_device_eval_batch_size=2, disable_tqdm=True)
    found = AnswerTrainer(model=made, args=told, eval_dataset=Dataset.from_list(rows())).evaluate()
    batch = collated(rows())
    assert found["eval_loss"] == pytest.approx(made(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")}).loss.item(), abs=1e-5)


def test_what_cannot_be_learnt_from_is_refused(tmp_path):
    tokenizer = tiny_chat.tokenizer()
    with pytest.raises(UserError, match="there are no rows to train on"):
        fit_answers(tiny_chat.model(), tokenizer, [], tmp_path)
    with pytest.raises(UserError, match=r"the answer to the prompt 'Which' is empty"):
        answer_row(tokenizer, "Which", " ")
    with pytest.raises(UserError, match=r"prompt and answer have \d+ tokens, and the model takes 8"):
        answer_row(tokenizer, *PROMPTS[0], max_length=8)
    mute = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(UserError, match="no token for the end"):
        answer_row(mute, *PROMPTS[0])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep me")
    with pytest.raises(UserError, match="full is not empty; give a new folder"):
        fit_answers(tiny_chat.model(), tokenizer, rows(), tmp_path / "full")
    made = tiny_chat.model()
    made.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match="the loss is nan at step 1"):
        fit_answers(made, tokenizer, rows(), tmp_path / "out", max_steps=1)
    assert not (tmp_path / "out" / "result.json").exists()
