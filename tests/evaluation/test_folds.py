"""Cross-validation: its runs, the choice of thresholds, and one sweep from its runs to its report."""

import json
import re
import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from vessel.data.catalog import Catalog
from vessel.data.dataset import VesselDataset
from vessel.errors import VesselError
from vessel.evaluation.fold_runs import FoldRun, find_fold_runs, require_one_experiment
from vessel.evaluation.folds import Curve, cross_fitted, evaluate_folds, mean_curve
from vessel.evaluation.options import DataOptions, EvaluateOptions
from vessel.evaluation.results import read_results
from vessel.evaluation.scoring import input_images, probability_maps
from vessel.inference.loading import load_model
from vessel.inference.options import NetworkOptions
from vessel.inference.predictor import Predictor
from vessel.metrics.overlap import OVERLAP_METRICS
from vessel.metrics.thresholds import THRESHOLDS
from vessel.runs.manifest import Manifest
from vessel.runs.sweep import JOB, Job


def curve(images, **dice):
    """Build a curve with Dice 0 at every threshold but those named `t25=0.8`."""
    scores = np.zeros(len(THRESHOLDS))
    for name, value in dice.items():
        scores[THRESHOLDS.index(int(name[1:]) / 100)] = value
    return Curve(images, dict.fromkeys(OVERLAP_METRICS, scores))


def test_guard_I6_a_fold_has_no_say_in_its_own_threshold():
    others = [curve(10, t30=0.8, t60=0.5), curve(10, t30=0.7, t60=0.6)]
    for own in (curve(10, t90=1.0), curve(500, t05=0.9), curve(0)):
        assert cross_fitted([*others, own])[2] == 0.3


def test_every_fold_is_decided_by_the_images_of_the_others():
    curves = [curve(30, t20=0.9, t40=0.6), curve(10, t40=0.7, t80=0.4), curve(10, t80=0.8)]
    # by hand: without 0: (0.35 at .4, 0.6 at .8); without 1: (0.675 at .2, 0.45, 0.2); without 2: (0.675 at .2, 0.625)
    assert cross_fitted(curves) == [0.8, 0.2, 0.2]
    assert cross_fitted([curve(1, t10=0.5, t60=0.5), curve(1, t10=0.5, t60=0.5)]) == [0.6, 0.6]  # nearest 0.5


def test_the_images_of_a_larger_fold_count_as_many():
    assert mean_curve([curve(30, t50=0.8), curve(10, t50=0.4)])["dice"][THRESHOLDS.index(0.5)] == pytest.approx(0.7)


def test_no_images_choose_no_threshold():
    with pytest.raises(VesselError, match="outside fold 1"):
        cross_fitted([curve(0), curve(4, t50=0.5)])


def run_of(catalog, fold, folder, **changes):
    """Write the folder of a finished run, without weights."""
    data = {"fingerprint": catalog.fingerprint, "split_hash": catalog.split.hash, "fold": fold}
    config = {
        "data": {"root": "data", "fold": fold}, "seed": fold, "optimizer": {"lr": 1e-3},
        "trainer": {"max_steps": 4, "devices": 1}, "callbacks": {"early_stopping": None},
    }  # fmt: skip
    node = OmegaConf.create(config)
    for key, value in changes.pop("config", {}).items():
        OmegaConf.update(node, key, value)
    manifest = Manifest("tiny", OmegaConf.to_container(node), data, ("lumen",), "small", versions={})
    folder.mkdir(parents=True)
    replace(manifest, **changes).write(folder)
    (folder / "result.json").write_text('{"best": 0.5, "limits": {}}')
    return folder


def ended(folder, number, error=""):
    """Write the record of a job of a sweep."""
    job = Job(number, (f"data.fold={number}",), None if error else 0.5, 0.5, str(folder), error)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / JOB).write_text(json.dumps(asdict(job)))


@pytest.fixture
def catalog(oct_set):
    return Catalog.open(oct_set)


@pytest.fixture
def sweep(catalog, tmp_path):
    for fold in range(3):
        ended(run_of(catalog, fold, tmp_path / f"sweep/{fold}"), fold)
    return tmp_path / "sweep"


def test_the_runs_of_a_sweep_are_found(sweep, catalog):
    runs = find_fold_runs([sweep])
    assert [(run.fold, run.folder) for run in runs] == [(fold, sweep / str(fold)) for fold in range(3)]
    require_one_experiment(runs, catalog)


def test_a_fold_that_failed_may_be_trained_again_by_itself(sweep, catalog, tmp_path):
    shutil.rmtree(sweep / "1")
    ended(sweep / "1", 1, error="out of memory")
    with pytest.raises(VesselError, match=r"fold 1 .*data\.fold=1"):
        require_one_experiment(find_fold_runs([sweep]), catalog)
    again = run_of(catalog, 1, tmp_path / "again")
    runs = find_fold_runs([sweep, again])
    assert [run.fold for run in runs] == [0, 1, 2]
    require_one_experiment(runs, catalog)


def test_what_is_no_cross_validation_is_refused(sweep, catalog, tmp_path):
    with pytest.raises(VesselError, match=r"nowhere: .*data\.fold=0,1"):
        find_fold_runs([tmp_path / "nowhere"])
    with pytest.raises(VesselError, match=r"sweep/0 .*twice .*fold 0"):
        find_fold_runs([sweep, run_of(catalog, 0, tmp_path / "twice")])
    with pytest.raises(VesselError, match=r"fixed: .*data\.fold=0,1"):
        find_fold_runs([run_of(catalog, None, tmp_path / "fixed")])
    (sweep / "2/result.json").unlink()
    with pytest.raises(VesselError, match=r"sweep/2: .*result\.json.*resume=auto"):
        find_fold_runs([sweep])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"phrases": ("cap",)}, r"phrases: \['lumen'\] and \['cap'\]"),
        ({"config": {"optimizer.lr": 1e-4}}, r"fold and seed.*optimizer\.lr=0\.0001 \(there 0\.001\)"),
        ({"config": {"trainer.max_steps": 8}}, r"fold and seed.*length\.max_steps=8 \(there 4\)"),
        ({"config": {"callbacks.early_stopping": {"patience": 3}}}, r"fold and seed.*stopping"),
        ({"data": {"fingerprint": "x", "split_hash": "y", "fold": 2}}, r"sweep/2: fingerprint .*\bx\b"),
    ],
)  # fmt: skip
def test_guard_D9_folds_are_of_one_experiment(sweep, catalog, changes, named):
    shutil.rmtree(sweep / "2")
    ended(run_of(catalog, 2, sweep / "2", **changes), 2)
    with pytest.raises(VesselError, match=named):
        require_one_experiment(find_fold_runs([sweep]), catalog)


def test_guard_D9_folds_of_another_split_are_refused(sweep, catalog):
    data = {"fingerprint": catalog.fingerprint, "split_hash": "y", "fold": 2}
    shutil.rmtree(sweep / "2")
    ended(run_of(catalog, 2, sweep / "2", data=data), 2)
    with pytest.raises(VesselError, match=rf"sweep/2: split_hash .*\by, .*{catalog.split.hash}"):
        require_one_experiment(find_fold_runs([sweep]), catalog)


def test_devices_may_differ(sweep, catalog):
    shutil.rmtree(sweep / "2")
    ended(run_of(catalog, 2, sweep / "2", config={"trainer.devices": 2, "seed": 7}), 2)
    require_one_experiment(find_fold_runs([sweep]), catalog)


@pytest.mark.parametrize(("waited", "stopped"), [(3, True), (2, False)])
def test_early_stopping_is_read_from_the_last_checkpoint(tmp_path, catalog, waited, stopped):
    folder = run_of(catalog, 0, tmp_path / "run")
    (folder / "checkpoints").mkdir()
    state = {"wait_count": waited, "patience": 3, "stopped_epoch": 0}
    for name, callbacks in {"last-000004": {"EarlyStopping{'monitor': 'x'}": state}, "best-000002": {}}.items():
        torch.save({"vessel": {}, "callbacks": callbacks}, folder / f"checkpoints/{name}.ckpt")
    run = FoldRun(0, folder, Manifest.from_dict(json.loads((folder / "manifest.json").read_text())))
    assert run.checkpoint.name == "last-000004.ckpt"
    assert run.stopped_early is stopped


@pytest.fixture(scope="module")
def trained(train_tiny, tmp_path_factory):
    """Train three runs of two steps, each without one fold."""
    sweep = tmp_path_factory.mktemp("sweeps") / "sweep"
    for fold in range(3):
        train_tiny(sweep / str(fold), f"data.fold={fold}", f"seed={fold}", "trainer.max_steps=2")
        ended(sweep / str(fold), fold)
    return sweep


def options_of(**changes):
    """Build the options of the command that evaluates folds."""
    given = {"data": DataOptions(None, None), "network": NetworkOptions("auto", None, None, None), "device": "cpu"}
    given |= {"batch_size": 4, "workers": 0} | changes
    return EvaluateOptions(**dict.fromkeys(EvaluateOptions.__dataclass_fields__) | given)


@pytest.fixture(scope="module")
def pooled(trained):
    """Evaluate them and return their results."""
    report = evaluate_folds([trained], options_of())
    read = read_results(trained)
    assert read.folder == trained / "evaluate/pooled"
    assert read.report == json.loads(json.dumps(report))
    return read


@pytest.mark.slow
def test_guard_I6_pooled_results_are_out_of_fold(pooled, catalog):
    report = pooled.report
    held_out = [frame_id for fold in catalog.split.folds for frame_id in fold["val"]]
    assert sorted(row.id for row in pooled.rows if row.phrase == "lumen") == sorted(held_out)
    assert not set(held_out) & set(catalog.split.parts["test"])
    assert (report["fold"], report["n_ok"], report["n_failed"]) == ("pooled", len(held_out), 0)
    assert [(fold["fold"], fold["seed"], fold["source"].startswith("last-")) for fold in report["folds"]] == [
        (fold, fold, True) for fold in range(3)
    ]
    for words in ("3 folds by patient", "chosen on the images of the others", "last checkpoint was taken"):
        assert words in report["note"]
    assert report["summary"]["all"]["dice"]["n_patients"] == len({row.patient for row in pooled.rows})
    pixels = sum(one["n"] for one in report["reliability"]["lumen"])
    assert pixels == sum(frame.width * frame.height for frame in map(catalog.frames.get, held_out))


@pytest.mark.slow
def test_figures_are_those_of_each_run_on_its_fold(pooled, trained, catalog):
    """Predicted and counted again, from the last checkpoints."""
    curves, found = [], {}
    for fold in range(3):
        [last] = (trained / str(fold) / "checkpoints").glob("last-*.ckpt")
        model = load_model(str(last))
        dataset = VesselDataset(
            catalog.root,
            catalog.part("val", fold),
            phrases=pooled.report["phrases"],
            prompt=model.prompt,
            geometry=model.geometry,
        )
        answers = list(Predictor(model, device="cpu").predict(input_images(dataset), dataset.__getitem__))
        dice = []
        for answer in answers:
            maps, masks = probability_maps(answer), answer.sample.masks.numpy()
            found[answer.sample.id] = fold, maps[0], masks[0]
            dice.append(np.mean([[dice_of(p > t, m) for t in THRESHOLDS] for p, m in zip(maps, masks, strict=True)], 0))
        curves.append(Curve(len(answers), dict.fromkeys(OVERLAP_METRICS, np.mean(dice, 0))))
    thresholds = [fold["threshold"] for fold in pooled.report["folds"]]
    assert thresholds == cross_fitted(curves)
    scored = {row.id: row.scores.dice for row in pooled.rows if row.phrase == "lumen"}
    for name, (fold, probability, mask) in found.items():
        assert scored[name] == pytest.approx(dice_of(probability > thresholds[fold], mask))


class PredictionStartedError(Exception):
    """Raised instead of a prediction."""


@pytest.mark.slow
def test_a_folder_with_other_results_is_refused_before_anything_is_predicted(pooled, trained, tmp_path, monkeypatch):
    def predict(*_, **__):
        raise PredictionStartedError

    monkeypatch.setattr(Predictor, "predict", predict)
    out = tmp_path / "results"
    shutil.copytree(pooled.folder, out)
    with pytest.raises(PredictionStartedError):  # its own results may be replaced
        evaluate_folds([trained], options_of(out=str(out)))
    report = json.loads((out / "metrics.json").read_text())
    (out / "metrics.json").write_text(json.dumps({**report, "fingerprint": "others"}))
    with pytest.raises(VesselError, match=f"{re.escape(str(out))} .*others"):
        evaluate_folds([trained], options_of(out=str(out)))
    with pytest.raises(PredictionStartedError):
        evaluate_folds([trained], options_of(out=str(out), overwrite=True))
    assert json.loads((out / "metrics.json").read_text())["fingerprint"] == "others"


def dice_of(predicted, mask):
    total = predicted.sum() + mask.sum()
    return 2 * (predicted & mask).sum() / total if total else 1.0
