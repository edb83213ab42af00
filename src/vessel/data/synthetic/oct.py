"""Synthetic intravascular OCT: pullbacks drawn in polar coordinates, as the scanner records them.

Units and axes as in `anatomy`; brightness is in [0, 1] of the display's red channel. Field letters: A angles
(A-lines), D depths, S side of the frame. Brightness, decay and speckle were fitted to real frames.
"""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from vessel.data.synthetic.anatomy import (
    A_LINES,
    DEPTHS,
    WIRE,
    Anatomy,
    Array,
    SyntheticPullback,
    anatomy_at,
    angle_between,
    noise,
)

Mask = NDArray[np.bool_]

THETA: Array = (np.arange(A_LINES, dtype=np.float32) * (2 * np.pi / A_LINES))[:, None]
RADIUS: Array = ((np.arange(DEPTHS, dtype=np.float32) + 0.5) / DEPTHS)[None, :]
# The sepia display: green and blue that go with a red level.
RED = (0, 30, 60, 90, 120, 150, 180, 210, 255)
GREEN = (0, 2, 12, 29, 49, 76, 110, 146, 235)
BLUE = (0, 0, 1, 4, 4, 7, 18, 38, 125)


def render(
    pullback: SyntheticPullback, position: float, size: int, rng: np.random.Generator
) -> tuple[NDArray[np.uint8], dict[str, Mask]]:
    """Render one frame with its masks.

    Args:
        pullback: the vessel.
        position: along the pullback, in scanner frames.
        size: side S of the frame in pixels.
        rng: the frame's own generator; it makes the speckle and the small rotation between frames.

    Returns:
        uint8 [S, S, 3] RGB, and a bool [S, S] mask for each of "lumen", "side branch" and "lipid core" that is present.
    """
    turn = np.float32(0.02 * rng.standard_normal())
    polar = _polar(pullback, position, anatomy_at(pullback, position, THETA - turn, RADIUS), THETA - turn, rng)
    theta, radius = _pixel_grid(size)
    anatomy = anatomy_at(pullback, position, theta - turn, radius)
    in_view = radius < 1
    masks = {
        "lumen": (anatomy.lumen < 0) & in_view,
        "side branch": (anatomy.branch < 0) & (anatomy.lumen >= 0) & in_view,
        "lipid core": (anatomy.lipid < 0) & in_view,
    }
    return _display(pullback, polar, size), {phrase: mask for phrase, mask in masks.items() if mask.any()}


def _polar(
    pullback: SyntheticPullback, position: float, anatomy: Anatomy, theta: Array, rng: np.random.Generator
) -> Array:
    """Compute the brightness [A, D] on the display, speckle included."""
    wall = np.minimum(anatomy.lumen, anatomy.branch)
    # A soft minimum, so that layers bend round the mouth of a branch instead of folding.
    depth = np.maximum(-0.05 * np.log(np.exp(-anatomy.lumen / 0.05) + np.exp(-anatomy.branch / 0.05)), 0)
    # Rows of the texture turn slowly along the pullback; its columns follow the wall, not the catheter.
    column = np.minimum((depth * DEPTHS).astype(np.intp), DEPTHS - 1)
    layers = np.take_along_axis(np.roll(pullback.layers, int(position), axis=0), column, axis=1)
    reach = pullback.decay * (1 + 0.25 * pullback.rays[:, None])
    tissue = pullback.gain * np.exp(-((depth / reach) ** 1.3)) + 0.13 * np.exp(-depth / 0.6)
    tissue = tissue * (1 - 0.18 * np.exp(-depth / 0.012))  # the dull rim of the intima
    tissue = tissue * (1 + 0.12 * (1 + pullback.rays[:, None]) * layers * _step(depth - 0.15, 0.06))
    tissue = tissue * (1 - 0.7 * _step(-anatomy.lipid, 0.02))
    blood = 0.045 + pullback.blood * (1 + noise(rng, 20.0, 10.0))
    level = blood + (tissue - blood) * _step(wall, 0.006)
    level = _wire(pullback, position, theta, _catheter(pullback, level, rng))
    speckle = np.log(noise(rng, *pullback.grain) ** 2 + noise(rng, *pullback.grain) ** 2 + 0.35) - 0.65
    return np.clip(level * (1 + pullback.speckle * speckle) + 0.012 * speckle, 0, 1)


def _catheter(pullback: SyntheticPullback, level: Array, rng: np.random.Generator) -> Array:
    """Cover the centre with the sheath: mottled, with the rings that its surfaces reflect."""
    scale = RADIUS / pullback.catheter
    level_in = 0.05 + 0.19 * _step(scale - 0.72, 0.02) * (1 + 0.25 * noise(rng, 4.0, 1.5))
    for ring, width, height in ((0.0, 0.06, 0.8), (0.46, 0.03, 0.16), (0.58, 0.04, 0.34), (0.97, 0.04, 0.14)):
        level_in = level_in + height * np.exp(-(((scale - ring) / width) ** 2))
    return np.where(scale < 1, level_in, level)


def _wire(pullback: SyntheticPullback, position: float, theta: Array, level: Array) -> Array:
    """Add the guide wire: a crescent that faces the catheter, and its shadow over all that lies behind."""
    direction = pullback.wire.at(position)
    distance = pullback.catheter + WIRE
    x, y = RADIUS * np.cos(theta - direction) - distance, RADIUS * np.sin(theta - direction)
    ring = np.hypot(x, y) + 1e-6
    crescent = np.exp(-(((ring - WIRE) / 0.018) ** 2)) * _step(-x / ring - 0.2, 0.3)
    in_sector = _step(pullback.wire_width - np.abs(angle_between(theta, direction)), 0.015)
    behind = in_sector * _step(RADIUS - distance - 0.02, 0.01)
    return np.maximum(level * (1 - behind) + 0.045 * behind, 0.9 * crescent)


def _display(pullback: SyntheticPullback, polar: Array, size: int) -> NDArray[np.uint8]:
    """Convert a polar image to a square one, anti-aliased, in the console's colours: uint8 [S, S, 3]."""
    fine = 2 * size
    theta, radius = _pixel_grid(fine)
    closed = np.vstack([polar, polar[:1]])
    row, column = (theta % (2 * np.pi)) * (A_LINES / (2 * np.pi)), radius * DEPTHS - 0.5
    square = cv2.remap(closed, column, row, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    square = cv2.resize(np.where(radius < 1, square, 0), (size, size), interpolation=cv2.INTER_AREA)
    rgb = np.stack([np.interp(255 * square, RED, channel) for channel in (RED, GREEN, BLUE)], axis=-1)
    rgb = rgb.round().astype(np.uint8)
    if pullback.ruler is not None:
        _draw_ruler(rgb, pullback.ruler)
    return rgb


def _draw_ruler(rgb: NDArray[np.uint8], angle: float) -> None:
    """Draw the measuring line that consoles lay over the frame, half blue, half yellow, with its marks."""
    size = rgb.shape[0]
    centre = (size - 1) / 2
    step = np.array([np.cos(angle), np.sin(angle)]) * centre

    def point(reach: float) -> tuple[int, int]:
        x, y = centre + reach * step
        return round(x), round(y)

    for sign, line, mark in ((-1, (0, 110, 110), (110, 220, 220)), (1, (130, 120, 40), (240, 230, 150))):
        cv2.line(rgb, point(0), point(0.97 * sign), line, max(1, size // 512), cv2.LINE_AA)
        for reach in (0.4, 0.8):
            cv2.circle(rgb, point(reach * sign), max(1, size // 170), mark, -1, cv2.LINE_AA)


@lru_cache(maxsize=4)
def _pixel_grid(size: int) -> tuple[Array, Array]:
    """Compute angle and radius [S, S] of the pixel centres of the square around the field of view."""
    axis = ((np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1).astype(np.float32)
    return np.arctan2(axis[:, None], axis[None, :]), np.hypot(axis[:, None], axis[None, :])


def _step(x: Array, softness: float) -> Array:
    """Rise smoothly from 0 for negative x to 1 for positive x, over about four times `softness`."""
    return 0.5 * (1 + np.tanh(x / softness))
