"""Tiny random models of every family that the decoders must run on, and a tokenizer of 40 words for them."""

import functools

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

VOCAB = 40
WORDS = ["<pad>", "</s>", "<s>", ".", *[f"w{i}" for i in range(VOCAB - 4)]]
SPECIAL = {"vocab_size": VOCAB, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
WIDE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 128}
FAMILIES = {
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SPECIAL, **WIDE, num_key_value_heads=2, tie_word_embeddings=True)
    ),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SPECIAL, **WIDE, num_key_value_heads=2)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**SPECIAL, n_embd=32, n_layer=2, n_head=4, n_positions=128)),
    "opt": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(
            **SPECIAL, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=128
        )
    ),
    "gpt_neox": lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SPECIAL, **WIDE)),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(**SPECIAL, decoder_start_token_id=0, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    ),
}


@functools.cache
def model(family: str):
    """A random model whose next token depends on its context sharply enough to tell right from wrong."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        made = FAMILIES[family]().eval()
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.data.mul_(4.0 if family != "t5" else 1.5)
    made.generation_config.max_length = None
    return made


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="."))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", bos_token="<s>", padding_side="left", clean_up_tokenization_spaces=False
    )


def prompts(count: int = 4) -> list[list[int]]:
    """Prompts of different lengths, without special tokens."""
    return [[4 + (5 * i + 3 * j) % (VOCAB - 4) for j in range(3 + 2 * i)] for i in range(count)]
