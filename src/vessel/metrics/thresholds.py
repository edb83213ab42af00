"""Choose the probability threshold: one list of candidates and one rule."""

from __future__ import annotations

THRESHOLDS = tuple(round(0.05 * i, 2) for i in range(1, 20))
