"""Methods of the user's own: a function from a :class:`Request` to shards, given as such or by its name."""

from __future__ import annotations

import importlib
import json
import operator
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from robustdice.errors import PlanError, RobustdiceError, first_line
from robustdice.importable import importable_from_here
from robustdice.partitioning.request import Answer, Request
from robustdice.plan import Holder, Shard

Own = Callable[[Request], "Answer | Sequence[Sequence[Shard]]"]
"""What a user's method looks like."""


def find(name: str) -> Own:
    """The function that ``package.module:function`` names; PlanError when there is none."""
    module_name, _, attribute = name.partition(":")
    with importable_from_here():
        try:
            method = operator.attrgetter(attribute)(importlib.import_module(module_name))
        except Exception as error:  # whatever the module does on import
            raise PlanError(
                f"cannot import the method {name!r}: {type(error).__name__}: {first_line(error)}; "
                "it is named as package.module:function, from this directory or from what is installed"
            ) from error
    if not callable(method):
        raise PlanError(f"the method {name} is a {type(method).__name__}; expected a function of a request")
    found: Own = method
    return found


def name_of(method: Own) -> str:
    """What plans and tables call a function: ``module:function``."""
    return f"{method.__module__}:{getattr(method, '__qualname__', type(method).__qualname__)}"


def ask(method: Own, name: str, request: Request) -> Answer:
    """What the function answers, as plans need it; PlanError, naming the function, when it fails or answers nothing of
    the kind."""
    try:
        with importable_from_here():
            answer = method(request)
    except RobustdiceError as error:
        raise PlanError(f"method {name}: {error}") from error
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        hint = "; no scores were given: --scores FILE, or --data DATA" if request.importance is None else ""
        raise PlanError(
            f"method {name} failed: {type(error).__name__}: {first_line(error)} ({where.filename}, line {where.lineno})"
            + hint
        ) from error
    if not isinstance(answer, Answer):
        answer = Answer(shards=answer)  # type: ignore[arg-type]
    try:
        shards = tuple(tuple(map(_checked, of_layer)) for of_layer in answer.shards)
        settings, provenance = (json.loads(json.dumps(dict(said))) for said in (answer.settings, answer.provenance))
    except (TypeError, ValueError) as error:
        raise PlanError(
            f"method {name} answered what is no plan ({first_line(error)}); expected for every layer a sequence of "
            "Shard(neurons, holders), or an Answer with them and settings that are JSON"
        ) from None
    if len(shards) != len(request.layers):
        raise PlanError(f"method {name} answered shards for {len(shards)} layers, the model has {len(request.layers)}")
    return Answer(shards, settings, provenance)


def _checked(shard: Any) -> Shard:
    """A shard of whole numbers that are Python's, whatever sequences and NumPy numbers it was made of; TypeError."""
    if not isinstance(shard, Shard):
        raise TypeError(f"a {type(shard).__name__} where a Shard should be")
    holders = []
    for holder in shard.holders:
        if not isinstance(holder, Holder) or not isinstance(holder.representation, str):
            raise TypeError(f"{holder!r} where a Holder should be")
        holders.append(Holder(operator.index(holder.device), holder.representation))
    neurons, parity_of = (tuple(map(operator.index, numbers)) for numbers in (shard.neurons, shard.parity_of))
    return Shard(neurons, tuple(holders), parity_of)
