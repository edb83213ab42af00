"""A run from its configuration, on painted pullbacks, with the real trainer and every callback."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from tests.conftest import TINY_NETWORK, _configuration
from tests.weights.layouts import write_sa2va

from vessel.checkpoints.reading import find_checkpoint, read_checkpoint
from vessel.errors import VesselError
from vessel.inference.loading import load_model
from vessel.runs.manifest import Manifest, without_places
from vessel.training.run import train

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
    one, two = load_model(str(tiny_run)), load_model(str(find_checkpoint(tiny_run)))
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
        (("trainable=lora",), "lora.r=0"),
        (("trainable=decoder_only", "lora.r=8"), "random for ever"),
    ],
)
def test_guard_T3_a_run_that_leaves_seg_random_is_refused(train_tiny, tmp_path, options, told):
    with pytest.raises(VesselError, match=told):
        train_tiny(tmp_path, *options)


def test_lora_checkpoint_of_loaded_weights_holds_trained_tensors_only(train_tiny, tiny_run, tmp_path):
    base = load_model(str(tiny_run)).network
    write_sa2va(tmp_path / "public", base)
    run = tmp_path / "lora"
    started = (f"weights=[{tmp_path}/public]", "prompt=small")
    train_tiny(run, *started, "lora.r=8", "trainable=lora", "optimizer=lora")
    state = read_checkpoint(find_checkpoint(run))["state_dict"]
    trained = ("lora_", "modules_to_save", "projector", "sam_mask_decoder", "text_hidden_fcs")
    assert all(any(part in name for part in trained) for name in state)
    manifest = Manifest.from_dict(read_checkpoint(find_checkpoint(run))["vessel"])
    assert {module["share"] for module in manifest.weights[0]["modules"]} == {1.0}
    assert json.loads((run / "manifest.json").read_text())["weights"] == list(manifest.weights)
    restored = load_model(str(run)).network
    assert torch.equal(restored.grounding.no_mem_embed, base.grounding.no_mem_embed)  # from the base
    name = "mllm.lm_head.modules_to_save.default.weight"
    assert torch.equal(restored.state_dict()[name], state[f"network.{name}"])  # from the checkpoint


@pytest.fixture
def lora_run(train_tiny, tiny_run, tmp_path):
    """A run with adapters on a folder of its own: the run and the folder."""
    folder = write_sa2va(tmp_path / "base", load_model(str(tiny_run)).network)
    options = (
        f"weights={folder}",
        "prompt=small",
        "lora.r=8",
        "trainable=lora",
        "optimizer=lora",
        "trainer.max_steps=2",
    )
    train_tiny(tmp_path / "run", *options)
    return tmp_path / "run", folder, options


def test_guard_W4_a_base_that_changed_is_noticed_by_whoever_reads_the_run(lora_run, train_tiny, plan, tmp_path):
    """Without this, masks of other weights would carry the fingerprint of the run."""
    run, folder, options = lora_run
    assert load_model(str(run)).base[0].source == str(folder)
    (folder / "model.safetensors").unlink()
    write_sa2va(folder, plan().build())
    with pytest.raises(VesselError, match="are not those that the run was trained on"):
        load_model(str(run))
    with pytest.raises(VesselError, match="are not those that the run was trained on"):
        train_tiny(tmp_path / "on", *options, f"ckpt={run}", "trainer.max_steps=4")
    with pytest.raises(VesselError, match="are not those that the run was trained on"):
        train_tiny(tmp_path / "more", *options, f"weights=[{folder},{find_checkpoint(run)}]")


def test_a_run_can_be_what_another_begins_with(lora_run, tiny_run, train_tiny, tmp_path):
    run, folder, options = lora_run
    train_tiny(tmp_path / "more", *options, f"weights=[{folder},{find_checkpoint(run)}]")
    reports = load_model(str(tmp_path / "more")).reports
    assert [report.kind for report in reports] == ["Sa2VA folder", "checkpoint of a run", "checkpoint of a run"]
    with pytest.raises(VesselError, match="began with random weights is its own base; export it"):
        train_tiny(tmp_path / "none", f"weights={find_checkpoint(tiny_run)}")


def test_a_run_is_read_from_anywhere_and_names_no_relative_folder(train_tiny, tiny_run, oct_set, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    folder = write_sa2va(tmp_path / "here" / "Jane", load_model(str(tiny_run)).network)
    load_model(str(tiny_run)).prompt.save(folder)
    train_tiny(tmp_path / "run", "weights=Jane", "prompt=sa2va", "trainer.max_steps=2")
    monkeypatch.chdir(tmp_path)
    assert load_model(str(tmp_path / "run")).tuned
    manifest = Manifest.from_dict(json.loads((tmp_path / "run" / "manifest.json").read_text()))
    assert "Jane" not in json.dumps(without_places(manifest.as_dict()))


def test_a_run_that_goes_on_keeps_the_commit_of_its_weights(monkeypatch):
    """The hub may have moved on since; `pinned` would take what it holds today."""
    from types import SimpleNamespace

    from omegaconf import OmegaConf

    from vessel.training.settings import settled
    from vessel.weights.entry import Weights

    monkeypatch.setattr(Weights, "fetch", lambda self: (Path("somewhere"), self.revision or "of today"))
    config = OmegaConf.create(
        {"weights": ["hf://org/base"], "data": {"root": None}, "prompt": {"tokenizer": None, "template": "qwen_chat"}}
    )
    parent = SimpleNamespace(config={"weights": [{"source": "hf://org/base", "revision": "of the run"}]})
    assert settled(config, None).weights[0].revision == "of today"
    assert settled(config, parent).weights[0].revision == "of the run"


def test_prompt_and_template_come_from_the_weights(train_tiny, tiny_run, tmp_path):
    restored = load_model(str(tiny_run))
    folder = write_sa2va(tmp_path / "public", restored.network, template="internlm2_chat")
    restored.prompt.save(folder)
    train_tiny(tmp_path / "run", f"weights={folder}", "trainer.max_steps=2")
    again = load_model(str(tmp_path / "run"))
    assert again.prompt.name == again.manifest.prompt == "internlm2_chat"
    assert again.prompt.token_ids == restored.prompt.token_ids
    assert again.manifest.config["prompt"]["tokenizer"] == str(folder)
    with pytest.raises(VesselError, match=r"names none; name one, or choose prompt=small"):
        train_tiny(tmp_path / "none", "prompt=sa2va")


def test_weights_without_a_tokenizer_are_told(train_tiny, plan, tmp_path):
    folder = write_sa2va(tmp_path / "public", plan().build())
    with pytest.raises(Exception, match=r"prompt\.tokenizer=.*prompt=small"):
        train_tiny(tmp_path / "run", f"weights={folder}")


def test_a_run_that_nothing_would_train_is_refused(train_tiny, tmp_path):
    with pytest.raises(VesselError, match="nothing would train"):
        train_tiny(tmp_path, "trainable=nothing")


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_bf16_trains(train_tiny, tmp_path, precision):
    train_tiny(tmp_path, f"trainer.precision={precision}", "lora.r=8", "trainable=all")
    assert all(math.isfinite(v) for v in values(tmp_path, "train/loss").values())


OPTIONS = ("loss=sa2va", "data.phrases=lumen", "trainer.accumulate_grad_batches=2", "data.fold=1")


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


def test_the_steps_after_the_last_validation_are_kept(train_tiny, tmp_path):
    train_tiny(tmp_path, "trainer.max_steps=5", "trainer.val_check_interval=3")
    assert "last-000005.ckpt" in {path.name for path in (tmp_path / "checkpoints").iterdir()}


def test_a_run_that_has_ended_is_not_made_longer_unasked(train_tiny, tmp_path, capsys):
    """An early stop would otherwise be undone by every resume, and a job that is requeued would never end."""
    best = train_tiny(tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    assert train_tiny(tmp_path, "resume=auto") == best
    assert "has come to its end; trainer.max_steps" in capsys.readouterr().out
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    with pytest.raises(VesselError, match=r"trained with other settings: optimizer\.lr=1e-05 \(there 0\.0006\)"):
        train_tiny(tmp_path, "resume=auto", "trainer.max_steps=6", "optimizer.lr=1e-5")
    train_tiny(tmp_path, "resume=auto", "trainer.max_steps=6")
    assert max(values(tmp_path, "train/loss")) == 5


def test_a_run_is_not_resumed_from_nothing(train_tiny, tmp_path, capsys):
    run = tmp_path / "run"
    with pytest.raises(VesselError, match="no good checkpoint to go on from; it has none"):
        train_tiny(run, f"resume={run}")
    train_tiny(run, "trainer.max_steps=2")
    for checkpoint in (run / "checkpoints").iterdir():
        checkpoint.write_bytes(checkpoint.read_bytes()[:-50])
    with pytest.raises(VesselError, match=r"(?s)to go on from;\n.*last-000002\.ckpt: cut short"):
        train_tiny(run, f"resume={run}", "trainer.max_steps=4")
    train_tiny(run, "resume=auto", "trainer.max_steps=4")
    told = capsys.readouterr().out
    assert "passed over last-000002.ckpt: cut short" in told
    assert "training begins anew" in told
    assert sorted(values(run, "train/loss")) == [0, 1, 2, 3]


def test_debug_trains_two_batches(oct_set, tmp_path):
    options = ("experiment=debug", f"run={tmp_path}", f"data.root={oct_set}", "trainer.accelerator=cpu")
    train(_configuration("train", [*options, "~callbacks.progress", *TINY_NETWORK]))
    assert {"best-000002.ckpt", "last-000002.ckpt"} == {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert any("val/dice_best" in line for line in lines(tmp_path))
