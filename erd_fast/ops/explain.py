"""Which backend a call takes, and why not the others."""

import importlib
from typing import Any

from erd_fast.errors import ConfigError, unknown_name
from erd_fast.ops import choices
from erd_fast.ops.backends import BACKENDS, OPS, asked_for
from erd_fast.ops.choices import form_of
from erd_fast.ops.declare import ReachedError, explaining


def explain(op: str, *args: Any, **how: Any) -> str:
    """Which backend ``op`` takes, and why not the others: for a call with these arguments, or without any in general.

    Raises:
        ConfigError: unknown op. ValueError: arguments that the op does not allow.
    """
    if op not in OPS:
        raise ConfigError(unknown_name("op", op, OPS))
    declared, flat = OPS[op], ()
    if args or how:
        token = explaining.set(True)
        try:
            getattr(importlib.import_module("erd_fast.ops"), op)(*args, **how)
        except ReachedError as asked:
            flat = asked.args[1]
        else:
            return f"{op} takes its differentiable reference: the call is within a transform, or needs a gradient"
        finally:
            explaining.reset(token)
    names = dict.fromkeys((*sorted(declared.backends, key=declared.lateness)[:-1], *BACKENDS))
    refusals = {backend: declared.refusal(backend, *flat) for backend in names}
    named = asked_for(op, declared.backends)
    if named:
        chosen, why = named, "asked for by name"
    elif declared.timed and flat and (stored := choices.chosen(op, form_of(flat))):
        chosen, why = stored, "the fastest when they were timed"
    else:
        chosen, why = next(name for name, refusal in refusals.items() if refusal is None), "the first that can run"
    reasons = [f"  {backend}: {'; '.join(refusal or ('can run',))}" for backend, refusal in refusals.items()]
    return "\n".join([f"{op} takes {chosen}, {why}", *reasons])
