"""What every function here asks of its input: said once, in one wording."""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

SYMMETRY_TOLERANCE = 1e-4  # relative; moments summed in float32 are symmetric to about 1e-6
NEGATIVE_TOLERANCE = 1e-3  # relative to the largest eigenvalue; below it is noise, above it the matrix is no moment


def double(name: str, value: Float[Tensor, "..."], ndim: int | None = None) -> Float[Tensor, "..."]:
    """The tensor detached and in float64, on its device, or on the CPU where the device has no float64.

    Raises:
        ValueError: if it is no floating-point tensor, is empty, has other than ``ndim`` dimensions, or holds NaN or infinity.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise ValueError(f"{name} is {getattr(value, 'dtype', type(value).__name__)}; it must be a floating-point tensor")
    if ndim is not None and value.ndim != ndim:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; it must have {ndim} dimension{'s' * (ndim != 1)}")
    if value.numel() == 0:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; it must not be empty")
    value = value.detach()
    value = (value.cpu() if value.device.type == "mps" else value).to(torch.float64)
    if not bool(torch.stack(torch.aminmax(value)).isfinite().all()):  # isfinite of the whole would make three copies
        raise ValueError(f"{name} holds NaN or infinity; all its values must be finite")
    return value


def sized(name: str, value: Float[Tensor, "..."], shape: tuple[int, ...], like: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """:func:`double`, of exactly this shape and on the device of ``like``."""
    value = double(name, value, len(shape))
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; it must be {shape}")
    return value.to(like.device)


def moment(name: str, value: Float[Tensor, "d d"], size: int | None = None, like: Tensor | None = None) -> Float[Tensor, "d d"]:
    """A symmetric, non-zero matrix in float64, made exactly symmetric.

    Raises:
        ValueError: if it is not square, of another size, not symmetric, or zero.
    """
    value = double(name, value, 2)
    size = value.shape[0] if size is None else size
    if tuple(value.shape) != (size, size):
        raise ValueError(f"{name} has shape {tuple(value.shape)}; it must be {(size, size)}")
    largest = float(torch.stack(torch.aminmax(value)).abs().max())
    if largest == 0:
        raise ValueError(f"{name} is zero; it must come from at least one non-zero observation")
    if float((value - value.T).max()) > SYMMETRY_TOLERANCE * largest:
        raise ValueError(f"{name} is not symmetric; it must be a second moment or covariance")
    value = (value + value.T).div_(2)
    return value if like is None else value.to(like.device)


def cast(value: Float[Tensor, "..."], like: Tensor, dtype: torch.dtype | None) -> Float[Tensor, "..."]:
    """A result on the device of the input, in ``dtype`` or, if that is None, in the input's."""
    return value.to(like.device, like.dtype if dtype is None else dtype).contiguous()


def whole(name: str, value: int, low: int, high: int | None = None) -> int:
    """Raises: ValueError: if the number is no whole number in ``low..high``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        raise ValueError(f"{name} is {value!r}; it must be a whole number " + (f"of at least {low}" if high is None else f"in {low}..{high}"))
    return value


def number(name: str, value: float, low: float, high: float, *, open_low: bool = False, open_high: bool = False) -> float:
    """Raises: ValueError: if the number is outside the interval (NaN is)."""
    legal = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not legal or not (low < value if open_low else low <= value) or not (value < high if open_high else value <= high):
        raise ValueError(f"{name} is {value!r}; it must be a number in {'(' if open_low else '['}{low}, {high}{')' if open_high else ']'}")
    return float(value)


def one_of(name: str, value: str, legal: Iterable[str]) -> str:
    """Raises: ValueError: if the word is not among the legal ones."""
    if value not in (words := list(legal)):
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(words)}")
    return value


def descending_eigh(name: str, matrix: Float[Tensor, "d d"]) -> tuple[Float[Tensor, "d"], Float[Tensor, "d d"]]:
    """Eigenvalues, largest first and none below zero, with eigenvectors in columns, each with its largest entry positive.

    Raises:
        ValueError: if an eigenvalue is clearly negative.
    """
    with _one_thread():
        values, vectors = torch.linalg.eigh(matrix)
    values, vectors = values.flip(0), vectors.flip(1)
    if float(values[-1]) < -NEGATIVE_TOLERANCE * float(values.abs().max()):
        raise ValueError(f"{name} has the eigenvalue {float(values[-1]):.3g}; it must be positive semi-definite")
    signs = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    return values.clamp_min(0), vectors * signs


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Reducing to tridiagonal form waits for memory: threads gain little, and wait for each other where others use the machine too.

    (Of size 2048, on two cores: 2 s on one thread, 2 to 19 s on two.)
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
