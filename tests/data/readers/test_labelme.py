"""LabelMe files, right and wrong."""

import json

import pytest

from vessel.data.readers.labelme import read_labelme
from vessel.errors import VesselError

A = [0, 0, 4, 0, 4, 4]


def points(drawn):
    return {phrase: [list(p.points) for p in polygons] for phrase, polygons in drawn.items()}


def labelme(tmp_path, *shapes, **more):
    file = tmp_path / "x.json"
    file.write_text(json.dumps({"shapes": list(shapes), **more}), encoding="utf-8")
    return read_labelme(file)


def test_labelme_groups_shapes_by_label_and_keeps_the_canvas(tmp_path):
    shapes = [{"label": "Vessel", "points": [[0, 0], [4, 0], [4, 4]], "shape_type": "polygon"}] * 2
    drawn = labelme(tmp_path, *shapes, imageWidth=800, imageHeight=600)
    assert points(drawn) == {"vessel": [A, A]}
    assert drawn["vessel"][0].canvas == (600, 800)


def test_guard_D2_labelme_shape_of_one_point(tmp_path):
    good = {"label": "vessel", "points": [[0, 0], [4, 0], [4, 4]]}
    with pytest.raises(VesselError, match=r"x\.json, polygon 1: .*\b1 "):
        labelme(tmp_path, good, {"label": "vessel", "points": [[3, 3]]})


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"label": "a", "points": [[0, 0], [1, 1]], "shape_type": "rectangle"}, "rectangle"),
        ({"points": [[0, 0], [1, 1], [2, 0]]}, "`label`"),
        ({"label": "a", "points": [[0, 0], [1], [2, 0]]}, "polygon 0: .*finite"),
        ({"label": "a", "points": [[0, 0], [float("nan"), 1], [2, 0]]}, "polygon 0: .*finite"),
    ],
)
def test_labelme_refusals(tmp_path, shape, message):
    with pytest.raises(VesselError, match=message):
        labelme(tmp_path, shape)


def test_broken_json_is_named(tmp_path):
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(VesselError, match=r"x\.json: .*JSON"):
        read_labelme(tmp_path / "x.json")
