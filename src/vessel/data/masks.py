"""Boolean masks: rasterise polygons, read and write lossless files, trace outlines for interchange."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from vessel.errors import Problem, VesselError

MIN_POINTS = 3


def rasterise(polygons: Sequence[Sequence[float]], size: tuple[int, int]) -> np.ndarray:
    """Fill polygons; where they overlap the result is their union.

    Args:
        polygons: flat `x1, y1, x2, y2, …` in pixels, the corner of the first pixel at 0, 0; three points at least.
        size: (H, W).

    Returns:
        bool [H, W].

    Raises:
        VesselError: for a polygon of fewer than three points or of an odd number of coordinates.
    """
    from pycocotools import mask as coco

    for index, polygon in enumerate(polygons):
        # pycocotools reads four numbers as a box and anything shorter as garbage.
        if len(polygon) < 2 * MIN_POINTS or len(polygon) % 2:
            raise VesselError(
                Problem(f"polygon {index}", f"{len(polygon)} coordinates", "give x and y of three points or more")
            )
    if not polygons:
        return np.zeros(size, dtype=bool)
    pieces = coco.frPyObjects([list(map(float, polygon)) for polygon in polygons], *size)
    return coco.decode(coco.merge(pieces)).astype(bool)


def read_mask(path: Path, size: tuple[int, int]) -> np.ndarray:
    """Read a mask file: 1-bit, 0/1, 0/255, or black and one other colour.

    Args:
        path: PNG or another lossless image file.
        size: (H, W) of the image it belongs to.

    Returns:
        bool [H, W].

    Raises:
        VesselError: when it is unreadable, of another size, or holds more than background and foreground.
    """
    try:
        with Image.open(path) as image:
            pixels = np.array(image.convert("RGB") if image.mode not in {"1", "L", "I;16", "I"} else image)
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        reason = f"cannot be read as a mask ({type(error).__name__})"
        raise VesselError(Problem(str(path), reason, "export the mask again as PNG")) from error
    if pixels.shape[:2] != size:
        reason = f"the mask is {pixels.shape[1]}x{pixels.shape[0]} and its image {size[1]}x{size[0]}"
        reason += ", which its EXIF orientation may turn upright" if pixels.shape[1::-1] == size else ""
        raise VesselError(Problem(str(path), reason, "export it at the size of the image; masks are never resized"))
    return _binary(pixels, path)


def _binary(pixels: np.ndarray, path: Path) -> np.ndarray:
    if pixels.dtype == bool:
        return pixels.view(np.uint8) != 0  # Pillow writes true as 255, where compiled code counts on 1
    foreground = pixels != 0 if pixels.ndim == 2 else (pixels != 0).any(axis=2)
    values = np.unique(pixels[foreground], axis=0)
    if len(values) > 1 or (pixels.ndim == 2 and len(values) and int(values[0]) not in {1, 255, 65535}):
        listed = ", ".join(str(value) for value in values[:4].tolist())
        reason = f"not a binary mask: besides 0 it holds {listed}{', …' if len(values) > 4 else ''}"
        raise VesselError(Problem(str(path), reason, "save it as 0/1 or 0/255, one file per phrase"))
    return foreground


def write_mask(path: Path, mask: np.ndarray) -> None:
    """Write a bool [H, W] mask as 1-bit PNG, without loss."""
    assert mask.dtype == bool, "masks are boolean"
    Image.fromarray(mask).save(path, format="PNG")


def mask_polygons(mask: np.ndarray) -> list[list[float]]:
    """Trace a mask into polygons which `rasterise` turns into the same mask, holes and one-pixel vessels included.

    Polygons cannot hold holes, so a region with one is cut through it into two.

    Args:
        mask: bool [H, W].

    Returns:
        flat `x1, y1, …` polygons in pixels.
    """
    import cv2

    # Twofold enlargement puts the contour a quarter pixel inside the edge, so that a single pixel still has an area.
    double = np.repeat(np.repeat(mask.astype(np.uint8), 2, axis=0), 2, axis=1)
    contours, hierarchy = cv2.findContours(double, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    parents = [] if hierarchy is None else np.asarray(hierarchy).reshape(-1, 4)[:, 3]
    holes = [contour for contour, parent in zip(contours, parents, strict=True) if parent >= 0]
    if holes:
        x, _, width, _ = cv2.boundingRect(holes[len(holes) // 2])
        cut = (x + width // 2) // 2
        left, right = mask.copy(), mask.copy()
        left[:, cut:] = False
        right[:, :cut] = False
        return mask_polygons(left) + mask_polygons(right)
    return [((contour.reshape(-1) + 0.5) / 2).tolist() for contour in contours]
