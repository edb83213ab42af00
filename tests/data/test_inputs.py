"""Ways to name images and phrases."""

import re

import numpy as np
import pytest
from PIL import Image

from vessel.data.inputs import find_images, requested_phrases
from vessel.errors import VesselError


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((4, 4), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def scans(tmp_path):
    for name in ("b.png", "a.JPG", "sub/b.png", "sub/b.tif", "größe 1/c.png", "b_mask.png", ".cache/x.png"):
        picture(tmp_path / "scans" / name)
    (tmp_path / "scans/notes.txt").write_text("no image")
    return tmp_path / "scans"


def test_a_folder_with_its_sub_folders(scans):
    found = find_images(str(scans))
    assert [t.name for t in found] == ["a.JPG", "b.png", "größe 1/c.png", "sub/b.png", "sub/b.tif"]
    assert [t.id for t in found] == ["a", "b", "größe 1/c", "sub/b.png", "sub/b.tif"]
    assert all(t.file == scans / t.name for t in found)


def test_one_file(scans):
    [found] = find_images(str(scans / "sub/b.tif"))
    assert (found.id, found.name) == ("b", "b.tif")


def test_a_pattern(scans):
    found = find_images(f"{scans}/**/b.*")
    assert [t.name for t in found] == ["b.png", "sub/b.png", "sub/b.tif"]


def test_results_among_the_images_are_no_input(scans):
    picture(scans / "out/masks/lumen/b.png")
    names = [t.name for t in find_images(str(scans), beside=scans / "out")]
    assert "out/masks/lumen/b.png" not in names
    assert len(names) == 5


def test_a_prepared_data_set_and_its_parts(oct_set):
    everything = {t.id for t in find_images(str(oct_set))}
    parts = [{t.id for t in find_images(str(oct_set), split=part)} for part in ("train", "val", "test")]
    assert set.union(*parts) == everything
    assert sum(map(len, parts)) == len(everything) == 20


@pytest.mark.parametrize("name", ["scans/none", "scans/*.gif", "empty"])
def test_nothing_there_is_an_error(scans, name):
    (scans.parent / "empty").mkdir()
    with pytest.raises(VesselError, match="images="):
        find_images(str(scans.parent / name))


def test_a_split_belongs_to_a_data_set(scans):
    with pytest.raises(VesselError, match="split=test"):
        find_images(str(scans), split="test")


def test_phrases_are_normalised_and_requested_once(prompt):
    assert requested_phrases(None, ("lumen",), prompt) == ("lumen",)
    assert requested_phrases("Fibrous_cap.", (), prompt) == ("fibrous cap",)
    assert requested_phrases(["Lumen", "lumen ", "side branch"], (), prompt) == ("lumen", "side branch")


@pytest.mark.parametrize("phrase", ["<image>\nlumen", "lumen [SEG]", "the [seg] lumen", "<IMG_CONTEXT>", "a<|im_end|>"])
def test_guard_I2_users_give_a_phrase_and_never_tokens(prompt, phrase):
    with pytest.raises(VesselError, match="phrases: .*" + re.escape(repr(phrase))):
        requested_phrases([phrase], (), prompt)


@pytest.mark.parametrize("phrases", [[], "", [" ."]])
def test_a_phrase_has_words(prompt, phrases):
    with pytest.raises(VesselError, match="phrases"):
        requested_phrases(phrases, (), prompt)
