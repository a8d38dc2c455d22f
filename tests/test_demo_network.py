"""The demo's data and network are what the repository says they are."""

import hashlib
import json

import numpy as np
import pytest
import torch

from robustdice.demo.network import RECORD_FILE, WEIGHTS_FILE, DigitsCNN, digits_cnn
from robustdice.errors import DataError
from robustdice.images import check_preprocessing, normalise_pixels
from robustdice.model.digits import PREPROCESSING, Split, digits

KIB = 1024


@pytest.mark.parametrize(
    ("split", "sha256"),
    [
        ("train", "baa1ffa3480bc637e6a62a72f42fa66507a94a9f4bc9286365f68510a7e6ef1f"),
        ("test", "61937f4ca07351bc3c55bca7e6490257b06a7ff56f189824c4541615ae6e0785"),
    ],
)
def test_a_split_is_the_same_bytes_everywhere(split: Split, sha256: str) -> None:
    images, classes = digits(split)
    assert hashlib.sha256(images.tobytes() + classes.astype("<i8").tobytes()).hexdigest() == sha256


def test_the_splits_are_balanced_and_cover_every_image() -> None:
    assert np.bincount(digits("train")[1]).tolist() == [100] * 10
    assert np.bincount(digits("test")[1]).tolist() == [78, 82, 77, 83, 81, 82, 81, 79, 74, 80]


def test_no_test_image_is_trained_on() -> None:
    seen = {image.tobytes() for image in digits("train")[0]}
    assert not any(image.tobytes() in seen for image in digits("test")[0])


def test_enlarging_is_what_pytorch_calls_bilinear() -> None:
    from sklearn.datasets import load_digits  # noqa: PLC0415 -- slow to import

    small = torch.from_numpy(load_digits().images)[:, None]
    enlarged = torch.nn.functional.interpolate(small, scale_factor=4, mode="bilinear") * 255 / 16
    expected = (enlarged + 0.5).floor().to(torch.uint8).numpy()
    images = np.concatenate([digits("train")[0], digits("test")[0]])
    assert sorted(image.tobytes() for image in images) == sorted(image.tobytes() for image in expected)


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(DataError, match="no split 'validation', only 'train' and 'test'"):
        digits("validation")  # type: ignore[arg-type]


def test_a_caller_cannot_change_the_digits_of_others() -> None:
    before = digits("test")[0].copy()
    digits("test")[0][:] = 0
    assert np.array_equal(digits("test")[0], before)


def test_the_preprocessing_fits_the_training_images() -> None:
    images, _ = digits("train")
    assert check_preprocessing(PREPROCESSING)["classes"] == list("0123456789")
    assert list(images.shape[1:]) == PREPROCESSING["input_size"]
    assert PREPROCESSING["mean"] == [pytest.approx(images.mean() / 255, abs=1e-3)]
    assert PREPROCESSING["std"] == [pytest.approx(images.std() / 255, abs=1e-3)]


def test_the_weights_have_the_accuracy_that_is_recorded() -> None:
    record = json.loads(RECORD_FILE.read_bytes())
    images, classes = digits("test")
    inputs = torch.from_numpy(normalise_pixels(images.astype(np.float32) / np.float32(255), DigitsCNN.preprocessing))
    with torch.inference_mode():
        right = digits_cnn()(inputs).argmax(dim=1) == torch.from_numpy(classes)
    assert record["test_accuracy"] == pytest.approx(int(right.sum()) / len(classes), abs=1e-9)
    assert record["test_accuracy"] >= 0.975
    assert record["test_images"] == len(classes)


def test_the_network_is_small_and_ready_for_inference() -> None:
    network = digits_cnn()
    assert not network.training
    assert all(parameter.dtype == torch.float32 for parameter in network.parameters())
    parameters = sum(parameter.numel() for parameter in network.parameters())
    assert parameters == json.loads(RECORD_FILE.read_bytes())["parameters"]
    assert 200 * KIB < WEIGHTS_FILE.stat().st_size < 600 * KIB


def test_random_weights_can_be_had_instead() -> None:
    torch.manual_seed(0)
    images = torch.zeros(1, 1, 32, 32)
    assert not torch.equal(digits_cnn(random_weights=True)(images), digits_cnn()(images))
