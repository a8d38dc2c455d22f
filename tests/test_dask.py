"""Scoring and evaluating on a real Dask cluster, one of whose workers dies in the middle."""

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest

import robustdice as rd
from robustdice.errors import ClusterError
from robustdice.model.data import load_data
from robustdice.model.load import load_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
]


@contextmanager
def processes(*commands: list[str], folder: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Started one after the other, and ended by their ids."""
    started = []
    folder.mkdir(exist_ok=True)
    try:
        for number, command in enumerate(commands):
            with (folder / f"log-{number}").open("wb") as log:
                started.append(subprocess.Popen([sys.executable, "-m", *command], stdout=log, stderr=log))
        yield started
    finally:
        for process in reversed(started):
            process.kill()
            process.wait()


def test_the_results_are_the_local_ones_though_a_worker_is_killed(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"tcp://127.0.0.1:{port}"
    here = ["--host", "127.0.0.1", "--no-dashboard"]
    worker = ["distributed.cli.dask_worker", address, *here, "--nthreads", "1", "--no-nanny"]
    scheduler = ["distributed.cli.dask_scheduler", *here, "--port", str(port)]
    network = load_model("robustdice.demo.network:digits_cnn")
    data = load_data("digits", network.preprocessing, network.outputs).sample(400)
    images = load_data("digits", network.preprocessing, network.outputs, split="train").sample(16).images()
    local = rd.score(network, images)
    plan = rd.partition(network, local, devices=3, memory=0.6)
    folders = ["--local-directory", str(tmp_path)]
    workers = [[*worker, *folders]] * 3

    def killing(process: subprocess.Popen[bytes]) -> Callable[[int, int], None]:
        def kill(done: int, _total: int) -> None:
            if done and process.poll() is None:
                process.kill()

        return kill

    with processes(scheduler, folder=tmp_path) as (central,):
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        with pytest.raises(ClusterError, match=r"has no workers .* 'dask worker ADDRESS'"):
            rd.score(network, images, scheduler=address)
        with processes(*workers, folder=tmp_path / "workers") as (first, second, _third):
            remote = rd.score(network, images, scheduler=address, on_progress=killing(first))
            for a, b in zip(local.scores, remote.scores, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-9)
            found = rd.evaluate(network, plan, data, scheduler=address, on_progress=killing(second))
            assert first.wait() != 0
            assert second.wait() != 0
            assert found == rd.evaluate(network, plan, data)
        with processes(workers[0], folder=tmp_path / "only") as (only,), ExitStack() as later:

            def replacing(done: int, _total: int) -> None:
                if done and only.poll() is None:
                    only.kill()
                    later.enter_context(processes(workers[0], folder=tmp_path / "replacement"))

            assert rd.evaluate(network, plan, data, scheduler=address, on_progress=replacing) == found
            assert only.wait() != 0
            with pytest.raises(
                ClusterError, match=r"did not finish a task .* repeat the command|no Dask scheduler|no workers"
            ):
                rd.evaluate(network, plan, data, scheduler=address, on_progress=killing(central))
