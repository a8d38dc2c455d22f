"""A CDC build as real device processes: any one device may die, and every answer stays complete and right."""

from pathlib import Path

import numpy as np
import pytest
import torch

import robustdice as rd
from nets import relative_error
from robustdice.model.data import load_data
from robustdice.model.load import load_model


@pytest.mark.slow
def test_a_cluster_with_a_parity_device_outlives_any_one_device(tmp_path: Path) -> None:
    network = load_model("robustdice.demo.network:digits_cnn")
    images = load_data("digits", network.preprocessing, network.outputs).images(0, 20)
    plan = rd.partition(network, devices=4, method="cdc")
    rd.build(network, plan, tmp_path / "build")

    def scores(*failed: int) -> np.ndarray:
        with torch.no_grad():
            survivors = [torch.tensor(mask) for mask in plan.surviving_neurons(failed)]
            return network.run(torch.from_numpy(images), survivors).numpy()

    with rd.LocalCluster(tmp_path / "build", timeout_seconds=5.0) as cluster:
        for answer, expected in zip(cluster.client.stream(images), scores(), strict=True):
            assert (answer.coverage, answer.from_spares) == (1.0, 0.0)
            assert answer.outputs is not None
            assert relative_error(answer.outputs, expected) < 1e-4
        for device in range(4):  # the last is the parity device
            cluster.kill(device)
            for answer, expected in zip(cluster.client.stream(images), scores(), strict=True):
                assert answer.coverage == 1.0
                assert answer.outputs is not None
                assert relative_error(answer.outputs, expected) < 1e-4
            assert answer.down == (device,)
            assert (answer.from_spares > 0) == (device < 3)
            cluster.restart(device)
            cluster.wait()
            for _ in range(200):
                if not cluster.infer(images[0]).down:
                    break
            else:
                raise AssertionError(f"device {device} did not come back: {cluster.log(1)}")
        for failed, dying in (((0, 3), (0, 3)), ((0, 1, 3), (1,))):  # a slice and the sums, then another slice
            for device in dying:
                cluster.kill(device)
            *_, answer = cluster.client.stream(images)
            assert answer.down == failed
            assert 0 < answer.coverage < 1
            assert answer.outputs is not None
            assert relative_error(answer.outputs, scores(*failed)[-1]) < 1e-4
