"""`vessel.export`: what is written, what is proved, and what happens when the proof fails."""

import json
import shutil
import subprocess
import sys
from collections import namedtuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from vessel.errors import VesselError
from vessel.proof import compare, drawn_image, masks_of
from vessel.publication import Options, export
from vessel.restore import find_checkpoint, restore

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def exported(tiny_run, tmp_path_factory):
    return export(Options(str(tiny_run), str(tmp_path_factory.mktemp("exports") / "oct"), "fp32", None, None))


@pytest.fixture
def options(tiny_run, tmp_path):
    def make(**changes):
        return Options(
            **{"ckpt": str(tiny_run), "out": str(tmp_path / "made"), "dtype": "fp32", "images": None, "mapping": None}
            | changes
        )

    return make


def edited(tiny_run, tmp_path, edit):
    """A copy of the run whose best checkpoint was changed by `edit`."""
    shutil.copytree(tiny_run, tmp_path / "edited")
    file = find_checkpoint(tmp_path / "edited")
    checkpoint = torch.load(file, weights_only=True)
    edit(checkpoint)
    torch.save(checkpoint, file)
    return str(tmp_path / "edited")


def nothing_left(tmp_path):
    return not [path for path in tmp_path.iterdir() if "made" in path.name]


def test_the_folder_is_complete_and_equals_the_run(exported, tiny_run):
    assert {path.name for path in exported.iterdir()} == {
        "README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vessel.json"
    }  # fmt: skip
    run, folder = restore(str(tiny_run)), restore(str(exported))
    assert folder.threshold == run.threshold
    assert folder.manifest.phrases == run.manifest.phrases
    assert folder.prompt.token_ids == run.prompt.token_ids
    assert folder.manifest.parent == {"name": "tiny", "fingerprint": run.manifest.fingerprint}
    images = {"drawn": drawn_image(96)}
    assert np.allclose(masks_of(str(tiny_run), images)["drawn"], masks_of(str(exported), images)["drawn"], atol=1e-5)


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


def test_guard_D11_no_folder_of_this_machine_travels(exported, oct_set, tiny_run):
    for file in exported.glob("*.*"):
        if file.suffix in (".json", ".md"):
            text = file.read_text()
            assert str(oct_set) not in text
            assert str(tiny_run.parent) not in text
    assert "root" not in json.loads((exported / "vessel.json").read_text())["config"]["data"]


def test_guard_D11_a_raw_identifier_stops_the_export(options, tiny_run, tmp_path):
    ckpt = edited(tiny_run, tmp_path, lambda c: c["vessel"].update(name="Anna Invented 0123456789"))
    with pytest.raises(VesselError, match="looks like a patient's name or id"):
        export(options(ckpt=ckpt))
    assert nothing_left(tmp_path)


def test_guard_D11_names_are_those_of_the_mapping_that_is_named(options, tiny_run, tmp_path, capsys):
    names = tmp_path / "names"
    names.mkdir()
    (names / "mapping.json").write_text(json.dumps({"patients": {}, "files": {}, "names": ["ana invented"]}))
    ckpt = edited(tiny_run, tmp_path, lambda c: c["vessel"].update(name="Ana_Invented"))
    with pytest.raises(VesselError, match="patient's name or id"):
        export(options(ckpt=ckpt, mapping=str(names)))
    with pytest.raises(VesselError, match=r"no mapping\.json"):
        export(options(mapping=str(tmp_path)))
    assert nothing_left(tmp_path)
    export(options(ckpt=ckpt))  # the painted data set has no mapping beside it: that is said
    assert "only patterns were checked" in capsys.readouterr().out


def test_the_card_speaks_from_the_manifest(exported):
    card = (exported / "README.md").read_text()
    manifest = json.loads((exported / "vessel.json").read_text())
    for told in (
        "lumen, side branch",
        manifest["fingerprint"],
        manifest["parent"]["fingerprint"],
        "20 images, 5 patients",
    ):
        assert told in card


def test_guard_W6_merged_adapters_in_bf16_draw_the_same_masks(train_tiny, tmp_path, capsys):
    train_tiny(tmp_path / "run", "lora=r8", "trainable=lora", "optimizer.lr=0.01")
    made = export(Options(str(tmp_path / "run"), str(tmp_path / "made"), "bf16", None, None))
    assert {t.dtype for t in load_file(made / "model.safetensors").values()} == {torch.bfloat16}
    told = capsys.readouterr().out
    assert "of mask pixels equal" in told
    assert "GB as bf16" in told


def test_guard_W4_training_from_an_export_and_exporting_again(train_tiny, exported, tmp_path, capsys):
    """Weights that did not move are found out, weights that did pass."""
    started = (f"weights=[{exported}]", f"prompt.tokenizer={exported}", "trainable=decoder_only")
    train_tiny(tmp_path / "moved", *started, "optimizer.lr=0.01")
    export(Options(str(tmp_path / "moved"), str(tmp_path / "first"), "bf16", None, None))
    assert "differs from its base (a local folder) in every trained group" in capsys.readouterr().out
    train_tiny(tmp_path / "still", *started, "optimizer.lr=0.0", "~callbacks.first_step_check")
    with pytest.raises(VesselError, match=r"text_hidden_fcs.*equal to the base"):
        export(Options(str(tmp_path / "still"), str(tmp_path / "made"), "bf16", None, None))
    assert nothing_left(tmp_path)


def test_guard_W9_too_small_a_disk_is_seen_before(options, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(VesselError, match=r"0\.00 GB are free.*bf16"):
        export(options())
    assert nothing_left(tmp_path)


def test_guard_W11_an_export_that_does_not_load_in_a_fresh_process_leaves_nothing(options, tmp_path, monkeypatch):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'ImportError: no such thing' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    with pytest.raises(VesselError, match=r"fresh process: ImportError: no such thing"):
        export(options())
    assert nothing_left(tmp_path)


def test_other_masks_fail_the_proof():
    ramp = np.linspace(0, 1, 10_000, dtype=np.float32).reshape(1, 100, 100)
    between = float(ramp[0, 50, 0]) + 6e-5
    assert "100.000% of mask pixels equal" in compare({"a": ramp}, {"a": ramp + 5e-5}, threshold=between, dtype="fp32")
    with pytest.raises(VesselError, match=r"sample b: .* up to 0\.001"):
        compare({"a": ramp, "b": ramp}, {"a": ramp, "b": ramp + 1e-3}, threshold=0.5, dtype="fp32")
    # 2 % of the pixels change sides, all of them within 0.05 of the threshold; then 10 % do.
    assert "98.000% of mask pixels equal" in compare({"a": ramp}, {"a": ramp + 0.02}, threshold=0.5, dtype="bf16")
    with pytest.raises(VesselError, match="dtype=fp32"):
        compare({"a": ramp}, {"a": ramp + 0.1}, threshold=0.5, dtype="bf16")


def test_a_place_that_is_taken_and_a_dtype_that_is_none(options, tmp_path):
    with pytest.raises(VesselError, match="never written over"):
        export(options(out=str(tmp_path)))
    with pytest.raises(VesselError, match="dtype=int4"):
        export(options(dtype="int4"))


def test_as_a_user_runs_it(tiny_run, oct_set, tmp_path):
    def run(command, *arguments):
        return subprocess.run(
            [sys.executable, "-m", f"vessel.{command}", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=180,
        )

    done = run("export", f"ckpt={tiny_run}", "out=made", "dtype=fp32", f"images={oct_set}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("proved:") == 3
    scored = run("evaluate", "ckpt=made", f"data.root={oct_set}", "out=results")
    assert scored.returncode == 0, scored.stderr
    report = json.loads((tmp_path / "results/metrics.json").read_text())
    assert report["fingerprint"] == json.loads((tmp_path / "made/vessel.json").read_text())["fingerprint"]
