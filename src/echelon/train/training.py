"""How long, on how much and how often: what all language-model training has in common, whatever the method."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Training:
    """The protocol of a run, beside its method.

    Attributes:
        steps: optimizer steps.
        batch_size: rows a step on one process.
        seqlen: tokens a row.
        accumulate: forward passes that a step's rows are split into; less memory, the same result.
        pack: join documents and cut full rows; without, one document a row, truncated or padded (the protocol of papers on memory-efficient pre-training).
        warmup: share of the steps in which the learning rate rises from 0.
        floor: share of the learning rate at which its cosine ends.
        max_grad_norm: global norm to which gradients are clipped; 0 for no limit.
        bf16: forward in bfloat16 (the weights keep their type).
        fsdp: shard weights, gradients and what state can be over the processes (FSDP2); for optimizers, under torchrun.
        layerwise: step inside backward, so that one gradient is alive at a time; needs max_grad_norm 0 and one process.
        max_parameter_norm: with layerwise, norm to which each parameter's gradient is clipped; 0 for no limit.
        save_every: steps between checkpoints; 0 for none.
        eval_every: steps between two looks at the held-out text; 0 for one before and one after.
        eval_tokens: tokens of it that are read at most.
        legacy_eval: also report perplexity with the bias of GaLore's evaluation loop (means of batches, one batch too many in the divisor).
        seed: of the order of rows, of dropout, and of new weights.
    """

    steps: int = 1000
    batch_size: int = 16
    seqlen: int = 256
    accumulate: int = 1
    pack: bool = True
    warmup: float = 0.1
    floor: float = 0.1
    max_grad_norm: float = 1.0
    bf16: bool = False
    fsdp: bool = False
    layerwise: bool = False
    max_parameter_norm: float = 0.0
    save_every: int = 100
    eval_every: int = 0
    eval_tokens: int = 10_000_000
    legacy_eval: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises: ValueError: if a field is out of range."""
        for name, least in (("steps", 1), ("batch_size", 1), ("seqlen", 2), ("accumulate", 1), ("save_every", 0), ("eval_every", 0), ("eval_tokens", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} is {value!r}; it must be a whole number of at least {least}")
        for name in ("warmup", "floor"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be in [0, 1]")
        for name in ("max_grad_norm", "max_parameter_norm"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be at least 0")
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate is {self.accumulate}; it must divide batch_size, {self.batch_size}")
        if self.layerwise and self.max_grad_norm:
            raise ValueError(f"max_grad_norm is {self.max_grad_norm!r} with layerwise, which never sees all gradients together; set it to 0")
        if self.fsdp and self.layerwise:
            raise ValueError("fsdp is True with layerwise; steps in backward are for one process")
        if self.max_parameter_norm and not self.layerwise:
            raise ValueError(f"max_parameter_norm is {self.max_parameter_norm!r} without layerwise; use max_grad_norm")
