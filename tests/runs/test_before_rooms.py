"""A run, an export and a data set of commit e131f52, from before the packages were drawn, still work."""

import hashlib
import json
import lzma
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from hydra.utils import get_class
from PIL import Image
from tests.launching import command

from vessel.runs.old_names import CLASSES, present_option

RECORDED = Path(__file__).parent / "before_rooms"
EXPECTED = json.loads((RECORDED / "expected.json").read_text(encoding="utf-8"))
RUN = "outputs/night/then"
# Every class that the configuration tree named then.
NAMED = (
    "vessel.callbacks.feature_cache.FeatureCache", "vessel.callbacks.first_step_check.FirstStepCheck",
    "vessel.callbacks.graceful_stop.GracefulStop", "vessel.callbacks.last_checkpoint.LastCheckpoint",
    "vessel.callbacks.mask_panels.MaskPanels", "vessel.callbacks.non_finite_stop.NonFiniteStop",
    "vessel.callbacks.parameter_table.ParameterTable", "vessel.callbacks.step_seeds.StepSeeds",
    "vessel.callbacks.threshold_sweep.ThresholdSweep", "vessel.callbacks.throughput.Throughput",
    "vessel.data.module.VesselDataModule", "vessel.data.prompt.Prompt", "vessel.data.transforms.Augmentation",
    "vessel.data.transforms.QuarterTurns", "vessel.loggers.PrivateWandb", "vessel.losses.NativeObjective",
    "vessel.losses.Sa2vaObjective", "vessel.model.baselines.PromptedSizes", "vessel.model.baselines.UNetSizes",
    "vessel.model.grounding.GroundingSizes", "vessel.model.lora.Lora", "vessel.model.mllm.LanguageSizes",
    "vessel.model.mllm.VisionSizes", "vessel.model.sa2va.Sizes", "vessel.sharding.Sharded", "vessel.sweep.SweepSummary",
    "vessel.task.OptimizerSettings",
)  # fmt: skip


@pytest.fixture
def study(tmp_path) -> Path:
    """The folder that the commands ran in."""
    for name, place in {"data": "data", "export": "export", "run": RUN}.items():
        shutil.copytree(RECORDED / name, tmp_path / place)
    for packed in tmp_path.rglob("*.xz"):
        packed.with_suffix("").write_bytes(lzma.decompress(packed.read_bytes()))
        packed.unlink()
    return tmp_path


@pytest.fixture
def vessel(study):
    """Run a command there: `vessel("evaluate", "ckpt=...")` gives what it printed."""

    def run(verb: str, *options: str) -> str:
        done = command(f"vessel.{verb}", *options, cwd=study)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def losses(study: Path) -> dict[str, float]:
    lines = [json.loads(line) for line in (study / RUN / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {str(line["step"]): line["train/loss"] for line in lines if "train/loss" in line and line["step"] >= 4}


@pytest.mark.parametrize("name", NAMED)
def test_every_class_that_was_named_is_found(name):
    assert isinstance(get_class(CLASSES.get(name, name)), type)


@pytest.mark.slow
def test_a_run_is_evaluated_predicted_from_and_exported(study, vessel):
    vessel("evaluate", f"ckpt={RUN}", "data.root=data", "out=evaluation")
    report = json.loads((study / "evaluation/metrics.json").read_text(encoding="utf-8"))
    assert report["fingerprint"] == EXPECTED["fingerprint"]
    assert report["summary"]["lumen"]["dice"]["mean"] == EXPECTED["dice"]
    vessel("predict", f"ckpt={RUN}", "images=data", "split=test", "out=predicted")
    results = json.loads((study / "predicted/results.json").read_text(encoding="utf-8"))
    files = {image["id"]: image["phrases"]["lumen"] for image in results["images"]}
    assert results["threshold"] == EXPECTED["threshold"]
    assert {name: entry["area"] for name, entry in files.items()} == EXPECTED["areas"]
    pixels = {name: Image.open(study / "predicted" / entry["probability"]).tobytes() for name, entry in files.items()}
    assert {name: hashlib.sha256(held).hexdigest() for name, held in pixels.items()} == EXPECTED["probabilities"]
    vessel("export", f"ckpt={RUN}", "out=again")
    manifest = json.loads((study / "again/vessel.json").read_text(encoding="utf-8"))
    assert manifest["fingerprint"] == EXPECTED["export_fingerprint"]


@pytest.mark.slow
def test_an_export_is_predicted_from(study, vessel):
    vessel("predict", "ckpt=export", "images=data", "split=test", "phrases=[lumen]", "out=predicted")
    results = json.loads((study / "predicted/results.json").read_text(encoding="utf-8"))
    assert results["fingerprint"] == EXPECTED["export_fingerprint"]
    assert {image["id"]: image["phrases"]["lumen"]["area"] for image in results["images"]} == EXPECTED["areas"]


@pytest.mark.slow
def test_a_run_that_is_named_is_resumed_with_the_same_losses(study, vessel):
    vessel("train", f"resume={RUN}", "trainer.max_steps=6")
    assert losses(study) == EXPECTED["resumed_losses"]


@pytest.mark.slow
def test_moved_classes_and_renamed_options_are_not_other_settings(study, vessel):
    """The options as they were typed, those renamed since under their names of today, and the data where it was."""
    checkpoint = study / RUN / "checkpoints/last-000004.ckpt"
    content = torch.load(checkpoint, weights_only=True)
    content["vessel"]["config"]["data"]["root"] = str(study / "data")
    torch.save(content, checkpoint)
    typed = yaml.safe_load((study / RUN / ".hydra/overrides.yaml").read_text(encoding="utf-8"))
    options = [present_option(word, "train") for word in typed if not word.startswith("trainer.max_steps=")]
    printed = vessel("train", *options, "trainer.max_steps=6", "resume=auto")
    assert f"resume=auto: goes on in {RUN}" in printed
    assert losses(study) == EXPECTED["resumed_losses"]
