"""Tries architectures from model to bundles, and writes the table in docs/architectures.md.

    python scripts/architectures.py --out docs/architectures.md [SOURCE ...]

For every classification CNN of torchvision, some of timm, and ONNX files that torch.onnx writes: load it with random
weights, plan, build, and run the bundles beside the model, with nobody down and with each device down. A model a core,
each in a process of its own; what is finished is kept beside the table until all is.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx

from robustdice.bundle.onnx_graph import OnnxGraph, export_onnx
from robustdice.bundle.read import load_bundle
from robustdice.bundle.write import write_bundles
from robustdice.errors import RobustdiceError
from robustdice.files import write_atomically
from robustdice.importance.score import score
from robustdice.model.builders import import_torchvision
from robustdice.model.canonical import aten
from robustdice.model.execute import attribute, execute
from robustdice.model.load import load_model
from robustdice.model.network import Network
from robustdice.model.tracing import quiet
from robustdice.plan import Plan, failure_sets
from robustdice.runtime.inprocess import InProcess
from robustdice.tasks import Checkpoint
from robustdice.workshop import partition, relative_error

TRANSFORMERS = ("vit_", "swin_", "maxvit_")
"""What torchvision ships that is no CNN."""
TIMM = [
    "convnextv2_atto",
    "cs3darknet_focus_s",
    "cspresnet50",
    "dla34",
    "dpn68",
    "eca_nfnet_l0",
    "efficientnet_b0_gn",
    "ese_vovnet19b_dw",
    "fasternet_t0",
    "gernet_s",
    "ghostnet_100",
    "hrnet_w18_small",
    "inception_next_atto",
    "inception_v4",
    "legacy_xception",
    "mixnet_s",
    "mobilenetv4_conv_small",
    "mobileone_s0",
    "regnetz_040",
    "repghostnet_050",
    "repvgg_a0",
    "res2net50_26w_4s",
    "resnest14d",
    "rexnet_100",
    "selecsls42",
    "skresnet18",
    "starnet_s1",
    "tresnet_m",
]
ONNX = [
    "alexnet",
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "googlenet",
    "inception_v3",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "regnet_y_400mf",
    "resnet18",
    "resnext50_32x4d",
    "shufflenet_v2_x1_0",
    "squeezenet1_1",
    "vgg11_bn",
    "wide_resnet50_2",
]
"""One of each family of torchvision, as files of both of torch's exporters."""
EXPORTERS = ("dynamo", "torchscript")
LARGE_BYTES = 400_000_000
"""Models from this size on are tried with one plan on two devices: writing gigabytes takes its time."""
TIMEOUT_SECONDS = 3600
IMAGE = (3, 224, 224)
DEVIATION = 0.25
TOLERANCE = 1e-4
"""The largest relative error of what is said to work, unless float32 itself does worse."""
ABOUT = """
Each has random weights, scaled so that every layer matters to the scores, and takes images of 224x224. It is planned
(RobustDiCE at half of the memory on 4 devices, CDC on 3; models above 400 MB RobustDiCE on 2 devices only), built, and
run from its bundles. The error is the largest difference to the model's scores over the largest score, with nobody down
and with each single device down, where the model loses the same neurons. A model does not count as working when that is
above 1e-4 and above four times what float32 alone does to the model (its difference from float64).
*Exchanged* counts the activations of an image when every layer is handed over.
"""


def sources() -> list[str]:
    """Everything that the table has a row for."""
    every = import_torchvision().models.list_models(module=import_torchvision().models)
    return [
        *(f"torchvision:{name}" for name in every if not name.startswith(TRANSFORMERS)),
        *(f"timm:{name}" for name in TIMM),
        *(f"{exporter}:{name}" for name in ONNX for exporter in EXPORTERS),
    ]


def settle(network: Network) -> None:
    """Make random weights such that every layer matters to the scores, and rounding errors do not grow.

    What every layer, and what scales channels, gives gets the deviation ``DEVIATION``, and so does what batch norms
    give; scales that are zero at first, so that a branch says nothing, become one before. With a larger deviation, or
    batch norms that subtract all of the mean, deep networks of random weights are chaotic: float32 and float64 give
    EfficientNet-B7 and ResNet-152 different answers.
    """
    image = np.random.default_rng(1).standard_normal((2, *network.input_shape), dtype=np.float32)
    values: dict[fx.Node, Any] = {network.input: torch.from_numpy(image)}
    layers = {layer.node for layer in network.layers}

    def again(*nodes: fx.Node) -> None:
        for node in nodes:
            del values[node]
        execute(network.module, list(nodes), values)

    with torch.no_grad():
        for node in network.nodes:
            execute(network.module, [node], values)
            parameters = [used for used in node.all_input_nodes if used.op == "get_attr"]
            if node in layers or (node.target is aten.mul.Tensor and parameters):
                weight = parameters[0]
                if _open(network, weight):
                    again(weight, node)
                attribute(network.module, str(weight.target)).mul_(DEVIATION / values[node].std())
                again(weight, node)
            elif node.target is aten.batch_norm.default:
                _open(network, node.args[1])
                given = values[node.all_input_nodes[0]]
                axes = [axis for axis in range(given.ndim) if axis != 1]
                seen = (given.mean(axes) / 8, given.square().mean(axes) / DEVIATION**2)
                for argument, statistic in zip(node.args[3:5], seen, strict=True):
                    assert isinstance(argument, fx.Node)
                    attribute(network.module, str(argument.target)).copy_(statistic)
                    again(argument)
                again(node)


def _open(network: Network, scale: Any) -> bool:
    """Make a scale that is all zeros one; whether it was."""
    closed = isinstance(scale, fx.Node) and not attribute(network.module, str(scale.target)).any()
    if closed:
        attribute(network.module, str(scale.target)).fill_(1)
    return closed


def rounding(network: Network) -> float:
    """What float32 does to the model: the relative difference of its scores to those in float64."""
    image = torch.from_numpy(np.random.default_rng(0).standard_normal((1, *network.input_shape), dtype=np.float32))
    with torch.no_grad():
        exact = copy.deepcopy(network.module).double()(image.double())
        return relative_error(network.run(image).double().numpy(), exact.numpy())


def plans(network: Network) -> list[Plan]:
    """What is tried: RobustDiCE from the norms of the weights, and CDC."""
    image = np.zeros((1, *network.input_shape), np.float32)
    scores = score(network, image, columns=("s1",))
    if 4 * sum(attribute(network.module, name).numel() for name in _weights(network)) > LARGE_BYTES:
        return [partition(network, scores, devices=2, memory=0.7)]
    return [partition(network, scores, devices=4, memory=0.5), partition(network, devices=3, method="cdc")]


def _weights(network: Network) -> list[str]:
    return sorted({str(node.target) for node in network.nodes if node.op == "get_attr"})


def errors_of(network: Network, plan: Plan, graph: OnnxGraph, directory: Path) -> dict[str, float]:
    """The largest relative error of the plan's bundles against the model: with nobody down, and with one."""
    image = np.random.default_rng(0).standard_normal((1, *network.input_shape), dtype=np.float32)
    bundles = [load_bundle(path) for path in write_bundles(network, plan, directory, graph=graph)]
    cluster = InProcess(bundles, threads=2)
    errors = {"intact": 0.0, "one down": 0.0}
    for failed in [failed for size in (0, 1) for failed in failure_sets(plan.devices, size)]:
        survivors = [torch.tensor(mask) for mask in plan.surviving_neurons(failed)]
        with torch.no_grad():
            expected = network.run(torch.from_numpy(image), survivors).numpy()
        kind = "one down" if failed else "intact"
        errors[kind] = max(errors[kind], relative_error(cluster.run(image, failed), expected))
    return errors


def check(source: str, directory: Path) -> dict[str, Any]:
    """The table's row for a source."""
    kind, _, name = source.partition(":")
    try:
        network = load_model(write_onnx(name, kind, directory) if kind in EXPORTERS else source, **_weights_of(kind))
        settle(network)
        graph = export_onnx(network)
        found = [errors_of(network, plan, graph, directory / plan.method) for plan in plans(network)]
    except RobustdiceError as error:
        return {"reason": str(error)}
    worst = max(max(errors.values()) for errors in found)
    if worst > TOLERANCE and worst > 4 * rounding(network):
        return {"reason": f"the bundles differ from the model by {worst:.0e}"}
    return {
        "parameters": network.shared_weights + sum(each.neurons * each.neuron_weights for each in network.plan_layers),
        "layers": len(network.layers),
        "exchanged": sum(int(np.prod(layer.shape)) for layer in network.layers),
        **{key: max(errors[key] for errors in found) for key in found[0]},
    }


def _weights_of(kind: str) -> dict[str, Any]:
    return {} if kind in EXPORTERS else {"random_weights": True, "preprocessing": {"input_size": IMAGE}}


def write_onnx(name: str, exporter: str, directory: Path) -> str:
    """A torchvision model with random weights as an ONNX file; the file's path."""
    torchvision = import_torchvision()
    path = directory / f"{name}.onnx"
    torch.manual_seed(0)
    with quiet():
        model = torchvision.models.get_model(name, weights=None).eval()
        images, batch = torch.zeros(2, *IMAGE), {0: torch.export.Dim("batch")}
        if exporter == "dynamo":
            torch.onnx.export(model, (images,), path, dynamo=True, verbose=False, dynamic_shapes=(batch,))
        else:
            axes = {"image": {0: "batch"}}
            torch.onnx.export(
                model, (images,), str(path), dynamo=False, input_names=["image"], dynamic_axes=axes, opset_version=13
            )
    return str(path)


def check_elsewhere(source: str) -> dict[str, Any]:
    """:func:`check` in a process of its own: what a model took is given back, whatever becomes of it."""
    command = [sys.executable, __file__, "--check", source]
    try:
        done = subprocess.run(  # noqa: S603 -- our own command
            command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return {"reason": f"took more than {TIMEOUT_SECONDS} seconds"}
    if done.returncode:
        return {
            "reason": f"crashed: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else done.returncode}"
        }
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The page."""
    headings = {
        "torchvision": "torchvision: all classification CNNs",
        "timm": "timm",
        "dynamo": "ONNX files that torch.onnx.export writes (dynamo=True)",
        "torchscript": "ONNX files that torch.onnx.export writes (dynamo=False, opset 13)",
    }
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision", "timm", "onnxruntime"))
    good = sum("reason" not in row for row in rows.values())
    lines = [
        "# Architectures that were tried",
        "",
        f"{good} of {len(rows)} work. Written by `python scripts/architectures.py --out docs/architectures.md`,",
        f"with {versions}.",
        "",
        *ABOUT.strip().split("\n"),
    ]
    for kind, heading in headings.items():
        mine = {source: row for source, row in rows.items() if source.startswith(f"{kind}:")}
        if not mine:
            continue
        lines += ["", f"## {heading}", ""]
        lines += ["| model | parameters | layers | exchanged | error | error, one down |", "|---|---|---|---|---|---|"]
        for source, row in mine.items():
            name = source.partition(":")[2]
            if "reason" in row:
                lines.append(f"| {name} | does not work: {row['reason'].replace('|', '/')} | | | | |")
            else:
                sizes = f"{row['parameters'] / 1e6:.1f} M | {row['layers']} | {row['exchanged'] / 1e6:.2f} M"
                lines.append(f"| {name} | {sizes} | {row['intact']:.0e} | {row['one down']:.0e} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str]) -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", metavar="SOURCE", help="such as timm:dla34 (default: all)")
    parser.add_argument("--out", type=Path, required="--check" not in arguments)
    parser.add_argument("--check", metavar="SOURCE", help="print the row of one source as JSON")
    chosen = parser.parse_args(arguments)
    if chosen.check:
        with tempfile.TemporaryDirectory() as directory:
            print(json.dumps(check(chosen.check, Path(directory))))
        return
    kept = Checkpoint(chosen.out.with_suffix(".partial"), {"what": "architectures", "torch": version("torch")})
    names = chosen.sources or sources()
    rows: dict[str, dict[str, Any]] = {}
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for source, row in zip(names, pool.map(lambda s: kept.get(s) or check_elsewhere(s), names), strict=True):
            if "reason" not in row and kept.get(source) is None:  # what does not work is tried again
                kept.add(source, row)
            rows[source] = row
            print(source, row, flush=True)
    write_atomically(chosen.out, table(rows).encode())
    kept.delete()


if __name__ == "__main__":
    main(sys.argv[1:])
