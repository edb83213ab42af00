"""All scores of a mask: the record, the rules for empty masks, and the masks' own overlap against torchmetrics."""

import json
import subprocess
import sys
from dataclasses import asdict, fields

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torchmetrics.functional.classification import (
    binary_calibration_error,
    binary_f1_score,
    binary_jaccard_index,
    binary_precision,
    binary_recall,
)

from vessel.errors import VesselError
from vessel.metrics.scores import METRICS, Scores, score
from vessel.metrics.shape import centreline_scores, component_error, surface_scores

SIZE = (30, 40)
NOTHING = np.zeros(SIZE, dtype=bool)


def probabilities(seed, size=SIZE):
    field = gaussian_filter(np.random.default_rng(seed).standard_normal(size), 3)
    return (1 / (1 + np.exp(-8 * field / field.std()))).astype(np.float32).clip(0, 0.999)


def something():
    mask = NOTHING.copy()
    mask[5:9, 3:33] = True
    return mask


def test_the_record_has_the_names_of_the_table_in_its_order():
    assert [field.name for field in fields(Scores)] == list(METRICS)
    assert list(METRICS) == [
        *("dice", "iou", "precision", "recall", "cldice", "centreline_sensitivity"),
        *("hd95", "nsd", "component_error", "ece"),
    ]
    assert {metric.better for metric in METRICS.values()} == {"higher", "lower"}
    assert {name for name, metric in METRICS.items() if metric.unit == "length"} == {"hd95"}


@pytest.mark.parametrize("seed", range(4))
def test_overlap_and_calibration_equal_torchmetrics(seed):
    probability, true = probabilities(seed), probabilities(seed + 10) > 0.6
    predicted = probability > 0.4
    found = score(probability, predicted, true)
    one, two = torch.from_numpy(predicted).int(), torch.from_numpy(true).int()
    for name, theirs in {
        "dice": binary_f1_score,
        "iou": binary_jaccard_index,
        "precision": binary_precision,
        "recall": binary_recall,
    }.items():
        assert getattr(found, name) == pytest.approx(theirs(one, two).item(), abs=1e-6)
    expected = binary_calibration_error(torch.from_numpy(probability).double().ravel(), two.ravel(), n_bins=15)
    assert found.ece == pytest.approx(expected.item(), abs=1e-9)


def test_the_rest_is_passed_on_with_spacing_and_tolerance():
    predicted, true = probabilities(1) > 0.5, probabilities(2) > 0.5
    found = score(None, predicted, true, spacing=(0.5, 2.0), tolerance=1.5)
    surface = surface_scores(predicted, true, spacing=(0.5, 2.0), tolerance=1.5)
    assert (found.hd95, found.nsd) == surface != surface_scores(predicted, true, spacing=(1.0, 1.0), tolerance=2.0)
    assert (found.cldice, found.centreline_sensitivity) == centreline_scores(predicted, true)
    assert found.component_error == component_error(predicted, true)
    assert found.ece is None


def test_a_perfect_mask():
    true = something()
    expected = {name: 1.0 if metric.better == "higher" else 0.0 for name, metric in METRICS.items()}
    assert asdict(score(true.astype(np.float32), true, true)) == expected


def test_scores_are_plain_numbers_that_json_takes():
    probability = probabilities(3)
    found = asdict(score(probability, probability > 0.5, something()))
    assert {type(value) for value in found.values()} == {float}
    assert json.loads(json.dumps(found)) == found


DIAGONAL = (30**2 + 40**2) ** 0.5
EMPTY = {
    "both empty": {**dict.fromkeys(METRICS, 1.0), "hd95": 0.0, "component_error": 0.0, "ece": 0.25},
    "ground truth empty": {
        **dict.fromkeys(METRICS, 0.0),
        **{"recall": 1.0, "centreline_sensitivity": 1.0, "hd95": DIAGONAL, "component_error": 1.0, "ece": 0.25},
    },
    "nothing predicted": {
        **dict.fromkeys(METRICS, 0.0),
        **{"precision": 1.0, "hd95": DIAGONAL, "component_error": 1.0, "ece": pytest.approx(0.25 - 120 / 1200)},
    },
}


@pytest.mark.parametrize("case", EMPTY)
@pytest.mark.parametrize("name", METRICS)
def test_guard_D12_each_score_keeps_its_rule_for_empty_masks(name, case):
    predicted = something() if case == "ground truth empty" else NOTHING
    true = something() if case == "nothing predicted" else NOTHING
    found = score(np.full(SIZE, 0.25, dtype=np.float32), predicted, true)
    assert getattr(found, name) == EMPTY[case][name]
    assert METRICS[name].rule


def test_guard_D12_a_missed_structure_costs_more_than_any_misplaced_one():
    one, other = NOTHING.copy(), NOTHING.copy()
    one[0, 0] = other[-1, -1] = True
    for spacing in ((1.0, 1.0), (0.01, 0.3)):
        missed = score(None, NOTHING, one, spacing=spacing).hd95
        assert missed == pytest.approx(np.hypot(30 * spacing[0], 40 * spacing[1]))
        assert missed > score(None, other, one, spacing=spacing).hd95


def test_an_image_that_is_all_vessel():
    found = score(None, ~NOTHING, ~NOTHING)
    assert (found.dice, found.cldice, found.hd95, found.nsd, found.component_error) == (1, 1, 0, 1, 0)


@pytest.mark.parametrize(
    ("predicted", "true", "lengths"),
    [
        (NOTHING, NOTHING.T, {}),
        (NOTHING.astype(np.uint8), NOTHING, {}),
        (NOTHING, NOTHING.astype(np.float32), {}),
        (NOTHING, NOTHING, {"spacing": (0.0, 1.0)}),
        (NOTHING, NOTHING, {"tolerance": -1.0}),
    ],
)
def test_what_cannot_be_compared_is_refused(predicted, true, lengths):
    with pytest.raises(ValueError, match=r"prediction|spacing"):
        score(None, predicted, true, **lengths)


def test_guard_I7_a_broken_probability_map_has_no_score():
    broken = np.full(SIZE, 0.2, dtype=np.float32)
    broken[3, 4] = np.nan
    with pytest.raises(VesselError, match="non-finite"):
        score(broken, broken > 0.5, something())


def test_reading_the_table_loads_neither_torch_nor_monai():
    code = "import sys, vessel.metrics.scores; print({'torch', 'monai', 'skimage'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
