"""Sa2VA annotation files in their three shapes, right and wrong."""

import json

import pytest

from vessel.data.readers.sa2va import read_sa2va

A = [0, 0, 4, 0, 4, 4]
B = [5, 5, 9, 5, 9, 9]


def sa2va(tmp_path, *entries):
    file = tmp_path / "annotations.json"
    file.write_text(json.dumps(list(entries)), encoding="utf-8")
    return read_sa2va(file)


def points(drawn):
    return {phrase: [list(p.points) for p in polygons] for phrase, polygons in drawn.items()}


def test_nested_polygons_pair_with_their_phrases(tmp_path):
    by_image, problems = sa2va(tmp_path, {"image": "a.png", "mask": [[A, B], [B]], "text": ["Lumen.", "plaque"]})
    assert problems == []
    assert points(by_image["a.png"]) == {"lumen": [A, B], "plaque": [B]}


def test_flat_polygons_pair_with_their_phrases(tmp_path):
    by_image, _ = sa2va(tmp_path, {"image": "a.png", "mask": [A, B], "text": ["lumen", "plaque"]})
    assert points(by_image["a.png"]) == {"lumen": [A], "plaque": [B]}


def test_conversations_name_the_phrase(tmp_path):
    mask = [{"segmentation": [A], "area": 8, "bbox": [0, 0, 4, 4], "category_id": 1}, {"segmentation": [B]}]
    for question in (
        "<image>\nPlease segment the blood vessel.",
        "<image>Can you segment the Blood vessel in this image?",
        "<image>\nWhat is the blood vessel in this image? Please respond with segmentation mask.",
        "<image>\nPlease give a segmentation mask for the blood vessel in the image.",
    ):
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "Sure, [SEG]."}]
        by_image, problems = sa2va(tmp_path, {"image": "a.png", "mask": mask, "conversations": turns})
        assert problems == []
        assert points(by_image["a.png"]) == {"blood vessel": [A, B]}


def test_a_question_without_a_phrase_is_a_problem(tmp_path):
    turns = [{"from": "human", "value": "<image>\nHello?"}]
    _, problems = sa2va(tmp_path, {"image": "a.png", "mask": [{"segmentation": [A]}], "conversations": turns})
    assert "no phrase found in the question 'Hello?'" in str(problems[0])


@pytest.mark.parametrize("mask", [[[A, B]], [A, B], [[A], [B]]])
def test_guard_D3_one_phrase_keeps_every_fragment(tmp_path, mask):
    by_image, problems = sa2va(tmp_path, {"image": "a.png", "mask": mask, "text": ["vessel"]})
    assert problems == []
    assert points(by_image["a.png"]) == {"vessel": [A, B]}


@pytest.mark.parametrize(("mask", "text"), [([A, B, A], ["x", "y"]), ([A], ["x", "y"]), ([], ["x"]), ([A], [])])
def test_guard_D3_any_other_mismatch_is_an_error(tmp_path, mask, text):
    by_image, problems = sa2va(tmp_path, {"image": "a.png", "mask": mask, "text": text})
    assert by_image == {"a.png": {}}
    assert f"entry 0 (a.png): {len(mask)} masks and {len(text)} phrases" in str(problems[0])


def test_guard_D4_a_string_is_one_phrase(tmp_path):
    by_image, problems = sa2va(tmp_path, {"image": "a.png", "mask": [A, B], "text": "blood vessel"})
    assert problems == []
    assert points(by_image["a.png"]) == {"blood vessel": [A, B]}


@pytest.mark.parametrize("text", [3, [3], [""], {"a": 1}, None])
def test_guard_D4_other_types_are_refused(tmp_path, text):
    _, problems = sa2va(tmp_path, {"image": "a.png", "mask": [A], "text": text})
    assert "`text` is not a list of phrases" in str(problems[0])


def test_guard_D5_polygons_of_one_phrase_are_one_object(tmp_path):
    one = {"image": "a.png", "mask": [A, B], "text": ["vessel", "Vessel"]}
    by_image, _ = sa2va(tmp_path, one, {"image": "a.png", "mask": [A], "text": ["vessel"]})
    assert points(by_image["a.png"]) == {"vessel": [A, B, A]}


def test_guard_D2_short_polygons_are_named_all_at_once(tmp_path):
    good = {"image": "a.png", "mask": [[A, B]], "text": ["vessel"]}
    bad = {"image": "b.png", "mask": [[A, [3, 3]]], "text": ["vessel"]}
    worse = {"image": "c.png", "mask": [[1, 2, 3]], "text": ["vessel"]}
    by_image, problems = sa2va(tmp_path, good, bad, worse)
    assert points(by_image["a.png"]) == {"vessel": [A, B]}
    assert [p.where.split("annotations.json, ")[1] for p in problems] == [
        "entry 1 (b.png), mask 0, polygon 1",
        "entry 2 (c.png), mask 0, polygon 0",
    ]
    assert "1 point(s)" in problems[0].reason


@pytest.mark.parametrize("entry", [3, {"mask": []}, {"image": "a.png"}, {"image": "a.png", "mask": [3], "text": ["x"]}])
def test_malformed_entries_are_problems(tmp_path, entry):
    assert len(sa2va(tmp_path, entry)[1]) == 1


def test_an_empty_entry_declares_the_image_empty(tmp_path):
    assert sa2va(tmp_path, {"image": "a.png", "mask": [], "text": []}) == ({"a.png": {}}, [])
