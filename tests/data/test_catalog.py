"""Reading a prepared data set, and noticing when it is none or was changed."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest

from vessel.data.catalog import Catalog, Frame, Split, digest, fingerprint_of
from vessel.errors import VesselError


def frame(patient, number):
    video = f"{patient}_v1"
    masks = {"cap": None, "lumen": f"masks/lumen/{video}_{number:06d}.png"}
    return Frame(f"{video}_{number:06d}", "", 8, 8, patient, video, number, masks, f"{patient}{number}")


def write(root, *, frames=None, split=None, **changes):
    frames = frames or [frame(p, n) for p in ("pa", "pb", "pc", "pd") for n in (1, 2)]
    ids = {p: tuple(f.id for f in frames if f.patient == p) for p in ("pa", "pb", "pc", "pd")}
    parts = {"train": ids["pa"] + ids["pb"], "val": ids["pc"], "test": ids["pd"]}
    folds = ({"train": ids["pc"], "val": ids["pa"] + ids["pb"]},)
    split = split or Split("patient", 0, 0, "", parts, folds)
    manifest = {
        "kind": "vessel dataset",
        "version": 1,
        "name": "t",
        "phrases": ["cap", "lumen"],
        "masks_hash": "m",
        "fingerprint": fingerprint_of(frames, "m"),
        "split_hash": split.hash,
        **changes,
    }
    (root / "frames.json").write_text(json.dumps([asdict(f) for f in frames]))
    (root / "splits.json").write_text(json.dumps(split.to_json()))
    (root / "manifest.json").write_text(json.dumps(manifest))
    return root


def edit(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_parts_and_folds(tmp_path):
    catalog = Catalog.open(write(tmp_path))
    assert catalog.phrases == ("cap", "lumen")
    assert [f.patient for f in catalog.part("train")] == ["pa", "pa", "pb", "pb"]
    assert [f.id for f in catalog.part("train", fold=0)] == ["pc_v1_000001", "pc_v1_000002"]
    assert [f.patient for f in catalog.part("test", fold=0)] == ["pd", "pd"]
    assert catalog.frames["pa_v1_000001"].masks["cap"] is None


def test_a_home_folder_is_written_out(tmp_path, monkeypatch):
    write(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert Catalog.open(Path("~") / tmp_path.name).root == tmp_path
    with pytest.raises(VesselError, match="~nosuchuser/x"):
        Catalog.open(Path("~nosuchuser/x"))


def test_missing_parts_and_folds_list_those_there(tmp_path):
    catalog = Catalog.open(write(tmp_path))
    with pytest.raises(VesselError, match=r"'dev'.*train, val, test"):
        catalog.part("dev")
    with pytest.raises(VesselError, match=r"fold 1.* 0 to 0"):
        catalog.part("train", fold=1)


def test_hash_is_of_the_canonical_json(tmp_path):
    content = json.loads((write(tmp_path) / "splits.json").read_text())
    stated = content.pop("hash")
    assert stated == digest(content) == Catalog.open(tmp_path).split.hash


@pytest.mark.parametrize("name", ["manifest.json", "frames.json", "splits.json"])
def test_missing_or_broken_files(tmp_path, name):
    (write(tmp_path) / name).write_text("{")
    with pytest.raises(VesselError, match=rf"{name} .*line 1"):
        Catalog.open(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(VesselError, match=rf"{name}; .*python -m vessel\.prepare source=\.\.\. out="):
        Catalog.open(tmp_path)


@pytest.mark.parametrize("changes", [{"kind": "vessel run"}, {"version": 2}, {"fingerprint": "0"}, {"split_hash": "0"}])
def test_manifests_of_something_else(tmp_path, changes):
    with pytest.raises(VesselError, match=re.escape(str(tmp_path))):
        Catalog.open(write(tmp_path, **changes))


def test_guard_D9_an_edited_split_is_refused(tmp_path):
    edit(write(tmp_path) / "splits.json", lambda content: content["train"].append(content["test"].pop()))
    with pytest.raises(VesselError, match=r"splits\.json.*hash"):
        Catalog.open(tmp_path)


def test_edited_frames_are_refused(tmp_path):
    edit(write(tmp_path) / "frames.json", lambda content: content[0].update(patient="pz"))
    with pytest.raises(VesselError, match=r"frames\.json.*manifest\.json"):
        Catalog.open(tmp_path)


def test_the_pixel_spacing_belongs_to_the_fingerprint(tmp_path):
    assert Catalog.open(write(tmp_path)).pixel_spacing is None
    edit(tmp_path / "manifest.json", lambda content: content.update(pixel_spacing=[0.01, 0.02]))
    with pytest.raises(VesselError, match=r"frames\.json.*manifest\.json"):
        Catalog.open(tmp_path)
    frames = list(json.loads((tmp_path / "frames.json").read_text()))
    stated = fingerprint_of([Frame(**each) for each in frames], "m", [0.01, 0.02])
    catalog = Catalog.open(write(tmp_path, pixel_spacing=[0.01, 0.02], fingerprint=stated))
    assert catalog.pixel_spacing == (0.01, 0.02)


def test_frames_with_unknown_fields_are_refused(tmp_path):
    edit(write(tmp_path) / "frames.json", lambda content: content[0].update(colour="red"))
    with pytest.raises(VesselError, match="colour"):
        Catalog.open(tmp_path)


def test_guard_D9_a_leaking_split_is_refused_even_with_a_fitting_hash(tmp_path):
    parts = {"train": ("pa_v1_000001",), "val": ("pb_v1_000001",), "test": ("pa_v1_000002",)}
    write(tmp_path, split=Split("patient", 0, 0, "", parts, ()))
    with pytest.raises(VesselError, match=r"pa .*train.*test"):
        Catalog.open(tmp_path)
