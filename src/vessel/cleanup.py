"""Morphological clean-up of binary masks, after the threshold; probabilities are never touched."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vessel.errors import VesselError


@dataclass
class Cleanup:
    """What is done to a mask, in this order; the defaults do nothing.

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
            if getattr(self, name) < 0:
                raise VesselError(f"cleanup.{name}={getattr(self, name)}: must be 0 or more pixels")

    def __call__(self, mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """The cleaned copy of a bool [H, W] mask."""
        from scipy.ndimage import binary_fill_holes
        from skimage.measure import label
        from skimage.morphology import isotropic_closing, isotropic_opening

        if self.opening:
            mask = isotropic_opening(mask, self.opening)
        if self.closing:
            mask = isotropic_closing(mask, self.closing)
        if self.fill_holes:
            mask = binary_fill_holes(mask)
        if self.min_size:
            components = label(mask, connectivity=2)
            large = np.bincount(components.ravel()) >= self.min_size
            mask = mask & large[components]
        return mask
