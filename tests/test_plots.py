"""Pictures hold what the data says, and are files that other programs read."""

from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from PIL import Image

from robustdice.errors import OutputError
from robustdice.failure.evaluate import Evaluation
from robustdice.importance.values import Importance
from robustdice.partitioning import partition
from robustdice.plan import Layer, ModelReference, failure_sets
from robustdice.report import plots

MODEL = ModelReference("test", "0" * 64)
LAYERS = (Layer("first", 8, 1, 10, 10, 1), Layer("second", 5, 1, 10, 10, 1))


def evaluation(method: str, lowest: float) -> Evaluation:
    accuracy = {f: 0.9 if not f else lowest + 0.1 * min(f) for size in range(3) for f in failure_sets(3, size)}
    return Evaluation(0.9, 50, "images", method, 3, 0.5, accuracy)


def test_accuracy_has_a_line_and_a_band_for_each_plan() -> None:
    (axes,) = plots.accuracy([evaluation("robustdice", 0.5), evaluation("lop", 0.1)]).axes
    robust, lop, _clean = axes.lines
    assert np.asarray(robust.get_ydata()) == pytest.approx([90, 60, 100 * (0.5 + 0.5 + 0.6) / 3])
    assert np.asarray(lop.get_ydata())[1] == pytest.approx(20)
    assert [str(robust.get_label()), str(lop.get_label())] == [
        "robustdice, at most 50 % of the model each",
        "lop, at most 50 % of the model each",
    ]
    band = axes.collections[0].get_paths()[0].get_extents()
    assert (band.ymin, band.ymax) == pytest.approx((50, 90))
    assert "50 images of images" in axes.get_title("left")


def test_holders_of_every_layer_fill_a_bar() -> None:
    scores = tuple(np.linspace(0, 1, layer.neurons)[:, None] ** 3 for layer in LAYERS)
    importance = Importance(("first", "second"), scores, ("s1",), MODEL)
    plan = partition(LAYERS, importance, devices=3, threshold=0.2, shared_weights=0, model=MODEL)
    (axes,) = plots.holders(plan).axes
    widths = np.array([bar.get_width() for bar in axes.patches[: 2 * 3]]).reshape(2, 3)  # type: ignore[attr-defined]
    assert widths.sum(1) == pytest.approx([100, 100])
    for row, shards in zip(widths, plan.shards, strict=True):
        single = sum(len(shard.neurons) for shard in shards if len(shard.holders) == 1)
        assert row[0] == pytest.approx(100 * single / sum(len(shard.neurons) for shard in shards))


def test_importance_is_sorted_and_scaled_in_each_layer() -> None:
    scores = (np.array([[0.0, 5.0], [2.0, 5.0], [1.0, 5.0]]), np.array([[7.0, 1.0]]))
    figure = plots.importance(Importance(("a", "b"), scores, ("s1", "s3"), MODEL))
    s1, s3, _ = figure.axes
    first = np.asarray(s1.images[0].get_array())
    assert [str(axes.get_title()) for axes in (s1, s3)] == ["s1", "s3"]
    assert first[0, [0, -1]] == pytest.approx([1, 0])
    assert (np.diff(first[0]) <= 0).all()
    assert np.interp(0.5, np.linspace(0, 1, 200), first[0]) == pytest.approx(0.5, abs=0.01)
    assert not np.asarray(s3.images[0].get_array()).any()  # all neurons alike


def test_figure_2_has_a_panel_for_each_model_and_scenario() -> None:
    methods = [evaluation("robustdice", 0.5), evaluation("full", 0.9)]
    names = {4: "A, 4 devices", 3: "B, 3 devices"}
    figure = plots.scenarios({"one": {4: methods, 3: methods}, "two": {4: methods, 3: methods}}, names)
    assert [axes.get_title() for axes in figure.axes] == [
        "A, 4 devices: one",
        "B, 3 devices: one",
        "A, 4 devices: two",
        "B, 3 devices: two",
    ]
    assert np.asarray(figure.axes[3].lines[0].get_ydata()) == pytest.approx([90, 60, 100 * (0.5 + 0.5 + 0.6) / 3])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["robustdice", "full", "the model alone"]


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_pictures_are_files_of_their_kind(suffix: str, tmp_path: Path) -> None:
    scores = tuple(np.random.default_rng(0).random((units, 3)) for units in (8, 1, 300))
    importance = Importance(("a", "b", "c"), scores, ("s1", "s2", "s3"), MODEL)
    path = tmp_path / f"picture{suffix}"
    plots.save(plots.importance(importance), path)
    if suffix == ".png":
        with Image.open(path) as image:
            assert image.size[0] > 600
    else:
        assert ET.parse(path).getroot().tag.endswith("svg")  # noqa: S314 -- our own


def test_a_picture_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"ends with \.png, \.svg, \.pdf, not 'a\.txt'"):
        plots.save(plots.accuracy([evaluation("lop", 0.1)]), tmp_path / "a.txt")
