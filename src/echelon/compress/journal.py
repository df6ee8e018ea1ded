"""The work folder of a streamed compression: what it is of, which steps are done, and what the next one needs.

A step's files are written first and named in the journal, by one rename, afterwards. Whenever the process dies, the journal therefore names whole
files only, and whatever else lies in the folder is swept away when the work is taken up again.
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from echelon.calibrate.stored import StoredStates, flushed
from echelon.data.files import write_whole
from echelon.errors import UserError

JOURNAL, LOCK, MODEL, STATES, CARRIED, REPLACED = "journal.json", "lock", "model", "states", "carried", "replaced"


class Journal:
    """Entering takes the folder for this process alone.

    Args:
        folder: made if it is not there.
        identity: what the work is of; a folder of other work is refused.

    Attributes:
        model: the folder of the future model, which :meth:`publish` moves to its place.

    Raises:
        UserError: on entering, if the folder holds other work or something else, or another process works there.
    """

    def __init__(self, folder: str | os.PathLike[str], identity: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.model = self.folder / MODEL
        self.identity = json.loads(json.dumps(identity))
        self.steps: dict[str, dict[str, Any]] = {}
        self._lock: Any = None
        self._written = 0

    def __enter__(self) -> "Journal":
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            others = [file for file in self.folder.iterdir() if not file.name.startswith(".") and file.name != LOCK]
            if others and not (self.folder / JOURNAL).is_file():
                raise UserError(f"{self.folder} exists and is no work folder; give another one as work")
            self._lock = open(self.folder / LOCK, "w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another process is compressing in {self.folder}; wait for it, or give another work folder") from error
        except OSError as error:
            raise UserError(f"cannot use {self.folder} as work folder: {error.strerror or error}") from error
        try:
            if others:
                self._take_up()
            if not self.steps:
                self._save()
            self._sweep()
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        self._lock.close()

    def _take_up(self) -> None:
        try:
            noted = json.loads((self.folder / JOURNAL).read_text(encoding="utf-8"))
            before, self.steps = _flat(noted["identity"]), noted["steps"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{self.folder / JOURNAL} is no journal; delete the folder to start again") from error
        now = _flat(self.identity)
        for name in [*now, *before] if self.steps else ():  # where nothing is done yet, nothing can be mixed up
            if now.get(name) != before.get(name):
                told = f"{self.folder} holds other work: {name} was {before.get(name)!r} and is {now.get(name)!r}"
                raise UserError(f"{told}; go on with the same settings, give another work folder, or delete this one")

    def _save(self) -> None:
        write_whole(self.folder / JOURNAL, json.dumps({"identity": self.identity, "steps": self.steps}))

    def _sweep(self) -> None:
        """Delete what no step names."""
        named = {self.folder / name for step in self.steps.values() for name in step["files"]}
        keep = named | {self.folder / JOURNAL, self.folder / LOCK, self.model, self.folder / REPLACED, self.folder / STATES, self.folder / CARRIED}
        for parent in (self.folder, self.model, self.folder / STATES, self.folder / CARRIED):
            for file in parent.iterdir() if parent.is_dir() else ():
                if file not in keep:
                    _delete(file)

    @property
    def published(self) -> bool:
        """Whether the model has been moved to its place already."""
        return "publish" in self.steps and not self.model.is_dir()

    def keep(self, states: Iterable[Tensor]) -> StoredStates:
        """Put states on disk for now; they stay if they are given to :meth:`done`."""
        self._written += 1
        return StoredStates.write(self.folder / STATES / f"{len(self.steps)}-{self._written}", states)

    def shard(self, name: str, tensors: Mapping[str, Tensor]) -> str:
        """Write a shard of the model, whole or not at all; its place in the folder.

        Raises:
            UserError: if it cannot be written.
        """
        self._write(self.model / name, {key: tensor.contiguous() for key, tensor in tensors.items()})
        return f"{MODEL}/{name}"

    def done(
        self, step: str, note: Mapping[str, Any], *, carried: Mapping[str, Tensor] | None = None, states: Sequence[Tensor] | None = None,
        shard: str | None = None, after: str | None = None, forget: bool = False,
    ) -> None:  # fmt: skip
        """Note that a step is done.

        Args:
            step: its name.
            note: what is to be remembered of it, as JSON.
            carried: tensors that are to be remembered.
            states: the hidden states behind it, if they were kept here.
            shard: what :meth:`shard` returned.
            after: an earlier step whose states are needed no more.
            forget: whether this goes for its tensors, too.

        Raises:
            UserError: if it cannot be written; the step then counts as not done.
        """
        files = [shard] if shard else []
        entry: dict[str, Any] = {"note": dict(note), "files": files}
        if carried:
            entry["carried"] = f"{CARRIED}/{step}.safetensors"
            self._write(self.folder / entry["carried"], {key: value.contiguous() for key, value in carried.items()})
            files.append(entry["carried"])
        if isinstance(states, StoredStates) and len(states):
            entry["states"] = [f"{STATES}/{states.folder.name}", len(states)]
            files.append(entry["states"][0])
        before = self.steps.get(after or "")
        if before is not None:
            gone = {before.get("states", [""])[0], before.get("carried", "") if forget else ""}
            before["files"] = [file for file in before["files"] if file not in gone]
        self.steps[step] = entry
        self._save()
        self._sweep()

    def states(self, step: str) -> StoredStates | None:
        """The hidden states that were given with a step."""
        found = self.steps[step].get("states")
        return None if found is None else StoredStates(self.folder / found[0], found[1])

    def carried(self, step: str) -> dict[str, Tensor]:
        """The tensors that were given with a step."""
        name = self.steps[step].get("carried", "")
        return {} if name not in self.steps[step]["files"] else {key: value.clone() for key, value in load_file(self.folder / name).items()}

    def write(self, name: str, text: str) -> None:
        """A text file beside the shards."""
        write_whole(self.model / name, text)

    def publish(self, out: Path) -> None:
        """Move the finished model to its place; the model that was there goes, as a whole. Killed in between, call it again."""
        try:
            if not self.published:
                for file in self.model.iterdir():
                    with open(file, "rb") as opened:
                        os.fsync(opened.fileno())
                if "publish" not in self.steps:
                    self.steps["publish"] = {"note": {}, "files": [f"{MODEL}/{file.name}" for file in self.model.iterdir()]}
                    self._save()
                if out.exists():
                    _delete(self.folder / REPLACED)
                    os.replace(out, self.folder / REPLACED)
                os.replace(self.model, out)
        except OSError as error:
            raise UserError(f"cannot write {out}: {error.strerror or error}; the finished model is in {self.model}") from error
        # The journal goes last: as long as anything is there, it says what it is.
        for file in sorted(self.folder.iterdir(), key=lambda file: file.name == JOURNAL):
            _delete(file)
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def _write(self, file: Path, tensors: Mapping[str, Tensor]) -> None:
        aside = file.with_name("." + file.name)
        try:
            file.parent.mkdir(exist_ok=True)
            flushed(dict(tensors), aside)
            os.replace(aside, file)
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                aside.unlink()
            raise UserError(f"cannot write {file}: {getattr(error, 'strerror', None) or error}; make room and run it again: it goes on from here") from error


def _flat(identity: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, value in identity.items():
        made |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return made


def _delete(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
