"""Model folders, small enough to train in a test: a language model and an encoder over forty words, and documents made of them."""

import random

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

NOUNS = "Sea Boat Lamp Rope Gull Storm Door Child Coat Letter Tower Bell Road Horse Fire Song".split()
VERBS = "waits turns sleeps burns falls rises calls stops".split()
WORDS = ["<pad>", "</s>", "<s>", "<unk>", ".", "pre", "suffi", "and", "then", "slowly", *NOUNS, *VERBS]
BARE = {"pad_token_id": None, "eos_token_id": None, "bos_token_id": None}


def tokenizer(*, bare=False, ending=False):
    """Words and full stops; ``bare`` without pad, begin and end tokens, ``ending`` with an end token behind every text (as T5 has)."""
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if ending:
        made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {} if bare else {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", **special)


def language_model(folder, *, bare=False, positions=96, width=16):
    """A random Llama whose texts are words and full stops."""
    special = BARE if bare else {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        made = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=len(WORDS), hidden_size=width, num_hidden_layers=1, num_attention_heads=2, intermediate_size=3 * width // 2,
                max_position_embeddings=positions, **special,
            )
        )  # fmt: skip
    made.save_pretrained(folder)
    tokenizer(bare=bare).save_pretrained(folder)
    return str(folder)


def bert(positions=64):
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return transformers.BertModel(
            transformers.BertConfig(
                vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
                max_position_embeddings=positions, pad_token_id=0,
            ),
            add_pooling_layer=False,
        ).eval()  # fmt: skip


def t5():
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return transformers.T5EncoderModel(
            transformers.T5Config(
                vocab_size=len(WORDS), d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1
            )
        ).eval()  # fmt: skip


def encoder(folder, family="bert"):
    {"bert": bert, "t5": t5}[family]().save_pretrained(folder)
    tokenizer(ending=family == "t5").save_pretrained(folder)
    return str(folder)


def document(seed, sentences=14):
    pick = random.Random(seed)
    return " ".join(
        f"{pick.choice(NOUNS)} {pick.choice(VERBS)} {'slowly ' * pick.randint(0, 3)}and then {pick.choice(NOUNS)} {pick.choice(VERBS)}."
        for _ in range(sentences)
    )
