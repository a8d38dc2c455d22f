"""Results as tables for people and as documents for programs (their keys are fixed in docs/formats.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from robustdice.cost.counts import costs_of
from robustdice.importance.values import Importance
from robustdice.plan import FailureSet, Plan
from robustdice.plan.certificate import wilson
from robustdice.report.sheet import Sheet
from robustdice.report.split_words import why_split
from robustdice.wire_format import WIRES

if TYPE_CHECKING:
    from robustdice.failure.availability import Expectation
    from robustdice.failure.evaluate import Evaluation
    from robustdice.model.network import Network
    from robustdice.workshop import Verification


def failure_set_name(failed: FailureSet) -> str:
    """A failure set as JSON keys spell it: device numbers in order, with commas; empty when nobody is down."""
    return ",".join(str(device) for device in sorted(failed))


def percent(fraction: float) -> str:
    """A fraction as people read it."""
    return f"{100 * fraction:.1f} %"


def network_json(network: Network) -> dict[str, Any]:
    """What ``inspect --json`` prints."""
    return {
        "model": network.reference.source,
        "model_digest": network.reference.digest,
        "input_shape": list(network.input_shape),
        "outputs": network.outputs,
        "parameters": network.parameters,
        "activation": network.activation,
        "shared_parameters": network.shared_weights,
        "layers": [
            {
                "name": layer.layer.name,
                "neurons": layer.layer.neurons,
                "group": layer.layer.group,
                "parameters": layer.layer.neurons * layer.layer.neuron_weights,
                "multiply_adds": layer.layer.neurons * layer.layer.neuron_macs,
                "exchange_shape": list(layer.shape),
                "exchange_bytes": 4 * int(np.prod(layer.shape)),
                "tail_ends_at": layer.value.name,
            }
            for layer in network.layers
        ],
    }


def network_table(network: Network) -> Sheet:
    """What ``inspect`` prints."""
    exchanged = sum(int(np.prod(layer.shape)) for layer in network.layers)
    caption = (
        f"{network.parameters:,} parameters ({network.shared_weights:,} outside of layers, on every device), "
        f"{exchanged:,} activations exchanged per image when every layer is, input {list(network.input_shape)}, "
        f"{network.outputs} outputs"
    )
    if network.activation == "sigmoid":
        caption += (
            ", each a label of its own (a sigmoid, not a softmax): of several labels, plans are made for the highest"
        )
    headings = ("layer", "neurons", "parameters", "multiply-adds", "exchange", "kB")
    table = Sheet(network.reference.source, *headings, caption=caption)
    for layer in network.layers:
        neurons = layer.layer.neurons
        table.add_row(
            layer.layer.name,
            f"{neurons}" if layer.layer.group == 1 else f"{neurons} in groups of {layer.layer.group}",
            f"{neurons * layer.layer.neuron_weights:,}",
            f"{neurons * layer.layer.neuron_macs:,}",
            "x".join(map(str, layer.shape)),
            f"{4 * int(np.prod(layer.shape)) / 1e3:.1f}",
        )
    return table


def importance_table(importance: Importance) -> Sheet:
    """What ``score`` prints."""
    table = Sheet("Importance (median, largest)", "layer", "neurons", *importance.columns)
    for name, scores in zip(importance.names, importance.scores, strict=True):
        cells = [f"{np.median(column):.3g}, {column.max():.3g}" for column in scores.T]
        table.add_row(name, str(len(scores)), *cells)
    how = importance.settings
    if "s3" in importance.columns and "s3" in how:
        chosen = "chosen by auto" if how.get("s3_chosen_by") == "auto" else "as asked for"
        classes = f", classes: {how['s3_classes']}" if "s3_classes" in how else ""
        table.caption = f"s3 is {how['s3']} ({chosen}{classes}), from {how.get('samples')} images."
    return table


PROCESS_BYTES = 70_000_000
"""Resident memory of a device's process that computes, without weights: Python, NumPy, ONNX Runtime, ZeroMQ (measured,
x86-64: docs/results/memory.md)."""
COPIES_WHILE_LOADING = 1, 3
"""So many times the weights are resident at the peak, while ONNX Runtime packs them: few where they are coarse or in
linear layers, many where they are float32 and in convolutions (measured, docs/formats.md)."""


def process_bytes(weights_bytes: int) -> tuple[int, int]:
    """From and to which resident memory a device's process is expected to need at its peak: an estimate."""
    least, most = COPIES_WHILE_LOADING
    return PROCESS_BYTES + least * weights_bytes, PROCESS_BYTES + most * weights_bytes


def process_memory(weights_bytes: int) -> str:
    """That, as people read it."""
    least, most = (round(size / 1e6) for size in process_bytes(weights_bytes))
    return f"{least} to {most} MB" if most > least else f"{most} MB"


def plan_json(plan: Plan) -> dict[str, Any]:
    """What ``plan --json`` prints."""
    return {
        "method": plan.method,
        "memory_share": plan.memory_share,
        "bytes_per_device": list(plan.bytes_per_device),
        "process_bytes": list(process_bytes(max(plan.bytes_per_device))),
        "healthy_compute_share": plan.healthy_compute_share,
        "splits": [plan.split(layer) for layer in range(len(plan.layers))],
        "exchanged_activations": plan.exchanged_activations,
        "exchanged_bytes": costs_of(plan).exchanged_bytes,
        "wire": plan.wire,
        "model": plan.model.source,
        "model_digest": plan.model.digest,
        "plan_digest": plan.digest,
        "settings": dict(plan.settings),
        "provenance": dict(plan.provenance),
    }


def plan_table(plan: Plan) -> Sheet:
    """For every layer, how many neurons have how many holders."""
    counts = map(str, range(1, plan.devices + 1))
    table = Sheet("How many neurons 1, 2, ... devices hold", "layer", "neurons", *counts, "split", "exchange")
    for index, (layer, shards) in enumerate(zip(plan.layers, plan.shards, strict=True)):
        held = [0] * plan.devices
        for shard in shards:
            held[len(shard.holders) - 1] += len(shard.neurons)
        handed = plan.exchanged_bytes(index)
        exchange = f"{handed / 1e3:.1f} kB" if handed else "none"
        table.add_row(layer.name, str(layer.neurons), *(str(n) if n else "" for n in held), plan.split(index), exchange)
    return table


def plan_summary(plan: Plan) -> str:
    """A plan's costs in one paragraph."""
    sizes = ", ".join(f"{size / 1e6:.2f}" for size in plan.bytes_per_device)
    after = sum(
        layer.neurons * layer.neuron_outputs for index, layer in enumerate(plan.layers) if plan.exchanged(index)
    )
    parity = any(map(plan.exchanged_before_tail, range(len(plan.layers))))
    before = f", before the layers' tails ({after:,} behind them), which every device then computes" if parity else ""
    return (
        f"{plan.method} on {plan.devices} devices: the largest holds {percent(plan.memory_share)} of the model "
        f"({sizes} MB of {plan.total_bytes / 1e6:.2f} MB) and computes {percent(plan.healthy_compute_share)} of its "
        f"multiply-adds while all are up. {plan.exchanged_activations:,} activations are handed over per "
        f"image{before}, {_on_the_wire(plan)}.{why_split(plan)} A device's process will need about "
        f"{process_memory(max(plan.bytes_per_device))} of memory (estimated: its weights {COPIES_WHILE_LOADING[0]} to "
        f"{COPIES_WHILE_LOADING[1]} times while they are loaded, and {PROCESS_BYTES / 1e6:.0f} MB)."
    )


def _on_the_wire(plan: Plan) -> str:
    """How many bytes travel, and of them how many as what."""
    by_wire = dict.fromkeys(reversed(WIRES), 0)
    for index, wire in enumerate(plan.wires):
        by_wire[wire] += plan.exchanged_bytes(index)
    used = {wire: size for wire, size in by_wire.items() if size} or {plan.wire: 0}
    total = f"{sum(used.values()) / 1e3:.1f} kB"
    if len(used) == 1:
        return f"{total} as {next(iter(used))}"
    return f"{total} ({', '.join(f'{size / 1e3:.1f} as {wire}' for wire, size in used.items())})"


def evaluation_json(result: Evaluation, expectation: Expectation | None = None) -> dict[str, Any]:
    """What ``evaluate --json`` prints for a plan."""
    failures = {}
    for size, summary in result.by_size.items():
        sets = {failure_set_name(f): accuracy for f, accuracy in result.accuracy.items() if len(f) == size}
        failures[str(size)] = {
            "worst": summary.worst,
            "mean": summary.mean,
            "best": summary.best,
            "worst_interval": list(wilson(summary.worst, result.samples)),
            "sets": sets,
        }
        if summary.sampled:
            failures[str(size)] |= {"sampled": True, "of": summary.of}
    return {
        "clean": result.clean,
        "clean_interval": list(wilson(result.clean, result.samples)),
        "samples": result.samples,
        "data": result.data,
        "memory_share": result.memory_share,
        "method": result.method,
        "wire": result.wire,
        "failures": failures,
        **({} if expectation is None else {"availability": expectation_json(expectation)}),
    }


def expectation_json(expectation: Expectation) -> dict[str, Any]:
    """The ``availability`` of ``evaluate --json``."""
    return {
        "up": list(expectation.up),
        "expected_accuracy": expectation.expected_accuracy,
        "no_answer_probability": expectation.no_answer_probability,
        "estimated": expectation.estimated,
        "distribution": [{"accuracy": a, "probability": p} for a, p in expectation.distribution],
    }


def expectation_table(expectation: Expectation, name: str = "") -> Sheet:
    """What ``evaluate --availability`` prints beside the accuracies."""
    up = sorted(set(expectation.up))
    spread = f"{up[0]:g}" if len(up) == 1 else f"{up[0]:g} to {up[-1]:g}"
    caption = (
        "From the measured accuracies, failures being independent; all devices down counts as accuracy 0 "
        f"(probability {expectation.no_answer_probability:.2g})."
        + (" Estimated: of some sizes only a sample of the failure sets was measured." if expectation.estimated else "")
    )
    whose = f" of {name}" if name else ""
    table = Sheet(f"Each device{whose} is up with probability {spread}", "accuracy", "", caption=caption)
    table.add_row("expected", percent(expectation.expected_accuracy))
    for probability in (0.5, 0.9, 0.99, 0.999):
        table.add_row(f"at least, {100 * probability:g} % of the time", percent(expectation.at_least(probability)))
    return table


def evaluation_table(result: Evaluation) -> Sheet:
    """What ``evaluate`` prints for one plan."""
    caption = f"{_measured_on(result)} The unpartitioned model: {percent(result.clean)}."
    title = f"{result.method}, memory share {percent(result.memory_share)}"
    title += "" if result.wire == "float32" else f", {result.wire} on the wire"
    headings = ("devices down", "worst", "mean", "best", "each failure set")
    sheet = Sheet(title, *headings, caption=caption, texts=["each failure set"])
    for size, summary in result.by_size.items():
        sets = [(failure_set_name(f), a) for f, a in result.accuracy.items() if len(f) == size and size]
        each = ", ".join(f"{{{name}}} {100 * accuracy:.1f}" for name, accuracy in sets) if len(sets) <= 6 else ""
        name = f"{size} ({summary.sets} of {summary.of:,} sets, sampled)" if summary.sampled else str(size)
        sheet.add_row(name, percent(summary.worst), percent(summary.mean), percent(summary.best), each)
    return sheet


def _measured_on(result: Evaluation) -> str:
    spread = max(b - a for a, b in (wilson(a, result.samples) for a in result.accuracy.values())) / 2
    return (
        f"Top-1 accuracy measured on {result.samples:,} images of {result.data}: each figure may be off by up to "
        f"{100 * spread:.1f} points (95 %), for they are a sample."
    )


def comparison_table(names: Sequence[str], results: Sequence[Evaluation]) -> Sheet:
    """What ``evaluate`` prints for several plans of one model: side by side, the worst failure set and the mean."""
    caption = (
        f"Worst failure set (mean of all). {_measured_on(results[0])} All plans saw the same images, so differences "
        f"between them are surer than that. The unpartitioned model: {percent(results[0].clean)}."
    )
    sheet = Sheet("Top-1 accuracy in %", "devices down", *names, caption=caption)
    sheet.add_row("method", *(result.method for result in results))
    sheet.add_row("memory share", *(percent(result.memory_share) for result in results))
    if {result.wire for result in results} != {"float32"}:
        sheet.add_row("on the wire", *(result.wire for result in results))
    for size in sorted({size for result in results for size in result.by_size}):
        summaries = [result.by_size.get(size) for result in results]
        cells = ["" if s is None else f"{100 * s.worst:.1f} ({100 * s.mean:.1f})" for s in summaries]
        sheet.add_row(str(size), *cells)
    return sheet


NOTHING_TO_CLAIM = "These weights are random, or what the claims are about was not compared: nothing to claim."


def trends_table(verdicts: Sequence[Mapping[str, Any]]) -> Sheet:
    """What ``reproduce`` prints."""
    table = Sheet("Do the paper's trends hold?", "model", "claim", "holds")
    for verdict in verdicts:
        table.add_row(verdict["model"], verdict["claim"], "yes" if verdict["holds"] else ", ".join(verdict["fails"]))
    if not verdicts:
        table.caption = NOTHING_TO_CLAIM
    return table


def verification_json(result: Verification) -> dict[str, Any]:
    """What ``verify --json`` prints."""
    return {
        "agrees": result.agrees,
        "max_relative_error": result.max_relative_error,
        "allowed_relative_error": result.allowed_relative_error,
        "failure_sets": {failure_set_name(failed): error for failed, error in result.errors.items()},
        **({"sampled": True, "of": result.of} if len(result.errors) < result.of else {}),
    }


def verification_table(result: Verification) -> Sheet:
    """What ``verify`` prints."""
    chosen = f"{len(result.errors)} of {result.of:,} failure sets, drawn" if len(result.errors) < result.of else None
    table = Sheet("Bundles against the model", "devices down", "largest relative error", caption=chosen)
    for failed, error in result.errors.items():
        table.add_row(failure_set_name(failed) or "none", f"{error:.1e}")
    return table


def verdict(result: Verification) -> str:
    """What ``verify`` found, in a sentence."""
    sets = (
        f"{len(result.errors)} of {result.of:,} failure sets" if len(result.errors) < result.of else "every failure set"
    )
    error = f"relative error at most {result.max_relative_error:.1e}, {result.allowed_relative_error:g} is allowed"
    return f"The bundles {'agree' if result.agrees else 'do NOT agree'} with the model for {sets} ({error})."
