"""The anatomy of a synthetic OCT pullback, and its shapes at one position.

Lengths are in units of the field-of-view radius, angles in radians clockwise from three o'clock (y points down).
Field letters: A angles (A-lines), D depths.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

Array = NDArray[np.floating]

A_LINES, DEPTHS = 512, 256
WIRE = 0.055  # radius of the guide wire
CAP = 0.05  # thickness of the fibrous cap over a lipid core


class Drift(NamedTuple):
    """A quantity that varies smoothly along the pullback."""

    mean: float
    amplitude: float
    period: float
    phase: float

    def at(self, position: float) -> float:
        """Return the value at a position, counted in scanner frames."""
        return self.mean + self.amplitude * float(np.sin(2 * np.pi * position / self.period + self.phase))


class Feature(NamedTuple):
    """A side branch or a lipid core, with its position along the pullback and in the wall."""

    centre: float
    half_length: float
    angle: float
    width: float
    thickness: float

    def strength(self, position: float) -> float:
        """Return 1 in the middle of the feature, 0.37 at its ends, falling to 0."""
        return float(np.exp(-(((position - self.centre) / self.half_length) ** 2)))

    def present(self, position: float) -> bool:
        """Return whether a frame at this position shows the feature."""
        return abs(position - self.centre) < self.half_length


@dataclass(frozen=True)
class SyntheticPullback:
    """A vessel and the scanner's settings; a frame is this at one position.

    Attributes:
        axes: the two half axes of the lumen's ellipse.
        tilt: direction of the first half axis.
        eccentricity: share of the free way by which the lumen's centre is off the catheter.
        heading: direction of that offset.
        ripples: relative amplitude of the contour's harmonics 2 to 5, each with its phase in `ripple_phases`.
        wire: direction of the guide wire, drifting.
        wire_width: half angle of its shadow.
        decay: depth at which the wall has lost about two thirds of its brightness.
        catheter: outer radius of the catheter's sheath.
        gain: brightness of the wall.
        grain: size of the speckle in A-lines and depth samples.
        speckle: strength of the speckle.
        blood: brightness of blood left in the lumen.
        ruler: direction of the console's measuring line; None when it is switched off.
        branches: side branches along the pullback.
        lipids: lipid cores along the pullback.
        layers: [A, D], texture of media and adventitia, running along the wall.
        rays: [A], relative brightness of A-lines deep in the wall.
    """

    axes: tuple[Drift, Drift]
    tilt: Drift
    eccentricity: Drift
    heading: Drift
    ripples: tuple[float, ...]
    ripple_phases: tuple[Drift, ...]
    wire: Drift
    wire_width: float
    decay: float
    catheter: float
    gain: float
    grain: tuple[float, float]
    speckle: float
    blood: float
    ruler: float | None
    branches: tuple[Feature, ...]
    lipids: tuple[Feature, ...]
    layers: Array
    rays: Array


def draw_pullback(rng: np.random.Generator, length: float) -> SyntheticPullback:
    """Draw a random vessel.

    Args:
        rng: the pullback's own generator.
        length: positions 0 to `length` will be rendered.
    """

    def drift(mean: float, amplitude: float) -> Drift:
        return Drift(mean, amplitude * rng.uniform(0.5, 1), rng.uniform(50, 110), rng.uniform(0, 2 * np.pi))

    calibre = rng.uniform(0.4, 0.66)
    wire = drift(rng.uniform(0, 2 * np.pi), 0.3)
    # Opposite sides of the vessel, both clear of the wire's shadow, so that neither structure hides another.
    side = rng.choice([-1, 1])
    return SyntheticPullback(
        axes=(drift(calibre, 0.06), drift(calibre * rng.uniform(0.72, 1), 0.06)),
        tilt=drift(rng.uniform(0, np.pi), 0.6),
        eccentricity=drift(rng.uniform(0.25, 0.75), 0.2),
        heading=drift(rng.uniform(0, 2 * np.pi), 0.9),
        ripples=tuple(rng.uniform(0.2, 1) * 0.05 / k for k in range(1, 5)),
        ripple_phases=tuple(drift(rng.uniform(0, 2 * np.pi), 1.5) for _ in range(4)),
        wire=wire,
        wire_width=rng.uniform(0.14, 0.3),
        decay=rng.uniform(0.2, 0.34),
        catheter=rng.uniform(0.165, 0.19),
        gain=rng.uniform(0.58, 0.7),
        grain=(rng.uniform(0.5, 0.75), rng.uniform(0.6, 1.0)),
        speckle=rng.uniform(0.14, 0.2),
        blood=rng.uniform(0.0, 0.025),
        ruler=rng.uniform(0, np.pi) if rng.random() < 0.5 else None,
        branches=_features(rng, length, angle=wire.mean + side * 1.7, width=(0.26, 0.4), thickness=(0.2, 0.7)),
        lipids=_features(rng, length, angle=wire.mean - side * 2.0, width=(0.5, 0.8), thickness=(0.2, 0.34)),
        layers=noise(rng, 9.0, 1.2),
        rays=noise(rng, 7.0, 0.0)[:, 0],
    )


class Anatomy(NamedTuple):
    """Signed distances on a grid of any shape, negative inside; infinite where the structure is absent."""

    lumen: Array
    branch: Array
    lipid: Array


def anatomy_at(pullback: SyntheticPullback, position: float, theta: Array, radius: Array) -> Anatomy:
    """Compute the shapes at a position, from which both the image and the masks are made."""
    lumen = radius - _contour(pullback, position, theta)
    branch = np.full_like(lumen, np.inf)
    for feature in pullback.branches:
        if feature.present(position):
            along, across = radius * np.cos(theta - feature.angle), radius * np.sin(theta - feature.angle)
            mouth = 0.06 * np.exp(-np.maximum(lumen, 0) / 0.05)
            past_end = np.maximum(lumen - feature.thickness, 0)
            tube = np.hypot(across, past_end) - mouth - 0.5 * feature.width * feature.strength(position)
            branch = np.minimum(branch, np.maximum(tube, -along))
    lipid = np.full_like(lumen, np.inf)
    for feature in pullback.lipids:
        if feature.present(position):
            shape = np.maximum(1 - (angle_between(theta, feature.angle) / feature.width) ** 2, -0.5)
            cap = CAP * (2 - shape)
            far_side = cap + feature.thickness * feature.strength(position) * shape
            lipid = np.minimum(lipid, np.maximum(cap - lumen, lumen - far_side))
    return Anatomy(lumen, branch, lipid)


def _contour(pullback: SyntheticPullback, position: float, theta: Array) -> Array:
    """Compute the distance of the lumen's wall from the catheter: an eccentric, rippled ellipse, narrowed by plaque."""
    a, b = (axis.at(position) for axis in pullback.axes)
    tilt, heading = pullback.tilt.at(position), pullback.heading.at(position)
    offset = pullback.eccentricity.at(position) * max(min(a, b) - pullback.catheter, 0)
    # In the ellipse's own frame scaled to a unit circle the wall is the root of a quadratic along the ray.
    ray_x, ray_y = np.cos(theta - tilt) / a, np.sin(theta - tilt) / b
    centre_x, centre_y = offset * np.cos(heading - tilt) / a, offset * np.sin(heading - tilt) / b
    square, product = ray_x**2 + ray_y**2, ray_x * centre_x + ray_y * centre_y
    wall = (product + np.sqrt(product**2 + square * (1 - centre_x**2 - centre_y**2))) / square
    for k, (amplitude, phase) in enumerate(zip(pullback.ripples, pullback.ripple_phases, strict=True), start=2):
        wall = wall * (1 + amplitude * np.cos(k * theta + phase.at(position)))
    for lipid in pullback.lipids:
        bulge = np.exp(-((angle_between(theta, lipid.angle) / lipid.width) ** 2))
        wall = wall * (1 - 0.2 * lipid.strength(position) * bulge)
    # The wall leaves room for the catheter and for the wire beside it.
    at_wire = np.exp(-((angle_between(theta, pullback.wire.at(position)) / 0.4) ** 2))
    return np.clip(wall, pullback.catheter + 0.015 + 2 * WIRE * at_wire, 0.88)


def angle_between(theta: Array, angle: float) -> Array:
    """Return the difference of two directions, in [-pi, pi)."""
    return (theta - angle + np.pi) % (2 * np.pi) - np.pi


def noise(rng: np.random.Generator, angular: float, radial: float) -> Array:
    """Draw smooth Gaussian noise [A, D] of variance 1; its filter's widths are in A-lines and depth samples."""
    white = rng.standard_normal((A_LINES, DEPTHS), dtype=np.float32)
    smooth = gaussian_filter(white, (angular, radial), mode=("wrap", "nearest"))
    return smooth / smooth.std()


def _features(
    rng: np.random.Generator, length: float, angle: float, width: tuple[float, float], thickness: tuple[float, float]
) -> tuple[Feature, ...]:
    """Draw features one after the other along the pullback, with free stretches between them."""
    features, centre = [], rng.uniform(0, 12)
    while centre < length + 12:
        half_length = rng.uniform(5, 10)
        features.append(
            Feature(centre, half_length, angle + rng.uniform(-0.15, 0.15), rng.uniform(*width), rng.uniform(*thickness))
        )
        centre += half_length + rng.uniform(16, 28)
    return tuple(features)
