"""From what users write to an engine."""

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

    kind: type[LocalEngine] | type[ServerEngine] = LocalEngine
    given: tuple[Any, ...] = (spec,)
    if isinstance(spec, str) and spec.startswith(("http://", "https://")):
        url, _, model = spec.partition("#")
        if not model:
            raise UserError(f"{spec} names no model; write it behind a #: {spec}#model")
        kind, given = ServerEngine, (url, model)
    elif not isinstance(spec, (str, Path)) and not (isinstance(spec, tuple) and len(spec) == 2):
        known = "embedded, a model folder, a hub id, http://host:port/v1#model, a model with its tokenizer, or an Engine"
        raise UserError(f"{type(spec).__name__} is no engine; give {known}")
    try:
        return kind(*given, **options)
    except TypeError as error:
        raise UserError(f"{kind.__name__} has no such knob: {error}") from error
