"""From what users write to an engine."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from echelon.errors import UserError
from echelon.llm.base import Engine


def resolve(spec: Any, **options: Any) -> Engine:
    """An engine from its name, a model with its tokenizer, or an engine.

    Args:
        spec: `embedded`, a model folder or a hub id; ``http://host:port/v1#model`` for an OpenAI-compatible server; a model and its tokenizer;
            or an engine.
        options: knobs of the engine that is made (:class:`~echelon.llm.local.LocalEngine` or :class:`~echelon.llm.server.ServerEngine`).

    Raises:
        UserError: if it is none of these, or there is no such knob. A model that is not there is told of when it is first needed.
    """
    if isinstance(spec, Engine):
        if options:
            raise UserError(f"{type(spec).__name__} is made already; {', '.join(options)} cannot be set any more")
        return spec
    from echelon.llm.local import LocalEngine
    from echelon.llm.server import ServerEngine

    make: Callable[..., Engine] = LocalEngine
    if is_address(spec):
        make = ServerEngine.at
    elif not isinstance(spec, (str, Path)) and not (isinstance(spec, tuple) and len(spec) == 2):
        known = "embedded, a model folder, a hub id, http://host:port/v1#model, a model with its tokenizer, or an Engine"
        raise UserError(f"{type(spec).__name__} is no engine; give {known}")
    try:
        return make(spec, **options)
    except TypeError as error:
        raise UserError(f"{'a server' if make is not LocalEngine else 'a local model'} has no such knob: {error}") from error


def is_address(spec: Any) -> bool:
    """Whether this names a server."""
    return isinstance(spec, str) and spec.startswith(("http://", "https://"))
