"""What the cost model says beside what device processes of this machine take, for models and splits.

    python benchmarks/bench_cost_model.py [MODEL ...] [--devices 2] [--seconds 3] [--out FILE.md]

MODEL is a file, or torchvision:NAME or timm:NAME with random weights. Each one is profiled here, then a plan by each
split is modelled from the profile, built and run. Layers are measured while another process computes the whole
model, as other devices do here when plans are run: cores share the machine's memory. Compared is what the busiest
device's processor takes for a frame, in all its threads: frames per second and latencies, printed beside it, also
depend on what else the machine does. Prints a table, and the median error.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median

import robustdice as rd
from robustdice.cost.model import predict
from robustdice.errors import PlanError
from robustdice.meter.arithmetic import measure_layers
from robustdice.meter.handing import measure_handing, measure_plan
from robustdice.meter.whole import whole_model

SPLITS = ("neurons", "hidden", "rows", "auto")
STARTING_SECONDS = 2.0
HEADING = (
    "| model | split | exchanges | processor, ms: modelled | measured | error | frames/s: modelled | measured "
    "| alone, ms: modelled | measured |\n|---|---|---|---|---|---|---|---|---|---|"
)


@contextlib.contextmanager
def beside(network: rd.Network) -> Iterator[None]:
    """While another process computes the whole network on the last core."""
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory) / "model.onnx"
        model.write_bytes(whole_model(network))
        core = str(max(os.sched_getaffinity(0)))
        shape = ",".join(map(str, network.input_shape))
        command = ["-m", "robustdice.meter.single", str(model), shape, "--seconds", "600", "--core", core]
        process = subprocess.Popen([sys.executable, *command])  # noqa: S603
        try:
            time.sleep(STARTING_SECONDS)
            yield
        finally:
            process.kill()
            process.wait()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["torchvision:alexnet", "torchvision:resnet18"])
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    handing = measure_handing()
    print(
        f"exchange {1e3 * handing.exchange_seconds:.3f} ms and {1e3 * handing.peer_seconds:.3f} a peer, value "
        f"{ {wire: f'{1e9 * each:.1f} ns' for wire, each in handing.value_seconds.items()} }, "
        f"hop {1e3 * handing.hop_seconds:.3f} ms, frame {1e3 * handing.frame_seconds:.3f} ms",
        file=sys.stderr,
    )
    rows, errors = [HEADING], []
    for source in options.models:
        network = rd.load_model(source, random_weights=":" in source)
        name = Path(source).stem.rpartition(":")[2]
        with beside(network):
            layers, rest_seconds = measure_layers(network)
        profile = replace(handing, layers=layers, rest_seconds=rest_seconds, model_digest=network.reference.digest)
        done = set()
        for split in SPLITS:
            try:
                plan = rd.partition(network, devices=options.devices, method="lop", split=split, profile=profile)
            except PlanError as error:
                print(f"{source} {split}: {error}", file=sys.stderr)
                continue
            what = (plan.shards, plan.strips, tuple(plan.pairs.items()))
            if what in done:
                continue
            done.add(what)
            said, found = predict(plan, profile), measure_plan(network, plan, options.seconds)
            errors.append(said.processor_seconds / found.processor_seconds - 1)
            rows.append(
                f"| {name} | {split} | {plan.exchanges} | {1e3 * said.processor_seconds:.2f} | "
                f"{1e3 * found.processor_seconds:.2f} | {errors[-1]:+.0%} | {said.frames_per_second:.1f} | "
                f"{found.frames_per_second:.1f} | {1e3 * said.latency_seconds:.1f} | "
                f"{1e3 * found.latency_seconds:.1f} |"
            )
            print(rows[-1], file=sys.stderr, flush=True)
    rows.append(f"\nMedian error of {len(errors)} plans: {median(map(abs, errors)):.1%}.")
    print("\n".join(rows))
    if options.out is not None:
        options.out.write_text("\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
