"""From a module to running device processes: what they answer is what the evaluator computes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import robustdice as rd
from robustdice.model.network import Network, build_network
from robustdice.plan import Certificate, FailureSet
from robustdice.report.tables import verification_json


def load(module: torch.nn.Module, *shape: int) -> Network:
    program = torch.export.export(
        module.eval(), (torch.zeros(2, *shape),), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    return build_network(program, "test", {"input_size": list(shape)})


def expected(network: Network, plan: rd.Plan, frame: np.ndarray, failed: FailureSet) -> np.ndarray:
    with torch.no_grad():
        scores = network.run(
            torch.from_numpy(frame[None]), [torch.tensor(mask) for mask in plan.surviving_neurons(failed)]
        )
    return np.asarray(scores[0].numpy())


def agree(answer: rd.Answer, wanted: np.ndarray) -> bool:
    return answer.outputs is not None and np.allclose(answer.outputs, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spares", ["standby", "hot"])
def test_answers_equal_the_evaluator_for_the_devices_that_are_down(tmp_path: Path, spares: str) -> None:
    network = rd.load_model("robustdice.demo.network:digits_cnn")
    training = rd.load_data("digits", network.preprocessing, network.outputs, split="train")
    scores = rd.score(network, training.sample(10).images(), columns=["s1", "s2"])
    plan = rd.partition(network, scores, devices=3, memory=0.6)
    frames = rd.load_data("digits", network.preprocessing, network.outputs).images(0, 12)
    measured: dict[FailureSet, float] = {frozenset(): 0.9, frozenset({2}): 0.7}  # and nothing for {0, 2}
    plan = replace(plan, certificate=Certificate("some", "digest", 100, 0.95, measured))
    rd.build(network, plan, tmp_path / "build", spares=spares)
    with rd.LocalCluster(tmp_path / "build", timeout_seconds=10.0) as cluster:
        for down in (frozenset[int](), frozenset({2}), frozenset({0, 2})):
            for device in down:
                if cluster.process(device) is not None:
                    cluster.kill(device)
            answers = list(cluster.client.stream(frames))
            settled = [k for k, answer in enumerate(answers) if frozenset(answer.down) == down]
            assert len(settled) >= len(frames) // 2
            for k in settled:
                assert agree(answers[k], expected(network, plan, frames[k], down))
            # What was measured is said of frames that were computed so from first to last, and of no others.
            assert answers[-1].expected_accuracy == measured.get(down)
            assert {answer.expected_accuracy for answer in answers} <= {None, *measured.values()}


def test_shards_of_many_megabytes_travel(tmp_path: Path) -> None:
    """Encryption makes a frame longer than the largest shard: the limit on incoming frames must leave room for it."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Conv2d(1, 12, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(12, 4, 3), torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
    )  # fmt: skip
    network = load(module, 1, 512, 512)
    plan = rd.partition(network, devices=2, method="lop")
    rd.build(network, plan, tmp_path / "build")
    frame = np.random.default_rng(0).standard_normal((1, 512, 512), dtype=np.float32)
    with rd.LocalCluster(tmp_path / "build", timeout_seconds=20.0) as cluster:
        for answer in cluster.client.stream([frame] * 5):
            assert answer.coverage == 1
            assert agree(answer, expected(network, plan, frame, frozenset()))


def test_a_device_reports_its_own_memory_not_that_of_whoever_started_it(tmp_path: Path) -> None:
    ballast = np.ones(400 * 2**20, dtype=np.uint8)
    network = rd.load_model("robustdice.demo.network:digits_cnn")
    rd.build(network, rd.partition(network, devices=2, method="lop"), tmp_path / "build")
    with rd.LocalCluster(tmp_path / "build") as cluster:
        found = cluster.client.status()
    assert len(found) == 2
    assert all(0 < document["peak_rss_bytes"] < ballast.nbytes for document in found.values())


def test_of_many_failure_sets_a_sample_is_verified(tmp_path: Path) -> None:
    network = rd.load_model("robustdice.demo.network:digits_cnn")
    for devices, sets in ((3, 7), (9, 256)):
        rd.build(network, rd.partition(network, devices=devices, method="lop"), tmp_path / f"{devices}")
        found = rd.verify(tmp_path / f"{devices}", images=1)
        assert (len(found.errors), found.of) == (sets, 2**devices - 1)
        assert {len(failed) for failed in found.errors} == set(range(devices))
        assert found.max_relative_error < 1e-5
        document = verification_json(found)
        assert document.get("sampled", False) == (sets < found.of)
