"""What running devices say and give, as tables and documents (docs/formats.md fixes the keys)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from robustdice.report.sheet import Sheet
from robustdice.runtime.wire.line import Reach

if TYPE_CHECKING:
    from robustdice.meter.throughput import BenchResult
    from robustdice.runtime.answer import Answer


def answer_json(path: str, answer: Answer, classes: Sequence[str], activation: str = "softmax") -> dict[str, Any]:
    """What ``infer --json`` prints for one image; with its ``labels``, the likeliest first, where outputs are such."""
    index = answer.class_index
    labels: dict[str, Any] = {}
    if activation == "sigmoid" and answer.probabilities is not None:
        likely = [int(k) for k in np.argsort(-answer.probabilities) if answer.probabilities[k] >= 0.5]
        names = [classes[k] if classes else str(k) for k in likely]
        labels = {"labels": dict(zip(names, map(float, answer.probabilities[likely]), strict=True))}
    return {
        **labels,
        "path": path,
        "class_index": index,
        "class_name": classes[index] if index is not None and classes else None,
        "probability": None if answer.probabilities is None or index is None else float(answer.probabilities[index]),
        "coverage": answer.coverage,
        "from_spares": answer.from_spares,
        "down": None if answer.outputs is None else list(answer.down),
        "latency_ms": 1e3 * answer.latency_seconds,
        "reason": answer.refused,
        "expected_accuracy": answer.expected_accuracy,
    }


def answers_table(answers: Sequence[Mapping[str, Any]]) -> Sheet:
    """What ``infer`` prints. Images are named from the folder on that they have in common."""
    paths = [str(answer["path"]) for answer in answers]
    alike = len(paths) > 1 and len(set(map(os.path.isabs, paths))) == 1
    folder = os.path.commonpath([os.path.dirname(path) for path in paths]) if alike else ""  # noqa: PTH120
    headings = ("class", "sure %", "coverage %", "spares %", "down", "ms", "image")
    caption = f"Images in {folder}" if folder else None
    sheet = Sheet("Answers", *headings, caption=caption, texts=["image"], folds=True)
    for answer, path in zip(answers, paths, strict=True):
        index, probability, down = answer["class_index"], answer["probability"], answer["down"]
        sheet.add_row(
            "no answer" if index is None else ", ".join(answer.get("labels", ())) or str(answer["class_name"] or index),
            "" if probability is None else f"{100 * probability:.1f}",
            "" if down is None else f"{100 * answer['coverage']:.1f}",
            "" if down is None else f"{100 * answer['from_spares']:.1f}",
            "" if down is None else ",".join(map(str, down)) or "none",
            f"{answer['latency_ms']:.1f}",
            os.path.relpath(path, folder) if folder else path,
        )
    return sheet


def status_json(
    devices: Sequence[str], found: Mapping[int, Mapping[str, Any]], troubles: Mapping[int, str]
) -> dict[str, Any]:
    """What ``status --json`` prints: for each device what it says about itself, or null; why some are silent."""
    return {
        "devices": {name: found.get(number) for number, name in enumerate(devices)},
        "troubles": {devices[number]: trouble for number, trouble in troubles.items()},
    }


def status_table(devices: Sequence[str], found: Mapping[int, Mapping[str, Any]], troubles: Mapping[int, str]) -> Sheet:
    """What ``status`` prints: what each device says about itself, and below it what is the matter."""
    headings = ("device", "state", "sees as up", "in flight", "frames/s", "weights", "computes with")
    faults = _status_troubles(devices, found, troubles)
    sheet = Sheet("Devices, each in its own words", *headings)
    for number, name in enumerate(devices):
        said = found.get(number)
        if said is None:
            sheet.add_row(name, "silent")
            continue
        sheet.add_row(
            name,
            "up",
            ", ".join(map(str, said["up"])) or "nobody",
            str(said["in_flight"]),
            f"{said['frames_per_second']:.1f}",
            f"{said['weights_bytes'] / 1e6:.2f} MB",
            _computes_with(said.get("providers", {})),
        )
        down = sorted(set(range(len(devices))) - set(said["up"]))
        if down and said.get("corrected_for", down) != down:
            applied = said["corrected_for"] and f"those for {','.join(map(str, said['corrected_for']))} are applied"
            faults.append(
                f"{name} has no corrections for {','.join(map(str, down))} down: {applied or 'none are applied'}."
            )
        for who in said.get("one_way", ()):
            faults.append(f"{name} and {devices[who['device']]} are connected one way only: {who['reason']}.")
        if fault := said["last_fault"]:
            ago = f"{fault['seconds_ago']:.0f} s ago"
            faults.append(f"Last fault that {name} saw: device {fault['device']}, {ago}: {fault['reason']}.")
    sheet.caption = "\n".join(faults) or None
    return sheet


def _computes_with(providers: Mapping[str, int]) -> str:
    """The only provider, or how many models each has."""
    return ", ".join(name if len(providers) == 1 else f"{name} {count}" for name, count in providers.items())


def _status_troubles(
    devices: Sequence[str], found: Mapping[int, Mapping[str, Any]], troubles: Mapping[int, str]
) -> list[str]:
    """Why devices are silent, who refuses whom, and who is of another build."""
    lines = [f"{devices[number]} {trouble}." for number, trouble in troubles.items() if number not in found]
    for number, said in found.items():
        for peer, state in said["connections"].items():
            if state not in {Reach.CONNECTED.value, Reach.NOBODY.value}:
                lines.append(f"{devices[number]} says: {devices[int(peer)]} {state}.")
        for entry in said["refused"]:
            who = ", key ".join(filter(None, (entry["address"] or "somebody", entry["public_key"])))
            often = f"{entry['count']} times, {entry['seconds_ago']:.0f} s ago"
            lines.append(f"{devices[number]} has refused {who}: {entry['reason']} ({often}).")
    return lines


def bench_json(result: BenchResult) -> dict[str, Any]:
    """What ``bench --json`` prints."""
    return {
        "frames_per_second": result.frames_per_second,
        "single_frames_per_second": result.single_frames_per_second,
        "ratio": result.ratio,
        "ratios": list(result.ratios),
        "latency_ms": {"p50": result.latency_p50_ms, "p99": result.latency_p99_ms},
        "devices": [
            {
                "name": device.name,
                "weights_bytes": device.weights_bytes,
                "empty_rss_bytes": device.empty_rss_bytes,
                "rss_bytes": device.rss_bytes,
                "peak_rss_bytes": device.peak_rss_bytes,
                "providers": dict(device.providers),
                "joules_per_image": device.joules_per_image,
                "energy_source": device.energy_source,
                "no_energy": device.no_energy,
            }
            for device in result.devices
        ],
        "images": result.images,
        "unanswered": result.unanswered,
        "coverage": result.coverage,
        "idle_subtracted": result.idle_subtracted,
        "silent": list(result.silent),
        "not_compared": result.not_compared,
    }


def bench_table(result: BenchResult) -> Sheet:
    """What ``bench`` prints."""
    caption = (
        f"{result.images} images: {result.frames_per_second:.1f} frames/s (median), latency "
        f"{result.latency_p50_ms:.1f} ms (median), {result.latency_p99_ms:.1f} ms (99th percentile)."
    )
    if result.unanswered or result.coverage < 1:
        caption += f" {result.unanswered} were not answered; mean coverage {100 * result.coverage:.1f} %."
    if result.silent:
        caption += f" Not heard: {', '.join(result.silent)}."
    if result.ratio is None:
        caption += f" Not compared with the unpartitioned model: {result.not_compared}."
    else:
        caption += (
            f" One process with the unpartitioned model {result.single_frames_per_second:.1f} frames/s, "
            f"ratio {result.ratio:.2f} ({min(result.ratios):.2f} to {max(result.ratios):.2f} in "
            f"{len(result.ratios)} pairs)."
        )
    caption += " Resident memory: what the bundle added to an empty process, and the most of all of it."
    for reason in dict.fromkeys(device.no_energy for device in result.devices if device.no_energy):
        caption += f" No energy: {reason}."
    headings = ["device", "weights", "resident for it", "peak memory", "computes with"]
    sources = dict.fromkeys(device.energy_source for device in result.devices if device.energy_source)
    if sources:
        headings.append("J/image")
        beyond = ", beyond what it takes at rest" if result.idle_subtracted else ""
        caption += f" Energy ({', '.join(sources)}) is what each device's whole machine took{beyond}."
    sheet = Sheet("Devices", *headings, caption=caption)
    for device in result.devices:
        sizes = (device.weights_bytes, device.rss_bytes - device.empty_rss_bytes, device.peak_rss_bytes)
        cells = [*(f"{size / 1e6:.2f} MB" for size in sizes), _computes_with(device.providers)]
        joules = device.joules_per_image
        sheet.add_row(device.name, *cells, *([] if joules is None else [f"{joules:.3g}"]))
    return sheet
