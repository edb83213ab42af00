"""Synthetic X-ray angiography: runs of a branching vessel tree that contrast medium fills and leaves.

Lengths are in units of the frame's side, image coordinates (x right, y down). Field letters:
N segments, S side of the frame.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]
Mask = NDArray[np.bool_]

STEP = 0.012  # length of a segment
THINNEST = 0.0035  # width at which a branch ends: one pixel of a 256-pixel frame
SHADES = 4  # nested strokes that make the round profile of a vessel
FINE = 4  # a frame is drawn at this many times its side
SHIFT = 4  # fractional bits of OpenCV's coordinates


@dataclass(frozen=True)
class AngiographyRun:
    """The anatomy and the acquisition of a run, constant in time; a frame shows them at one time.

    Attributes:
        segments: float [N, 2, 2], start and end points (x, y).
        widths: float [N].
        arrival: float [N], length of the path of the contrast medium from the ostium to the segment.
        catheter: float [M, 2], points of the catheter, the last at the ostium.
        ribs: float [R, 5], each a soft dark ring: centre x, y, radius, thickness, strength.
        spine: x position of the spine.
        tilt: brightness gradient of the background along x and y.
        length: times 0 to `length` will be rendered.
        beat: frames of a heart beat.
        sway: direction and size of the heart's motion.
        opacity: absorption of the contrast medium.
        photons: photons that a bright pixel counts; fewer are noisier.
    """

    segments: Array
    widths: Array
    arrival: Array
    catheter: Array
    ribs: Array
    spine: float
    tilt: tuple[float, float]
    length: float
    beat: float
    sway: tuple[float, float]
    opacity: float
    photons: float


def draw_run(rng: np.random.Generator, length: float) -> AngiographyRun:
    """Draw the random anatomy and view of one run.

    Args:
        rng: the run's own generator.
        length: times 0 to `length` will be rendered, in frames.
    """
    ostium = np.array([rng.uniform(0.24, 0.36), rng.uniform(0.12, 0.24)])
    rows: list[tuple[float, ...]] = []
    for heading in (rng.uniform(0.1, 0.5), rng.uniform(1.1, 1.5)):
        _grow(rows, rng, ostium, heading, width=rng.uniform(0.021, 0.03), travelled=0.0)
    tree = np.array(rows, dtype=np.float32)
    bend = np.linspace(0, 1, 24)[:, None]
    start = np.array([ostium[0] - rng.uniform(0.05, 0.2), -0.05])
    bow = np.array([rng.uniform(-0.18, -0.08), 0]) * np.sin(np.pi * bend)
    ribs = [
        (rng.uniform(0.2, 0.8), 1.0 + y, rng.uniform(0.7, 0.85), rng.uniform(0.02, 0.03), rng.uniform(0.02, 0.06))
        for y in np.arange(5) * 0.22
    ]
    return AngiographyRun(
        segments=tree[:, :4].reshape(-1, 2, 2),
        widths=tree[:, 4],
        arrival=tree[:, 5],
        catheter=(start + (ostium - start) * bend + bow).astype(np.float32),
        ribs=np.array(ribs, dtype=np.float32),
        spine=rng.uniform(0.05, 0.95),
        tilt=(rng.uniform(-0.25, 0.25), rng.uniform(-0.25, 0.25)),
        length=length,
        beat=rng.uniform(14, 22),
        sway=(rng.uniform(-0.025, 0.025), rng.uniform(0.01, 0.03)),
        opacity=rng.uniform(32, 42),
        photons=rng.uniform(350, 900),
    )


def _grow(
    rows: list[tuple[float, ...]],
    rng: np.random.Generator,
    at: Array,
    heading: float,
    *,
    width: float,
    travelled: float,
) -> None:
    """Append the segments of one branch and, recursively, of those that leave it.

    A row is x0, y0, x1, y1, width, path length from the ostium.
    A branch tapers until it is `THINNEST`; thin ones wind more. Daughters keep to Murray's law within a little.
    """
    curl, since = rng.normal(0, 0.02), 0.0
    while width > THINNEST and -0.05 < at[0] < 1.05 and -0.05 < at[1] < 1.05:
        curl = 0.75 * curl + rng.normal(0, 0.04 + 0.03 * min(0.01 / width, 2))
        # Vessels lie on the heart, whose axis points down to the right: they turn back to it.
        heading += curl + 0.03 * np.sin(0.8 - heading)
        end = at + STEP * np.array([np.cos(heading), np.sin(heading)])
        rows.append((*at, *end, width, travelled))
        at, travelled, since = end, travelled + STEP, since + STEP
        width *= 1 - 0.01 - 0.016 * rng.random()
        if since > 0.05 and rng.random() < 0.2:
            share = rng.uniform(0.35, 0.7)
            side = rng.choice([-1, 1]) * rng.uniform(0.5, 1.1)
            _grow(rows, rng, at, heading + side, width=width * share, travelled=travelled)
            width, heading, since = width * (1 - share**3) ** (1 / 3), heading - 0.15 * side, 0.0


def render(
    run: AngiographyRun, time: float, size: int, rng: np.random.Generator
) -> tuple[NDArray[np.uint8], dict[str, Mask]]:
    """Render one frame with its mask.

    Args:
        run: anatomy and view.
        time: in frames from the injection.
        size: side S of the frame in pixels.
        rng: the frame's own generator; it makes the photon noise.

    Returns:
        uint8 [S, S] grey levels, and a bool [S, S] mask for "blood vessel": what the contrast medium shows.
    """
    filling = _filling(run, time)
    visible = filling > 0.35
    segments = _moved(run, run.segments, time)
    depth = _depth(segments, run.widths, filling, size)
    tube = _moved(run, np.stack([run.catheter[:-1], run.catheter[1:]], axis=1), time)
    catheter = _depth(tube, np.full(len(tube), 0.014), np.ones(len(tube)), size)
    light = _background(run, time, size) * np.exp(-run.opacity * depth - 14 * catheter)
    counts = rng.poisson(run.photons * light) / run.photons
    # A detector's own blur, after the photons have been counted.
    grey = np.clip(cv2.GaussianBlur(counts, (0, 0), size / 480) * 235, 0, 255).round().astype(np.uint8)
    return grey, {"blood vessel": _mask(segments[visible], run.widths[visible], size)}


def _filling(run: AngiographyRun, time: float) -> Array:
    """Compute the share of contrast medium [N] in each segment: a front runs down the tree, fresh blood follows."""
    start, washout = 0.15 * run.length, 0.75 * run.length
    front = 0.2 + 1.3 * time / max(start, 1)
    fresh = 1.1 * max(time - washout, 0) / max(run.length - washout, 1)
    came = np.clip((front - run.arrival) / 0.08, 0, 1)
    # Late frames fade but never lose the vessels: the last ones are the hard ones.
    left = 1 - 0.62 * np.clip((fresh - 0.6 * run.arrival) / 0.5, 0, 1)
    return (came * left).astype(np.float32)


def _moved(run: AngiographyRun, points: Array, time: float) -> Array:
    """Move points with the beating heart: the further down, the more."""
    swing = np.sin(2 * np.pi * time / run.beat)
    shift = np.array(run.sway, dtype=np.float32) * np.float32(swing)
    return points + shift * (0.3 + points[..., 1:2])


def _depth(segments: Array, widths: Array, filling: Array, size: int) -> Array:
    """Compute the path length [S, S] of the rays in contrast medium, in units of the side.

    Thin segments are drawn first, so that thick ones stay round.
    """
    side = size * FINE
    canvas = np.zeros((side, side), dtype=np.float32)
    points = _opencv_points(segments, side)
    order = [i for i in np.argsort(widths) if filling[i] > 0]
    for shade in range(SHADES):
        level = (shade + 0.5) / SHADES
        chord, spread = np.sqrt(1 - (1 - level) ** 2), 1 - shade / SHADES
        for i in order:
            (start, end), width = points[i], float(widths[i])
            way = width * float(filling[i] * chord)
            cv2.line(canvas, start, end, way, max(1, round(width * spread * side)), cv2.LINE_8, SHIFT)
    return np.asarray(cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA), dtype=np.float32)


def _mask(segments: Array, widths: Array, size: int) -> Mask:
    """Draw the union of the segments [S, S]; never thinner than one connected pixel."""
    canvas = np.zeros((size, size), dtype=np.uint8)
    for (start, end), width in zip(_opencv_points(segments, size), widths, strict=True):
        cv2.line(canvas, start, end, 1, max(1, round(float(width) * size)), cv2.LINE_8, SHIFT)
    return canvas.astype(bool)


def _opencv_points(segments: Array, side: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Convert segments to OpenCV's fixed-point pixels, whose centres lie at integers where ours lie at halves."""
    fixed: list[tuple[tuple[int, int], tuple[int, int]]] = (
        np.round((segments * side - 0.5) * 2**SHIFT).astype(int).tolist()
    )
    return fixed


def _background(run: AngiographyRun, time: float, size: int) -> Array:
    """Compute the light [S, S] in (0, 1] behind the vessels: soft tissue, spine, ribs, diaphragm, vignette."""
    axis = ((np.arange(size) + 0.5) / size).astype(np.float32)
    x, y = axis[None, :], axis[:, None]
    light = 0.72 + run.tilt[0] * (x - 0.5) + run.tilt[1] * (y - 0.5)
    bodies = 0.5 + 0.5 * np.tanh(4 * np.cos(2 * np.pi * (y * 5.5 + 0.1 * np.cos(9 * (x - run.spine)))))
    light = light * (1 - (0.14 + 0.06 * bodies) * np.exp(-(((x - run.spine) / 0.1) ** 4)))
    for centre_x, centre_y, radius, thickness, strength in run.ribs:
        light = light * (1 - strength * np.exp(-(((np.hypot(x - centre_x, y - centre_y) - radius) / thickness) ** 2)))
    breath = 0.02 * np.sin(2 * np.pi * time / 60)
    dome = np.hypot(x - 0.45, 1.3 * (y - 1.25 - breath)) - 0.42
    light = light * (1 - 0.22 * (0.5 - 0.5 * np.tanh(dome / 0.02)))
    return np.clip(light * (1 - 0.7 * np.hypot(x - 0.5, y - 0.5) ** 3), 0.02, 1)
