"""Bins of probabilities, against torchmetrics and by hand."""

import numpy as np
import pytest
import torch
from torchmetrics.classification import BinaryCalibrationError

from vessel.errors import VesselError
from vessel.metrics.calibration import BINS, Reliability


def image(seed, size=(40, 30)):
    rng = np.random.default_rng(seed)
    probability = rng.beta(0.4, 1.5, size).astype(np.float32).clip(0, 0.999)
    return probability, rng.random(size) < probability**1.5  # too sure of itself


@pytest.mark.parametrize("images", [1, 5])
def test_ece_equals_torchmetrics_over_one_image_and_over_a_set(images):
    ours, theirs = Reliability(), BinaryCalibrationError(n_bins=BINS, norm="l1")
    for seed in range(images):
        probability, true = image(seed, (40 + seed, 30))
        ours.add(probability, true)
        theirs.update(torch.from_numpy(probability.ravel()).double(), torch.from_numpy(true.ravel()).int())
    assert ours.ece == pytest.approx(theirs.compute().item(), abs=1e-9)
    assert ours.ece > 0.05


def test_bins_by_hand():
    found = Reliability()
    found.add(np.array([[0.01, 0.03, 0.5, 0.52]], dtype=np.float32), np.array([[False, True, True, True]]))
    bins = found.bins()
    assert len(bins) == BINS == 15
    assert bins[0] == {"low": 0, "high": 1 / 15, "n": 2, "confidence": pytest.approx(0.02), "frequency": 0.5}
    assert bins[7] == {"low": 7 / 15, "high": 8 / 15, "n": 2, "confidence": pytest.approx(0.51), "frequency": 1.0}
    assert bins[3] == {"low": 3 / 15, "high": 4 / 15, "n": 0, "confidence": None, "frequency": None}
    assert sum(each["n"] for each in bins) == 4
    assert found.ece == pytest.approx((2 * 0.48 + 2 * 0.49) / 4)


def test_a_border_belongs_to_the_bin_above_it_and_one_to_the_last():
    found = Reliability()
    found.add(np.array([[0.0, 0.2, 1.0]], dtype=np.float32), np.array([[False, False, True]]))
    assert [i for i, each in enumerate(found.bins()) if each["n"]] == [0, 3, 14]
    assert found.ece == pytest.approx(0.2 / 3)


@pytest.mark.parametrize(("probability", "true", "expected"), [(0.0, False, 0.0), (1.0, True, 0.0), (0.3, False, 0.3)])
def test_ece_of_a_constant(probability, true, expected):
    found = Reliability()
    found.add(np.full((5, 4), probability, dtype=np.float32), np.full((5, 4), true))
    assert found.ece == pytest.approx(expected)


def test_nothing_added_is_not_perfect():
    assert Reliability().ece is None


def test_rounding_does_not_make_a_map_unusable():
    found = Reliability()
    found.add(np.array([[-1e-7, 1 + 1e-7]], dtype=np.float32), np.array([[False, True]]))
    assert [i for i, each in enumerate(found.bins()) if each["n"]] == [0, 14]
    assert found.ece == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -0.01, 1.01])
def test_what_is_no_probability_is_refused(wrong):
    with pytest.raises(VesselError, match=r"\[0, 1\].*non-finite"):
        Reliability().add(np.array([[0.5, wrong]], dtype=np.float32), np.array([[True, False]]))


def test_shapes_and_types_are_checked():
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        Reliability().add(np.zeros((2, 3), dtype=np.float32), np.zeros((3, 2), dtype=bool))
    with pytest.raises(ValueError, match="uint8"):
        Reliability().add(np.zeros((2, 3), dtype=np.float32), np.zeros((2, 3), dtype=np.uint8))
