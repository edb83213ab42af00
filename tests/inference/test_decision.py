"""From probabilities to masks, and how the choice is kept."""

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy.ndimage import binary_propagation, gaussian_filter
from skimage.filters import apply_hysteresis_threshold

from vessel.errors import VesselError
from vessel.inference.cleanup import Cleanup
from vessel.inference.decision import (
    AUTO,
    DECISION_FILE,
    CleanupOptions,
    Decision,
    StoredDecision,
    override_decision,
    read_decision,
    read_given_decision,
)
from vessel.runs.manifest import Manifest

FULL = Decision(0.6, 0.3, Cleanup(opening=1, closing=2, fill_holes=True, min_size=5), ("flip_lr", "turn_90"))


@pytest.fixture
def probability():
    return np.random.default_rng(0).random((60, 50), dtype=np.float32)


def test_a_threshold_is_exceeded_never_met():
    mask = Decision(0.5)(np.array([[0.4, 0.5, 0.6]], dtype=np.float32))
    assert mask.dtype == bool
    assert mask.tolist() == [[False, False, True]]


def test_hysteresis_by_hand():
    """A weak pixel counts where it connects to a strong one, over a corner as well; alone it does not."""
    probability = np.array([[0.9, 0.1, 0.4], [0.1, 0.4, 0.1], [0.1, 0.1, 0.4], [0.1, 0.1, 0.1], [0.4, 0.4, 0.1]])
    expected = np.array([[1, 0, 1], [0, 1, 0], [0, 0, 1], [0, 0, 0], [0, 0, 0]], dtype=bool)
    assert np.array_equal(Decision(0.6, 0.3)(probability), expected)
    assert not Decision(0.95, 0.3)(probability).any()


def test_hysteresis_agrees_with_scipy_and_holds_what_scikit_image_finds_over_edges(probability):
    smooth = gaussian_filter(probability, 1.0)
    low, high = np.quantile(smooth, [0.6, 0.9])
    found = Decision(float(high), float(low))(smooth)
    assert np.array_equal(found, binary_propagation(smooth > high, np.ones((3, 3)), mask=smooth > low))
    over_edges = apply_hysteresis_threshold(smooth, low, high)
    assert not (over_edges & ~found).any()
    assert (smooth > high).sum() < over_edges.sum() <= found.sum() < (smooth > low).sum()


def test_the_clean_up_follows_the_threshold(probability):
    smooth = gaussian_filter(probability, 1.0)
    decision = Decision(0.5, 0.48, Cleanup(opening=1, min_size=20))
    assert np.array_equal(decision(smooth), decision.cleanup(Decision(0.5, 0.48)(smooth)))
    assert decision(smooth).sum() < Decision(0.5, 0.48)(smooth).sum()


def test_guard_I5_masks_shrink_as_the_threshold_rises(probability):
    areas = [Decision(threshold)(probability).sum() for threshold in (0.2, 0.4, 0.6, 0.8)]
    assert areas == sorted(areas, reverse=True)
    assert len(set(areas)) == 4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"threshold": 0}, "threshold=0: use auto, or a number between 0 and 1"),
        ({"threshold": True}, "threshold=True"),
        ({"hysteresis": 0.5}, "hysteresis=0.5: .*between 0 and the threshold, 0.5"),
        ({"hysteresis": "best"}, "hysteresis=best"),
        ({"tta": ("turn_45",)}, "turn_45 is none"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(values, message):
    with pytest.raises(VesselError, match=message):
        Decision(**values)


def test_json_and_words():
    assert Decision.from_json(json.loads(json.dumps(FULL.to_json()))) == FULL
    assert str(FULL) == (
        "threshold 0.60, hysteresis from 0.30, opening 1 px, closing 2 px, fill holes, min size 5 px, "
        "mean over the image and flip_lr, turn_90"
    )
    assert str(Decision(0.35)) == "threshold 0.35"
    for broken in ({}, None, {**FULL.to_json(), "gamma": 2}, {**FULL.to_json(), "cleanup": {"erosion": 1}}):
        with pytest.raises(VesselError, match="no decision that this vessel reads"):
            Decision.from_json(broken)


def by_user(**told):
    options = {"threshold": AUTO, "hysteresis": AUTO, "cleanup": CleanupOptions(), "tta": AUTO}
    return override_decision(FULL, **options | told)


def test_what_the_user_says_wins_and_the_rest_is_as_validation_chose():
    assert by_user() == FULL
    assert by_user(cleanup=CleanupOptions(min_size=0)) == replace(FULL, cleanup=replace(FULL.cleanup, min_size=0))
    assert by_user(tta=[]) == by_user(tta=None) == replace(FULL, tta=())
    assert by_user(tta="scale_0.8") == replace(FULL, tta=("scale_0.8",))
    assert by_user(hysteresis=None) == replace(FULL, hysteresis=None)
    assert by_user(threshold=0.2) == replace(FULL, threshold=0.2, hysteresis=None)
    assert by_user(threshold="0.2", hysteresis=0.1) == replace(FULL, threshold=0.2, hysteresis=0.1)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"threshold": "best"}, "threshold=best: use auto"),
        ({"threshold": None}, "threshold=None"),
        ({"hysteresis": 0.7}, "hysteresis=0.7"),
        ({"tta": ["up"]}, "tta="),
    ],
)
def test_options_that_make_no_sense(told, message):
    with pytest.raises(VesselError, match=message):
        by_user(**told)


def test_a_clean_up_that_makes_no_sense_is_told_before_anything_is_read():
    with pytest.raises(VesselError, match=r"cleanup\.min_size=few"):
        CleanupOptions(min_size="few")
    with pytest.raises(VesselError, match=r"cleanup\.fill_holes=3: say true or false"):
        CleanupOptions(fill_holes=3)


@pytest.fixture
def manifest():
    data = {"fingerprint": "data", "split_hash": "split"}
    return Manifest("run", {}, data, ("lumen",), "phi3", threshold=0.35, fingerprint="weights")


STORED = StoredDecision("weights", FULL, "data", "split", None, ({"option": "threshold", "value": "0.60"},))


def test_what_was_searched_is_stored_and_found_again(manifest, tmp_path):
    STORED.write(tmp_path / DECISION_FILE)
    assert StoredDecision.read(tmp_path / DECISION_FILE) == STORED
    assert [file.name for file in tmp_path.iterdir()] == [DECISION_FILE]
    assert read_decision(manifest, tmp_path) == (FULL, "searched on validation")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"fingerprint": "others"}, "other weights (others, these are weights)"),
        ({"split_hash": "new"}, "another data set or split"),
        ({"data": "new"}, "another data set or split"),
    ],
)
def test_guard_I6_a_decision_of_other_weights_or_data_is_not_used_and_said(manifest, tmp_path, changes, told):
    replace(STORED, **changes).write(tmp_path / DECISION_FILE)
    decision, source = read_decision(manifest, tmp_path)
    assert decision == Decision(0.35)
    assert "decision.json of the run is not used" in source
    assert told in source


def test_a_decision_that_the_user_names_has_to_fit(manifest, tmp_path):
    """A public network has no data of its own: then what it is used on has to be what it was chosen on."""
    STORED.write(tmp_path / DECISION_FILE)
    for place in (tmp_path, tmp_path / DECISION_FILE):
        assert read_given_decision(str(place), manifest)[0] == FULL
    public = replace(manifest, data={})
    same = {"fingerprint": "data", "split_hash": "split"}
    assert read_given_decision(str(tmp_path), public)[0] == read_given_decision(str(tmp_path), public, same)[0] == FULL
    for wrong, data, told in (
        (replace(manifest, fingerprint="others"), None, "other weights"),
        (public, {**same, "split_hash": "new"}, "another data set or split"),
    ):
        with pytest.raises(VesselError, match=f"decision=.*{told}.*search=true"):
            read_given_decision(str(tmp_path), wrong, data)
    with pytest.raises(VesselError, match="cannot be read as a decision"):
        read_given_decision(str(tmp_path / "none.json"), manifest)


def test_without_a_search_the_threshold_of_training_stands(manifest, tmp_path):
    assert read_decision(manifest, tmp_path)[0] == read_decision(manifest, None)[0] == Decision(0.35)
    assert "chosen on validation" in read_decision(manifest, None)[1]
    assert read_decision(replace(manifest, threshold=None), None) == (Decision(0.5), "none stored, 0.5 taken")


def test_an_export_carries_its_decision(manifest):
    carried = Manifest.from_dict(replace(manifest, decision=FULL.to_json()).as_dict())
    assert read_decision(carried, None)[0] == FULL


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"decision": {"threshold": 0.5}}'])
def test_a_damaged_file_is_named(manifest, tmp_path, text):
    (tmp_path / DECISION_FILE).write_text(text)
    with pytest.raises(VesselError, match=r"decision\.json cannot be read.*search=true"):
        read_decision(manifest, tmp_path)
