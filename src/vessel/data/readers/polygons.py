"""Polygons of annotation files: parsed, and brought to the size of their image."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vessel.data.masks import MIN_POINTS
from vessel.errors import Problem, VesselError


@dataclass(frozen=True)
class Polygon:
    """One polygon of an annotation file.

    Attributes:
        where: file, entry and index, for messages.
        points: flat `x1, y1, x2, y2, …`.
        canvas: (H, W) of the image that the coordinates belong to; None when it names none.
    """

    where: str
    points: tuple[float, ...]
    canvas: tuple[int, int] | None = None


PhrasePolygons = dict[str, tuple[Polygon, ...]]  # phrase -> polygons; no polygon declares the phrase absent


def fit_polygons(polygons: Sequence[Polygon], size: tuple[int, int]) -> list[list[float]]:
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


def parse_polygon(value: Any, where: str, canvas: tuple[int, int] | None) -> Polygon:
    """Check a flat list `x1, y1, x2, y2, …` of a file and return its polygon.

    Raises:
        VesselError: naming `where`, when it is no such list or has too few points.
    """
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


def read_canvas(content: Mapping[str, Any], height: str, width: str) -> tuple[int, int] | None:
    """Return (H, W) from the keys `height` and `width` of `content`; None where they hold no positive integers."""
    sides = (content.get(height), content.get(width))
    if all(isinstance(side, int) and side > 0 for side in sides):
        return int(sides[0]), int(sides[1])  # type: ignore[arg-type]
    return None


def read_annotations(file: Path) -> Any:
    """Read a JSON file, with or without a byte order mark.

    Raises:
        VesselError: naming the file, when it is not readable JSON.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise VesselError(Problem(str(file), f"is not readable JSON ({error})", "export it again")) from error
