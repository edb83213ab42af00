"""The files beside the tensors of an export."""

import json
import shutil

import pytest

from vessel.data.prompt import Prompt
from vessel.inference.cleanup import Cleanup
from vessel.inference.decision import DECISION_FILE, Decision, StoredDecision
from vessel.inference.loading import load_model
from vessel.publishing.folder import exported_manifest, public_code_files, write_export, write_tokenizer
from vessel.runs.manifest import LOCAL, Manifest

MANIFEST = Manifest(name="oct", config={}, data={"name": "set"}, phrases=("lumen",), prompt="qwen_chat", versions={})


@pytest.mark.parametrize("source", [None, "shared/tokenizer", "sa2va_qwen2"])
def test_a_tokenizer_is_one_of_transformers_4_and_5(golden_folder, tmp_path, source):
    """The public code runs with 4.49 to 4.57, where 5's class and its list of tokens are errors."""
    prompt = Prompt(None if source is None else str(golden_folder(source)))
    write_tokenizer(tmp_path, prompt)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] in ("PreTrainedTokenizerFast", "Qwen2Tokenizer")
    assert not {"extra_special_tokens", "backend", "is_local", "local_files_only"} & config.keys()
    again = Prompt(str(tmp_path))
    assert again.has_seg
    assert again.token_ids == prompt.token_ids
    assert again.tokenizer.get_vocab() == prompt.tokenizer.get_vocab()
    assert set(again.tokenizer.all_special_tokens) == set(prompt.tokenizer.all_special_tokens)
    assert again.encode(["blood vessel"], 3)[0].tolist() == prompt.encode(["blood vessel"], 3)[0].tolist()


def test_guard_D11_places_of_this_machine_stay_here_and_hub_ids_go(tmp_path, monkeypatch):
    """A folder is a place also by a bare name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Bare_Name").mkdir()
    sources = ["Bare_Name", str(tmp_path), "~/weights", "hf://owner/Sa2VA-8B"]
    run = Manifest(
        **{**MANIFEST.as_dict(), "phrases": ("lumen",)}
        | {
            "config": {"weights": [{"source": s} for s in sources], "run": "x", "data": {"root": "/data", "fold": 1}},
            "weights": tuple({"source": source, "fingerprint": "f"} for source in sources),
            "fingerprint": "old",
        }
    )
    gone = exported_manifest(run, fingerprint="new")
    assert [entry["source"] for entry in gone.config["weights"]] == [LOCAL, LOCAL, LOCAL, "hf://owner/Sa2VA-8B"]
    assert [report["source"] for report in gone.weights] == [LOCAL, LOCAL, LOCAL, "hf://owner/Sa2VA-8B"]
    assert gone.config["data"] == {"fold": 1}
    assert "run" not in gone.config
    assert (gone.fingerprint, gone.parent) == ("new", {"name": "oct", "fingerprint": "old"})


def test_public_code_is_that_of_the_first_folder_that_has_it(tmp_path):
    for folder, files in {"none": ["other.py"], "first": ["modeling_sa2va_chat.py", "sam2.py", "a.json"]}.items():
        (tmp_path / folder).mkdir()
        for file in files:
            (tmp_path / folder / file).touch()
    places = [tmp_path / "none" / "other.py", tmp_path / "none", tmp_path / "first"]
    assert [file.name for file in public_code_files(places)] == ["modeling_sa2va_chat.py", "sam2.py"]
    assert public_code_files(places[:2]) == []


@pytest.mark.slow
def test_guard_I6_an_export_carries_what_was_searched_on_validation(tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "run")
    run = load_model(str(tmp_path / "run"))
    write_export(tmp_path, run, layout="native", dtype="fp32", code=[])
    assert load_model(str(tmp_path)).decision == run.decision == Decision(run.threshold)
    decision = Decision(0.4, 0.2, Cleanup(min_size=9), ("flip_lr",))
    data = run.manifest.data["fingerprint"], run.manifest.data["split_hash"]
    StoredDecision(run.manifest.fingerprint, decision, *data).write(tmp_path / "run" / DECISION_FILE)
    run = load_model(str(tmp_path / "run"))
    write_export(tmp_path, run, layout="native", dtype="fp32", code=[])
    assert load_model(str(tmp_path)).decision == decision
    assert load_model(str(tmp_path)).decision_source == "searched on validation, stored with the weights"
    assert str(decision) in (tmp_path / "README.md").read_text()
