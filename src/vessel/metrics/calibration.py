"""Calibration: compare predicted probabilities with the frequency of vessel pixels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vessel.errors import VesselError

BINS = 15
_ROUNDING = 1e-6  # by which resampling or averaging float32 may leave [0, 1]


class Reliability:
    """Counts of pixels in `BINS` equal bins of their probability of vessel, over any number of images.

    A bin holds its lower border and not its upper one; the last holds 1 too.

    Attributes:
        n: int64 [BINS], pixels.
        probability: float64 [BINS], sum of their probabilities.
        true: int64 [BINS], how many of them are vessel.
    """

    def __init__(self) -> None:
        self.n: NDArray[np.int64] = np.zeros(BINS, dtype=np.int64)
        self.probability: NDArray[np.float64] = np.zeros(BINS)
        self.true: NDArray[np.int64] = np.zeros(BINS, dtype=np.int64)

    def add(self, probability: NDArray[np.float32], true: NDArray[np.bool_]) -> None:
        """Count the pixels of an image.

        Args:
            probability: float [H, W], in [0, 1].
            true: bool [H, W].

        Raises:
            VesselError: a probability is outside [0, 1] or not a number.
            ValueError: the shapes differ or the ground truth is not boolean.
        """
        if probability.shape != true.shape or true.dtype != np.bool_:
            raise ValueError(f"probability {probability.shape}, ground truth {true.shape} {true.dtype}")
        if not np.all((probability >= -_ROUNDING) & (probability <= 1 + _ROUNDING)):
            raise VesselError(
                "a probability map holds values outside [0, 1] or non-finite ones, it cannot be scored; "
                "find the first non-finite loss in metrics.jsonl"
            )
        pixel, values = true.ravel(), probability.ravel()
        bins = np.minimum((values * BINS).astype(np.intp), BINS - 1)
        self.n += np.bincount(bins, minlength=BINS)
        self.probability += np.bincount(bins, weights=values, minlength=BINS)
        self.true += np.bincount(bins[pixel], minlength=BINS)

    def merge(self, other: Reliability) -> None:
        """Add the counts of another one."""
        self.n += other.n
        self.probability += other.probability
        self.true += other.true

    @property
    def ece(self) -> float | None:
        """Compute the expected calibration error in [0, 1]; None before the first pixel.

        The mean over pixels of |mean probability - share of vessel| of their bin (Naeini et al., AAAI 2015; Guo et
        al., ICML 2017), with the probability of vessel as confidence.
        """
        total = int(self.n.sum())
        return float(np.abs(self.probability - self.true).sum() / total) if total else None

    def bins(self) -> list[dict[str, float | int | None]]:
        """List the points of the reliability curve, one a bin.

        Returns:
            `low`, `high`, `n`, `confidence` (mean probability) and `frequency` (share of vessel) of each bin; the last
            two are None where n is 0.
        """
        return [
            {
                "low": i / BINS,
                "high": (i + 1) / BINS,
                "n": n,
                "confidence": float(self.probability[i]) / n if n else None,
                "frequency": int(self.true[i]) / n if n else None,
            }
            for i, n in enumerate(self.n.tolist())
        ]
