"""Six click models: a linear part, embeddings of fields, an interaction between them, and a deep part.

They follow the papers named at each class; all have the linear part, as DeepCTR's have, also where the paper (DCN, AutoInt) leaves it out.
"""

from abc import ABC, abstractmethod
from itertools import combinations, pairwise
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_outputs import SequenceClassifierOutput

from echelon.models.ctr import config as configs
from echelon.models.ctr.config import CTRConfig
from echelon.models.ctr.embedding import FieldEmbedding

Vectors = Float[Tensor, "rows fields width"]
Flat = Float[Tensor, "rows flat"]
Dense = Float[Tensor, "rows dense"]


class Deep(nn.Module):
    """The deep part: linear layers, each with batch norm (if any), activation and dropout."""

    def __init__(self, inputs: int, config: CTRConfig) -> None:
        super().__init__()
        widths = [inputs, *(config.hidden_sizes or [])]
        self.linears = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) if config.batch_norm else nn.Identity() for width in widths[1:])
        self.activation, self.dropout = ACT2FN[config.hidden_act], nn.Dropout(config.dropout)

    def forward(self, x: Flat) -> Flat:
        for linear, norm in zip(self.linears, self.norms, strict=True):
            x = self.dropout(self.activation(norm(linear(x))))
        return x


class CTRModel(PreTrainedModel, ABC):
    """Base of the click models; a subclass says how embeddings interact and what its deep part reads.

    Attributes:
        deep_reads_embeddings: whether the deep part reads the embeddings side by side, with nothing in between.
    """

    config_class = CTRConfig
    main_input_name = "sparse_ids"
    deep_reads_embeddings: ClassVar[bool] = True

    embedding: Any
    deep: Deep

    def __init__(self, config: CTRConfig, deep_inputs: int | None = None, output_inputs: int | None = None) -> None:
        super().__init__(config)
        width = config.hidden_sizes[-1]  # type: ignore[index]
        self.embedding = FieldEmbedding(config)
        self.wide = FieldEmbedding(config, 1)
        self.wide_dense = nn.Linear(max(config.dense_features, 1), 1)
        self.deep = Deep(config.fields * config.embedding_dim + config.dense_features if deep_inputs is None else deep_inputs, config)
        self.output = nn.Linear(width if output_inputs is None else output_inputs, 1, bias=False)

    def forward(
        self, sparse_ids: Int[Tensor, "rows slots"], dense: Dense | None = None, labels: Float[Tensor, " rows"] | None = None, **_: Any
    ) -> SequenceClassifierOutput:
        """Logits of a click, (rows,), and the mean binary cross-entropy if there are labels."""
        if dense is None:
            dense = self.wide_dense.weight.new_zeros(len(sparse_ids), self.config.dense_features)
        vectors, flat = self.embedding(sparse_ids)
        numbers = dense if self.config.dense_features else dense.new_zeros(len(sparse_ids), 1)
        logits = self.wide(sparse_ids)[1].sum(1) + self.wide_dense(numbers)[:, 0] + self.interact(vectors, flat, dense)
        loss = None if labels is None else nn.functional.binary_cross_entropy_with_logits(logits, labels.to(logits))
        return SequenceClassifierOutput(loss=loss, logits=logits)  # type: ignore[arg-type]

    @abstractmethod
    def interact(self, vectors: Vectors, flat: Flat, dense: Dense) -> Float[Tensor, " rows"]:
        """All of the logit but its linear part."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            init.xavier_normal_(module.weight)
        if isinstance(module, CTRModel):
            for name, parameter in module.named_parameters(recurse=False):
                init.zeros_(parameter) if "bias" in name else init.normal_(parameter, std=parameter.shape[-1] ** -0.5)


class DeepFM(CTRModel):
    """A factorization machine beside the deep part; "DeepFM: A Factorization-Machine based Neural Network for CTR Prediction", arXiv 1703.04247."""

    config_class = configs.DeepFMConfig

    def __init__(self, config: CTRConfig) -> None:
        super().__init__(config)
        self.post_init()

    def interact(self, vectors: Vectors, flat: Flat, dense: Dense) -> Float[Tensor, " rows"]:
        return pairs(vectors).sum(1) + self.output(self.deep(torch.cat([flat, dense], 1)))[:, 0]


class DCN(CTRModel):
    """Explicit crosses of growing degree; "Deep & Cross Network for Ad Click Predictions", arXiv 1708.05123. They need whole embeddings."""

    config_class = configs.DCNConfig

    def __init__(self, config: configs.DCNConfig) -> None:
        inputs = config.fields * config.embedding_dim + config.dense_features
        super().__init__(config, output_inputs=inputs + config.hidden_sizes[-1])  # type: ignore[index]
        self.cross = nn.Parameter(torch.empty(config.cross_layers, inputs))
        self.cross_bias = nn.Parameter(torch.empty(config.cross_layers, inputs))
        self.post_init()

    def interact(self, vectors: Vectors, flat: Flat, dense: Dense) -> Float[Tensor, " rows"]:
        start = crossed = torch.cat([vectors.flatten(1), dense], 1)
        for weight, bias in zip(self.cross, self.cross_bias, strict=True):
            crossed = start * (crossed @ weight)[:, None] + bias + crossed
        return self.output(torch.cat([crossed, self.deep(torch.cat([flat, dense], 1))], 1))[:, 0]


class XDeepFM(CTRModel):
    """A compressed interaction network, whose maps are vector-wise products; "xDeepFM", arXiv 1803.05170."""

    config_class = configs.XDeepFMConfig

    def __init__(self, config: configs.XDeepFMConfig) -> None:
        super().__init__(config)
        sizes = [config.fields, *(config.cin_sizes or [])]
        self.cin = nn.ModuleList(nn.Linear(a * config.fields, b, bias=False) for a, b in pairwise(sizes))
        self.cin_output = nn.Linear(sum(sizes[1:]), 1, bias=False)
        self.post_init()

    def interact(self, vectors: Vectors, flat: Flat, dense: Dense) -> Float[Tensor, " rows"]:
        maps, pooled = vectors, []
        for layer in self.cin:
            products = torch.einsum("bhd,bmd->bdhm", maps, vectors).flatten(2)
            maps = layer(products).transpose(1, 2)
            pooled.append(maps.sum(2))
        return self.cin_output(torch.cat(pooled, 1))[:, 0] + self.output(self.deep(torch.cat([flat, dense], 1)))[:, 0]


class AutoInt(CTRModel):
    """Self-attention between fields, unscaled, with a residual; "AutoInt", arXiv 1810.11921."""

    config_class = configs.AutoIntConfig

    def __init__(self, config: configs.AutoIntConfig) -> None:
        inner = config.attention_heads * config.attention_dim
        last = config.fields * (inner if config.attention_layers else config.embedding_dim)
        super().__init__(config, output_inputs=last + config.hidden_sizes[-1])  # type: ignore[index]
        widths = [config.embedding_dim, *[inner] * config.attention_layers]
        self.attention = nn.ModuleList(nn.Linear(width, 4 * inner, bias=False) for width in widths[:-1])
        self.post_init()

    def interact(self, vectors: Vectors, flat: Flat, dense: Dense) -> Float[Tensor, " rows"]:
        for layer in self.attention:
            *parts, residual = layer(vectors).chunk(4, 2)
            query, key, value = (part.unflatten(2, (self.config.attention_heads, -1)).transpose(1, 2) for part in parts)
            mixed = nn.functional.scaled_dot_product_attention(query, key, value, scale=1.0).transpose(1, 2).flatten(2)
            vectors = torch.relu(mixed + residual)
        return self.output(torch.cat([vectors.flatten(1), self.deep(torch.cat([flat, dense], 1))], 1))[:, 0]


class NFM(CTRModel):
    """The deep part reads the sum of the products of all pairs; "Neural Factorization Machines for Sparse Predictive Analytics", arXiv 1708.05027."""

    config_class = configs.NFMConfig
    deep_reads_embeddings = False

    def __init__(self, config: CTRConfig) -> None:
        super().__init__(config, deep_inputs=config.embedding_dim + config.dense_features)
        self.post_init()

    def interact(self, vectors: Vectors, flat: Flat, dense: Dense) -> Float[Tensor, " rows"]:
        return self.output(self.deep(torch.cat([pairs(vectors), dense], 1)))[:, 0]


class FiBiNET(CTRModel):
    """Fields are weighed by squeeze and excitation and multiplied bilinearly, a matrix for each field; "FiBiNET", arXiv 1905.09433."""

    config_class = configs.FiBiNETConfig
    deep_reads_embeddings = False

    def __init__(self, config: configs.FiBiNETConfig) -> None:
        fields, width = config.fields, config.embedding_dim
        super().__init__(config, deep_inputs=fields * (fields - 1) * width + config.dense_features)
        middle = max(1, fields // config.reduction)
        self.squeeze = nn.Linear(max(fields, 1), middle, bias=False)
        self.excite = nn.Linear(middle, fields, bias=False)
        self.bilinear = nn.Parameter(torch.empty(2, fields, width, width))
        self.post_init()

    def interact(self, vectors: Vectors, flat: Flat, dense: Dense) -> Float[Tensor, " rows"]:
        weighed = vectors * torch.relu(self.excite(torch.relu(self.squeeze(vectors.mean(2)))))[..., None]
        left, right = (list(side) for side in zip(*combinations(range(vectors.shape[1]), 2), strict=True))
        products = [
            torch.einsum("bfd,fde->bfe", seen, matrix)[:, left] * seen[:, right] for seen, matrix in zip((vectors, weighed), self.bilinear, strict=True)
        ]
        return self.output(self.deep(torch.cat([*(part.flatten(1) for part in products), dense], 1)))[:, 0]


def pairs(vectors: Vectors) -> Float[Tensor, "rows width"]:
    """The sum over all pairs of fields of their elementwise product."""
    return 0.5 * (vectors.sum(1).square() - vectors.square().sum(1))


ARCHITECTURES: dict[str, type[CTRModel]] = {
    cls.config_class.model_type.removeprefix("ctr_"): cls for cls in (DeepFM, DCN, XDeepFM, AutoInt, NFM, FiBiNET)
}  # fmt: skip
for _cls in ARCHITECTURES.values():
    AutoConfig.register(_cls.config_class.model_type, _cls.config_class, exist_ok=True)
    AutoModel.register(_cls.config_class, _cls, exist_ok=True)
