"""A source becomes a data set, or nothing is written and every reason is told."""

import json
import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from vessel.cli.conf import CONF
from vessel.data.catalog import Catalog, digest
from vessel.data.masks import read_mask, write_mask
from vessel.data.preparation import PrepareOptions, prepare
from vessel.errors import BadItemsError, VesselError
from vessel.privacy.scanner import Scanner

ID = "0012345678"
VIDEOS = (
    f"Quillon Marsh Vex({ID})_1-2_003_0a1b2c3d",
    f"Quillon_Marsh_Vex_{ID}__1-3_004_0a1b2c3e",
    "quillon marsh vex",
    "ana_bell",
    "bo carr né",
)
SIZE = (24, 32)


def defaults():
    raw = OmegaConf.load(f"{CONF}/prepare.yaml")
    raw.pop("hydra"), raw.pop("defaults")
    schema = OmegaConf.structured(PrepareOptions)
    return OmegaConf.to_object(OmegaConf.merge(schema, raw, {"source": "", "out": ""}))


def picture(seed):
    return np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), dtype=np.uint8)


def truth(seed):
    return np.random.default_rng(1000 + seed).random(SIZE) < 0.3


def stems():
    return [f"{video}_frame_{n:06d}" for video in VIDEOS for n in range(1, 4)]


@pytest.fixture
def options(tmp_path):
    """A source of five videos of three patients, with EXIF, and where it goes."""
    (tmp_path / "raw/images").mkdir(parents=True)
    (tmp_path / "raw/masks").mkdir()
    exif = Image.Exif()
    exif[0x010E] = "Quillon Marsh Vex"
    for seed, stem in enumerate(stems()):
        Image.fromarray(picture(seed)).save(tmp_path / f"raw/images/{stem}.png", exif=exif)
        write_mask(tmp_path / f"raw/masks/{stem}_mask.png", truth(seed))
    return replace(defaults(), source=str(tmp_path / "raw"), out=str(tmp_path / "set"), workers=0)


def test_pixels_and_masks_arrive_unchanged(options, tmp_path):
    catalog = prepare(options)
    files = json.loads((tmp_path / "set.identity/mapping.json").read_text())["files"]
    assert len(files) == len(catalog.frames) == 15
    for seed, stem in enumerate(stems()):
        frame = catalog.frames[files[stem]]
        with Image.open(catalog.root / frame.image) as image:
            assert image.info == {}
            assert np.array_equal(np.array(image), picture(seed))
        path = frame.masks["blood vessel"]
        assert np.array_equal(read_mask(catalog.root / path, SIZE), truth(seed))
    assert catalog.manifest["n_patients"] == 3
    assert catalog.manifest["n_videos"] == 5
    assert catalog.manifest["unit"] == "patient"


def test_guard_D11_nothing_raw_is_in_the_data_set_or_printed(options, tmp_path, capsys):
    prepare(options)
    raw = Scanner(tmp_path / "set.identity")
    printed = capsys.readouterr()
    assert "burnt into the pixels" in printed.out
    # The paths printed are the user's own; this test's folder is named after the test.
    assert raw.find((printed.out + printed.err).replace(str(tmp_path), "")) == []
    for path in (tmp_path / "set").rglob("*"):
        assert raw.find(str(path.relative_to(tmp_path))) == []
        if path.is_file():
            assert raw.find(path.read_bytes().decode("latin-1")) == [] or path.suffix == ".png"
            assert b"Quillon" not in path.read_bytes()


def test_guard_D13_statistics_are_of_the_whole_set(options, capsys):
    figures = prepare(options).manifest["statistics"]
    shares = [truth(seed).mean() for seed in range(15)]
    row = figures["phrases"]["blood vessel"]
    assert row["share_of_all"] == pytest.approx(np.mean(shares))
    assert row["share_where_present"]["max"] == pytest.approx(max(shares))
    assert figures["sizes"] == {"32x24": 15}
    assert f"{np.mean(shares):.2%}" in capsys.readouterr().out


def test_again_is_idempotent(options, tmp_path, capsys):
    before = prepare(options)
    stamp = (tmp_path / "set/manifest.json").stat().st_mtime_ns
    assert prepare(options) == before
    assert "unchanged" in capsys.readouterr().out
    assert (tmp_path / "set/manifest.json").stat().st_mtime_ns == stamp
    shutil.rmtree(tmp_path / "set")
    assert prepare(options) == before  # the salt in the mapping gives the same names


def test_the_split_does_not_depend_on_the_salt(options, tmp_path):
    def test_files(out):
        catalog = prepare(replace(options, out=str(tmp_path / out)))
        files = json.loads((tmp_path / f"{out}.identity/mapping.json").read_text())["files"]
        return sorted(stem for stem, frame_id in files.items() if frame_id in catalog.split.parts["test"])

    assert test_files("one") == test_files("two")


def test_another_source_is_not_overwritten_unasked(options, tmp_path):
    prepare(options)
    write_mask(tmp_path / f"raw/masks/{stems()[0]}_mask.png", truth(77))
    with pytest.raises(VesselError, match="overwrite=true"):
        prepare(options)
    old = Catalog.open(tmp_path / "set")
    assert prepare(replace(options, overwrite=True)).fingerprint != old.fingerprint
    assert sorted(p.name for p in tmp_path.iterdir()) == ["raw", "set", "set.identity"]


def test_a_foreign_folder_is_never_overwritten(options, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/thesis.tex").write_text("years")
    with pytest.raises(VesselError, match="no prepared data set"):
        prepare(replace(options, overwrite=True))
    assert (tmp_path / "set/thesis.tex").read_text() == "years"


def test_every_bad_item_is_told_at_once_and_nothing_written(options, tmp_path):
    raw = tmp_path / "raw"
    cut = raw / f"images/{stems()[0]}.png"
    cut.write_bytes(cut.read_bytes()[:900])
    write_mask(raw / f"masks/{stems()[1]}_mask.png", np.ones((24, 31), dtype=bool))
    (raw / f"masks/{stems()[2]}_mask.png").unlink()
    Image.fromarray(picture(99)).save(raw / "images/nobody.png")
    write_mask(raw / "masks/nobody_mask.png", truth(99))
    with pytest.raises(BadItemsError) as caught:
        prepare(options)
    reasons = " | ".join(problem.reason for problem in caught.value.problems)
    assert len(caught.value.problems) == 4
    for said in ("cannot be read", "the mask is 31x24", "has no annotation", "tells no patient"):
        assert said in reasons
    assert [p.name for p in tmp_path.iterdir()] == ["raw"]


def test_guard_D1_polygons_on_another_canvas(options, tmp_path):
    shutil.rmtree(tmp_path / "raw/masks")
    box = [0, 0, 40, 0, 40, 30, 0, 30]  # a 64x48 canvas: a larger box than the 32x24 image holds
    entries = [{"image": f"{stem}.png", "mask": [[box]], "text": ["vessel"]} for stem in stems()]
    (tmp_path / "raw/annotations.json").write_text(json.dumps(entries))
    with pytest.raises(BadItemsError, match=r"entry 0 .*outside the 32x24 image"):
        prepare(options)
    stated = [{**entry, "width": 64, "height": 48} for entry in entries]
    (tmp_path / "raw/annotations.json").write_text(json.dumps(stated))
    catalog = prepare(options)
    assert catalog.manifest["statistics"]["phrases"]["vessel"]["share_of_all"] == pytest.approx(20 * 15 / (32 * 24))


def test_guard_D6_overlapping_fragments_stay_boolean(options, tmp_path):
    shutil.rmtree(tmp_path / "raw/masks")
    boxes = [[0, 0, 8, 0, 8, 8, 0, 8], [4, 0, 12, 0, 12, 8, 4, 8]]
    entries = [{"image": f"{stem}.png", "mask": boxes, "text": ["vessel"] * 2} for stem in stems()]
    (tmp_path / "raw/annotations.json").write_text(json.dumps(entries))
    catalog = prepare(options)
    frame = next(iter(catalog.frames.values()))
    assert read_mask(catalog.root / frame.masks["vessel"], SIZE).sum() == 12 * 8


def test_annotations_for_interchange_are_a_source_again(options, tmp_path):
    one = prepare(options)
    (tmp_path / "again").mkdir()
    shutil.copytree(tmp_path / "set/images", tmp_path / "again/images")
    shutil.copy(tmp_path / "set/annotations.json", tmp_path / "again")
    pattern = r"(?P<video>(?P<patient>p\w+)_v\d+)_(?P<frame>\d+)"
    two = prepare(replace(options, source=str(tmp_path / "again"), out=str(tmp_path / "two"), identity=pattern))
    assert two.manifest["masks_hash"] != ""
    rows = [c.manifest["statistics"]["phrases"]["blood vessel"] for c in (one, two)]
    assert rows[0]["share_of_all"] == pytest.approx(rows[1]["share_of_all"])


def test_declared_absence_is_recorded(options, tmp_path):
    write_mask(tmp_path / f"raw/masks/{stems()[0]}_mask.png", np.zeros(SIZE, dtype=bool))
    (tmp_path / f"raw/masks/{stems()[1]}_mask.png").unlink()
    catalog = prepare(replace(options, missing="empty"))
    assert sum(frame.masks["blood vessel"] is None for frame in catalog.frames.values()) == 2
    assert catalog.manifest["statistics"]["phrases"]["blood vessel"]["absent"] == 2


def test_16_bit_images_of_one_source_keep_their_relative_brightness(options, tmp_path, capsys):
    for seed, stem in enumerate(stems()):  # frames reach 1,000 to 4,000 of 4,095
        dim = picture(seed)[..., 0].astype(np.uint16) * (4 if seed % 2 else 15)
        Image.fromarray(dim).save(tmp_path / f"raw/images/{stem}.png")
    catalog = prepare(options)
    files = json.loads((tmp_path / "set.identity/mapping.json").read_text())["files"]
    for seed, factor in ((0, 15), (1, 4)):
        with Image.open(catalog.root / catalog.frames[files[stems()[seed]]].image) as image:
            expected = np.rint(picture(seed)[..., 0].astype(float) * factor * 255 / 4095)
            assert np.array_equal(np.array(image)[..., 0], expected)
    assert catalog.manifest["grey_bits"] == 12
    assert "all scaled from 12 bits" in capsys.readouterr().out


@pytest.mark.parametrize(("given", "kept"), [(0.01, (0.01, 0.01)), ([0.01, 2], (0.01, 2.0))])
def test_the_pixel_spacing_is_kept(options, given, kept):
    unknown = prepare(options)
    assert unknown.pixel_spacing is None
    with pytest.raises(VesselError, match="other options"):
        prepare(replace(options, pixel_spacing=given))
    known = prepare(replace(options, pixel_spacing=given, overwrite=True))
    assert known.pixel_spacing == Catalog.open(known.root).pixel_spacing == kept
    assert known.fingerprint != unknown.fingerprint
    assert prepare(replace(options, pixel_spacing=list(kept))).fingerprint == known.fingerprint


def test_data_sets_of_unknown_spacing_keep_the_fingerprint_they_had(options):
    catalog = prepare(options)
    frames = [asdict(frame) for frame in catalog.frames.values()]
    assert catalog.fingerprint == digest([frames, catalog.manifest["masks_hash"]])


@pytest.mark.parametrize(
    "wrong", [0, -0.1, float("nan"), float("inf"), "0.01 mm", True, [], [0.01], [0.01, 0.0], [0.01] * 3]
)
def test_a_pixel_spacing_that_is_none_is_refused(options, wrong, tmp_path):
    with pytest.raises(VesselError, match=r"pixel_spacing=.*give the millimetres of a pixel"):
        prepare(replace(options, pixel_spacing=wrong))
    assert [p.name for p in tmp_path.iterdir()] == ["raw"]


def test_a_part_that_shows_a_phrase_nowhere_is_told(options, tmp_path, capsys):
    before = prepare(options)
    assert before.manifest["warnings"] == []
    files = json.loads((tmp_path / "set.identity/mapping.json").read_text())["files"]
    for stem, frame_id in files.items():
        if frame_id in before.split.parts["test"]:
            write_mask(tmp_path / f"raw/masks/{stem}_mask.png", np.zeros(SIZE, dtype=bool))
    [warning] = prepare(replace(options, overwrite=True)).manifest["warnings"]
    assert warning.startswith("blood vessel is in none of the ")
    assert f"warning: {warning}" in capsys.readouterr().out


def test_duplicates_across_splits_are_named(options, tmp_path):
    first, last = stems()[0], stems()[-1]
    shutil.copy(tmp_path / f"raw/images/{first}.png", tmp_path / f"raw/images/{last}.png")
    with pytest.raises(BadItemsError) as caught:
        prepare(options)
    assert first in str(caught.value)
    assert last in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["raw"]


def test_guard_D9_one_patient_needs_another_unit_by_name(options, tmp_path):
    for path in [*(tmp_path / "raw").rglob("ana*"), *(tmp_path / "raw").rglob("bo*")]:
        path.unlink()
    with pytest.raises(VesselError, match="split=block"):
        prepare(options)
    catalog = prepare(replace(options, split="block", gap=0))
    assert "same patients" in catalog.manifest["note"] == catalog.split.note


def test_processes_give_what_one_process_gives(options, tmp_path, monkeypatch):
    monkeypatch.setattr("vessel.data.preparation._SERIAL_BELOW", 2)
    one = prepare(options)
    shutil.rmtree(tmp_path / "set")
    assert prepare(replace(options, workers=2)) == one


@pytest.mark.parametrize(("workers", "cores", "processes"), [("auto", 8, 8), ("auto", 1, 0), (0, 8, 0), (1, 8, 1)])
def test_workers_zero_is_the_main_process_and_auto_is_every_core(options, monkeypatch, workers, cores, processes):
    assert defaults().workers == "auto"
    monkeypatch.setattr("vessel.data.preparation.os.cpu_count", lambda: cores)
    assert replace(options, workers=workers).processes == processes


def test_workers_zero_starts_no_process(options, monkeypatch):
    monkeypatch.setattr("vessel.data.preparation._SERIAL_BELOW", 2)
    monkeypatch.delattr("vessel.data.preparation.ProcessPoolExecutor")
    assert len(prepare(options).frames) == 15


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"source": "nowhere"}, "no such folder"),
        ({"source": __file__}, "is a file"),
        ({"split": "patients"}, "choose one of patient, block, frame"),
        ({"layout": "coco"}, "layout=coco"),
        ({"folds": -1}, "folds=-1"),
        ({"workers": -1}, "workers=-1"),
        ({"workers": "all"}, "workers=all"),
        ({"phrase": "_"}, "phrase"),
        ({"phrase": "All"}, "mean over phrases"),
        ({"identity": "("}, "identity="),
    ],
)
def test_bad_options(options, changes, said):
    with pytest.raises(VesselError, match=said):
        prepare(replace(options, **changes))


def test_places_that_would_mix_input_and_output(options, tmp_path):
    with pytest.raises(VesselError, match="inside the other"):
        prepare(replace(options, out=str(tmp_path / "raw/out")))
    with pytest.raises(VesselError, match="must not travel"):
        prepare(replace(options, mapping=str(tmp_path / "set/names")))
    with pytest.raises(VesselError, match="mapping=DIR"):
        prepare(replace(options, mapping=str(tmp_path / "raw")))


def test_hub_that_cannot_be_reached(options, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(VesselError, match="hf://nobody/nothing: "):
        prepare(replace(options, source="hf://nobody/nothing"))


def test_synthetic_sources_are_a_function_of_their_seed(options, tmp_path):
    small = replace(options.synthetic, patients=3, frames=2, size=64)
    wanted = replace(options, source="synthetic", synthetic=small)
    one = prepare(replace(wanted, out=str(tmp_path / "one")))
    two = prepare(replace(wanted, out=str(tmp_path / "two")))
    assert one.fingerprint == two.fingerprint
    assert one.split == two.split
