"""Search threshold, test-time augmentation, hysteresis and clean-up on validation; each is kept only where it helps.

The search is greedy: an option is tried on top of what was kept before, in the order in which a mask is made. A change
is kept when the mean Dice rises by `MIN_GAIN` at least, in more than half of the patients. Everything that was tried is
recorded, with an interval of the paired difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.progress import track

from vessel.errors import VesselError
from vessel.evaluation.probability_store import ProbabilityStore
from vessel.inference.decision import Decision
from vessel.inference.predictor import Failure
from vessel.inference.results import Prediction
from vessel.inference.tta import FLIPS, SCALES, TURNS
from vessel.metrics.intervals import cluster_interval
from vessel.metrics.scores import Scores
from vessel.metrics.summary import ImageScore, cluster_means
from vessel.metrics.thresholds import THRESHOLDS

MIN_GAIN = 0.001
LOW_RATIOS = (0.5, 0.7, 0.85)  # of the threshold
RADII = (1.0, 2.0, 3.0)  # of opening and closing, in pixels
MIN_SIZES = (16, 64, 256, 1024)  # of a component, in pixels

Predict = Callable[[tuple[str, ...]], Iterable[Prediction | Failure]]


@dataclass(frozen=True)
class Trial:
    """The effect of a change of the decision.

    Attributes:
        option: that was changed.
        value: it was given.
        dice: mean over images, videos and patients with it; None where it could not be scored.
        gain: by how much that is more than without it.
        low, high: 95 % interval of the gain; None for one cluster.
        unit: of the clusters: patient, video or block.
        clusters: their number.
        better: of these, how many gained.
        worse: how many lost.
        adopted: whether it was kept.
        note: why it could not be scored.
    """

    option: str
    value: str
    dice: float | None = None
    gain: float | None = None
    low: float | None = None
    high: float | None = None
    unit: str = ""
    clusters: int = 0
    better: int = 0
    worse: int = 0
    adopted: bool = False
    note: str = ""

    @property
    def helps(self) -> bool:
        """Return whether the gain is large enough, and not that of a few patients."""
        return self.gain is not None and self.gain >= MIN_GAIN and 2 * self.better > self.clusters


class Search:
    """A greedy search; `run` does it.

    Args:
        predict: predicts every image of the validation part with this test-time augmentation.
        folder: for probabilities, those of two kinds of test-time augmentation at most.

    Attributes:
        decision: the best one so far.
        trials: everything that was tried, in order.
        kept: probabilities with the test-time augmentation of that decision.
    """

    def __init__(self, predict: Predict, folder: Path) -> None:
        self.predict, self.folder = predict, folder
        self.decision, self.trials = Decision(), list[Trial]()
        self.kept = ProbabilityStore(folder / "alone", predict(()))
        self._rows: Sequence[ImageScore] = ()

    def run(self, start: Decision) -> Decision:
        """Search from a threshold on.

        Raises:
            VesselError: no image gave a result.
        """
        if not len(self.kept):
            raise VesselError(f"search=true: no image gave a result; the first: {self.kept.failures[0].reason}")
        self.decision = start
        [self._rows] = self._scored([start])
        self.trials.append(replace(self._trial("start", str(start), self._rows), adopted=True))
        self._step("threshold", {f"{t:.2f}": replace(start, threshold=t) for t in THRESHOLDS if t != start.threshold})
        for tta in (FLIPS, TURNS, SCALES):
            self._add_tta(tta)
        self._step("hysteresis", self._hystereses())
        for name, values in {"opening": RADII, "closing": RADII, "fill_holes": (True,), "min_size": MIN_SIZES}.items():
            self._step(name.replace("_", " "), {_word(value): self._cleaned(name, value) for value in values})
        return self.decision

    def _hystereses(self) -> dict[str, Decision]:
        """Return decisions with a lower threshold beside a vessel, then with a higher one away from it."""
        now = self.decision.threshold
        pairs = [(now, ratio * now) for ratio in LOW_RATIOS] + [(now / ratio, now) for ratio in LOW_RATIOS]
        found = [(round(high, 3), round(low, 3)) for high, low in pairs if high < 1]
        return {
            f"{low:.2f} to {high:.2f}": replace(self.decision, threshold=high, hysteresis=low) for high, low in found
        }

    def _cleaned(self, name: str, value: Any) -> Decision:
        return replace(self.decision, cleanup=replace(self.decision.cleanup, **{name: value}))

    def _step(self, option: str, candidates: Mapping[str, Decision]) -> None:
        """Try values of an option, and keep the best of those that help; of equals the nearest threshold."""
        decisions = list(candidates.values())
        scored = self._scored(decisions)
        trials = [self._trial(option, value, rows) for value, rows in zip(candidates, scored, strict=True)]
        helping = [i for i, trial in enumerate(trials) if trial.helps]
        if helping:
            best = max(helping, key=lambda i: (trials[i].gain, -self._change(decisions[i])))
            trials[best] = replace(trials[best], adopted=True)
            self.decision, self._rows = decisions[best], scored[best]
        self.trials += trials

    def _add_tta(self, tta: Sequence[str]) -> None:
        """Try more test-time augmentation, at the threshold that is best with it."""
        more, before = (*self.decision.tta, *tta), self.kept
        kept = ProbabilityStore(self.folder / "_".join(more), self.predict(more))
        if kept.ids != before.ids:
            note = f"{len(kept.failures)} images failed, {len(before.failures)} without this augmentation"
            self.trials.append(Trial("tta", ", ".join(more), note=note))
            kept.remove()
            return
        self.kept = kept
        thresholds = sorted({*THRESHOLDS, self.decision.threshold})
        candidates = [replace(self.decision, tta=more, threshold=threshold) for threshold in thresholds]
        scored = self._scored(candidates)
        best = max(range(len(scored)), key=lambda i: (_mean(scored[i]), -self._change(candidates[i])))
        trial = self._trial("tta", f"{', '.join(more)}; threshold {thresholds[best]:.2f}", scored[best])
        self.trials.append(replace(trial, adopted=trial.helps))
        if trial.helps:
            self.decision, self._rows = candidates[best], scored[best]
            before.remove()
        else:
            self.kept = before
            kept.remove()

    def _change(self, decision: Decision) -> float:
        return abs(decision.threshold - self.decision.threshold)

    def _scored(self, decisions: Sequence[Decision]) -> list[Sequence[ImageScore]]:
        """Score each decision: a row for each phrase of each image."""
        rows = track(self.kept.dice(decisions), "trying", self.kept.rows, transient=True)
        return list(zip(*rows, strict=True))

    def _trial(self, option: str, value: str, rows: Sequence[ImageScore]) -> Trial:
        """Compute the effect of a change on the clusters that the bootstrap of an interval draws."""
        changes = [
            replace(row, scores=Scores(dice=_dice(row) - _dice(before)))
            for row, before in zip(rows, self._rows, strict=True)
        ]
        unit, clusters = cluster_means(changes, "dice")
        gains = list(clusters.values())
        low, high = cluster_interval(gains, bounds=(-1.0, 1.0))
        better, worse = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
        return Trial(option, value, _mean(rows), fmean(gains), low, high, unit, len(gains), better, worse)


def _word(value: Any) -> str:
    return "yes" if value is True else f"{value:g} px"


def _dice(row: ImageScore) -> float:
    assert row.scores.dice is not None, "Dice is always defined"
    return row.scores.dice


def _mean(rows: Sequence[ImageScore]) -> float:
    return fmean(cluster_means(rows, "dice")[1].values())
