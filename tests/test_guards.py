"""Mistakes of work by hand, provoked through the commands. All names are invented."""

import csv
import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from tests.commands import changed, score, texts, vessel

from vessel.data.catalog import Catalog
from vessel.data.masks import write_mask
from vessel.errors import BadItemsError, VesselError
from vessel.inference.loading import load_model
from vessel.model.sa2va import Sa2VA

pytestmark = pytest.mark.slow
ID = "0012345678"


def write_source(folder, stems, *, empty=()):
    """Write images of noise with masks of noise, and no mask for the stems in `empty`."""
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    for seed, stem in enumerate(stems):
        draw = np.random.default_rng(seed)
        Image.fromarray(draw.integers(0, 256, (24, 32, 3), dtype=np.uint8)).save(folder / f"images/{stem}.png")
        if stem not in empty:
            write_mask(folder / f"masks/{stem}_mask.png", draw.random((24, 32)) < 0.3)
    return folder


def test_guard_D9_frames_of_one_patient_are_parted_by_name_only_and_every_report_warns(tmp_path, train_tiny, capsys):
    synthetic = ("source=synthetic", f"out={tmp_path}/set", "synthetic.patients=1", "synthetic.frames=8", "workers=1")
    with pytest.raises(VesselError, match="split=frame"):
        vessel("prepare", *synthetic, "synthetic.size=64")
    assert not (tmp_path / "set").exists()
    note = vessel("prepare", *synthetic, "synthetic.size=64", "split=frame", "folds=2").split.note
    assert "say nothing about new patients" in note
    train_tiny(tmp_path / "run", f"data.root={tmp_path}/set", "data.phrases=lumen", "trainer.max_steps=2")
    capsys.readouterr()
    report = score(tmp_path / "run", out=tmp_path / "results")
    assert report["unit"] == "frame"
    assert note in " ".join(capsys.readouterr().out.split())
    made = texts(tmp_path / "results")
    for name in ("metrics.json", "report.html", "report.md"):
        assert note in made[name], name


def test_guard_D10_three_spellings_of_a_patient_are_one_in_one_part(tmp_path):
    spellings = (f"Quillon Marsh Vex({ID})_1-2_003", f"QUILLON_MARSH_VEX__{ID}__1-3_004", "quillon marsh vex")
    others = ("ana bell", "bo carr", "una o'dwyer")
    write_source(tmp_path / "raw", [f"{video}_frame_{n:06d}" for video in (*spellings, *others) for n in (1, 2)])
    catalog = vessel("prepare", f"source={tmp_path}/raw", f"out={tmp_path}/set", "workers=1", "folds=0")
    assert (catalog.manifest["n_patients"], catalog.manifest["n_videos"]) == (4, 6)
    files = json.loads((tmp_path / "set.identity/mapping.json").read_text())["files"]
    own = {frame_id for stem, frame_id in files.items() if "marsh" in stem.lower()}
    assert len(own) == 6
    assert [len(own & set(ids)) for ids in catalog.split.parts.values() if own & set(ids)] == [6]


def test_guard_D12_missing_masks_stop_it_and_empty_ones_are_scored_by_a_stated_rule(tmp_path, train_tiny):
    stems = [f"{patient}_frame_{n:06d}" for patient in ("ana", "bo", "cy", "di") for n in (1, 2)]
    write_source(tmp_path / "raw", stems, empty=[stem for stem in stems if stem.endswith("1")])
    options = (f"source={tmp_path}/raw", f"out={tmp_path}/set", "workers=1", "folds=0")
    with pytest.raises(BadItemsError, match=r"\b4 bad ") as caught:
        vessel("prepare", *options)
    assert all("has no annotation" in problem.reason for problem in caught.value.problems)
    assert not (tmp_path / "set").exists()
    catalog = vessel("prepare", *options, "missing=empty")
    assert sum(frame.masks["blood vessel"] is None for frame in catalog.frames.values()) == 4
    train_tiny(tmp_path / "run", f"data.root={tmp_path}/set", "data.phrases=blood vessel", "trainer.max_steps=2")
    report = score(tmp_path / "run", out=tmp_path / "results")
    dice = report["summary"]["blood vessel"]["dice"]
    assert (dice["n_images"], dice["n_present"]) == (report["n_ok"], report["n_ok"] // 2)
    assert all(metric["rule"] for metric in report["metrics"].values())
    assert report["metrics"]["dice"]["rule"] in texts(tmp_path / "results")["report.md"]


def test_guard_I1_I7_images_unreadable_or_too_large_for_the_memory_are_listed_and_never_scored(
    tiny_run, oct_set, tmp_path
):
    root, results = tmp_path / "set", tmp_path / "results"
    shutil.copytree(oct_set, root)
    cut, large = Catalog.open(root).part("test")[1:3]
    (root / cut.image).write_bytes((root / cut.image).read_bytes()[:500])

    def small_memory(module, arguments):
        if isinstance(module, Sa2VA) and large.id in arguments[0].ids:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    hook = torch.nn.modules.module.register_module_forward_pre_hook(small_memory)
    try:
        report = score(tiny_run, f"data.root={root}", out=results)
    finally:
        hook.remove()
    assert (report["n_ok"], report["n_failed"]) == (2, 2)
    assert report["summary"]["all"]["dice"]["n_images"] == 2
    with (results / "per_image.csv").open() as stream:
        scored = {row["id"] for row in csv.DictReader(stream)}
    assert len(scored) == 2
    assert not scored & {cut.id, large.id}
    reasons = {"cannot be read as an image": cut, "out of memory": large}
    made = {name: " ".join(text.split()) for name, text in texts(results).items()}
    for failure, (reason, frame) in zip(report["failures"], reasons.items(), strict=True):
        assert (failure["id"], failure["file"]) == (frame.id, frame.image)
        assert reason in failure["reason"]
        assert not list((results / "panels").glob(f"*{frame.id}*"))
        assert all(reason in made[name] and frame.id in made[name] for name in ("report.html", "report.md"))


def test_guard_I8_I10_results_hold_their_fingerprint_and_are_not_overwritten(tiny_run, tmp_path):
    def heavier(checkpoint):
        name = next(iter(checkpoint["state_dict"]))
        checkpoint["state_dict"][name] = checkpoint["state_dict"][name] + 1

    other = changed(tiny_run, tmp_path / "other", heavier)
    score(tiny_run, out=tmp_path / "results")
    before = texts(tmp_path / "results")
    refusal = rf"{re.escape(str(tmp_path / 'results'))} .*split test.*overwrite=true"
    with pytest.raises(VesselError, match=refusal):
        score(other, out=tmp_path / "results")
    with pytest.raises(VesselError, match=refusal):
        score(tiny_run, "split=val", out=tmp_path / "results")
    assert texts(tmp_path / "results") == before
    fingerprint = load_model(str(tiny_run)).manifest.fingerprint
    for file in ("metrics.json", "report.html", "report.md"):
        assert fingerprint in before[file], file
        assert re.search(r"\btiny\b", before[file]), file
    assert load_model(str(other)).manifest.fingerprint != fingerprint
