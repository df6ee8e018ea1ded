"""A tiny random BERT and T5 encoder in RankGen's clothes, and a stand-in for a sentence encoder."""

import functools

import numpy as np
import torch
import transformers

import tiny
from echelon.score import RankGenEncoder


def tokenizer():
    return tiny.tokenizer()


@functools.cache
def backbone(family="bert"):
    with torch.random.fork_rng():
        torch.manual_seed(11)
        if family == "t5":
            config = transformers.T5Config(vocab_size=tiny.VOCAB, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu")
            return transformers.T5EncoderModel(config).eval()
        config = transformers.BertConfig(
            vocab_size=tiny.VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, max_position_embeddings=64
        )
        return transformers.BertModel(config, add_pooling_layer=False).eval()


def untrained_rankgen(family="bert", **settings):
    settings = {"prefix_max_length": 24, "suffix_max_length": 12} | settings
    made = RankGenEncoder(backbone(family), tokenizer(), **settings).eval()
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(12)
        made.projection.weight.add_(0.3 * torch.randn_like(made.projection.weight))
    return made


class encoder:
    """Bag-of-words vectors with the signature of SentenceTransformer.encode."""

    max_seq_length = 128

    def encode(self, texts, convert_to_tensor=False, normalize_embeddings=False, **_):
        vectors = np.zeros((len(texts), 64), dtype=np.float32)
        for row, text in enumerate(texts):
            for word in text.split():
                vectors[row, sum(map(ord, word)) % 64] += 1
            vectors[row, 0] += 0.1
        if normalize_embeddings:
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return torch.from_numpy(vectors) if convert_to_tensor else vectors
