"""A network found again from whatever the user calls `ckpt`, also one that vessel never trained."""

import json
import shutil

import pytest
import torch
from omegaconf import OmegaConf
from tests.conftest import SIZES
from tests.weights.layouts import internvl_state, write_folder, write_sa2va, write_sam2

from vessel.errors import VesselError
from vessel.inference.decision import DECISION_FILE, Decision, StoredDecision
from vessel.inference.loading import load_model
from vessel.inference.options import LoadSettings, NetworkOptions
from vessel.runs.manifest import Manifest

READING = LoadSettings(grounding=SIZES.grounding)


@pytest.fixture
def public(plan, prompt, tmp_path):
    """A Sa2VA folder as somebody else would have made it: `public(template=...)` changes config.json."""

    def make(**changes):
        folder = write_sa2va(tmp_path / "Sa2VA-tiny", plan().build(), **changes)
        prompt.save(folder)
        return folder

    return make


def test_a_public_folder_is_a_network_without_phrases(public, plan, make_batch):
    model = load_model(str(public()), READING)
    assert not model.tuned
    assert model.threshold == 0.5
    assert model.manifest.fingerprint == model.reports[0].fingerprint != ""
    batch = make_batch([["lumen"]])
    with torch.no_grad():
        assert torch.equal(model.network(batch).mask_logits, plan().build().eval()(batch).mask_logits)
    assert not model.network.trainable_groups()


def test_template_and_ids_come_from_the_folder(public, prompt):
    model = load_model(str(public(template="internlm2_chat")), READING)
    assert model.prompt.name == "internlm2_chat"
    assert model.prompt.token_ids == prompt.token_ids


def test_an_unknown_template_is_refused(public):
    with pytest.raises(VesselError, match=r"template=vicuna.*qwen_chat"):
        load_model(str(public(template="vicuna")), READING)


def test_a_tokenizer_without_seg_is_refused(public):
    folder = public()
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    added = ("[SEG]", "<p>", "</p>", "<vp>", "</vp>")
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["content"] not in added]
    file.write_text(json.dumps(tokenizer))
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    for key in ("extra_special_tokens", "additional_special_tokens", "added_tokens_decoder"):
        config.pop(key, None)
    file.write_text(json.dumps(config))
    with pytest.raises(VesselError, match=r"tokenizer has no \[SEG\]"):
        load_model(str(folder), READING)


def test_a_sam2_of_unknown_size_needs_its_sizes(public):
    with pytest.raises(VesselError, match="grounding"):
        load_model(str(public()))


def test_what_is_no_whole_network_is_refused(plan, prompt, tmp_path):
    network = plan().build()
    vlm = write_folder(tmp_path / "vlm", internvl_state(network, prompt.new_tokens.start))
    with pytest.raises(VesselError, match=r"InternVL folder is no whole Sa2VA.*vessel\.train weights="):
        load_model(str(vlm))
    with pytest.raises(VesselError, match=r"no checkpoint of vessel\.train"):
        load_model(str(write_sam2(tmp_path / "sam2.pt", network)))


def test_guard_I4_a_network_too_large_for_the_memory_is_refused_before_it_is_read(public, monkeypatch):
    from types import SimpleNamespace

    folder = public()
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=2_000_000))
    monkeypatch.setattr("vessel.weights.build.NetworkPlan.build", lambda _: pytest.fail("it was built"))
    with pytest.raises(VesselError, match=r"dtype=bf16.*network\.dtype"):
        load_model(str(folder), READING)


def test_guard_I4_bf16_is_the_default_on_a_gpu_and_halves_the_network(public):
    options = NetworkOptions(dtype="auto", device_map=None, base=None, grounding=None)
    assert options.load_settings(torch.device("cuda")).dtype == torch.bfloat16
    assert options.load_settings(torch.device("cpu")).dtype == torch.float32
    model = load_model(str(public()), LoadSettings(torch.bfloat16, grounding=SIZES.grounding))
    assert {parameter.dtype for parameter in model.network.parameters()} == {torch.bfloat16}


def test_wrong_network_options_are_refused():
    with pytest.raises(VesselError, match=r"network\.dtype=fp8"):
        NetworkOptions("fp8", None, None, None).load_settings(torch.device("cpu"))
    with pytest.raises(VesselError, match=r"embed_dims"):
        NetworkOptions("auto", None, None, {"embed_dims": 3}).load_settings(torch.device("cpu"))
    with pytest.raises(VesselError, match=r"'frame'.* frame_size,"):
        NetworkOptions("auto", None, None, {"frame": 64}).load_settings(torch.device("cpu"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: {}, r"it lacks config, data, name, phrases, prompt, weights"),
        (lambda _: [], r"it lacks config"),
        (lambda _: None, r"it lacks config"),
        (lambda values: values | {"colour": 1}, r"it has an unknown colour"),
        (lambda values: values | {"phrases": None}, r"of another type is phrases"),
        (lambda values: values | {"config": [], "data": "x"}, r"of another type is config, data"),
    ],
)
def test_a_damaged_manifest_is_told(change, message):
    values = Manifest(name="run", config={}, data={}, phrases=("lumen",), prompt="qwen_chat").as_dict()
    assert Manifest.from_dict(values).as_dict() == values
    with pytest.raises(VesselError, match=message):
        Manifest.from_dict(change(values))


def test_a_public_folder_with_an_empty_vessel_json_is_told(public):
    folder = public()
    (folder / "vessel.json").write_text("{}")
    with pytest.raises(VesselError, match=r"manifest .*it lacks config"):
        load_model(str(folder), READING)


@pytest.mark.slow
def test_an_untuned_network_is_evaluated_as_a_baseline(public, oct_set, tmp_path, capsys):
    """Scores of a network that never saw the phrases, with a note that says what it is."""
    from tests.conftest import _configuration

    from vessel.cli.options import typed
    from vessel.evaluation.command import evaluate
    from vessel.evaluation.options import EvaluateOptions

    sizes = OmegaConf.create({k: getattr(SIZES.grounding, k) for k in SIZES.grounding.__dataclass_fields__})
    config = _configuration("evaluate", [f"ckpt={public()}", f"data.root={oct_set}", "data.phrases=[lumen]"])
    config.network.grounding, config.run = sizes, str(tmp_path)
    report = evaluate(typed(config, EvaluateOptions, "vessel.evaluate"), tmp_path / "out")
    assert set(report["summary"]) == {"all", "lumen"}
    assert "did not train this network" in report["note"]
    assert f"[SEG] is its own choice in {100 * (1 - report['seg_missing']):.0f} %" in report["note"]
    assert "[SEG] is its own choice" in " ".join(capsys.readouterr().out.split())
    assert report["n_ok"] > 0


@pytest.mark.slow
def test_a_search_that_ends_meanwhile_does_not_part_a_decision_from_its_source(tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "run")
    model = load_model(str(tmp_path / "run"))
    first = model.decision
    data = model.manifest.data["fingerprint"], model.manifest.data["split_hash"]
    StoredDecision(model.manifest.fingerprint, Decision(0.3, 0.2), *data).write(tmp_path / "run" / DECISION_FILE)
    assert model.decision == first
    assert "searched" not in model.decision_source
    again = load_model(str(tmp_path / "run"))
    assert again.decision == Decision(0.3, 0.2)
    assert "searched" in again.decision_source
