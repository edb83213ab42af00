"""The baselines as a user trains, resumes, evaluates and predicts with them, each on the split of all others."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tests.conftest import _configuration

from vessel.checkpoints.reading import find_checkpoint
from vessel.errors import VesselError
from vessel.runs.manifest import Manifest
from vessel.training.run import train

pytestmark = pytest.mark.slow

SMALL = {
    "unet": ("model.encoder=tu-test_resnet", "model.decoder=[16,16,8,8,8]", "model.frame_size=64"),
    "sam2_prompt": (
        "model.grounding.frame_size=64", "model.grounding.embed_dim=8", "model.grounding.stages=[1,2,2,1]",
        "model.grounding.windows=[4,4,4,2]", "model.grounding.width=32", "model.grounding.memory_width=8",
        "model.grounding.memory_mlp=32",
    ),
}  # fmt: skip
QUICK = (
    "trainer.accelerator=cpu", "trainer.max_steps=4", "trainer.val_check_interval=2", "trainer.log_every_n_steps=1",
    "+trainer.enable_progress_bar=false", "~callbacks.progress", "~callbacks.mask_panels",
)  # fmt: skip
BASELINES = pytest.mark.parametrize("network", sorted(SMALL))


def settings(network, data, *options):
    given = [f"experiment={network}", *SMALL[network], f"data.root={data}", "data.phrases=[lumen,side branch]"]
    return _configuration("train", [*given, *QUICK, *options])


@pytest.fixture(scope="module")
def runs(oct_set, tmp_path_factory):
    """Train each baseline, with a checkpoint of its second step; return the run folders."""
    folder = tmp_path_factory.mktemp("baselines")
    for network in SMALL:
        run = folder / network
        save = "+callbacks.save._target_=tests.training.resume_ranks.SaveAt", f"+callbacks.save.folder={run}/saves"
        train(settings(network, oct_set, f"run={run}", *save, "+callbacks.save.validation=[1]"))
    return {network: folder / network for network in SMALL}


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Return a function that runs a command as a user gives it, in this process."""
    from hydra.core.global_hydra import GlobalHydra

    def call(verb, *options):
        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", [f"vessel.{verb}", *options, f"hydra.run.dir={tmp_path / 'hydra'}"])
        __import__(f"vessel.{verb}", fromlist=["main"]).main()

    return call


def test_guard_I12_baselines_are_scored_on_the_same_split_with_one_command(runs, command):
    reports = {}
    for network, run in runs.items():
        command("evaluate", f"ckpt={run}", "split=test")
        reports[network] = json.loads((run / "evaluate/test/metrics.json").read_text())
    for network, report in reports.items():
        assert (report["run"], report["n_ok"], report["n_failed"]) == (network, 4, 0)
        assert set(report["summary"]) == {"all", "lumen", "side branch"}
        assert Manifest.from_dict(json.loads((runs[network] / "manifest.json").read_text())).network == network
    one, other = reports.values()
    for key in ("fingerprint", "split_hash"):
        assert one["data"][key] == other["data"][key] != ""
    assert one["fingerprint"] != other["fingerprint"]


@BASELINES
def test_no_rate_of_seg_is_invented(runs, network):
    lines = [json.loads(line) for line in (runs[network] / "metrics.jsonl").read_text().splitlines()]
    names = {name for line in lines for name in line}
    assert {"train/mask_loss", "val/dice", "val/dice_best"} <= names
    assert not [name for name in names if "seg_emission" in name or "lm_loss" in name]


@BASELINES
def test_a_run_resumes_to_the_last_bit(runs, oct_set, tmp_path, network):
    train(settings(network, oct_set, f"run={tmp_path}", f"ckpt={runs[network]}/saves/validation-1.ckpt"))
    before, after = (
        torch.load(find_checkpoint(run, ("last",)), weights_only=True)["state_dict"]
        for run in (runs[network], tmp_path)
    )
    assert before.keys() == after.keys()
    assert [name for name, tensor in before.items() if not torch.equal(tensor, after[name])] == []


@BASELINES
def test_masks_are_predicted_and_words_refused(runs, oct_set, command, capsys, tmp_path, network):
    given = f"ckpt={runs[network]}", f"images={oct_set}", "split=test"
    command("predict", *given, f"out={tmp_path / 'out'}", "phrases=[side branch]")
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert (results["n_ok"], results["n_without_mask"]) == (4, 0)
    first = results["images"][0]
    assert first["text"] == ""
    assert np.array(Image.open(tmp_path / "out" / first["phrases"]["side branch"]["probability"])).any()
    for options, reason in (
        (
            ("phrases=[plaque]",),
            "this network reads no words, it knows the phrases that it was trained on: lumen, side",
        ),
        (("decode=generate",), f"decode=generate: {network} is a baseline ({network}) without a language model"),
        (("question=What is this?", "decode=generate"), "question=: "),
        (("video=true",), "video=true: "),
    ):
        with pytest.raises(SystemExit):
            command("predict", *given, f"out={tmp_path / 'refused'}", *options)
        assert reason in capsys.readouterr().err
        assert not (tmp_path / "refused").exists()
    with pytest.raises(SystemExit):
        command("export", given[0], f"out={tmp_path / 'exported'}")
    assert "vessel.export: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("network", "options", "named"),
    [
        ("unet", ("trainable=lora",), r"trainable=lora: .*trainable=all"),
        ("unet", ("trainable=decoder_only",), r"trainable=decoder_only: .*choose all"),
        ("unet", ("lora.r=8",), r"lora\.r=8: .*lora\.r=0"),
        ("sam2_prompt", ("trainable=decoder_only",), r"trainable=decoder_only .*random .*SAM2"),
    ],
)
def test_what_would_not_learn_is_refused(oct_set, tmp_path, network, options, named):
    with pytest.raises(VesselError, match=named):
        train(settings(network, oct_set, f"run={tmp_path}", *options))


@BASELINES
def test_the_plan_of_a_baseline_is_printed(command, capsys, network):
    command("train", f"experiment={network}", f"model={network}_large", "plan=true", "trainer=gpu", "gpu_gb=80")
    printed = capsys.readouterr().out
    assert "fits: " in printed
    assert {"unet": "activations: U-Net encoder", "sam2_prompt": "activations: SAM2 image encoder"}[network] in printed
