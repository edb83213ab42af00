"""The search on validation, on probabilities with known answers, and once with a network."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from vessel.batch import Sample
from vessel.checkpoints.reading import find_checkpoint
from vessel.data.catalog import Catalog
from vessel.data.dataset import VesselDataset
from vessel.data.inputs import InputImage
from vessel.errors import VesselError
from vessel.evaluation.decision_search import MIN_GAIN, Search
from vessel.evaluation.metrics_json import Part
from vessel.evaluation.options import DataOptions, EvaluateOptions
from vessel.evaluation.probability_store import ProbabilityStore
from vessel.evaluation.search import check_search, run_search
from vessel.inference.cleanup import Cleanup
from vessel.inference.decision import DECISION_FILE, Decision, read_given_decision
from vessel.inference.loading import load_model
from vessel.inference.options import NetworkOptions
from vessel.inference.predictor import Failure
from vessel.inference.results import Prediction
from vessel.metrics.intervals import cluster_interval

SIZE = (48, 40)
Y, X = np.mgrid[: SIZE[0], : SIZE[1]]
DISC = (Y - 24) ** 2 + (X - 20) ** 2 < 120


def prediction(name, patient, *maps, mask=DISC):
    """Build the prediction of an image of a patient from these maps, one a phrase."""
    empty = torch.empty(0, dtype=torch.long)
    phrases = tuple(f"phrase {i}" for i in range(len(maps)))
    sample = Sample(
        name, patient, f"{patient}_v", phrases, empty, empty, empty, empty, SIZE,
        masks=torch.from_numpy(np.stack([mask] * len(maps))),
    )  # fmt: skip
    values = tuple(torch.from_numpy(one.astype(np.float32)) for one in maps)
    return Prediction(InputImage(name, Path(name), name), sample, ("",) * len(maps), values, (True,) * len(maps))


def patients(draw, *, n=3, frames=2):
    """Build predictions of all patients; `draw(patient, frame)` gives the map of each image."""
    return [prediction(f"p{p}_{f}", f"p{p}", draw(p, f)) for p in range(n) for f in range(frames)]


def searched(folder, answers, start=0.5):
    """Search with predictions that are the same for every augmentation, or those of `answers(tta)`."""
    search = Search(answers if callable(answers) else lambda _: answers, folder)
    search.run(Decision(start))
    return search


def of(search, option):
    return [trial for trial in search.trials if trial.option == option]


def test_guard_I5_the_threshold_of_known_probabilities_is_found(tmp_path):
    """0.33 in the disc and up to 0.22 around it: between the two every image is right, elsewhere none is."""
    rng = np.random.default_rng(0)
    search = searched(tmp_path, patients(lambda p, f: np.where(DISC, 0.33, 0.22 * rng.random(SIZE))))
    assert search.decision == Decision(0.3)
    by_value = {trial.value: trial for trial in of(search, "threshold")}
    assert by_value["0.25"].dice == by_value["0.30"].dice == 1
    assert by_value["0.35"].dice == 0
    assert 0 < by_value["0.05"].dice < by_value["0.10"].dice < by_value["0.20"].dice < 1
    assert [trial.value for trial in by_value.values() if trial.adopted] == ["0.30"]  # of equals the nearer
    assert len(by_value) == 18  # of 19 all but the one it started with


def specks(mask, number, seed):
    """Add holes and islands of two pixels, none of which touches another."""
    positions = [
        (y, x) for y in range(1, 47, 4) for x in range(1, 38, 4) if not mask[y - 1 : y + 2, x - 1 : x + 3].any()
    ]
    drawn = mask.copy()
    for i in np.random.default_rng(seed).choice(len(positions), number, replace=False):
        y, x = positions[i]
        drawn[y, x : x + 2] = True
    return drawn


def test_a_clean_up_that_helps_is_adopted_with_its_gain(tmp_path):
    """Against Dice by hand: 2 x 373 / (373 + 373 + two pixels a speck)."""
    number = {"p0": 3, "p1": 5, "p2": 10}
    answers = patients(lambda p, f: np.where(specks(DISC, number[f"p{p}"], p), 0.9, 0.1))
    search = searched(tmp_path, answers)
    assert search.decision == Decision(0.5, cleanup=Cleanup(opening=1))
    [trial] = [trial for trial in of(search, "opening") if trial.adopted]
    opened = search.decision(answers[0].probabilities[0].numpy())
    after = 2 * (opened & DISC).sum() / (opened.sum() + DISC.sum())
    gains = [after - 2 * DISC.sum() / (2 * DISC.sum() + 2 * count) for count in number.values()]
    assert trial.dice == pytest.approx(after)
    assert trial.gain == pytest.approx(np.mean(gains))
    assert (trial.low, trial.high) == pytest.approx(cluster_interval(gains, bounds=(-1, 1)))
    assert (trial.unit, trial.clusters, trial.better, trial.worse) == ("patient", 3, 3, 0)


def test_a_gain_of_a_few_patients_is_recorded_and_not_adopted(tmp_path):
    """One patient of three gains 0.03: the mean rises by 0.01, the others stay."""
    answers = patients(lambda p, f: np.where(specks(DISC, 12 if p == 0 else 0, f), 0.9, 0.1))
    search = searched(tmp_path, answers)
    [trial] = [trial for trial in of(search, "min size") if trial.value == "16 px"]
    assert trial.gain > 5 * MIN_GAIN
    assert (trial.better, trial.worse, trial.clusters, trial.adopted) == (1, 0, 3, False)
    assert search.decision == Decision(0.5)


def test_a_gain_too_small_is_not_adopted(tmp_path):
    large = np.ones(SIZE, dtype=bool)
    large[0, 0] = False  # one hole in 1,920 pixels
    answers = [prediction(f"i{p}", f"p{p}", np.where(large, 0.9, 0.1), mask=large | True) for p in range(3)]
    search = searched(tmp_path, answers)
    [trial] = [trial for trial in of(search, "closing") if trial.value == "1 px"]
    assert 0 < trial.gain < MIN_GAIN
    assert trial.better == 3
    assert search.decision == Decision(0.5)


def test_each_option_is_tried_on_top_of_what_was_kept(tmp_path):
    """Holes in the disc, weak ends and weak islands: fill, and hysteresis, and each in the table once a value."""
    ring = DISC & ~((Y - 24) ** 2 + (X - 20) ** 2 < 16)
    ends = DISC & (np.abs(X - 20) > 5)
    islands = np.zeros(SIZE, dtype=bool)
    islands[2:6, 2:38] = islands[42:46, 2:38] = True

    def draw(p, f):
        values = np.where(ring, 0.9, 0.05)
        values[ends & ring] = 0.45
        values[islands] = 0.45
        return values

    search = searched(tmp_path, patients(draw))
    assert search.decision.hysteresis is not None
    assert search.decision.hysteresis < 0.45 < search.decision.threshold
    assert search.decision.cleanup.fill_holes
    assert np.array_equal(search.decision(draw(0, 0)), DISC)
    tried = {option: len(of(search, option)) for option in dict.fromkeys(trial.option for trial in search.trials)}
    assert tried == {
        "start": 1, "threshold": 18, "tta": 3, "hysteresis": 6, "opening": 3, "closing": 3, "fill holes": 1,
        "min size": 4,
    }  # fmt: skip
    gains = sum(trial.gain for trial in search.trials if trial.adopted)
    assert search.trials[0].dice + gains == pytest.approx(1)


def test_augmentation_that_helps_is_kept_and_two_kinds_lie_on_the_disk_at_most(tmp_path):
    rng, on_disk = np.random.default_rng(0), []

    def answers(tta):
        on_disk.append(len(list(tmp_path.iterdir())))
        noise = {0: 0.8, 2: 0.3}.get(len(tta), 0.8)  # with the flips alone it is nearly right
        return patients(lambda p, f: np.clip(np.where(DISC, 0.6, 0.4) + noise * (rng.random(SIZE) - 0.5), 0, 1))

    search = searched(tmp_path, answers)
    assert search.decision.tta == ("flip_lr", "flip_ud")
    assert [trial.adopted for trial in of(search, "tta")] == [True, False, False]
    assert of(search, "tta")[1].value.startswith("flip_lr, flip_ud, turn_90, turn_180, turn_270; threshold 0.")
    assert max(on_disk) == 1  # and the one that is being made
    assert len(list(tmp_path.iterdir())) == 1


def test_augmentation_with_which_an_image_fails_is_recorded_and_not_adopted(tmp_path):
    good = patients(lambda p, f: np.where(DISC, 0.9, 0.1))

    def answers(tta):
        failed = [Failure(good[0].sample.id, "p0_0.png", "out of memory")] if "turn_90" in tta else good[:1]
        return [*failed, *good[1:]]

    trial = of(searched(tmp_path, answers), "tta")[1]
    assert (trial.gain, trial.adopted) == (None, False)
    assert trial.note.startswith("1 images failed, 0 without")


def test_guard_I7_an_image_that_fails_is_no_score(tmp_path):
    good = patients(lambda p, f: np.where(DISC, 0.9, 0.1))
    search = searched(tmp_path, [Failure("x", "x.png", "out of memory"), *good])
    assert (len(search.kept), len(search.kept.failures), search.trials[0].dice) == (6, 1, 1.0)
    with pytest.raises(VesselError, match=r"search=true: .*out of memory"):
        searched(tmp_path / "alone", [Failure("x", "x.png", "out of memory")])


def test_kept_maps_give_the_dice_of_those_that_came(tmp_path):
    """Two phrases an image; half precision moves no pixel over these thresholds."""
    rng = np.random.default_rng(0)
    answers = [prediction(f"i{i}", "p", rng.random(SIZE), rng.random(SIZE)) for i in range(3)]
    decisions = [Decision(0.123), Decision(0.6, 0.4), Decision(0.7, cleanup=Cleanup(closing=2))]
    kept = ProbabilityStore(tmp_path / "maps", answers)
    rows = list(kept.dice(decisions))
    assert len(rows) == kept.rows == 6
    for of_row, (answer, k) in zip(rows, [(answer, k) for answer in answers for k in range(2)], strict=True):
        for row, decision in zip(of_row, decisions, strict=True):
            drawn = decision(answer.probabilities[k].numpy())
            assert (row.id, row.phrase, row.present) == (answer.sample.id, f"phrase {k}", True)
            assert row.scores.dice == pytest.approx(2 * (drawn & DISC).sum() / (drawn.sum() + DISC.sum()), abs=2e-3)
    kept.remove()
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def run_folder(tiny_run, tmp_path):
    """Copy the run, as searches write into it."""
    shutil.copytree(tiny_run, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def search_of(oct_set):
    """Return `search_of(ckpt, split="val")`, which searches as the command does."""

    def call(ckpt, *, split="test", phrases=None, **changes):
        given = {"ckpt": str(ckpt), "split": split, "other_data": False, "batch_size": 8, "workers": 0, "device": "cpu"}
        others = {"data": DataOptions(None, phrases), "network": NetworkOptions("auto", None, None, None)}
        options = EvaluateOptions(**dict.fromkeys(EvaluateOptions.__dataclass_fields__) | given | others | changes)
        check_search(options)
        model, catalog = load_model(str(ckpt)), Catalog.open(oct_set)
        phrases = tuple(phrases or ("lumen", "side branch"))
        part = Part(catalog, options.split, None, phrases, own=True)
        frames = catalog.part(options.split)
        dataset = VesselDataset(
            catalog.root, frames, phrases=phrases, prompt=model.prompt, geometry=model.geometry
        )  # fmt: skip
        return run_search(model, part, dataset, options)

    return call


@pytest.mark.slow
def test_guard_I6_the_decision_of_validation_is_stored_with_the_run_and_found_again(search_of, run_folder, capsys):
    before = load_model(str(run_folder))
    content = search_of(run_folder, split="val")
    assert json.loads((run_folder / DECISION_FILE).read_text()) == content
    assert (content["fingerprint"], content["fold"]) == (before.manifest.fingerprint, None)
    assert content["split_hash"] == before.manifest.data["split_hash"]
    again = load_model(str(run_folder))
    assert again.decision.to_json() == content["decision"]
    assert again.decision_source == "searched on validation"
    assert before.decision == again.decision  # it is read when it is used
    adopted = [trial["value"] for trial in content["searched"] if trial["adopted"]]
    assert adopted[0] == f"threshold {before.threshold:.2f}"
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("hysteresis", "min size", "split=test"))
    assert not list(run_folder.glob(".search*"))


@pytest.mark.slow
def test_guard_I6_a_search_on_other_images_is_refused(search_of, run_folder, tmp_path):
    with pytest.raises(VesselError, match=r"split=test: .*split=val"):
        search_of(run_folder)
    with pytest.raises(VesselError, match=r"split=train: .*split=val"):
        search_of(run_folder, split="train")
    with pytest.raises(VesselError, match=r"other_data=true"):
        search_of(run_folder, split="val", other_data=True)
    with pytest.raises(VesselError, match=r"data\.phrases=\['lumen'\]"):
        search_of(run_folder, split="val", phrases=["lumen"])
    lone = tmp_path / "lone.ckpt"
    shutil.copy(find_checkpoint(run_folder), lone)
    shutil.copytree(run_folder / "tokenizer", tmp_path / "tokenizer", dirs_exist_ok=True)
    with pytest.raises(VesselError, match=r"lone\.ckpt .*out=DIR"):
        search_of(lone, split="val")
    content = search_of(lone, split="val", out=str(tmp_path / "decided"))
    decision, _ = read_given_decision(str(tmp_path / "decided"), load_model(str(lone)).manifest)
    assert decision.to_json() == content["decision"]
    assert not (run_folder / DECISION_FILE).exists()
