"""A run from its configuration, on painted pullbacks, with the real trainer and every callback."""

import json
import math
import re

import pytest
import torch
from tests.model.layouts import write_sa2va

from vessel.errors import VesselError
from vessel.restore import find_checkpoint, read_checkpoint, restore
from vessel.run import Manifest

pytestmark = pytest.mark.slow


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def values(run, name):
    return {line["step"]: line[name] for line in lines(run) if name in line}


def test_a_run_leaves_what_its_readers_need(tiny_run):
    manifest = Manifest.from_dict(json.loads((tiny_run / "manifest.json").read_text()))
    assert manifest.phrases == ("lumen", "side branch")
    assert manifest.data["unit"] == "patient"
    assert len(manifest.data["split_hash"]) == 64
    assert "run" not in json.dumps(manifest.config["callbacks"])
    assert str(tiny_run) not in (tiny_run / "manifest.json").read_text()
    logged = {name for line in lines(tiny_run) for name in line}
    assert {"train/loss", "val/dice", "val/iou", "val/dice_patient", "val/dice/lumen", "val/lm_loss"} <= logged
    for made in ("parameters.json", "threshold_sweep/threshold_sweep.csv", "tokenizer/tokenizer.json", "csv", "panels"):
        assert (tiny_run / made).exists(), made


def test_a_checkpoint_is_plain_data_with_manifest_and_threshold(tiny_run):
    checkpoint = read_checkpoint(find_checkpoint(tiny_run))
    assert Manifest.from_dict(checkpoint["vessel"]).name == "tiny"
    assert 0.05 <= checkpoint["callbacks"]["ThresholdSweep"]["threshold"] <= 0.95


def test_restored_network_computes_what_the_checkpoint_holds(tiny_run, make_batch):
    one, two = restore(str(tiny_run)), restore(str(find_checkpoint(tiny_run)))
    batch = make_batch([["lumen", "side branch"]])
    with torch.no_grad():
        assert torch.equal(one.network(batch).mask_logits, two.network(batch).mask_logits)
    assert one.manifest.fingerprint == two.manifest.fingerprint != ""
    assert 0.05 <= one.threshold <= 0.95
    state = read_checkpoint(find_checkpoint(tiny_run))["state_dict"]
    restored = one.network.state_dict()
    assert all(torch.equal(restored[n.removeprefix("network.")], t) for n, t in state.items() if "network" in n)


def test_the_same_seed_gives_the_same_losses(train_tiny, tiny_run, tmp_path):
    train_tiny(tmp_path / "again")
    train_tiny(tmp_path / "other", "seed=1")
    assert values(tmp_path / "again", "train/loss") == values(tiny_run, "train/loss")
    assert values(tmp_path / "other", "train/loss") != values(tiny_run, "train/loss")


def test_a_run_goes_on_from_its_last_checkpoint(train_tiny, tiny_run, tmp_path):
    """Same losses as a run that was never stopped; `ckpt` also takes the run's folder."""
    constant = ("optimizer.warmup=0.0", "+optimizer.final=1.0")
    steps = ("trainer.max_steps=6", "trainer.val_check_interval=3", *constant)
    train_tiny(tmp_path / "whole", *steps)
    train_tiny(tmp_path / "half", *steps, "trainer.max_steps=3")
    train_tiny(tmp_path / "rest", *steps, f"ckpt={tmp_path}/half")
    whole, rest = values(tmp_path / "whole", "train/loss"), values(tmp_path / "rest", "train/loss")
    assert sorted(rest) == [3, 4, 5]
    assert {step: whole[step] for step in rest} == rest
    manifest = json.loads((tmp_path / "rest" / "manifest.json").read_text())
    assert manifest["parent"]["name"] == "tiny"


def test_guard_D9_a_run_goes_on_with_its_own_split_only(train_tiny, tiny_run, tmp_path):
    with pytest.raises(VesselError, match="fold of that run"):
        train_tiny(tmp_path, f"ckpt={tiny_run}", "data.fold=1")
    with pytest.raises(VesselError, match="phrases of that run"):
        train_tiny(tmp_path, f"ckpt={tiny_run}", "data.phrases=lumen")


def test_the_last_checkpoint_is_that_of_the_last_validation(train_tiny, tmp_path):
    train_tiny(tmp_path, "trainer.max_steps=6", "optimizer.lr=1e-9")  # nothing improves after the first
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"best-000002.ckpt", "last-000006.ckpt"}


def test_guard_D11_a_raw_identifier_in_the_configuration_is_refused(train_tiny, tmp_path):
    with pytest.raises(VesselError, match="patient's name or id"):
        train_tiny(tmp_path, "name='pullback of 0012345678'")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("trainable=decoder_only",), "random for ever"),
        (("trainable=lora",), "lora=none"),
        (("trainable=decoder_only", "lora=r8"), "random for ever"),
    ],
)
def test_guard_T3_a_run_that_leaves_seg_random_is_refused(train_tiny, tmp_path, options, told):
    with pytest.raises(VesselError, match=told):
        train_tiny(tmp_path, *options)


def test_lora_checkpoint_of_loaded_weights_holds_trained_tensors_only(train_tiny, tiny_run, tmp_path):
    base = restore(str(tiny_run)).network
    write_sa2va(tmp_path / "public", base)
    run = tmp_path / "lora"
    train_tiny(run, f"weights=[{tmp_path}/public]", "lora=r8", "trainable=lora", "optimizer=lora")
    state = read_checkpoint(find_checkpoint(run))["state_dict"]
    trained = ("lora_", "modules_to_save", "projector", "sam_mask_decoder", "text_hidden_fcs")
    assert all(any(part in name for part in trained) for name in state)
    manifest = Manifest.from_dict(read_checkpoint(find_checkpoint(run))["vessel"])
    assert {module["share"] for module in manifest.weights[0]["modules"]} == {1.0}
    assert json.loads((run / "manifest.json").read_text())["weights"] == list(manifest.weights)
    restored = restore(str(run)).network
    assert torch.equal(restored.grounding.no_mem_embed, base.grounding.no_mem_embed)  # from the base
    name = "mllm.lm_head.modules_to_save.default.weight"
    assert torch.equal(restored.state_dict()[name], state[f"network.{name}"])  # from the checkpoint


def test_prompt_and_template_come_from_the_weights(train_tiny, tiny_run, tmp_path):
    restored = restore(str(tiny_run))
    folder = write_sa2va(tmp_path / "public", restored.network, template="internlm2_chat")
    restored.prompt.save(folder)
    train_tiny(tmp_path / "run", f"weights={folder}", "prompt=sa2va", "trainer.max_steps=2")
    again = restore(str(tmp_path / "run"))
    assert again.prompt.name == again.manifest.prompt == "internlm2_chat"
    assert again.prompt.token_ids == restored.prompt.token_ids
    with pytest.raises(VesselError, match=r"names none; name one, or choose prompt=small"):
        train_tiny(tmp_path / "none", "prompt=sa2va")


def test_a_run_that_nothing_would_train_is_refused(train_tiny, tmp_path):
    with pytest.raises(VesselError, match="nothing would train"):
        train_tiny(tmp_path, "trainable=nothing")


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_bf16_trains(train_tiny, tmp_path, precision):
    train_tiny(tmp_path, f"trainer.precision={precision}", "lora=r8", "trainable=all")
    assert all(math.isfinite(v) for v in values(tmp_path, "train/loss").values())


OPTIONS = ("objective=sa2va", "data.phrases=lumen", "trainer.accumulate_grad_batches=2", "data.fold=1")


@pytest.mark.parametrize("override", OPTIONS)
def test_options_train(train_tiny, tmp_path, override):
    assert train_tiny(tmp_path, override) is not None


def test_bad_input_is_refused(train_tiny, tmp_path):
    for override, message in {
        "data.phrases=[aorta]": "aorta.*holds",
        "data.root=nowhere": r"vessel\.prepare",
        "data.fold=9": "fold",
        "ckpt=nowhere.ckpt": "nowhere",
        "+sead=1": "sead",
        "data.root=???": "data.root",
        "trainable=some": "decoder_only",
        "trainer.accelerator=abacus": "trainer=auto",
        "model.language.vocabulary=100": "vocabulary=100",
    }.items():
        with pytest.raises(Exception) as caught:  # noqa: PT011 - Hydra wraps what its targets raise
            train_tiny(tmp_path, override)
        cause = caught.value
        while cause is not None and not isinstance(cause, VesselError):
            cause = cause.__cause__ or cause.__context__
        assert cause is not None, f"{override}: {caught.value!r}"
        assert re.search(message, str(cause)), f"{override}: {cause}"
