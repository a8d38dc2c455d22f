"""From a plan to verified bundles."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import robustdice as rd
from robustdice.cli.app import app
from robustdice.cli.options import (
    BuildDirectory,
    Json,
    MovedModel,
    Seed,
)
from robustdice.cli.usage import number, one_of
from robustdice.errors import ClusterError, RobustdiceError
from robustdice.report import tables
from robustdice.runtime.wire.config import CLUSTER_NAME, Cluster
from robustdice.runtime.wire.founding import found_cluster
from robustdice.runtime.wire.security import TRANSPORTS, UNENCRYPTED
from robustdice.terminal import out, print_json, progress, waiting


@app.command(epilog="Example: robustdice build plan.json -o build --spares standby")
def build(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="what 'robustdice plan' wrote")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="where to write the bundles")],
    spares: Annotated[
        str,
        typer.Option(
            help="standby (computed when needed) or hot (computed on every frame)",
            autocompletion=one_of("standby", "hot"),
        ),
    ] = "standby",
    host: Annotated[str | None, typer.Option(help="where all devices run (default: as before, or here)")] = None,
    hosts: Annotated[str | None, typer.Option(metavar="A,B,...", help="where each of the devices runs")] = None,
    port: Annotated[
        int | None, number("--port", "device K listens on this port + K (default: free ones here, 27200 elsewhere)")
    ] = None,
    model: MovedModel = None,
    new_keys: Annotated[bool, typer.Option("--new-keys", help="do not keep the keys of a build that is there")] = False,
    transport: Annotated[
        str | None,
        typer.Option(
            metavar="HOW",
            help="curve (encrypted) or plain, for a network that is private already (default: as before, or curve)",
            autocompletion=one_of(*TRANSPORTS),
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """One self-contained bundle per device, and DIR/cluster.toml.

    A build that is in DIR already is replaced; its devices keep their addresses and keys unless told otherwise.
    """
    if host is not None and hosts is not None:
        raise ClusterError("--host is for all devices and --hosts for each of them: give one of the two")
    places = host if hosts is None else [each.strip() for each in hosts.split(",")]
    rebuilt = (output / CLUSTER_NAME).exists()
    made = rd.Plan.load(plan)
    found_cluster(output, made.devices, made.digest, places, port, new_keys, transport)  # errors before the long work
    with waiting("loading the model"):
        network = rd.reload_model(made.model, model, plan.parent)
    with waiting("writing the bundles"):
        rd.build(
            network, made, output, spares=spares, host=places, base_port=port, new_keys=new_keys, transport=transport
        )
    cluster = Cluster.read(output / CLUSTER_NAME)
    addresses = [device.address for device in cluster.devices]
    if as_json:
        network_json = {"addresses": addresses, "transport": cluster.transport}
        print_json({"output": str(output), "bytes_per_device": made.bytes_per_device, **network_json})
        return
    for device, size in enumerate(made.bytes_per_device):
        line = f"{output / f'device-{device}'}  {size / 1e6:.2f} MB of weights, {addresses[device]}"
        out.print(line, soft_wrap=True)
    need = tables.process_memory(max(made.bytes_per_device))
    out.print(f"Each device's process will need about {need} of memory (estimated, while loading).", soft_wrap=True)
    if made.certificate is None:
        out.print(
            "How accurate the answers are has not been measured: after robustdice evaluate they say what to expect.",
            soft_wrap=True,
        )
    if rebuilt:
        out.print("Devices that run now serve the build before this one until they are started again.", soft_wrap=True)
    if cluster.transport == "plain":
        out.print(f"Mind: {UNENCRYPTED}.", soft_wrap=True)
    there = "robustdice up {0} to try it here" if cluster.here else "robustdice device {0}/device-K on device K"
    out.print(f"Next: robustdice verify {output}, then {there.format(output)}.", soft_wrap=True)


@app.command(epilog="Example: robustdice verify build")
def verify(directory: BuildDirectory, model: MovedModel = None, seed: Seed = 0, as_json: Json = False) -> None:
    """Run the bundles in one process and compare them with the model, for every failure set.

    Above 8 devices for 256 of the failure sets, and the table says so.
    """
    with progress("verifying") as advance:
        result = rd.verify(directory, model=model, seed=seed, on_progress=advance)
    if as_json:
        print_json(tables.verification_json(result))
    else:
        out.print(tables.verification_table(result))
        out.print(tables.verdict(result))
    if not result.agrees:
        raise RobustdiceError(f"{tables.verdict(result)} Build them again")
