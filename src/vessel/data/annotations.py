"""Annotation files in, phrases with polygons out: LabelMe, and Sa2VA `annotations.json` in its three shapes."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vessel.data.masks import MIN_POINTS
from vessel.errors import Problem, VesselError

# How the human side of a conversation asks for a mask; the phrase is what it asks for.
_QUESTION = re.compile(
    r"(?:segment|highlight|outline|masks? (?:for|of)|(?:what|where) (?:is|are))\s+(?:(?:the|a|an|all)\s+)*"
    r"(?P<phrase>.+?)(?:\s+(?:in|on|from|of)\s+(?:this|the)\s+(?:image|picture|frame)\b.*)?[\s.?!]*$",
    re.IGNORECASE | re.DOTALL,
)


@dataclass(frozen=True)
class Polygon:
    """One polygon of an annotation file.

    Attributes:
        where: file, entry and index, for messages.
        points: flat `x1, y1, x2, y2, …`.
        canvas: (H, W) that the file says its coordinates belong to; None when it says nothing.
    """

    where: str
    points: tuple[float, ...]
    canvas: tuple[int, int] | None = None


Drawn = dict[str, tuple[Polygon, ...]]  # phrase -> polygons; no polygon declares the phrase absent


def normal_phrase(text: str) -> str:
    """The one spelling of a phrase: lower case, single spaces instead of underscores, no full stop at the end."""
    return re.sub(r"[\s_]+", " ", text).strip().removesuffix(".").rstrip().lower()


def fit(polygons: Sequence[Polygon], size: tuple[int, int]) -> list[list[float]]:
    """Bring polygons to the coordinates of their image.

    Args:
        polygons: in the coordinates of their own canvas.
        size: (H, W) of the decoded image.

    Returns:
        flat polygons in pixels of the image.

    Raises:
        VesselError: when the canvas has another shape than the image, or a polygon lies outside it.
    """
    fitted = []
    for polygon in polygons:
        height, width = polygon.canvas or size
        if abs(height * size[1] / (width * size[0]) - 1) > 0.01:
            reason = f"drawn on a {width}x{height} canvas, which is no scaled version of the {size[1]}x{size[0]} image"
            raise VesselError(Problem(polygon.where, reason, "annotate the image itself, or remove it"))
        xs, ys = polygon.points[::2], polygon.points[1::2]
        # The far edge of the last pixel lies at the width; one pixel more is a rounding slip, not another canvas.
        if min(xs) < -1 or min(ys) < -1 or max(xs) > width + 1 or max(ys) > height + 1:
            reason = (
                f"reaches x {min(xs):g}..{max(xs):g}, y {min(ys):g}..{max(ys):g} outside the {width}x{height} image"
            )
            remedy = "scale the polygons to the image, or state the canvas they were drawn on (`width` and `height`)"
            raise VesselError(Problem(polygon.where, reason, remedy))
        scales = (size[1] / width, size[0] / height)
        fitted.append([value * scales[index % 2] for index, value in enumerate(polygon.points)])
    return fitted


def read_labelme(file: Path) -> Drawn:
    """Read one LabelMe file; its image may have any name.

    Raises:
        VesselError: with the first thing that is wrong, naming file and shape.
    """
    content = _load(file)
    shapes = content.get("shapes") if isinstance(content, dict) else None
    if not isinstance(shapes, list):
        raise VesselError(Problem(str(file), "has no list `shapes`", "export it from LabelMe again"))
    canvas = _canvas(content, "imageHeight", "imageWidth")
    drawn: Drawn = {}
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
        drawn[phrase] = (*drawn.get(phrase, ()), _polygon(flat, where, canvas))
    return drawn


def read_sa2va(file: Path) -> tuple[dict[str, Drawn], list[Problem]]:
    """Read `annotations.json`: nested polygons, the flat variant, or `segmentation` with `conversations`.

    Every polygon of one phrase belongs to one object; several entries of one image are put together.

    Returns:
        polygons by image file name, and every entry that could not be read.
    """
    entries = _load(file)
    if not isinstance(entries, list):
        return {}, [Problem(str(file), "is not a list of entries", "write a list of {image, mask, text}")]
    by_image: dict[str, Drawn] = {}
    problems = []
    for index, entry in enumerate(entries):
        where = f"{file}, entry {index}"
        try:
            name, drawn = _entry(entry, where)
        except VesselError as error:
            problems.append(error.args[0])
            # It is annotated, if badly: one message about it is enough.
            if isinstance(entry, dict) and isinstance(entry.get("image"), str):
                by_image.setdefault(entry["image"], {})
            continue
        known = by_image.setdefault(name, {})
        for phrase, polygons in drawn.items():
            known[phrase] = (*known.get(phrase, ()), *polygons)
    return by_image, problems


def _entry(entry: Any, where: str) -> tuple[str, Drawn]:
    if not isinstance(entry, dict) or not isinstance(entry.get("image"), str):
        raise VesselError(Problem(where, "has no text `image`", "write {image, mask, text}"))
    where = f"{where} ({entry['image']})"
    objects = entry.get("mask")
    if not isinstance(objects, list):
        raise VesselError(Problem(where, "has no list `mask`", "write a list; [] with text [] declares an empty image"))
    grouped = [_polygons_of(item, f"{where}, mask {index}") for index, item in enumerate(objects)]
    phrases = _phrases(entry, where)
    if len(phrases) == 1 and grouped:
        phrases = phrases * len(grouped)
    if len(phrases) != len(grouped):
        reason = f"{len(grouped)} masks and {len(phrases)} phrases"
        raise VesselError(Problem(where, reason, "give one phrase for all masks, or one phrase a mask"))
    canvas = _canvas(entry, "height", "width")
    drawn: Drawn = {}
    for mask, (phrase, pieces) in enumerate(zip(phrases, grouped, strict=True)):
        for index, piece in enumerate(pieces):
            polygon = _polygon(piece, f"{where}, mask {mask}, polygon {index}", canvas)
            drawn[phrase] = (*drawn.get(phrase, ()), polygon)
    return entry["image"], drawn


def _polygons_of(item: Any, where: str) -> list[Any]:
    """The polygons of one object, whichever of the three shapes it has."""
    if isinstance(item, dict):
        item = item.get("segmentation")
    if not isinstance(item, list) or not item:
        raise VesselError(Problem(where, "holds no polygon", "give flat lists of x, y; run-length codes are not read"))
    return item if all(isinstance(piece, list) for piece in item) else [item]


def _phrases(entry: Mapping[str, Any], where: str) -> list[str]:
    text = entry.get("text")
    if text is None and isinstance(entry.get("conversations"), list):
        text = [_asked_for(turn, where) for turn in entry["conversations"] if _is_human(turn)]
    # A string is one phrase; iterating it would make a phrase of each letter.
    texts = [text] if isinstance(text, str) else text
    if not isinstance(texts, list) or not all(isinstance(t, str) and normal_phrase(t) for t in texts):
        reason = "`text` is not a list of phrases"
        raise VesselError(Problem(where, reason, "write one phrase for all masks, or one phrase a mask"))
    return [normal_phrase(t) for t in texts]


def _is_human(turn: Any) -> bool:
    return isinstance(turn, dict) and turn.get("from") in {"human", "user"}


def _asked_for(turn: Mapping[str, Any], where: str) -> str:
    question = str(turn.get("value", "")).replace("<image>", " ")
    found = _QUESTION.search(question.strip())
    if not found:
        reason = f"no phrase found in the question {question.strip()[:80]!r}"
        raise VesselError(Problem(where, reason, "add `text: [phrase]` to the entry"))
    return found["phrase"]


def _polygon(value: Any, where: str, canvas: tuple[int, int] | None) -> Polygon:
    numbers = isinstance(value, list) and all(_is_number(n) for n in value)
    if not numbers or len(value) % 2:
        reason = "is not a flat list of finite x, y pairs"
        raise VesselError(Problem(where, reason, "write x1, y1, x2, y2, … in pixels"))
    if len(value) < 2 * MIN_POINTS:
        reason = f"has {len(value) // 2} point(s)"
        raise VesselError(Problem(where, reason, f"draw at least {MIN_POINTS} points, or delete it"))
    return Polygon(where, tuple(float(n) for n in value), canvas)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2


def _canvas(content: Mapping[str, Any], height: str, width: str) -> tuple[int, int] | None:
    sides = (content.get(height), content.get(width))
    if all(isinstance(side, int) and side > 0 for side in sides):
        return int(sides[0]), int(sides[1])  # type: ignore[arg-type]
    return None


def _load(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise VesselError(Problem(str(file), f"is not readable JSON ({error})", "export it again")) from error
