"""Scores of shape: centre lines, outlines and components of two masks, computed by MONAI and scikit-image.

The rules for empty masks are those of `vessel.metrics.scores.METRICS`. Each function first crops both masks to the box
that holds them: background around it changes nothing, except the HD95 of a missing mask.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]


def centreline_scores(predicted: Mask, true: Mask) -> tuple[float, float]:
    """Compute centre-line Dice (clDice) and centre-line sensitivity, each in [0, 1].

    clDice (Shit et al., CVPR 2021) is the harmonic mean of two shares: of the prediction's centre line that lies in the
    ground truth, and of the ground truth's centre line that lies in the prediction, which is the centre-line
    sensitivity.

    Args:
        predicted: bool [H, W].
        true: bool [H, W].
    """
    from skimage.morphology import skeletonize

    predicted, true = _cropped(predicted, true)
    precision = _share_inside(skeletonize(predicted), true)
    sensitivity = _share_inside(skeletonize(true), predicted)
    total = precision + sensitivity
    return (2 * precision * sensitivity / total if total else 0.0), sensitivity


def surface_scores(
    predicted: Mask, true: Mask, *, spacing: tuple[float, float], tolerance: float
) -> tuple[float, float]:
    """Compute the 95th percentile of the Hausdorff distance (HD95) and the normalised surface distance (NSD).

    An outline is the pixels of a mask of which one of the four neighbours is outside the mask or the image. HD95 is the
    larger of the 95th percentiles (linear interpolation) of the distances from one outline to the other, as MONAI
    defines it. NSD is the share of the pixels of both outlines that lie within the tolerance of the other one (Nikolov
    et al., 2018; Seidlitz et al., 2022): every pixel counts alike, however long its edge.

    Args:
        predicted: bool [H, W].
        true: bool [H, W].
        spacing: of rows and of columns, a length per pixel.
        tolerance: a length.

    Returns:
        HD95, a length; NSD in [0, 1].
    """
    missing = int(not predicted.any()) + int(not true.any())
    if missing == 2:
        return 0.0, 1.0
    if missing == 1:  # the largest distance that the image allows: a missed vessel costs more than a misplaced one
        return float(np.hypot(predicted.shape[0] * spacing[0], predicted.shape[1] * spacing[1])), 0.0
    # The parts that `compute_hausdorff_distance` and `compute_surface_dice` are made of: each distance is found once.
    from monai.metrics import get_mask_edges, get_surface_distance

    of_predicted, of_true = get_mask_edges(*_cropped(predicted, true), crop=False)
    to_true = get_surface_distance(of_predicted, of_true, spacing=spacing)
    to_predicted = get_surface_distance(of_true, of_predicted, spacing=spacing)
    near = np.count_nonzero(to_true <= tolerance) + np.count_nonzero(to_predicted <= tolerance)
    hd95 = max(np.quantile(to_true, 0.95), np.quantile(to_predicted, 0.95))
    return float(hd95), float(near / (len(to_true) + len(to_predicted)))


def component_error(predicted: Mask, true: Mask) -> float:
    """Count the components too many or too few: the zeroth Betti error.

    Args:
        predicted: bool [H, W]; pixels that touch at a corner belong together.
        true: bool [H, W].
    """
    from skimage.measure import label

    first, second = (int(label(mask, connectivity=2).max()) if mask.any() else 0 for mask in (predicted, true))
    return float(abs(first - second))


def _cropped(predicted: Mask, true: Mask) -> tuple[Mask, Mask]:
    """Crop both masks to the smallest box that holds both; of size 0 x 0 where both are empty."""
    either = predicted | true
    rows, columns = np.flatnonzero(either.any(1)), np.flatnonzero(either.any(0))
    if not len(rows):
        return predicted[:0, :0], true[:0, :0]
    box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return predicted[box], true[box]


def _share_inside(line: Mask, mask: Mask) -> float:
    """Return the share of the pixels of a centre line that lie in the mask; 1 where there is no line."""
    total = np.count_nonzero(line)
    return float(np.count_nonzero(line & mask) / total) if total else 1.0
