"""Translucent overlays of masks on images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vessel.plotting.colours import PHRASE_COLOURS


def overlay(
    image: np.ndarray, masks: np.ndarray, *, colours: Sequence[str] = PHRASE_COLOURS, alpha: float = 0.35
) -> np.ndarray:
    """Lay masks over an image: translucent inside, opaque along the inner edge.

    Args:
        image: uint8 [H, W, 3].
        masks: bool [K, H, W]; a later mask lies over an earlier one.
        colours: `#rrggbb`, used in turn.
        alpha: opacity inside the masks, in [0, 1].

    Returns:
        uint8 [H, W, 3].
    """
    import cv2

    blended = image.astype(np.float32)
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    for i, mask in enumerate(masks):
        colour = np.array(list(bytes.fromhex(colours[i % len(colours)][1:])), dtype=np.float32)
        inside = cv2.erode(mask.astype(np.uint8), cross)  # what lies outside the image takes nothing away
        opacity = (mask * np.where(inside, alpha, 1.0)).astype(np.float32)[..., None]
        blended += opacity * (colour - blended)
    return blended.round().astype(np.uint8)
