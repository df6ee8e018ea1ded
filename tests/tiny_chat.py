"""A byte-level tokenizer with a chat template, learnt from a few sentences, and a tiny random Llama for it: what prompts in plain language need."""

import functools

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from echelon.llm import LocalEngine
from echelon.models import LoadedModel

VOCAB = 360
SPECIAL = ["<pad>", "</s>", "<s>", "<|user|>", "<|system|>", "<|assistant|>"]
CHAT = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>\n{{ message.content | trim }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
TEXT = [
    "Here are some paragraphs. The query asks for the most relevant passage, and the others are not.", "the theory of the other thing",
    "rain and wind and sea",
]  # fmt: skip


@functools.cache
def tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    made.train_from_iterator(TEXT * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", bos_token="<s>", extra_special_tokens=SPECIAL[3:], padding_side="left",
        clean_up_tokenization_spaces=False, chat_template=CHAT if chat else None,
    )  # fmt: skip


def model(seed: int = 7, context: int = 2048, layers: int = 2):
    """A new model, the same one each time."""
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
        max_position_embeddings=context, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = transformers.LlamaForCausalLM(config).eval()
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.data.mul_(4.0)
    return made


def engine(chat: bool = True, **shape) -> LocalEngine:
    return LocalEngine(LoadedModel(model(**shape), tokenizer(chat)))
