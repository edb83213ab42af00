"""`vessel.evaluate`, through its function and once as a user runs it."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from tests.launching import command
from tests.wandb_offline import media, read_history

from vessel.checkpoints.reading import find_checkpoint
from vessel.data.catalog import Catalog, Frame, fingerprint_of
from vessel.data.masks import read_mask
from vessel.errors import VesselError
from vessel.evaluation.command import evaluate
from vessel.evaluation.options import DataOptions, EvaluateOptions
from vessel.inference.decision import CleanupOptions
from vessel.inference.loading import load_model
from vessel.inference.options import NetworkOptions
from vessel.prediction.command import predict
from vessel.prediction.options import PredictOptions
from vessel.publishing.verification import network_results, synthetic_image

pytestmark = pytest.mark.slow

NETWORK = NetworkOptions("auto", None, None, None)


def set_threshold(run, threshold):
    file = find_checkpoint(run)
    checkpoint = torch.load(file, weights_only=True)
    checkpoint["callbacks"]["ThresholdSweep"]["threshold"] = threshold
    torch.save(checkpoint, file)


@pytest.fixture
def run_folder(tiny_run, tmp_path):
    """Copy the run without results, with a threshold at which its hardly trained network predicts some vessel."""
    shutil.copytree(tiny_run, tmp_path / "run")
    probabilities = network_results(load_model(str(tiny_run)), {"synthetic": synthetic_image(64)}).probabilities[
        "synthetic"
    ]
    set_threshold(tmp_path / "run", float(np.median(probabilities)))
    return tmp_path / "run"


@pytest.fixture
def score(run_folder, tmp_path):
    def call(**changes):
        root = changes.pop("root", None)
        defaults = {
            "ckpt": str(run_folder), "split": "test", "out": None, "tolerance": None, "other_data": False,
            "overwrite": False, "search": False, "decision": None, "compare": None, "folds": None, "logger": None,
            "run": ".",
            "batch_size": 3, "workers": 0, "device": "cpu", "network": NETWORK,
        }  # fmt: skip
        return evaluate(
            EvaluateOptions(**defaults | changes, data=DataOptions(root and str(root), None)), tmp_path / "elsewhere"
        )

    return call


@pytest.fixture
def damaged(oct_set, tmp_path):
    """Copy the data set with one test image cut short."""
    shutil.copytree(oct_set, tmp_path / "damaged")
    catalog = Catalog.open(tmp_path / "damaged")
    frame = catalog.part("test")[1]
    image = catalog.root / frame.image
    image.write_bytes(image.read_bytes()[:500])
    return catalog.root, frame


def test_figures_are_those_of_the_masks_that_predict_writes(score, run_folder, oct_set, tmp_path):
    report = score()
    options = {"phrases": None, "split": "test", "decode": "forced", "threshold": "auto", "hysteresis": "auto"}
    options |= {"decision": None, "cleanup": CleanupOptions(), "tta": "auto"}
    rest = {"overwrite": False, "batch_size": 1, "workers": 0, "device": "cpu", "devices": 1}
    rest |= {"network": NETWORK, "question": None, "mask_prompts": None, "video": False, "max_new_tokens": 2048}
    predicted = predict(PredictOptions(str(run_folder), str(oct_set), str(tmp_path / "masks"), **options, **rest))
    frames = Catalog.open(oct_set).frames
    dice = []
    for image in predicted["images"]:
        frame = frames[image["id"]]
        size = (frame.height, frame.width)
        file = frame.masks["lumen"]
        a = read_mask(tmp_path / "masks" / image["phrases"]["lumen"]["mask"], size)
        b = np.zeros(size, bool) if file is None else read_mask(oct_set / file, size)
        total = a.sum() + b.sum()
        dice.append(2 * (a & b).sum() / total if total else 1.0)
    assert np.mean(dice) > 0
    assert report["summary"]["lumen"]["dice"]["mean"] == pytest.approx(np.mean(dice), abs=1e-3)
    assert report["summary"].keys() == {"all", "lumen", "side branch"}
    assert report["summary"]["all"]["dice"]["n_images"] == report["n_ok"] == 4


def test_results_folder(score, run_folder):
    report = score()
    out = run_folder / "evaluate/test"
    assert json.loads((out / "metrics.json").read_text()) == report
    rows = list(csv.DictReader((out / "per_image.csv").open()))
    assert len(rows) == 4 * 2
    panels = sorted(path.name.split("_p")[0] for path in (out / "panels").iterdir())
    assert panels == ["best", "first_1", "first_2", "first_3", "median", "worst"]
    assert 0 <= report["seg_missing"] <= 1
    assert report["note"] == ""


def test_best_and_worst_panels_are_those_of_the_table(score, run_folder):
    score()
    by_image = {}
    for row in csv.DictReader((run_folder / "evaluate/test/per_image.csv").open()):
        by_image.setdefault(row["id"], []).append(float(row["dice"]))
    means = {name: np.mean(values) for name, values in by_image.items()}
    panels = run_folder / "evaluate/test/panels"
    [worst], [best] = panels.glob("worst_*"), panels.glob("best_*")
    assert means[worst.stem.removeprefix("worst_")] == min(means.values())
    assert means[best.stem.removeprefix("best_")] == max(means.values())


def test_guard_I8_the_report_says_which_weights_it_is_about(score, run_folder):
    report = score()
    assert report["run"] == "tiny"
    assert report["fingerprint"] == load_model(str(run_folder)).manifest.fingerprint != ""
    assert report["source"].endswith(find_checkpoint(run_folder).name)


def test_guard_I6_the_threshold_is_the_stored_one_and_never_chosen_here(score, run_folder):
    for stored in (0.05, 0.95):
        set_threshold(run_folder, stored)
        report = score(overwrite=True)
        assert report["threshold"] == stored
        assert "chosen on validation" in report["threshold_source"]
    set_threshold(run_folder, None)
    report = score(overwrite=True)
    assert report["threshold"] == 0.5
    assert "No threshold was chosen" in report["note"]


def test_guard_I1_an_image_that_fails_is_counted_and_never_scored(score, damaged, run_folder):
    root, frame = damaged
    report = score(root=root)
    assert (report["n_ok"], report["n_failed"]) == (3, 1)
    [failure] = report["failures"]
    assert (failure["id"], failure["file"]) == (frame.id, frame.image)
    assert str(root) not in json.dumps(failure)
    assert frame.id not in (run_folder / "evaluate/test/per_image.csv").read_text()
    assert report["summary"]["all"]["dice"]["n_images"] == 3


def test_when_nothing_could_be_scored_the_command_fails(score, damaged, run_folder):
    root, _ = damaged
    for frame in Catalog.open(root).part("test"):
        (root / frame.image).write_bytes(b"")
    with pytest.raises(VesselError, match=r"\b4 images"):
        score(root=root)
    report = json.loads((run_folder / "evaluate/test/metrics.json").read_text())
    assert (report["n_ok"], report["n_failed"], report["summary"]) == (0, 4, {})


def test_guard_D9_other_data_must_be_named_by_an_option(score, oct_set, tmp_path):
    shutil.copytree(oct_set, tmp_path / "moved")
    assert score(root=tmp_path / "moved")["data"]["same_as_run"]
    other = tmp_path / "other"
    size = ("synthetic.patients=4", "synthetic.frames=2", "synthetic.size=64")
    assert command("vessel.prepare", "source=synthetic", f"out={other}", *size, cwd=tmp_path).returncode == 0
    with pytest.raises(VesselError, match=r"fingerprint.*other_data=true"):
        score(root=other)
    report = score(root=other, other_data=True)
    assert not report["data"]["same_as_run"]
    assert "not the data set of the run" in report["note"]
    with pytest.raises(VesselError, match=report["data"]["fingerprint"]):  # same weights, same part, same folder
        score(other_data=True)
    assert score(other_data=True, overwrite=True)["data"]["fingerprint"] != report["data"]["fingerprint"]


def test_a_phrase_that_is_in_no_image_is_reported_as_absent(score, oct_set, tmp_path, capsys):
    """Scores of 1.000 for drawing nothing say so, in the table and under it."""
    bare = tmp_path / "bare"
    shutil.copytree(oct_set, bare)
    frames = json.loads((bare / "frames.json").read_text())
    for frame in frames:
        frame["masks"]["side branch"] = None
    (bare / "frames.json").write_text(json.dumps(frames))
    manifest = json.loads((bare / "manifest.json").read_text())
    manifest["fingerprint"] = fingerprint_of([Frame(**frame) for frame in frames], manifest["masks_hash"])
    (bare / "manifest.json").write_text(json.dumps(manifest))
    summary = score(root=bare, other_data=True)["summary"]
    assert (summary["side branch"]["dice"]["n_present"], summary["side branch"]["dice"]["mean_present"]) == (0, None)
    assert summary["lumen"]["dice"]["n_present"] == 4
    printed = capsys.readouterr().out
    assert "side branch is in none" in printed
    assert "lumen is in none" not in printed
    assert "0 of 4" in printed


def test_training_and_validation_images_are_called_so(score):
    assert "training images" in score(split="train")["note"]
    assert "were chosen on these images" in score(split="val")["note"]
    with pytest.raises(VesselError, match="split=dev"):
        score(split="dev")


def test_guard_I10_results_of_other_weights_are_not_written_over(score, run_folder, tmp_path):
    first = score(out=str(tmp_path / "results"))
    again = score(out=str(tmp_path / "results"))
    assert (again["summary"], again["rows_hash"]) == (first["summary"], first["rows_hash"])
    other = run_folder / "checkpoints/other.ckpt"
    checkpoint = torch.load(find_checkpoint(run_folder), weights_only=True)
    name = next(iter(checkpoint["state_dict"]))
    checkpoint["state_dict"][name] = checkpoint["state_dict"][name] + 1
    torch.save(checkpoint, other)
    with pytest.raises(VesselError, match=rf"{first['fingerprint']}, split test"):
        score(ckpt=str(other), out=str(tmp_path / "results"))
    assert json.loads((tmp_path / "results/metrics.json").read_text()) == again
    assert score(ckpt=str(other), out=str(tmp_path / "results"), overwrite=True)["fingerprint"] != first["fingerprint"]


def test_a_checkpoint_outside_a_run_gets_the_default_folder(score, run_folder, tmp_path):
    lone = tmp_path / "lone.ckpt"
    shutil.copy(find_checkpoint(run_folder), lone)
    shutil.copytree(run_folder / "tokenizer", tmp_path / "tokenizer", dirs_exist_ok=True)
    score(ckpt=str(lone))
    assert (tmp_path / "elsewhere/metrics.json").is_file()


def test_one_thing_is_evaluated_at_a_time(score):
    for given in ({"compare": ["a", "b"]}, {"ckpt": None}, {"ckpt": None, "folds": "sweep", "compare": ["a", "b"]}):
        with pytest.raises(VesselError, match=r"ckpt=RUN, compare="):
            score(**given)
    with pytest.raises(VesselError, match=r"^search=true .*ckpt=RUN.* folds="):
        score(ckpt=None, folds="sweep", search=True)


def test_wandb_gets_the_numbers_and_the_report(score, run_folder, tmp_path, monkeypatch):
    for variable in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / "wandb-home"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = tmp_path / "offline"
    report = score(logger={"wandb": {"_target_": "vessel.loggers.PrivateWandb", "save_dir": str(folder)}})
    logged = {name: value for row in read_history(folder) for name, value in row.items()}
    assert logged["test/all/dice"] == report["summary"]["all"]["dice"]["mean"]
    assert logged["test/lumen/hd95"] == report["summary"]["lumen"]["hd95"]["mean"]
    page = run_folder / "evaluate/test/report.html"
    assert media(folder, logged["report/test"]).read_bytes() == page.read_bytes()
    with pytest.raises(VesselError, match=r"logger=csv: .*logger=wandb"):
        score(logger={"csv": {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": str(folder)}})


def test_as_a_user_runs_it(run_folder, tmp_path):
    done = command("vessel.evaluate", "ckpt=run", "split=val", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (run_folder / "evaluate/val/metrics.json").is_file()
    for word in ("lumen", "Recall", "intervals", "threshold", "note:", "evaluate/val"):
        assert word in done.stdout
