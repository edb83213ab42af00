"""`vessel.export`: what is written, what is proved, and what happens when the proof fails."""

import json
import shutil
import sys
from collections import namedtuple
from dataclasses import asdict

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from tests.conftest import _configuration
from tests.golden import GROUNDING, NETWORKS
from tests.launching import command

from vessel.checkpoints.reading import find_checkpoint
from vessel.errors import VesselError
from vessel.files import readable
from vessel.inference.loading import load_model
from vessel.inference.options import LoadSettings
from vessel.publishing import folder as folder_module
from vessel.publishing import upload
from vessel.publishing.command import ExportNetworkOptions, ExportOptions, export
from vessel.weights.entry import Weights
from vessel.weights.recognition import open_source

pytestmark = pytest.mark.slow
CODE = {"modeling_sa2va_chat.py": "raise SystemExit('never imported')\n", "sam2.py": "x = 1\n"}
DEFAULTS = {
    "layout": "sa2va", "dtype": "fp32", "to_pth": False, "remote_code": None, "images": None, "mapping": None,
    "push": None, "private": True,
}  # fmt: skip


def export_options(ckpt, out, base=None, grounding=None, **changes):
    network = ExportNetworkOptions(base, grounding)
    return ExportOptions(ckpt=str(ckpt), out=str(out), network=network, **DEFAULTS | changes)


@pytest.fixture(scope="module")
def exported(tiny_run, tmp_path_factory):
    return export(export_options(tiny_run, tmp_path_factory.mktemp("exports") / "oct"))


@pytest.fixture(scope="module")
def base(exported, tmp_path_factory):
    """A Sa2VA folder with the public code beside its weights."""
    folder = tmp_path_factory.mktemp("bases") / "Sa2VA"
    shutil.copytree(exported, folder)
    (folder / "vessel.json").unlink()
    for name, text in CODE.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def lora_run(train_tiny, base, tmp_path_factory):
    """A run of LoRA on that folder."""
    folder = tmp_path_factory.mktemp("runs") / "lora"
    started = (f"weights=[{base}]", f"prompt.tokenizer={base}", "name=lora")
    train_tiny(folder, *started, "lora.r=8", "trainable=lora", "optimizer.lr=0.01")
    return folder


@pytest.fixture
def out(tmp_path):
    return tmp_path / "new" / "made"


def edited(run, tmp_path, edit):
    """A copy of a run whose best checkpoint was changed by `edit`."""
    shutil.copytree(run, tmp_path / "edited")
    file = find_checkpoint(tmp_path / "edited")
    checkpoint = torch.load(file, weights_only=True)
    edit(checkpoint)
    torch.save(checkpoint, file)
    return tmp_path / "edited"


def nothing_left(tmp_path):
    return not [path for path in tmp_path.iterdir() if path.name == "new"]


def test_the_folder_is_complete_and_equals_the_run(exported, tiny_run):
    assert {path.name for path in exported.iterdir()} == {
        "README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vessel.json"
    }  # fmt: skip
    run, folder = load_model(str(tiny_run)), load_model(str(exported))
    assert folder.threshold == run.threshold
    assert folder.manifest.phrases == run.manifest.phrases
    assert folder.prompt.token_ids == run.prompt.token_ids
    assert folder.manifest.parent == {"name": "tiny", "fingerprint": run.manifest.fingerprint}
    assert folder.manifest.fingerprint == folder.reports[-1].fingerprint


def test_names_and_config_are_public(exported):
    names = load_file(exported / "model.safetensors").keys()
    assert {"language_model.lm_head.weight", "mlp1.0.weight", "text_hidden_fcs.0.weight"} <= names
    assert all(
        n.startswith(("language_model.", "vision_model.", "mlp1.", "grounding_encoder.", "text_hidden_fcs."))
        for n in names
    )
    config = json.loads((exported / "config.json").read_text())
    assert (config["model_type"], config["template"], config["llm_config"]["vocab_size"]) == (
        "sa2va_chat",
        "qwen_chat",
        512,
    )


@pytest.mark.parametrize(("layout", "dtype"), [("sa2va", "bf16"), ("native", "fp32"), ("adapter", "bf16")])
def test_guard_W6_every_layout_draws_and_speaks_as_the_network_with_its_adapters(
    lora_run, base, out, capsys, layout, dtype
):
    made = export(export_options(lora_run, out, layout=layout, dtype=dtype, to_pth=layout == "native"))
    told = capsys.readouterr().out
    assert f"MB as {dtype}" in told
    assert "of mask pixels equal" in told
    assert "answers equal" in told
    files = sorted(made.glob("*.safetensors"))
    stored = {tensor.dtype for file in files for tensor in load_file(file).values()}
    assert stored == {{"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]}
    assert {"vessel.json", "tokenizer.json", "README.md"} <= {path.name for path in made.iterdir()}
    settings = LoadSettings(base=[Weights(str(base))] if layout == "adapter" else ())
    run, again = load_model(str(lora_run)), load_model(str(made), settings)
    assert again.threshold == run.threshold
    assert again.manifest.parent["fingerprint"] == run.manifest.fingerprint
    assert ("lora" in again.network.trainable_groups()) == (layout == "adapter")
    if layout == "native":
        assert {name.split(".")[0] for name in load_file(files[0])} == {"mllm", "grounding", "text_hidden_fcs"}
        assert json.loads((made / "config.json").read_text())["model_type"] == "vessel_sa2va"
        pth = open_source(str(out.with_name("made.pth")))
        assert pth.kind.name == "full .pth of the public code"
        plain = dict(again.network.state_dict())
        assert all(torch.equal(plain[name], tensor) for name, tensor in pth.tensors())
        assert "made.pth: " in told


def test_an_adapter_is_merged_by_exporting_it_again(lora_run, base, tmp_path):
    adapter = export(export_options(lora_run, tmp_path / "adapter", layout="adapter"))
    with pytest.raises(VesselError, match=r"base=FOLDER"):
        export(export_options(adapter, tmp_path / "merged"))
    at_once = export(export_options(lora_run, tmp_path / "at_once"))
    merged = export(export_options(adapter, tmp_path / "merged", base=str(base)))
    one, two = (load_file(folder / "model.safetensors") for folder in (at_once, merged))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"], config["lora_alpha"]) == ("", 8, 16)


def test_guard_W4_an_export_with_a_file_lost_or_changed_is_refused(lora_run, base, tmp_path):
    adapter = export(export_options(lora_run, tmp_path / "adapter", layout="adapter"))
    settings = LoadSettings(base=[Weights(str(base))])
    assert load_model(str(adapter), settings).tuned
    (adapter / "non_lora.safetensors").unlink()
    with pytest.raises(VesselError, match="not those that were exported"):
        load_model(str(adapter), settings)


def test_a_run_without_adapters_has_none_to_export(tiny_run, out, tmp_path):
    with pytest.raises(VesselError, match="no adapters that trained; choose layout=sa2va"):
        export(export_options(tiny_run, out, layout="adapter"))
    assert nothing_left(tmp_path)


def test_guard_W11_the_public_code_goes_with_the_weights_and_is_never_run(lora_run, base, exported, tmp_path, capsys):
    made = export(export_options(lora_run, tmp_path / "of_the_base", dtype="bf16"))
    assert {file.name: file.read_text() for file in made.glob("*.py")} == CODE
    assert "predict_forward" in (made / "README.md").read_text()
    assert "remote_code=FOLDER" not in capsys.readouterr().out
    again = export(export_options(made, tmp_path / "of_an_export"))
    assert {file.name for file in again.glob("*.py")} == set(CODE)
    # From random weights there is none, unless a folder is named; both are said.
    assert not list(exported.glob("*.py"))
    assert "remote_code=FOLDER" in (exported / "README.md").read_text()
    named = export(export_options(exported, tmp_path / "named", remote_code=str(base)))
    assert {file.name for file in named.glob("*.py")} == set(CODE)
    export(export_options(exported, tmp_path / "unnamed"))
    assert "remote_code=FOLDER" in capsys.readouterr().out.splitlines()[-1]


def test_a_public_network_comes_out_in_another_form(exported, base, tmp_path, capsys):
    sam2 = json.loads((exported / "vessel.json").read_text())["config"]["model"]["grounding"]
    del sam2["_target_"]
    made = export(export_options(base, tmp_path / "made", grounding=sam2, layout="native"))
    assert "nothing was trained here" in capsys.readouterr().out
    assert not (made / "vessel.json").exists()
    assert "vessel did not train it" in (made / "README.md").read_text()
    one, two = (dict(open_source(str(folder)).tensors()) for folder in (base, made))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_recorded_networks_pass_the_gate(golden_folder, out, name, capsys):
    folder = golden_folder(name)
    images = str(folder / "images/square.png")
    made = export(export_options(folder, out, grounding=asdict(GROUNDING), images=images))
    assert "1 of 1 answers equal" in capsys.readouterr().out
    one, two = (load_file(place / "model.safetensors") for place in (folder, made))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_guard_D11_no_folder_of_this_machine_travels(exported, lora_run, base, oct_set, tiny_run, tmp_path):
    adapter = export(export_options(lora_run, tmp_path / "made", layout="adapter"))
    for file in (*exported.glob("*.*"), *adapter.glob("*.*")):
        if file.suffix in (".json", ".md"):
            text = file.read_text()
            assert not [place for place in (oct_set, tiny_run.parent, lora_run.parent, base) if str(place) in text]
    assert "root" not in json.loads((exported / "vessel.json").read_text())["config"]["data"]


def test_guard_D11_a_raw_identifier_stops_the_export(tiny_run, out, tmp_path):
    ckpt = edited(tiny_run, tmp_path, lambda c: c["vessel"].update(name="Anna Invented 0123456789"))
    with pytest.raises(VesselError, match="looks like a patient's name or id"):
        export(export_options(ckpt, out))
    assert nothing_left(tmp_path)


def test_guard_D11_names_are_those_of_the_mapping_that_is_named(tiny_run, out, tmp_path, capsys, monkeypatch):
    names = tmp_path / "names"
    names.mkdir()
    (names / "mapping.json").write_text(json.dumps({"patients": {}, "files": {}, "names": ["ana invented"]}))
    ckpt = edited(tiny_run, tmp_path, lambda c: c["vessel"].update(name="Ana_Invented"))
    with pytest.raises(VesselError, match="patient's name or id"):
        export(export_options(ckpt, out, mapping=str(names)))
    with pytest.raises(VesselError, match=r"no mapping\.json"):
        export(export_options(tiny_run, out, mapping=str(tmp_path)))
    assert nothing_left(tmp_path)
    # The painted data set has no mapping beside it: that is said. And a hub that is not there takes nothing away.
    monkeypatch.setattr(upload, "HfApi", lambda: HfApi(endpoint="http://127.0.0.1:9", token="hf_x"))
    with pytest.raises(VesselError, match="the hub was not reached"):
        export(export_options(ckpt, out, push="me/oct"))
    told = capsys.readouterr().out
    assert "only patterns were checked" in told
    assert "me/oct (private), 6 files" in told
    assert load_model(str(out)).manifest.name == "Ana_Invented"


def test_guard_W4_training_from_an_export_and_exporting_again(train_tiny, exported, out, tmp_path, capsys):
    """Weights that did not move are found out, weights that did pass."""
    started = (f"weights=[{exported}]", f"prompt.tokenizer={exported}", "trainable=decoder_only")
    train_tiny(tmp_path / "moved", *started, "optimizer.lr=0.01")
    export(export_options(tmp_path / "moved", tmp_path / "first", dtype="bf16"))
    told = capsys.readouterr().out
    assert "every trained group differs from its base: " in told
    assert "text_hidden_fcs" in told.split("differs from its base: ")[1].splitlines()[0]
    train_tiny(tmp_path / "still", *started, "optimizer.lr=0.0", "~callbacks.first_step_check")
    with pytest.raises(VesselError, match=r"text_hidden_fcs.*equal to the base"):
        export(export_options(tmp_path / "still", out, dtype="bf16"))
    assert nothing_left(tmp_path)


def test_guard_W4_a_checkpoint_that_holds_the_base_again_is_found_out(lora_run, out, tmp_path):
    """Adapters that add nothing: one group of several did not train."""

    def undo(checkpoint):
        for name, tensor in checkpoint["state_dict"].items():
            if "lora_B" in name:
                tensor.zero_()

    with pytest.raises(VesselError, match=r"^lora: to be trained, yet equal to the base"):
        export(export_options(edited(lora_run, tmp_path, undo), out))
    assert nothing_left(tmp_path)


def test_guard_W4_another_base_than_the_runs_is_found_out(lora_run, base, out, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(base, other)
    tensors = load_file(other / "model.safetensors")
    tensors["vision_model.embeddings.class_embedding"] += 1e-3
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})

    def move(checkpoint):
        checkpoint["vessel"]["config"]["weights"][0]["source"] = str(other)

    with pytest.raises(VesselError, match=r"other: its tensors .* are not those that the run was trained on"):
        export(export_options(edited(lora_run, tmp_path, move), out))
    assert nothing_left(tmp_path)


def test_guard_W5_a_checkpoint_without_what_it_trained_is_refused(lora_run, out, tmp_path):
    def drop(checkpoint):
        kept = {name: t for name, t in checkpoint["state_dict"].items() if "lora_" not in name}
        checkpoint["state_dict"] = kept

    with pytest.raises(VesselError, match="lora_"):
        export(export_options(edited(lora_run, tmp_path, drop), out))
    assert nothing_left(tmp_path)


@pytest.mark.parametrize(
    ("layout", "spoil", "what"),
    [("sa2va", "flip", "is not the one"), ("native", "drop", "is missing"), ("adapter", "flip", "is not the one")],
)
def test_guard_W4_what_is_on_the_disk_must_be_what_was_in_memory(
    lora_run, out, tmp_path, monkeypatch, layout, spoil, what
):
    written = folder_module.write_layout

    def spoilt(folder, *args, **kwargs):
        in_memory = written(folder, *args, **kwargs)
        file = next(folder.glob("*model.safetensors"))
        tensors = load_file(file)
        name = next(name for name in tensors if name.endswith(("lm_head.weight", "text_hidden_fcs.0.weight")))
        if spoil == "drop":
            del tensors[name]
        else:
            tensors[name].view(torch.uint8)[0, 0] ^= 1
        save_file(tensors, file, metadata={"format": "pt"})
        return in_memory

    monkeypatch.setattr(folder_module, "write_layout", spoilt)
    with pytest.raises(VesselError, match=rf"tensor \S*(lm_head|text_hidden_fcs)\S* {what}"):
        export(export_options(lora_run, out, layout=layout, to_pth=True))
    assert nothing_left(tmp_path)


def test_guard_W6_masks_or_words_that_differ_leave_nothing(tiny_run, out, tmp_path, monkeypatch):
    """A merge that goes wrong after the tensors were compared: written as told, and yet another network."""
    merged = folder_module.write_layout

    def wrong(folder, network, *args, **kwargs):
        with torch.no_grad():
            network.text_hidden_fcs[2].bias += 5
        return merged(folder, network, *args, **kwargs)

    monkeypatch.setattr(folder_module, "write_layout", wrong)
    with pytest.raises(VesselError, match=r"sample \S+: the export's probabilities differ"):
        export(export_options(tiny_run, out, to_pth=True))
    assert nothing_left(tmp_path)


def test_guard_W9_too_small_a_disk_is_seen_before(tiny_run, exported, out, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    size = (exported / "model.safetensors").stat().st_size
    free = 10**8 + size + size // 2  # for the folder, and not for the training file as well
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - free, free))
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(VesselError, match=r"take 105\.\d MB and 104\.\d MB are free.*bf16"):
        export(export_options(tiny_run, out, to_pth=True))
    with pytest.raises(VesselError, match="fresh process"):  # far behind the look at the disk
        export(export_options(tiny_run, out))
    assert nothing_left(tmp_path)


def test_guard_W9_inputs_are_not_touched_by_a_failure(lora_run, base, out, tmp_path, monkeypatch):
    before = {file: file.stat().st_mtime_ns for folder in (lora_run, base) for file in folder.rglob("*")}
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(VesselError, match="fresh process"):
        export(export_options(lora_run, out, to_pth=True))
    after = {file: file.stat().st_mtime_ns for folder in (lora_run, base) for file in folder.rglob("*")}
    assert before == after
    assert nothing_left(tmp_path)


def test_guard_W8_the_size_is_printed_and_bf16_is_the_default(tiny_run, exported, tmp_path, capsys):
    whole = sum(tensor.nbytes for tensor in load_file(exported / "model.safetensors").values())
    made = export(export_options(tiny_run, tmp_path / "made", dtype=_configuration("export", ["ckpt=", "out="]).dtype))
    assert sum(tensor.nbytes for tensor in load_file(made / "model.safetensors").values()) == whole // 2
    assert f"weights: {readable(whole / 2)} as bf16" in capsys.readouterr().out


def test_guard_W11_an_export_that_does_not_load_in_a_fresh_process_leaves_nothing(tiny_run, out, tmp_path, monkeypatch):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'ImportError: no such thing' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    with pytest.raises(VesselError, match=r"fresh process.*: ImportError: no such thing"):
        export(export_options(tiny_run, out))
    assert nothing_left(tmp_path)


def test_bad_choices_are_refused_before_anything_is_read(tmp_path, exported):
    def refused(**changes):
        with pytest.raises(VesselError) as caught:
            export(export_options("nowhere", changes.pop("out", tmp_path / "made"), **changes))
        return str(caught.value)

    assert "never written over" in refused(out=tmp_path)
    (tmp_path / "made.pth").touch()
    assert "made.pth exists" in refused(to_pth=True)
    assert "dtype=int4: choose one of bf16, fp32" in refused(dtype="int4")
    assert "layout=onnx: choose one of sa2va, native, adapter" in refused(layout="onnx")
    assert f"holds no {next(iter(CODE))}" in refused(remote_code=str(exported))
    assert "goes with layout=sa2va" in refused(remote_code=str(exported), layout="native")
    assert "push=a/b/c: no name of a repository" in refused(push="a/b/c")


def test_as_a_user_runs_it(tiny_run, oct_set, tmp_path):
    def run(verb, *arguments):
        return command(f"vessel.{verb}", *arguments, cwd=tmp_path)

    shutil.copytree(tiny_run, tmp_path / "run")
    scored = run("evaluate", "ckpt=run")
    assert scored.returncode == 0, scored.stderr
    measured = json.loads((tmp_path / "run/evaluate/test/metrics.json").read_text())["summary"]["lumen"]["iou"]
    done = run("export", "ckpt=run", "out=made", "dtype=fp32", f"images={oct_set}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("verified:") == 3
    assert f"| lumen | IoU | {measured['mean']:.3f} | " in (tmp_path / "made/README.md").read_text()
    scored = run("evaluate", "ckpt=made", f"data.root={oct_set}", "out=results")
    assert scored.returncode == 0, scored.stderr
    report = json.loads((tmp_path / "results/metrics.json").read_text())
    assert report["fingerprint"] == json.loads((tmp_path / "made/vessel.json").read_text())["fingerprint"]
    predicted = run("predict", "ckpt=made", f"images={oct_set}", "phrases=[lumen]", "out=masks")
    assert predicted.returncode == 0, predicted.stderr
    assert np.unique([path.suffix for path in (tmp_path / "masks/masks").rglob("*.*")]).tolist() == [".png"]
