"""Hidden states that are kept on disk and mapped into memory a batch at a time."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from echelon.errors import UserError


class StoredStates(Sequence[Tensor]):
    """One tensor for each batch, in its own dtype; an item is read when it is asked for, and kept by nobody else.

    Args:
        folder: where they are, as :meth:`write` left them.
        batches: how many.
    """

    def __init__(self, folder: str | os.PathLike[str], batches: int) -> None:
        self.folder, self.batches = Path(folder), batches

    @classmethod
    def write(cls, folder: str | os.PathLike[str], states: Iterable[Float[Tensor, "*batch width"]]) -> "StoredStates":
        """Store the states as they come and have them on disk before returning.

        Raises:
            UserError: if they cannot be written.
        """
        folder, count = Path(folder), 0
        for state in states:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                flushed({"states": state.contiguous()}, folder / f"{count}.safetensors")
            except (OSError, SafetensorError) as error:
                raise UserError(f"cannot write {folder}: {getattr(error, 'strerror', None) or error}") from error
            count += 1
        return cls(folder, count)

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, batch: Any) -> Any:
        if not 0 <= batch < self.batches:
            raise IndexError(batch)
        file = self.folder / f"{batch}.safetensors"
        try:
            with safe_open(file, framework="pt") as opened:
                return opened.get_tensor("states")
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot read {file}: {error}") from error


def flushed(tensors: dict[str, Tensor], file: Path) -> None:
    """Write tensors to a safetensors file that is on disk afterwards."""
    save_file(tensors, file, metadata={"format": "pt"})
    with open(file, "rb") as opened:
        os.fsync(opened.fileno())
