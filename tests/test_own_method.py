"""Methods of the user's own: the README's example, and what is said of functions that do not do."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import robustdice as rd
from commands import fails, run_json
from robustdice.errors import PlanError
from robustdice.importance.values import Importance
from robustdice.model.network import Network
from robustdice.partitioning import Answer, Request

README = Path(__file__).parents[1] / "README.md"
MODEL = "robustdice.demo.network:digits_cnn"


@pytest.fixture(scope="module")
def network() -> Network:
    return rd.load_model(MODEL)


@pytest.fixture(scope="module")
def scores(network: Network) -> Importance:
    dataset = rd.load_data("digits", network.preprocessing, network.outputs, split="train").sample(8)
    return rd.score(network, dataset, columns=("s1",))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with ``mine.py`` as the README has it."""
    section = README.read_text().split("### A method of your own", 1)[1]
    found = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert found is not None
    (tmp_path / "mine.py").write_text(found[1])
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "mine", raising=False)
    return tmp_path


def test_the_readmes_example_makes_plans(here: Path, network: Network, scores: Importance) -> None:
    assert sum(map(bool, (here / "mine.py").read_text().splitlines())) <= 10
    for devices in (2, 3, 4):
        plan = rd.partition(network, scores, devices=devices, method="mine:top_twice")
        assert plan.method == "mine:top_twice"
        assert plan.provenance["scores"]["digest"] == scores.digest
        for layer, values, shards in zip(plan.layers, scores.scores, plan.shards, strict=True):
            copied = {neuron for shard in shards if len(shard.holders) == 2 for neuron in shard.neurons}
            assert copied == set(np.argsort(-values[:, 0])[: layer.neurons // 2].tolist())
        assert all(mask.any() for failed in range(devices) for mask in plan.surviving_neurons([failed]))


def test_the_readmes_example_runs_as_a_command(here: Path, scores: Importance) -> None:
    scores.save(here / "scores.npz")
    arguments = ("plan", MODEL, "--devices", "4", "--method", "mine:top_twice", "--use", "s1", "-o", "plan.json")
    document = run_json(*arguments, "--scores", "scores.npz")
    assert document["method"] == "mine:top_twice"
    plan = rd.Plan.load("plan.json")
    assert plan.digest == document["plan_digest"]
    assert "method mine:top_twice failed: AttributeError" in (said := fails(*arguments))
    assert "mine.py, line" in said
    assert "no scores were given: --scores FILE, or --data DATA" in said


def test_a_function_itself_is_a_method_and_sees_the_network(network: Network) -> None:
    asked: list[Request] = []

    def everywhere(request: Request) -> Answer:
        asked.append(request)
        holders = [tuple(range(request.devices))]
        shards = tuple(rd.to_shards(holders * layer.neurons, 1) for layer in request.layers)
        # NumPy's whole numbers are numbers, and whatever is a sequence will do.
        last = rd.Shard(np.arange(request.layers[-1].neurons), [rd.Holder(d) for d in np.arange(request.devices)])  # type: ignore[arg-type]
        return Answer((*shards[:-1], (last,)), {"why": "because"})

    plan = rd.partition(network, devices=3, method=everywhere)
    assert plan.method.endswith(":test_a_function_itself_is_a_method_and_sees_the_network.<locals>.everywhere")
    assert plan.settings == {"why": "because"}
    assert asked[0].network is network
    assert asked[0].importance is None
    assert plan.memory_share == 1
    assert plan.shards == rd.partition(network, devices=3, method="full").shards
    with pytest.raises(PlanError, match=r"everywhere puts 1.0000 of the model on one device, 0.6 are allowed"):
        rd.partition(network, devices=3, method=everywhere, memory=0.6)


def shards_of(request: Request, *devices: int) -> list[list[rd.Shard]]:
    holders = tuple(map(rd.Holder, devices))
    return [[rd.Shard(tuple(range(layer.neurons)), holders)] for layer in request.layers]


def without_one(request: Request) -> Any:
    first, *others = shards_of(request, 0)
    return [[rd.Shard(first[0].neurons[1:], first[0].holders)], *others]


def stops(_request: Request) -> Any:
    raise ZeroDivisionError("division by zero")


def refuses(request: Request) -> Any:
    request.refuse_budget("mine")


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (without_one, r"do not hold each of its \d+ neurons once"),
        (lambda request: shards_of(request, 4), "device 4 does not exist, the plan has 4 devices"),
        (lambda request: shards_of(request, -1), "device -1 does not exist"),
        (lambda request: shards_of(request, 1, 1), "a shard needs different holders"),
        (lambda request: shards_of(request)[:1], "a shard needs different holders, at least one|shards for 1 layers"),
        (lambda request: shards_of(request, 0)[:1], r"shards for 1 layers, the model has \d"),
        (lambda _: None, "answered what is no plan .*expected for every layer a sequence of Shard"),
        (lambda _: 3, "answered what is no plan"),
        (lambda _: "lop", "answered what is no plan .*a str where a Shard should be"),
        (lambda request: [[(0, 1)] for _ in request.layers], "a tuple where a Shard should be"),
        (lambda request: [[rd.Shard((0.5,), (rd.Holder(0),))] for _ in request.layers], "answered what is no plan"),  # type: ignore[arg-type]
        (lambda request: [[rd.Shard((0,), (0,))] for _ in request.layers], "0 where a Holder should be"),  # type: ignore[arg-type]
        (lambda request: [[rd.Shard((0,), (rd.Holder(0, "int9"),))] for _ in request.layers], "int9|neurons once"),
        (lambda request: Answer(shards_of(request, 0), {"a": object()}), "settings that are JSON"),  # type: ignore[arg-type]
        (stops, r"failed: ZeroDivisionError: division by zero \(.*test_own_method.py, line \d+\)"),
    ],
)
def test_what_is_no_plan_is_refused_with_the_functions_name(
    method: Callable[[Request], Any], message: str, network: Network
) -> None:
    with pytest.raises(PlanError, match=message) as error:
        rd.partition(network, devices=4, method=method)
    assert f"method {method.__module__}:{method.__qualname__}" in str(error.value)


def test_a_refusal_of_the_functions_own_is_passed_on(network: Network) -> None:
    with pytest.raises(PlanError, match=r"method .*:refuses: method mine takes no memory \(got 0.5\)"):
        rd.partition(network, devices=4, method=refuses, memory=0.5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine:absent", "cannot import the method 'mine:absent': AttributeError"),
        ("absent:f", "cannot import the method 'absent:f': ModuleNotFoundError"),
        ("mine:np", "the method mine:np is a module; expected a function"),
        (":f", "cannot import the method ':f'"),
        ("mine:", "cannot import the method 'mine:'"),
        ("broken:f", "cannot import the method 'broken:f': SyntaxError"),
        ("mine", "unknown method 'mine'; known: robustdice, lop, cdc, full, and package.module:function"),
    ],
)
def test_names_of_no_function_are_refused(name: str, message: str, here: Path, network: Network) -> None:
    (here / "broken.py").write_text("def f(:\n")
    with pytest.raises(PlanError, match=message):
        rd.partition(network, devices=4, method=name)


def test_thresholds_may_come_from_a_file(here: Path, scores: Importance) -> None:
    from robustdice.cli.options import read_thresholds  # noqa: PLC0415

    scores.save(here / "scores.npz")
    values = [0.05 * number for number in range(len(scores.names))]
    (here / "thresholds.txt").write_text("".join(f"{value}\n" for value in values))
    arguments = ("plan", MODEL, "--devices", "4", "--scores", "scores.npz", "--use", "s1", "-o", "plan.json")
    document = run_json(*arguments, "--threshold", "thresholds.txt", "--normalisation", "rank")
    assert document["settings"]["thresholds"] == values
    assert document["settings"]["normalisation"] == "rank"
    assert read_thresholds("0.25") == 0.25
    assert read_thresholds("inf") == float("inf")
    with pytest.raises(PlanError, match="takes a number or a file with one for each layer, not 'absent'"):
        read_thresholds("absent")
    (here / "words.txt").write_text("0.1\nlow\n")
    with pytest.raises(PlanError, match=r"words.txt: .*'low'; --threshold takes a file with a number a line"):
        read_thresholds("words.txt")
