"""The scores of one phrase of one image: names, units and rules for empty masks, and the record that holds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class MetricInfo:
    """The title, direction and format of a score in reports.

    Attributes:
        title: in tables and on axes.
        better: "higher" or "lower".
        unit: "" (ratio), "length" (mm where the pixel spacing is known, else px) or "count".
        rule: its value where ground truth, prediction or both are empty, in one sentence.
    """

    title: str
    better: str
    unit: str
    rule: str


_ONE = "Ground truth and prediction both empty: 1; one of them empty: 0."
METRICS: Mapping[str, MetricInfo] = {
    "dice": MetricInfo("Dice", "higher", "", _ONE),
    "iou": MetricInfo("IoU", "higher", "", _ONE),
    "precision": MetricInfo(
        "Precision", "higher", "", "Nothing predicted: 1; predicted where ground truth is empty: 0."
    ),
    "recall": MetricInfo("Recall", "higher", "", "Ground truth empty: 1; not empty and nothing of it predicted: 0."),
    "cldice": MetricInfo("clDice", "higher", "", _ONE),
    "centreline_sensitivity": MetricInfo(
        "Centre-line sensitivity", "higher", "", "Ground truth empty: 1; nothing predicted: 0."
    ),
    "hd95": MetricInfo("HD95", "lower", "length", "Both empty: 0; one of them empty: the diagonal of the image."),
    "nsd": MetricInfo("Normalised surface distance", "higher", "", _ONE),
    "component_error": MetricInfo("Component error", "lower", "count", "An empty mask has no component."),
    "ece": MetricInfo("Calibration error", "lower", "", "Defined for every image with probabilities, empty or not."),
}


@dataclass(frozen=True)
class Scores:
    """The value of each key of `METRICS`; None where a score is not defined."""

    dice: float | None = None
    iou: float | None = None
    precision: float | None = None
    recall: float | None = None
    cldice: float | None = None
    centreline_sensitivity: float | None = None
    hd95: float | None = None
    nsd: float | None = None
    component_error: float | None = None
    ece: float | None = None


def score(
    probability: NDArray[np.float32] | None,
    predicted: NDArray[np.bool_],
    true: NDArray[np.bool_],
    *,
    spacing: tuple[float, float] = (1.0, 1.0),
    tolerance: float = 2.0,
) -> Scores:
    """Compute all scores of one mask.

    Args:
        probability: float [H, W] in [0, 1]; None where only the mask is known, and then there is no calibration error.
        predicted: bool [H, W].
        true: bool [H, W].
        spacing: length of a pixel along rows and along columns: (1, 1) for lengths in pixels, millimetres for mm.
        tolerance: of the normalised surface distance, in the unit of `spacing`.

    Raises:
        VesselError: a probability is outside [0, 1] or not a number.
        ValueError: the shapes differ, a mask is not boolean, or a length is out of range.
    """
    # Here, so that code that only reads METRICS, such as a report, does not load torch.
    import torch

    from vessel.metrics.calibration import Reliability
    from vessel.metrics.overlap import Counts, dice, iou, precision, recall
    from vessel.metrics.shape import centreline_scores, component_error, surface_scores

    if predicted.shape != true.shape or not predicted.dtype == true.dtype == np.bool_:
        raise ValueError(f"prediction {predicted.shape} {predicted.dtype}, ground truth {true.shape} {true.dtype}")
    if min(spacing) <= 0 or tolerance < 0:
        raise ValueError(f"spacing {spacing}, tolerance {tolerance}: lengths are positive")
    pixels = [np.count_nonzero(found) for found in (predicted & true, predicted & ~true, ~predicted & true)]
    counts = Counts(*torch.tensor(pixels))
    cldice, sensitivity = centreline_scores(predicted, true)
    hd95, nsd = surface_scores(predicted, true, spacing=spacing, tolerance=tolerance)
    reliability = Reliability()
    if probability is not None:
        reliability.add(probability, true)
    return Scores(
        dice=dice(counts).item(),
        iou=iou(counts).item(),
        precision=precision(counts).item(),
        recall=recall(counts).item(),
        cldice=cldice,
        centreline_sensitivity=sensitivity,
        hd95=hd95,
        nsd=nsd,
        component_error=component_error(predicted, true),
        ece=reliability.ece,
    )
