"""What becomes of class scores in an answer: probabilities of classes, or of labels of their own."""

from dataclasses import replace

import numpy as np
import pytest

from robustdice.report.cluster_tables import answer_json, answers_table
from robustdice.runtime.answer import Answer, probabilities_of

SCORES = np.array([2.0, -1.0, 0.5, -np.inf], np.float32)


def test_probabilities_of_classes_sum_to_one_and_those_of_labels_are_their_own() -> None:
    classes, labels = (probabilities_of(SCORES, activation) for activation in ("softmax", "sigmoid"))
    assert classes is not None
    assert labels is not None
    assert classes.sum() == pytest.approx(1)
    np.testing.assert_allclose(labels, [0.8807971, 0.2689414, 0.6224593, 0], rtol=1e-6)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_large_scores_have_probabilities_and_lost_ones_none(activation: str) -> None:
    large = probabilities_of(np.array([1e4, -1e4], np.float32), activation)
    assert large is not None
    assert large.tolist() == [1.0, 0.0]
    assert probabilities_of(np.full(2, -np.inf, np.float32), activation) is None


def test_infer_names_every_label_that_is_likelier_than_not() -> None:
    probabilities = probabilities_of(SCORES, "sigmoid")
    answer = Answer(0, SCORES, probabilities, 0, 1.0, 0.0, (), 0.01, 0)
    names = ["dog", "cat", "hat", "car"]
    found = answer_json("a.png", answer, names, "sigmoid")
    assert (found["class_name"], list(found["labels"])) == ("dog", ["dog", "hat"])
    assert found["labels"]["hat"] == pytest.approx(0.6224593)
    assert "labels" not in answer_json("a.png", answer, names)
    none = answer_json("a.png", replace(answer, outputs=None, probabilities=None, class_index=None), names, "sigmoid")
    assert [row[0] for row in answers_table([found, none]).rows] == ["dog, hat", "no answer"]
