"""The workshop's steps that join several parts: a network's plan, its build, and the proof that the build is right."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from robustdice.auto import Candidate, Table, best_first, candidates, check_room, least_to_matter, tabulate
from robustdice.bundle.onnx_graph import OnnxGraph
from robustdice.bundle.read import load_bundle
from robustdice.bundle.write import PLAN_NAME, check_replaceable, write_bundles
from robustdice.cost.model import Judge, parse_link
from robustdice.cost.profile import TYPICAL, Profile
from robustdice.cost.purpose import Purpose, ordered_for
from robustdice.divided import considered_for
from robustdice.entropy_code import CODED
from robustdice.errors import BundleError, PlanError
from robustdice.failure.activations import activation_steps
from robustdice.failure.calibrate import calibrate as fit_corrections
from robustdice.failure.copies import Copies, state_of
from robustdice.failure.evaluate import choose_failure_sets
from robustdice.failure.passes import run_under
from robustdice.importance.values import Importance
from robustdice.learning import learned
from robustdice.model.fits import check_plan_fits
from robustdice.model.load import reload_model
from robustdice.model.network import Network
from robustdice.partitioning import Method, check_split
from robustdice.partitioning import partition as partition_layers
from robustdice.partitioning.budget import parse_memories, parse_memory
from robustdice.partitioning.paired import kinds_with_pairs
from robustdice.partitioning.precision import Kinds, represented
from robustdice.plan import FailureSet, Plan
from robustdice.progress import Progress, part, shown, silent
from robustdice.rivals import rivals
from robustdice.rounding.network import round_network, wanted_of
from robustdice.runtime.inprocess import InProcess
from robustdice.runtime.wire.founding import found_cluster
from robustdice.splits import splits_of


def partition(
    network: Network,
    scores: Importance | None = None,
    *,
    devices: int,
    method: Method = "robustdice",
    memory: float | str | None = None,
    threshold: float | Sequence[float] | None = None,
    columns: Sequence[str] | None = None,
    normalisation: str = "minmax",
    precision: str = "float32",
    spare_precision: str | None = None,
    images: NDArray[np.float32] | None = None,
    split: str = "neurons",
    wire: str = "float32",
    profile: Profile = TYPICAL,
    link: str | None = None,
    goal: str | None = None,
    on_progress: Progress = silent,
) -> Plan:
    """A plan for ``network`` on ``devices`` devices; arguments as in :func:`robustdice.partitioning.partition`.

    Primaries are kept in ``precision``, spares in ``spare_precision`` (the same unless said otherwise); the first and
    the last layer and very small filters in at least 8 bits. Coarse weights are fitted to ``images`` (unlabelled,
    [n, channels, height, width], 64 to 1,024), or without any rounded to the nearest. ``split`` is by ``neurons``
    alone, or ``hidden``: with the pairs of :func:`robustdice.model.pairs.choose_pairs`, or ``rows``: with a run
    of early layers in strips, of which nothing can be lost; or ``auto``: each layer as is modelled to be best, as
    :func:`robustdice.splits.splits_of` says, for ``profile``, ``link`` (such as ``"1Gbit"``) and ``goal`` (throughput
    unless said otherwise). Devices hand each other values as ``wire`` says: ``float32``, ``float16`` or ``uint8``
    (:mod:`robustdice.wire_format`). PlanError also when there is nothing to split so, or when a ``method`` of the
    user's own takes more memory than it was given.
    """
    check_split(split, method, goal)
    kinds = (precision, spare_precision or precision)
    judge = Judge(profile, None if link is None else parse_link(link), goal or "throughput")
    pairs_too = method != "cdc" and CODED.keys().isdisjoint(kinds)
    splits = splits_of(network, devices, split, judge, wire, pairs_too)
    plan = partition_layers(
        network.plan_layers,
        scores,
        devices=devices,
        method=method,
        memory=memory,
        threshold=threshold,
        columns=columns,
        normalisation=normalisation,
        shared_weights=network.shared_weights,
        model=network.reference,
        network=network,
        precision=kinds,
        pairs=splits.pairs,
        run=splits.run,
        whole=splits.whole,
    )
    plan = replace(plan, wire=wire, owned=splits.owned.intersection(plan.pairs))
    if split == "hidden" and not plan.pairs:
        why = (
            f"in this plan of method {plan.method} every device holds the layers that pairs begin with"
            if splits.pairs
            else f"no two layers of the model hand over less as a pair on {devices} devices"
        )
        raise PlanError(f"there is nothing to split hidden: {why}; leave out the split, or choose another")
    if split != "neurons":
        plan = replace(plan, settings={**plan.settings, "split": split})
    if kinds != ("float32", "float32"):
        wanted = kinds_with_pairs(plan.layers, plan.pairs, *kinds)
        of_layers = [Kinds() if plan.run_of(index) else kind for index, kind in enumerate(wanted)]
        plan = with_precision(network, plan, of_layers, images, on_progress)
    if memory is not None and max(plan.bytes_per_device) > parse_memory(memory, plan.total_bytes):
        raise PlanError(
            f"method {plan.method} puts {plan.memory_share:.4f} of the model on one device, {memory} are allowed: "
            "it does not keep request.memory; allow more"
        )
    return plan


def with_precision(
    network: Network,
    plan: Plan,
    kinds: Sequence[Kinds],
    images: NDArray[np.float32] | None = None,
    on_progress: Progress = silent,
) -> Plan:
    """The plan with every layer's primaries and spares in the representations ``kinds``, fitted to ``images``."""
    shards = tuple(represented(of_layer, kind, plan.devices) for of_layer, kind in zip(plan.shards, kinds, strict=True))
    wanted = wanted_of(shards, plan.pairs)
    return replace(
        plan,
        shards=shards,
        coarse=round_network(network, wanted, images, on_progress),
        settings={
            **plan.settings,
            "precision": [kind.primary for kind in kinds],
            "spare_precision": [kind.spare for kind in kinds],
            "rounding": "nearest" if images is None else f"gptq on {len(images)} images",
        },
    )


def choose_plan(
    network: Network,
    images: NDArray[np.float32],
    *,
    devices: int,
    memory: float | str | None = None,
    others: NDArray[np.float32] | None = None,
    survive: int | None = None,
    wire: str = "float32",
    profile: Profile = TYPICAL,
    link: str | None = None,
    goal: str | None = None,
    on_progress: Progress = silent,
) -> list[Candidate]:
    """What was considered for ``devices`` devices that may hold ``memory``, the best first, then what does not fit: see
    :func:`robustdice.auto.candidates`, :func:`robustdice.rivals.rivals` and :func:`robustdice.learning.learned`.
    ``memory`` is a share of the model such as 0.1 or an amount such as ``"8MB"`` that each device has, or amounts of
    all of them, ``"8MB,8MB,16MB,16MB"``; ``survive`` the number of devices down at once that the plan is made for (all
    but one); ``wire`` what values travel as. Plans are made with ``images`` and compared on ``others``, both
    unlabelled: [n, channels, height, width].

    The best is the most accurate one, or, for a ``goal``, one of :data:`robustdice.cost.purpose.PURPOSES`, what
    :func:`robustdice.divided.considered_for` says, by ``profile`` and ``link`` (such as ``"1Gbit"``): every split is
    tried then, and without ``memory`` a device may hold the whole model. PlanError when nothing fits.
    """
    rate = None if link is None else parse_link(link)
    purpose = None if goal is None else Purpose.of(goal, profile, rate)
    profile.check_fits(network.reference)
    if memory is None:
        if purpose is None:
            raise PlanError("the most accurate plan is the whole model on every device: say what memory there is")
        memory = 1.0
    budgets = parse_memories(memory, 4 * network.parameters, devices)
    check_room(network, devices, survive, budgets)  # what is said wrong is found before long work
    first, last = part(on_progress, 0, 0.4), part(on_progress, 0.4, 1)
    table = tabulate(
        network,
        images,
        devices=devices,
        others=others,
        survive=survive,
        wire=wire,
        least=0 if purpose else min(budgets),  # splits may leave little of a budget for spares
        on_progress=first,
    )
    found = choose_from(table, memory, purpose, last)
    last(1, 1)
    return found


def choose_from(
    table: Table, memory: float | str, purpose: Purpose | None = None, on_progress: Progress = silent
) -> list[Candidate]:
    """As :func:`choose_plan`, from a table that several budgets share."""
    budgets = parse_memories(memory, 4 * table.network.parameters, table.devices)
    first, last = part(on_progress, 0, 0.7), part(on_progress, 0.7, 1)
    if purpose is None:
        made = candidates(table, budgets, part(first, 0, 0.8), to_beat=-1.0)
        found = best_first([*made, *rivals(table, budgets, part(first, 0.8, 1), least_to_matter(made))])
    else:
        found = considered_for(purpose, table, budgets, first)
    found += learned(table, found, budgets, last)
    found = best_first(found) if purpose is None else ordered_for(purpose, found)
    if not found[0].fits:
        raise PlanError(f"no plan was found that keeps to {memory}; allow a little more")
    return found


def calibrate(
    network: Network,
    plan: Plan,
    images: NDArray[np.float32],
    *,
    max_failed: int | None = None,
    passes: int = 0,
    seed: int = 0,
    on_progress: Progress = silent,
) -> Plan:
    """The plan with corrections for every failure set of up to ``max_failed`` devices (all but one), fitted to
    ``images`` as :func:`robustdice.failure.calibrate.calibrate` says; what was measured of it before holds no more.
    Smaller failure sets than it has corrections for get none, unless ``max_failed`` asks for these: where
    :func:`choose_plan` left them out, their bytes went to weights."""
    least = min(map(len, plan.corrections), default=1)
    corrections = fit_corrections(
        network,
        plan,
        images,
        min_failed=least if max_failed is None else max(1, min(least, max_failed)),
        max_failed=max_failed,
        passes=passes,
        seed=seed,
        on_progress=on_progress,
    )
    return replace(plan, corrections=corrections, certificate=None)


def round_activations(
    network: Network, plan: Plan, images: NDArray[np.float32], *, on_progress: Progress = silent
) -> Plan:
    """The plan whose layers read their inputs in 8 bits where all their copies are in ``int8`` and devices gain from
    it: these multiply whole numbers then. Steps are chosen on ``images`` (unlabelled, [n, channels, height, width], a
    few hundred). What was measured of the plan before holds no more. PlanError when no layer is such."""
    steps = activation_steps(network, plan, images, on_progress)
    if not steps:
        raise PlanError("no layer has all its copies in int8: there is nothing to multiply in 8 bits; plan with int8")
    settings = {**plan.settings, "activations": f"int8 on {len(images)} images"}
    return replace(plan, activations=steps, settings=settings, certificate=None)


def build(
    network: Network,
    plan: Plan,
    directory: str | os.PathLike[str],
    *,
    spares: str = "standby",
    host: str | Sequence[str] | None = None,
    base_port: int | None = None,
    new_keys: bool = False,
    transport: str | None = None,
    graph: OnnxGraph | None = None,
) -> Path:
    """Write ``directory/device-0 ...`` and ``directory/cluster.toml``; returns the directory.

    Device K is to listen on ``host`` (one for all, or one for each) and port ``base_port`` + K. Where neither is given
    the devices keep the addresses of an earlier build in this directory, or are to run on this machine, on ports that
    are free now; key pairs are kept unless ``new_keys``, and so is the ``transport``, ``curve`` (encrypted) or
    ``plain``: see :func:`robustdice.runtime.wire.founding.found_cluster`. ``graph`` as in :func:`write_bundles`.
    PlanError when the plan is not of this network; ClusterError when the addresses cannot be used; OutputError when the
    directory cannot be written or holds something else.
    """
    target = Path(directory)
    check_replaceable(target)
    founding = found_cluster(target, plan.devices, plan.digest, host, base_port, new_keys, transport)
    write_bundles(network, plan, target, spares, graph, add=founding.write_secrets)
    founding.write(target)
    return target


@dataclass(frozen=True)
class Verification:
    """Largest relative error of the bundles against the model for each failure set: max |difference| / max |score|.

    Where there are more than a few hundred sets, ``errors`` has a sample of the ``of`` that exist.
    """

    errors: dict[FailureSet, float]
    of: int
    rounds_inputs: bool = False
    wire: str = "float32"

    @property
    def allowed_relative_error(self) -> float:
        """What float32 arithmetic in another order explains; where inputs or what travels are rounded, that what lies
        between two steps goes to the other one."""
        return 5e-2 if self.rounds_inputs else {"float32": 1e-4, "float16": 5e-3, "uint8": 5e-2}[self.wire]

    @property
    def max_relative_error(self) -> float:
        """The largest of all errors."""
        return max(self.errors.values())

    @property
    def agrees(self) -> bool:
        """Whether the bundles compute what the model does."""
        return self.max_relative_error <= self.allowed_relative_error


def verify(
    directory: str | os.PathLike[str],
    *,
    model: str | None = None,
    images: int = 2,
    seed: int = 0,
    progress: bool = False,
    on_progress: Progress = silent,
) -> Verification:
    """Run the bundles of a build in one process and compare them with the model, for every failure set.

    ``model`` says where the plan's model is now, when it has moved. ``images`` random images (standard normal, seeded)
    are used, and of more than a few hundred failure sets a sample.
    BundleError or ModelError when bundles, plan and model do not belong together.
    """
    root = Path(directory)
    plan = Plan.load(root / PLAN_NAME)
    bundles = [load_bundle(root / f"device-{device}") for device in range(plan.devices)]
    for bundle in bundles:
        if bundle.manifest.plan_digest != plan.digest:
            raise BundleError(f"{bundle.directory} is of another plan than {root / PLAN_NAME}; build them again")
    network = reload_model(plan.model, model, root)
    check_plan_fits(network, plan)
    cluster = InProcess(bundles)
    frames = np.random.default_rng(seed).standard_normal((images, *network.input_shape), dtype=np.float32)
    every = choose_failure_sets(plan.devices, seed=seed)
    copies = Copies.of(network, plan)
    errors: dict[FailureSet, float] = {}
    with shown("verifying", progress, on_progress) as told:
        for failed in every:
            (expected,) = run_under(network, torch.from_numpy(frames), [state_of(plan, failed)], copies)
            errors[failed] = relative_error(cluster.run(frames, failed), expected.numpy())
            told(len(errors), len(every))
    return Verification(errors, of=2**plan.devices - 1, rounds_inputs=bool(plan.activations), wire=plan.wire)


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference over the largest expected score; infinite when other class scores are missing."""
    present = np.isfinite(expected)
    if not np.array_equal(present, np.isfinite(found)):
        return float("inf")
    if not present.any():
        return 0.0
    difference = np.abs(found[present] - expected[present]).max()
    return float(difference / max(float(np.abs(expected[present]).max()), 1e-12))
