"""What a result depends on besides its recipe: model, data, code, packages, machine."""

import functools
import hashlib
import os
import platform
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import echelon
from echelon.compare.task import load_task
from echelon.models import embedded_dir

PACKAGES = ("torch", "transformers", "peft", "tokenizers", "numpy", "scipy", "scikit-learn", "sentence-transformers")
PIECE = 1 << 20


def fingerprint(paths: Iterable[str | Path]) -> str:
    """Hash of names, sizes and the first and last MiB of all files in these files and folders."""
    made = hashlib.sha256()
    for path in map(Path, paths):
        for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
            size = file.stat().st_size
            made.update(f"{file.name} {size}".encode())
            with file.open("rb") as content:
                made.update(content.read(PIECE))
                if size > PIECE:
                    content.seek(-PIECE, os.SEEK_END)
                    made.update(content.read())
    return made.hexdigest()[:16]


@functools.cache
def code_version() -> str:
    """Version, and hash of the package's own source: an edited method is another method."""
    root = Path(echelon.__file__).parent
    return f"{echelon.__version__}+{fingerprint(sorted(root.rglob('*.py')))[:12]}"


def identities(recipe: Any) -> dict[str, str]:
    """Fingerprints of the model, where it is on this machine, and of the data."""
    folder = embedded_dir() if recipe.model == "embedded" else Path(recipe.model)
    model = {"model": fingerprint([folder])} if folder.is_dir() else {}
    return model | {"data": fingerprint(load_task(recipe.task).sources(recipe))}


def foundations(recipe: Any) -> dict[str, Any]:
    """All that the result of every run depends on, whichever its method and seed."""
    return {
        "task": recipe.task, "model": recipe.model, "data": recipe.data, "budget": recipe.budget, "metrics": recipe.metrics,
        "code": code_version(), "files": identities(recipe),
    }  # fmt: skip


@functools.cache
def machine() -> dict[str, Any]:
    """Packages, processor, threads and commit."""
    import torch

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "echelon": code_version(), "commit": _commit(), "packages": versions, "python": platform.python_version(), "system": platform.platform(terse=True),
        "cpu": _cpu(), "threads": torch.get_num_threads(), "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }  # fmt: skip


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return f"{names[0]}, {len(names)} logical cores" if names else f"{platform.processor() or platform.machine()}, {os.cpu_count()} logical cores"


def _commit() -> str | None:
    try:
        said = subprocess.run(
            ["git", "-C", str(Path(echelon.__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return said.stdout.strip()[:12]
