"""FILA: start a LoRA from the directions of a weight that matter for what is to be forgotten and not for what is to stay.

Source: "Towards Robust and Parameter-Efficient Knowledge Unlearning for LLMs", arXiv 2408.06621. Differs from its code: decompositions are exact, or
oversampled with four power iterations for large matrices; gradients are taken without dropout; labels are counted behind the shift; targets are layers and not
parts of names. The base model is changed, so :class:`Start` keeps what it was, and turns the trained adapter into a LoRA for it.
"""

import contextlib
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from echelon.calibrate.gradients import collect_gradients, over_processes
from echelon.data.files import folder_whole
from echelon.edit.losses import sequence_log_probs, token_counts
from echelon.edit.rows import Row, collated
from echelon.linalg.checks import number, sized, whole
from echelon.linalg.lowrank import svd
from echelon.models.modules import dense_weight, is_linear

Matrices = Mapping[str, Float[Tensor, "out in"]]


def fisher(model: nn.Module, names: Sequence[str], rows: Sequence[Row], *, batch_size: int = 2, per_sample: bool = False) -> dict[str, Float[Tensor, "out in"]]:
    """Diagonal of the empirical Fisher matrix of some linear layers, on the CPU in float32.

    For each batch with c labels that count, the squared gradient of the mean cross-entropy is added c times, and all is divided by the number of labels.
    Gradients of several rows cancel before they are squared, which ``per_sample`` avoids by squaring each row's own.

    Args:
        model: a causal language model.
        names: of its layers.
        rows: in the order in which batches are made.
        batch_size: rows at a time.
        per_sample: square the gradient of each row.

    Raises:
        ValueError: if a layer is unknown or gets no gradient, a gradient is not finite, or ``batch_size`` is below 1.
    """
    whole("batch_size", batch_size, 1)
    batches = [collated(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]

    def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """A mean times sqrt(c) is a sum over sqrt(c); its gradient squared is c times the square of the mean's."""
        logits = model(**{key: value for key, value in batch.items() if key != "labels"}, use_cache=False).logits
        sums, counts = sequence_log_probs(logits, batch["labels"]), token_counts(batch["labels"])
        if not per_sample:
            return -sums.sum() / counts.sum().clamp_min(1).sqrt()
        return -(sums / counts.clamp_min(1).sqrt()).sum()

    found = collect_gradients(model, names, batches, sums=False, squares=True, per_sample=per_sample, loss=loss)
    tokens = over_processes(sum(int(token_counts(batch["labels"]).sum()) for batch in batches), next(model.parameters()).device)
    for square in found.squares.values():
        square.div_(max(1, tokens))
    return found.squares


def row_importance(forget: Float[Tensor, "out in"], retain: Float[Tensor, "out in"], eps: float = 1e-5) -> Float[Tensor, " out"]:
    """Root of each row's sum of Fisher information for what is to be forgotten over that for what is to stay."""
    return (forget.double() / (retain.double() + eps)).sum(1).sqrt()


def fila_factors(
    weight: Float[Tensor, "out in"], importance: Float[Tensor, " out"], rank: int, scale: float = 1.0, eps: float = 1e-5
) -> tuple[Float[Tensor, "r in"], Float[Tensor, "out r"]]:
    """A and B in float32, so that ``scale * B @ A`` is the matrix of this rank that is nearest to the weight when rows count by their importance.

    With D the importances on a diagonal and D W = U S V^T: A = sqrt(S / scale) V^T, B = (D + eps)^-1 U sqrt(S / scale). A row of importance zero has a row of
    zeros in B.

    Args:
        weight: W.
        importance: at least 0.
        rank: in 1..min(out, in).
        scale: of the LoRA, above 0.
        eps: keeps rows of little importance finite.

    Raises:
        ValueError: if shapes disagree, or a number is out of range.
    """
    number("scale", scale, 0, float("inf"), open_low=True, open_high=True)
    number("eps", eps, 0, float("inf"), open_low=True, open_high=True)
    d = sized("importance", importance, (weight.shape[0],), weight)
    if bool((d < 0).any()):
        raise ValueError(f"importance holds {float(d.min()):.3g}; it must be at least 0")
    found = svd(d[:, None] * weight.double(), rank, balance="sqrt", dtype=torch.float64)
    up = torch.where(d[:, None] > 0, found.up / (d[:, None] + eps), 0.0)  # rounding may leave 1e-17 over eps
    return (found.down / scale**0.5).float(), (up / scale**0.5).float()


@torch.no_grad()
def fila_init(model: PeftModel, forget: Matrices, retain: Matrices, *, eps: float = 1e-5, adapter_name: str = "default") -> "Start":
    """Give a plain LoRA FILA's factors and take them off the weights below, so that the model computes what it did.

    Call it before an optimizer is made or the model is sharded. In half precision the rest of a weight is rounded: it is off by half a unit in its last place.

    Args:
        model: what ``get_peft_model(base, LoraConfig(...))`` made.
        forget: Fisher information of what is to be forgotten, by name in the base model, see :func:`fisher`.
        retain: the same of what is to stay.
        eps: of the ratio of the two and of the inverse.
        adapter_name: of the adapter.

    Returns:
        What is needed to get back to the original base.

    Raises:
        ValueError: if a layer is quantised, tied, merged, adapted twice or by a variant of LoRA, its rank is larger than its smaller side, or its Fisher
            information is missing, negative, not finite or of another shape. Nothing is changed then.
    """
    layers = lora_layers(model, adapter_name)
    shared = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    made, originals = {}, {}
    for name, layer in layers.items():
        base = _plain_base(name, layer, adapter_name, shared)
        weight = dense_weight(base)
        whole(f"r of {name} ({' x '.join(map(str, weight.shape))})", layer.r[adapter_name], 1, min(weight.shape))
        importance = row_importance(_information(forget, "forget", name, weight), _information(retain, "retain", name, weight), eps)
        if bool(importance.any()):
            made[name] = fila_factors(weight.float(), importance, layer.r[adapter_name], layer.scaling[adapter_name], eps)
            originals[name] = weight.detach().cpu().clone()
        else:
            warnings.warn(f"nothing of {name} matters for what is to be forgotten; its adapter starts as PEFT makes it", stacklevel=2)
    for name, (A, B) in made.items():
        layer, weight = layers[name], dense_weight(layers[name].get_base_layer())
        layer.lora_A[adapter_name].weight.copy_(A)
        layer.lora_B[adapter_name].weight.copy_(B)
        weight.copy_(weight.float() - product(layer, adapter_name))  # of the stored factors, which may have been rounded
    return Start(model, originals, adapter_name)


class Start:
    """An adapter's factors before training, and the weights that its making changed.

    Args:
        model: the wrapped model, before training.
        originals: weights (out, in) of the base model before it was wrapped, by name, on the CPU; those that were not changed may be among them.
        adapter_name: of the adapter.
    """

    def __init__(self, model: PeftModel, originals: Matrices, adapter_name: str = "default"):
        self.model, self.adapter_name = model, adapter_name
        self.layers = lora_layers(model, adapter_name)
        self.factors = {name: [p.detach().clone() for p in pair(layer, adapter_name)] for name, layer in self.layers.items()}
        now = {name: dense_weight(layer.get_base_layer()).detach().cpu() for name, layer in self.layers.items() if name in originals}
        self.originals = {name: originals[name] for name in now if not torch.equal(now[name], originals[name])}

    @contextlib.contextmanager
    def reference(self) -> Iterator[PeftModel]:
        """The model as it was before training, in evaluation mode and without gradients.

        Switching the adapter off would not do: the base model alone is not what it was.
        """
        modes = [(module, module.training) for module in self.model.modules()]
        held = {name: [p.data for p in pair(layer, self.adapter_name)] for name, layer in self.layers.items()}
        try:
            self.model.eval()
            self._put(self.factors)
            with torch.no_grad():
                yield self.model
        finally:
            self._put(held)
            for module, mode in modes:
                module.training = mode

    @torch.no_grad()
    def to_lora(self) -> tuple[LoraConfig, dict[str, Tensor]]:
        """The trained adapter for the original base, as config and checkpoint of PEFT: ``[B, -B0] [A; A0]``, of twice the rank, where the base was changed."""
        config: Any = self.model.peft_config[self.adapter_name]
        tensors, ranks, alphas = {}, {}, {}
        for name, layer in self.layers.items():
            A, B = (p.detach() for p in pair(layer, self.adapter_name))
            if name in self.originals:
                first_A, first_B = (p.to(A.device) for p in self.factors[name])
                A, B = torch.cat([A, first_A]), torch.cat([B, -first_B], 1)
            tensors[f"base_model.model.{name}.lora_A.weight"] = A.clone().contiguous()
            tensors[f"base_model.model.{name}.lora_B.weight"] = B.clone().contiguous()
            alpha = layer.scaling[self.adapter_name] * len(A)
            ranks[name], alphas[name] = len(A), round(alpha) if abs(alpha - round(alpha)) < 1e-9 * alpha else alpha
        rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
        made = LoraConfig(
            r=int(rank), lora_alpha=alpha, target_modules=sorted(self.layers), fan_in_fan_out=config.fan_in_fan_out, task_type=config.task_type,
            rank_pattern={name: r for name, r in ranks.items() if r != rank}, alpha_pattern={name: a for name, a in alphas.items() if a != alpha},
            base_model_name_or_path=config.base_model_name_or_path, revision=config.revision, inference_mode=True,
        )  # type: ignore[arg-type]  # fmt: skip
        return made, tensors

    def save_lora(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`to_lora` to a folder, whole, that ``PeftModel.from_pretrained`` reads on the original base.

        Raises:
            UserError: if the folder cannot be written.
        """
        config, tensors = self.to_lora()
        with folder_whole(path) as folder:
            save_file({name: value.cpu() for name, value in tensors.items()}, folder / "adapter_model.safetensors", metadata={"format": "pt"})
            config.save_pretrained(os.fspath(folder))

    @torch.no_grad()
    def restore(self) -> None:
        """Give the base its weights back, bit for bit. The adapter on it then adds to the wrong thing: take :meth:`to_lora` before, and unload it."""
        for name, weight in self.originals.items():
            dense_weight(self.layers[name].get_base_layer()).copy_(weight)

    def _put(self, factors: Mapping[str, Sequence[Tensor]]) -> None:
        for name, layer in self.layers.items():
            for parameter, value in zip(pair(layer, self.adapter_name), factors[name], strict=True):
                parameter.data = value.to(parameter.device)


def lora_layers(model: PeftModel, adapter_name: str = "default") -> dict[str, Any]:
    """Layers with this LoRA by their name in the base model.

    Raises:
        ValueError: if there are none.
    """
    base: Any = model.get_base_model()
    found = {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer) and adapter_name in module.lora_A}
    if not found:
        raise ValueError(f"the model has no LoRA called {adapter_name!r}; wrap it with get_peft_model and a LoraConfig")
    return found


def pair(layer: Any, adapter_name: str) -> tuple[nn.Parameter, nn.Parameter]:
    """A (r, in) and B (out, r) of a layer."""
    return layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight


def product(layer: Any, adapter_name: str) -> Float[Tensor, "out in"]:
    """What an adapter adds to the weight, in float32."""
    A, B = pair(layer, adapter_name)
    return layer.scaling[adapter_name] * (B.float() @ A.float())


def _plain_base(name: str, layer: Any, adapter_name: str, shared: Counter[int]) -> Any:
    base = layer.get_base_layer()
    own = getattr(base, "_parameters", {}).get("weight")
    if not is_linear(base) or own is None or type(own.data) is not Tensor:
        raise ValueError(f"{name} is a {type(base).__name__}, quantised or not linear; FILA changes weights and needs nn.Linear or Conv1D in floating point")
    if shared[id(own)] > 1:
        raise ValueError(f"{name} shares its weight with another module (tied embeddings); leave it out, or load the model with tie_word_embeddings=False")
    if layer.merged or len(layer.lora_A) > 1:
        raise ValueError(f"{name} carries {'a merged adapter' if layer.merged else 'several adapters'}; FILA changes the weight below and needs this one alone")
    if adapter_name in layer.lora_variant or layer.lora_bias[adapter_name]:
        raise ValueError(f"{name} carries a variant of LoRA; FILA is for the plain one")
    return base


def _information(given: Matrices, what: str, name: str, weight: Tensor) -> Float[Tensor, "out in"]:
    if name not in given:
        raise ValueError(f"{what} holds no Fisher information of {name}; collect it again with it among the names")
    found = sized(f"{what} of {name}", given[name], tuple(weight.shape), weight)
    if bool((found < 0).any()):
        raise ValueError(f"{what} of {name} holds {float(found.min()):.3g}; Fisher information is at least 0")
    return found
