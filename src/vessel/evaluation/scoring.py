"""Predict and score every image of a part."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from numpy.typing import NDArray
from rich.progress import track

from vessel.data.catalog import Catalog
from vessel.data.dataset import VesselDataset
from vessel.data.inputs import InputImage
from vessel.errors import VesselError
from vessel.inference.decision import Decision
from vessel.inference.predictor import Failure, Predictor
from vessel.inference.results import Prediction
from vessel.metrics.calibration import Reliability
from vessel.metrics.scores import score
from vessel.metrics.summary import ImageScore

_PIXELS = 2.0  # the tolerance of the normalised surface distance unless the user sets one


@dataclass(frozen=True)
class Ruler:
    """The pixel spacing, unit and tolerance of distances.

    Attributes:
        spacing: row and column distance of pixels, in `unit`.
        unit: `mm` where the data set knows its pixel spacing, else `px`.
        tolerance: of the normalised surface distance, in `unit`.
    """

    spacing: tuple[float, float]
    unit: str
    tolerance: float

    @classmethod
    def of(cls, catalog: Catalog, tolerance: float | None) -> Ruler:
        """Build the ruler of a data set; without a tolerance, two pixels.

        Raises:
            VesselError: a tolerance that is no positive length.
        """
        if tolerance is not None and not 0 < tolerance < float("inf"):
            raise VesselError(f"tolerance={tolerance}: give a positive length; null takes {_PIXELS:g} pixels")
        known = catalog.pixel_spacing
        spacing = known or (1.0, 1.0)
        usual = _PIXELS * sum(spacing) / 2
        return cls(spacing, "px" if known is None else "mm", usual if tolerance is None else tolerance)


@dataclass
class Scored:
    """The scores and failures of a set of images.

    Attributes:
        rows: one a phrase of each image that was predicted.
        failures: the images without a result; they have no rows.
        emitted: for each phrase of each image, whether the network itself chose `[SEG]`; empty of one without words.
        reliability: probabilities against the ground truth, by phrase and for `all`.
    """

    rows: list[ImageScore] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    emitted: list[bool] = field(default_factory=list)
    reliability: Mapping[str, Reliability] = field(default_factory=lambda: defaultdict(Reliability))

    def add(self, prediction: Prediction, decision: Decision, ruler: Ruler) -> None:
        """Score one image."""
        sample = prediction.sample
        assert sample.masks is not None, "frames of a data set have masks"
        for phrase, probability, mask in zip(
            sample.phrases, probability_maps(prediction), sample.masks.numpy(), strict=True
        ):
            scores = score(
                probability, decision(probability), mask, spacing=ruler.spacing, tolerance=ruler.tolerance
            )  # fmt: skip
            self.rows.append(
                ImageScore(sample.id, sample.patient, sample.video, phrase, present=bool(mask.any()), scores=scores)
            )
            for name in (phrase, "all"):
                self.reliability[name].add(probability, mask)
        self.emitted += prediction.emitted


def probability_maps(prediction: Prediction) -> NDArray:
    """Stack the probabilities float32 [K, H, W] of an image with a forced answer, where every phrase has its own."""
    maps = [one for one in prediction.probabilities if one is not None]
    assert len(maps) == len(prediction.probabilities), "a forced answer has every [SEG]"
    return torch.stack(maps).numpy()


def input_images(dataset: VesselDataset) -> list[InputImage]:
    """List the images of a part under the names that reports use."""
    return [InputImage(frame.id, Path(dataset.root) / frame.image, frame.image) for frame in dataset.frames]


def score_part(
    predictor: Predictor,
    dataset: VesselDataset,
    decision: Decision,
    ruler: Ruler,
    *,
    batch_size: int = 4,
    workers: int = 0,
) -> Scored:
    """Predict and score every image of a part; an image that fails is counted and never scored.

    Args:
        predictor: with the test-time augmentation of the decision.
        dataset: the part.
        decision: from probabilities to masks.
        ruler: for distances.
        batch_size: images a pass.
        workers: loader processes.
    """
    scored, images = Scored(), input_images(dataset)
    answers = predictor.predict(images, dataset.__getitem__, batch_size=batch_size, workers=workers)
    for answer in track(answers, "evaluating", len(images), transient=True):
        if isinstance(answer, Failure):
            scored.failures.append(answer)
        else:
            scored.add(answer, decision, ruler)
    return scored


def missing_seg(emitted: Sequence[bool]) -> float | None:
    """Return the fraction of answers without a `[SEG]` of the network's own; None for a network without words."""
    return None if not emitted else 1 - sum(emitted) / len(emitted)
