"""Morphological clean-up of binary masks, after the threshold; probabilities are never touched."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vessel.errors import VesselError


@dataclass(frozen=True)
class Cleanup:
    """The steps that clean a mask up, in this order; the defaults do nothing.

    Attributes:
        opening: radius in pixels of an opening, which removes what is thinner.
        closing: radius in pixels of a closing, which bridges gaps.
        fill_holes: fill background that a vessel encloses.
        min_size: components of fewer pixels are removed; pixels that touch at a corner belong together.
    """

    opening: float = 0.0
    closing: float = 0.0
    fill_holes: bool = False
    min_size: int = 0

    def __post_init__(self) -> None:
        for name in ("opening", "closing", "min_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
                raise VesselError(f"cleanup.{name}={value}: must be 0 or more pixels")
        if not isinstance(self.fill_holes, bool):
            raise VesselError(f"cleanup.fill_holes={self.fill_holes}: say true or false")

    def __call__(self, mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """The cleaned copy of a bool [H, W] mask."""
        from scipy.ndimage import binary_fill_holes
        from skimage.measure import label

        if self.opening:
            mask = _by_disc(mask, "MORPH_OPEN", self.opening)
        if self.closing:
            mask = _by_disc(mask, "MORPH_CLOSE", self.closing)
        if self.fill_holes:
            mask = binary_fill_holes(mask)
        if self.min_size:
            components = label(mask, connectivity=2)
            large = np.bincount(components.ravel()) >= self.min_size
            mask = mask & large[components]
        return mask


def _by_disc(mask: NDArray[np.bool_], operation: str, radius: float) -> NDArray[np.bool_]:
    """As scikit-image's `isotropic_opening` and `isotropic_closing`, which compute distances and take far longer.

    They also leave a corner of a mask of which nothing outlasts an opening.
    """
    import cv2

    reach = int(radius)
    y, x = np.ogrid[-reach : reach + 1, -reach : reach + 1]
    disc = (y**2 + x**2 <= radius**2).astype(np.uint8)
    return cv2.morphologyEx(mask.astype(np.uint8), getattr(cv2, operation), disc).astype(bool)
