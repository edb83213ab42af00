"""Layout `labelme`: one LabelMe file an image, in json/ or beside the images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vessel.data.phrases import normal_phrase
from vessel.data.readers.layout import Labels, SourceLayout, SourcePaths, image_key, list_files
from vessel.data.readers.polygons import PhrasePolygons, parse_polygon, read_annotations, read_canvas
from vessel.errors import Problem, VesselError


def read_labelme(file: Path) -> PhrasePolygons:
    """Read one LabelMe file; its image may have any name.

    Raises:
        VesselError: names the file and its first bad shape.
    """
    content = read_annotations(file)
    shapes = content.get("shapes") if isinstance(content, dict) else None
    if not isinstance(shapes, list):
        raise VesselError(Problem(str(file), "has no list `shapes`", "export it from LabelMe again"))
    canvas = read_canvas(content, "imageHeight", "imageWidth")
    polygons: PhrasePolygons = {}
    for index, shape in enumerate(shapes):
        where = f"{file}, polygon {index}"
        if not isinstance(shape, dict) or not isinstance(shape.get("label"), str) or not normal_phrase(shape["label"]):
            raise VesselError(Problem(where, "has no text `label`", "name the structure in LabelMe"))
        kind = shape.get("shape_type") or "polygon"
        if kind != "polygon":
            raise VesselError(Problem(where, f"is a {kind}", "draw it as a polygon"))
        phrase = normal_phrase(shape["label"])
        points = shape.get("points")
        flat = [n for p in points for n in p] if isinstance(points, list) and all(map(_is_pair, points)) else points
        polygons[phrase] = (*polygons.get(phrase, ()), parse_polygon(flat, where, canvas))
    return polygons


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2


def _find_files(paths: SourcePaths) -> list[Path]:
    beside = [p for p in list_files(paths.images, ".json") if p.name != "annotations.json"]
    return list_files(paths.folder / "json", ".json") or beside


def _is_labelme(file: Path) -> bool:
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return True  # a broken file is listed with the other bad items rather than overlooked
    return isinstance(content, dict) and "shapes" in content


def _is_present(paths: SourcePaths) -> bool:
    return any(_is_labelme(file) for file in _find_files(paths)[:1])


def _read(paths: SourcePaths, _: str) -> tuple[Labels, list[Problem]]:
    labels: Labels = {}
    problems = []
    for file in _find_files(paths):
        try:
            labels[image_key(file.stem)] = dict(read_labelme(file))
        except VesselError as error:
            labels[image_key(file.stem)] = {}
            problems.append(error.args[0])
    return labels, problems


LAYOUT = SourceLayout("LabelMe files <stem>.json in json/ or beside each image", _is_present, _read)
