"""What a click model is made of."""

from typing import Any

from transformers import PreTrainedConfig


class CTRConfig(PreTrainedConfig):
    """Configuration shared by all click models.

    Args:
        vocab_sizes: rows of each embedding table.
        field_names: name of each field of ids.
        field_tables: which table each field reads; by default each its own. Fields may share one.
        field_slots: how many ids a field holds, padded; by default one. The embeddings of several are averaged.
        dense_features: how many plain numbers come with a row.
        embedding_dim: width D of the embeddings.
        padding_idx: the id that stands for nothing, whose embedding counts as zero; None if there is none.
        hidden_sizes: widths of the deep part.
        hidden_act: its activation, by the name that transformers gives it.
        dropout: behind each activation.
        batch_norm: whether each linear layer of the deep part is followed by a batch norm.
        initializer_range: standard deviation of new weights.

    Raises:
        ValueError: if the sizes contradict each other.
    """

    model_type = "ctr"

    vocab_sizes: list[int] | None = None
    field_names: list[str] | None = None
    field_tables: list[int] | None = None
    field_slots: list[int] | None = None
    dense_features: int = 0
    embedding_dim: int = 16
    padding_idx: int | None = 0
    hidden_sizes: list[int] | None = None
    hidden_act: str = "relu"
    dropout: float = 0.0
    batch_norm: bool = False
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        self.vocab_sizes = list(self.vocab_sizes or [])
        self.field_tables = list(range(len(self.vocab_sizes)) if self.field_tables is None else self.field_tables)
        self.field_slots = list([1] * len(self.field_tables) if self.field_slots is None else self.field_slots)
        self.field_names = list([f"C{i + 1}" for i in range(len(self.field_tables))] if self.field_names is None else self.field_names)
        self.hidden_sizes = list([400, 400, 400] if self.hidden_sizes is None else self.hidden_sizes)
        if not len(self.field_tables) == len(self.field_slots) == len(self.field_names):
            told = f"{len(self.field_names)}, {len(self.field_tables)} and {len(self.field_slots)} long"
            raise ValueError(f"field_names, field_tables and field_slots are {told}; they must have one entry for each field")
        if any(not 0 <= table < len(self.vocab_sizes) for table in self.field_tables):
            raise ValueError(f"field_tables is {self.field_tables}; there are {len(self.vocab_sizes)} tables")
        if self.vocab_sizes and (min(self.vocab_sizes) < 1 or self.embedding_dim < 1 or not self.hidden_sizes or min(self.hidden_sizes) < 1):
            raise ValueError("vocab_sizes, embedding_dim and hidden_sizes must be at least 1, and there must be a hidden layer")
        super().__post_init__(**kwargs)

    @property
    def fields(self) -> int:
        """How many fields of ids there are."""
        return len(self.field_tables or [])


class DeepFMConfig(CTRConfig):
    """DeepFM."""

    model_type = "ctr_deepfm"


class DCNConfig(CTRConfig):
    """Deep and cross network.

    Args:
        cross_layers: how many.
    """

    model_type = "ctr_dcn"
    cross_layers: int = 2


class XDeepFMConfig(CTRConfig):
    """xDeepFM.

    Args:
        cin_sizes: feature maps of each layer of the compressed interaction network.
    """

    model_type = "ctr_xdeepfm"
    cin_sizes: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.cin_sizes = list([64, 64] if self.cin_sizes is None else self.cin_sizes)
        super().__post_init__(**kwargs)


class AutoIntConfig(CTRConfig):
    """AutoInt.

    Args:
        attention_layers: how many.
        attention_heads: heads of each.
        attention_dim: width of a head.
    """

    model_type = "ctr_autoint"
    attention_layers: int = 2
    attention_heads: int = 2
    attention_dim: int = 8


class NFMConfig(CTRConfig):
    """Neural factorization machine."""

    model_type = "ctr_nfm"


class FiBiNETConfig(CTRConfig):
    """FiBiNET.

    Args:
        reduction: by how much the squeeze-and-excitation part narrows the fields.
    """

    model_type = "ctr_fibinet"
    reduction: int = 3
