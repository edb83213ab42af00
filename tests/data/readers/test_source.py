"""Source folders of every layout, and folders of none."""

import json
import re
import unicodedata

import numpy as np
import pytest
from PIL import Image

from vessel.data.readers.source import read_source
from vessel.errors import VesselError

TRIANGLE = [[1, 1], [6, 1], [6, 6]]


def image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)


def mask(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.eye(8, dtype=bool)).save(path)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def labelled(source):
    return {item.image.name: sorted(item.labels) for item in source.items}


@pytest.mark.parametrize(
    ("images", "masks"),
    [("images/{}.jpg", "masks/{}_mask.png"), ("{}.png", "{}_mask.png"), ("images/{}.png", "images/{}_mask.png")],
)
def test_masks_in_a_folder_or_beside(tmp_path, images, masks):
    for stem in ("001_1_1", "001_1_2"):
        image(tmp_path / images.format(stem))
        mask(tmp_path / masks.format(stem))
    source = read_source(tmp_path, phrase="Lumen")
    assert source.problems == []
    assert list(labelled(source).values()) == [["lumen"], ["lumen"]]
    assert source.phrases == ("lumen",)


@pytest.mark.parametrize("masks", ["{}_mask.png", "masks/{}_mask.png"])
def test_a_folder_of_masks_alone_is_refused_with_their_number(tmp_path, masks):
    mask(tmp_path / masks.format("001_1_1"))
    with pytest.raises(VesselError, match=re.escape(f"{tmp_path}: 1 masks")):
        read_source(tmp_path)


@pytest.mark.parametrize("folder", ["all", "All_"])
def test_a_phrase_named_all_is_refused_before_anything_is_trained(tmp_path, folder):
    image(tmp_path / "images/001_1_1.png")
    mask(tmp_path / f"masks/{folder}/001_1_1_mask.png")
    [problem] = read_source(tmp_path).problems
    assert "phrase 'all'" in str(problem)


def test_one_folder_per_phrase_and_absent_phrases(tmp_path):
    for stem in "abc":
        image(tmp_path / f"images/{stem}.png")
    mask(tmp_path / "masks/lumen/a_mask.png")
    mask(tmp_path / "masks/lumen/b.png")
    mask(tmp_path / "masks/Fibrous_cap/a_mask.png")
    source = read_source(tmp_path)
    assert source.phrases == ("fibrous cap", "lumen")
    assert labelled(source) == {"a.png": ["fibrous cap", "lumen"], "b.png": ["lumen"], "c.png": []}
    assert [p.where for p in source.problems] == [str(tmp_path / "images/c.png")]


@pytest.mark.parametrize("where", ["json/{}.json", "images/{}.json"])
def test_labelme(tmp_path, where):
    image(tmp_path / "images/a.png")
    write(tmp_path / where.format("a"), {"shapes": [{"label": "vessel", "points": TRIANGLE}]})
    assert labelled(read_source(tmp_path)) == {"a.png": ["vessel"]}


def test_sa2va_annotations(tmp_path):
    image(tmp_path / "images/a.jpg")
    image(tmp_path / "images/b.jpg")
    flat = [1, 1, 6, 1, 6, 6]
    entries = [
        {"image": "a.jpg", "mask": [[flat]], "text": ["vessel"]},
        {"image": "images/b.jpg", "mask": [], "text": []},
    ]
    write(tmp_path / "annotations.json", entries)
    source = read_source(tmp_path)
    assert source.problems == []
    assert labelled(source) == {"a.jpg": ["vessel"], "b.jpg": []}


def test_names_with_spaces_and_accents_in_either_unicode_form(tmp_path):
    image(tmp_path / f"images/{unicodedata.normalize('NFD', 'é lü')}_1_2.png")
    mask(tmp_path / f"masks/{unicodedata.normalize('NFC', 'é lü')}_1_2_mask.png")
    source = read_source(tmp_path)
    assert source.problems == []
    assert list(labelled(source).values()) == [["blood vessel"]]


def test_guard_D12_missing_is_an_error_and_empty_a_declared_state(tmp_path):
    image(tmp_path / "images/a.png")
    image(tmp_path / "images/b.png")
    mask(tmp_path / "masks/a_mask.png")
    problems = read_source(tmp_path).problems
    assert [(p.where, p.reason) for p in problems] == [(str(tmp_path / "images/b.png"), "has no annotation")]
    assert "missing=empty" in problems[0].remedy
    declared = read_source(tmp_path, missing="empty")
    assert declared.problems == []
    assert labelled(declared) == {"a.png": ["blood vessel"], "b.png": []}


def test_labels_without_image_and_doubles_are_problems(tmp_path):
    image(tmp_path / "images/a.png")
    image(tmp_path / "images/a.jpg")
    mask(tmp_path / "masks/lumen/a_mask.png")
    mask(tmp_path / "masks/lumen/a.png")
    mask(tmp_path / "masks/lumen_/gone.png")
    reasons = [p.reason for p in read_source(tmp_path).problems]
    assert reasons == [
        "a second mask of the same image and phrase",
        "a second folder of the phrase 'lumen'",
        "has the same stem as a.jpg",
        "is annotated but there is no such image",
    ]


def test_broken_labelme_files_are_listed_together(tmp_path):
    for stem in "abc":
        image(tmp_path / f"images/{stem}.png")
        (tmp_path / f"images/{stem}.json").write_text("{")
    write(tmp_path / "images/b.json", {"shapes": [{"label": "x", "points": [[1, 1]]}]})
    assert len(read_source(tmp_path).problems) == 3


def test_folder_without_images(tmp_path):
    mask(tmp_path / "masks/a_mask.png")
    with pytest.raises(VesselError, match=re.escape(str(tmp_path)) + r".*\.jpg"):
        read_source(tmp_path)


def test_folder_without_annotations_lists_the_layouts(tmp_path):
    image(tmp_path / "images/a.png")
    with pytest.raises(VesselError, match=r"(?s)annotations.*layout=masks.*layout=phrases.*labelme.*annotations\.json"):
        read_source(tmp_path)


def test_several_kinds_are_refused_unless_one_is_named(tmp_path):
    image(tmp_path / "images/a.png")
    mask(tmp_path / "masks/a_mask.png")
    write(tmp_path / "json/a.json", {"shapes": [{"label": "vessel", "points": TRIANGLE}]})
    with pytest.raises(VesselError, match=r"(?s)\b2 .*layout=masks.*layout=labelme"):
        read_source(tmp_path)
    assert read_source(tmp_path, layout="masks").phrases == ("blood vessel",)
    assert read_source(tmp_path, layout="labelme").phrases == ("vessel",)


def test_hidden_files_are_no_images(tmp_path):
    image(tmp_path / "images/a.png")
    (tmp_path / "images/._a.png").write_bytes(b"")
    mask(tmp_path / "masks/a_mask.png")
    assert list(labelled(read_source(tmp_path))) == ["a.png"]


def test_a_prepared_data_set_is_no_source(tmp_path):
    image(tmp_path / "images/a.png")
    write(tmp_path / "manifest.json", {})
    write(tmp_path / "splits.json", {})
    with pytest.raises(VesselError, match=re.escape(f"data.root={tmp_path}")):
        read_source(tmp_path)
