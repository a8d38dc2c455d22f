"""The unpartitioned model of a build as one ONNX file, to measure beside the devices (needs the workshop)."""

from __future__ import annotations

from pathlib import Path

from robustdice.bundle.onnx_graph import cut, export_onnx, make_model
from robustdice.bundle.write import PLAN_NAME
from robustdice.model.load import reload_model
from robustdice.model.network import Network
from robustdice.plan import Plan


def whole_model(network: Network) -> bytes:
    """The unpartitioned model as ONNX."""
    graph, source, result = export_onnx(network), network.input.name, network.output.name
    return make_model([cut(graph, [source], [result])], [source], [result], graph.opset)


def whole_model_of(build: Path, model: str | None = None) -> bytes:
    """The model that the build in a directory was made from, which is now at ``model`` when it has moved; ModelError
    when it is not there."""
    return whole_model(reload_model(Plan.load(build / PLAN_NAME).model, model, build))
