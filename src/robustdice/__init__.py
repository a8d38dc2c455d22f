"""Run a pretrained CNN on unreliable edge devices, so that answers keep coming while devices fail.

The workshop (``load_model`` to ``verify``) needs PyTorch, which is imported when one of its names is
first used; the device side (``Client``, ``LocalCluster``, ``run_device``) does without. Nothing is imported before it
is used: a device has no room for what it does not need.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from robustdice.errors import RobustdiceError, workshop_missing

# Newer versions of ONNX Runtime report on their use to their maker, from a thread of their own and through a database
# in the home directory, as soon as they are imported. A device tells nobody anything, unless somebody says so with 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from robustdice.failure.availability import Expectation as Expectation
    from robustdice.failure.availability import expect as expect
    from robustdice.failure.evaluate import Evaluation as Evaluation
    from robustdice.failure.evaluate import evaluate as evaluate
    from robustdice.failure.evaluate import evaluate_plans as evaluate_plans
    from robustdice.importance.score import score as score
    from robustdice.importance.values import Importance as Importance
    from robustdice.model.data import Dataset as Dataset
    from robustdice.model.data import load_data as load_data
    from robustdice.model.load import load_model as load_model
    from robustdice.model.load import reload_model as reload_model
    from robustdice.model.network import Network as Network
    from robustdice.partitioning.distribute import to_shards as to_shards
    from robustdice.plan import Holder as Holder
    from robustdice.plan import Layer as Layer
    from robustdice.plan import Plan as Plan
    from robustdice.plan import Shard as Shard
    from robustdice.plan import failure_sets as failure_sets
    from robustdice.report.plots import plot_accuracy as plot_accuracy
    from robustdice.report.plots import plot_plan as plot_plan
    from robustdice.report.plots import plot_scores as plot_scores
    from robustdice.runtime.answer import Answer as Answer
    from robustdice.runtime.client import Client as Client
    from robustdice.runtime.cluster import LocalCluster as LocalCluster
    from robustdice.runtime.device import run_device as run_device
    from robustdice.workshop import build as build
    from robustdice.workshop import calibrate as calibrate
    from robustdice.workshop import choose_plan as choose_plan
    from robustdice.workshop import partition as partition
    from robustdice.workshop import round_activations as round_activations
    from robustdice.workshop import verify as verify

__version__ = "0.1.0"

_LAZY = {
    "Answer": "robustdice.runtime.answer",
    "Client": "robustdice.runtime.client",
    "Dataset": "robustdice.model.data",
    "Evaluation": "robustdice.failure.evaluate",
    "Expectation": "robustdice.failure.availability",
    "Holder": "robustdice.plan",
    "Importance": "robustdice.importance.values",
    "Layer": "robustdice.plan",
    "LocalCluster": "robustdice.runtime.cluster",
    "Network": "robustdice.model.network",
    "Plan": "robustdice.plan",
    "Shard": "robustdice.plan",
    "build": "robustdice.workshop",
    "calibrate": "robustdice.workshop",
    "choose_plan": "robustdice.workshop",
    "evaluate": "robustdice.failure.evaluate",
    "evaluate_plans": "robustdice.failure.evaluate",
    "expect": "robustdice.failure.availability",
    "failure_sets": "robustdice.plan",
    "load_data": "robustdice.model.data",
    "load_model": "robustdice.model.load",
    "partition": "robustdice.workshop",
    "plot_accuracy": "robustdice.report.plots",
    "plot_plan": "robustdice.report.plots",
    "plot_scores": "robustdice.report.plots",
    "reload_model": "robustdice.model.load",
    "round_activations": "robustdice.workshop",
    "run_device": "robustdice.runtime.device",
    "score": "robustdice.importance.score",
    "to_shards": "robustdice.partitioning.distribute",
    "verify": "robustdice.workshop",
}
"""The public names, and where they are."""

__all__ = [
    "Answer",
    "Client",
    "Dataset",
    "Evaluation",
    "Expectation",
    "Holder",
    "Importance",
    "Layer",
    "LocalCluster",
    "Network",
    "Plan",
    "RobustdiceError",
    "Shard",
    "build",
    "calibrate",
    "choose_plan",
    "evaluate",
    "evaluate_plans",
    "expect",
    "failure_sets",
    "load_data",
    "load_model",
    "partition",
    "plot_accuracy",
    "plot_plan",
    "plot_scores",
    "reload_model",
    "round_activations",
    "run_device",
    "score",
    "to_shards",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'robustdice' has no attribute {name!r}")
    try:
        module = importlib.import_module(_LAZY[name])
    except ModuleNotFoundError as error:
        if (missing := workshop_missing(error)) is None:
            raise
        raise missing from None
    value = globals()[name] = getattr(module, name)
    return value


def __dir__() -> list[str]:
    """The public names, those that nobody has used yet included."""
    return sorted([*__all__, "__version__"])
