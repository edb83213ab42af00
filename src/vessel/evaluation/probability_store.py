"""Probabilities and ground truth of a part, kept on the disk while decisions are tried on them."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from vessel.batch import Sample
from vessel.data.dataset import VesselDataset
from vessel.errors import VesselError
from vessel.evaluation.scoring import probability_maps
from vessel.inference.decision import Decision
from vessel.inference.predictor import Failure
from vessel.inference.results import Prediction
from vessel.metrics.overlap import Counts, dice
from vessel.metrics.scores import Scores
from vessel.metrics.summary import ImageScore

_BYTES = 2.125  # a pixel of a phrase: float16 and a bit of ground truth


@dataclass(frozen=True)
class _Image:
    id: str
    patient: str
    video: str
    phrases: tuple[str, ...]
    width: int
    file: Path


class ProbabilityStore:
    """A store of the probabilities of every image as float16, one file an image, so that memory does not grow.

    Half precision is within 0.0003 of a probability: far less than two thresholds are apart.

    Args:
        folder: to be made; `remove` takes it away.
        answers: of the network.

    Attributes:
        failures: images without a result.
    """

    def __init__(self, folder: Path, answers: Iterable[Prediction | Failure]) -> None:
        self.folder, self.failures = folder, list[Failure]()
        self._images: list[_Image] = []
        folder.mkdir()
        for answer in answers:
            if isinstance(answer, Failure):
                self.failures.append(answer)
            else:
                self._keep(answer.sample, probability_maps(answer))

    def __len__(self) -> int:
        return len(self._images)

    @property
    def ids(self) -> list[str]:
        """Return the ids of the images, in order."""
        return [image.id for image in self._images]

    @property
    def rows(self) -> int:
        """Count the phrases of all images together."""
        return sum(len(image.phrases) for image in self._images)

    def dice(self, decisions: Sequence[Decision]) -> Iterator[list[ImageScore]]:
        """Yield for each image and phrase its Dice under each decision: one row a decision, with no other score."""
        for image in self._images:
            probabilities, ground_truths = self._read(image)
            for phrase, probability, ground_truth in zip(image.phrases, probabilities, ground_truths, strict=True):
                counts = np.array([_count(decision(probability), ground_truth) for decision in decisions])
                owner, present = (image.id, image.patient, image.video, phrase), bool(ground_truth.any())
                yield [
                    ImageScore(*owner, present, Scores(dice=value))
                    for value in dice(Counts(*torch.from_numpy(counts).unbind(-1))).tolist()
                ]

    def remove(self) -> None:
        """Delete the files."""
        shutil.rmtree(self.folder)

    def _keep(self, sample: Sample, probabilities: NDArray[np.float32]) -> None:
        assert sample.masks is not None, "frames of a data set have masks"
        file = self.folder / f"{len(self._images)}.npz"
        masks = np.packbits(sample.masks.numpy(), axis=-1)
        np.savez(file, probabilities=probabilities.astype(np.float16), masks=masks)
        self._images.append(
            _Image(sample.id, sample.patient, sample.video, sample.phrases, sample.size[1], file)
        )  # fmt: skip

    def _read(self, image: _Image) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        with np.load(image.file) as kept:
            masks = np.unpackbits(kept["masks"], axis=-1, count=image.width).astype(bool)
            return kept["probabilities"].astype(np.float32), masks


def require_room(folder: Path, dataset: VesselDataset) -> None:
    """Refuse to begin where the probabilities of two kinds of test-time augmentation have no room.

    Raises:
        VesselError: the space is too small; the message has the needed and the free bytes.
    """
    pixels = sum(frame.height * frame.width for frame in dataset.frames) * len(dataset.phrases)
    needed, free = 2 * _BYTES * pixels, shutil.disk_usage(folder).free
    if free < needed:
        raise VesselError(
            f"{folder}: the probabilities of {len(dataset)} images take {needed / 1e9:.2f} GB during the search and "
            f"{free / 1e9:.2f} GB are free; make room, or name another disk with out=DIR"
        )


def _count(predicted: NDArray[np.bool_], true: NDArray[np.bool_]) -> tuple[int, int, int]:
    """Count the pixels in both, in the prediction alone, and in the ground truth alone."""
    both = int((predicted & true).sum())
    return both, int(predicted.sum()) - both, int(true.sum()) - both
