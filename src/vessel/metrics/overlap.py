"""Dice, IoU, precision and recall of probability maps at one or many thresholds.

Shape letters: K phrases of one image, T thresholds, R rows (one row is one phrase of one image), H W native image size.

The rule for empty masks: a ratio of 0 to 0 is 1. So a phrase that is absent and not predicted scores 1 on all four;
absent but predicted scores 0 on Dice, IoU and precision, and 1 on recall (nothing could be missed); present but not
predicted scores 0 on Dice, IoU and recall, and 1 on precision (nothing wrong was claimed). Read those two together.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from vessel.errors import VesselError


@dataclass(frozen=True)
class Counts:
    """Pixels that agree and disagree, each int64 [T, K]."""

    tp: Tensor
    fp: Tensor
    fn: Tensor


def count(probabilities: Tensor, masks: Tensor, thresholds: Tensor) -> Counts:
    """Count pixels at all thresholds in one pass: a histogram over the thresholds, summed from the top.

    Args:
        probabilities: float [K, H, W], finite.
        masks: bool [K, H, W].
        thresholds: float32 [T], ascending. A pixel is predicted where its probability is greater than the threshold.

    Raises:
        VesselError: when a probability is not finite.
        ValueError: when the shapes differ or the masks are not boolean.
    """
    if masks.shape != probabilities.shape or masks.dtype != torch.bool:
        raise ValueError(f"probabilities {tuple(probabilities.shape)}, masks {tuple(masks.shape)} {masks.dtype}")
    if not torch.isfinite(probabilities).all():
        raise VesselError(
            "a probability map holds non-finite values, it cannot be scored; "
            "find the first non-finite loss in metrics.jsonl"
        )
    phrases, bins = len(probabilities), len(thresholds) + 1
    exceeded = torch.bucketize(probabilities.float(), thresholds)  # how many thresholds lie below the probability
    row = torch.arange(phrases, device=masks.device)[:, None, None] * 2 + masks
    histogram = torch.bincount((row * bins + exceeded).flatten(), minlength=phrases * 2 * bins).view(phrases, 2, bins)
    above = histogram.flip(-1).cumsum(-1).flip(-1)[..., 1:].permute(1, 2, 0)
    fp, tp = above
    return Counts(tp=tp, fp=fp, fn=masks.sum(dim=(1, 2)) - tp)


def dice(counts: Counts) -> Tensor:
    """Compute 2 TP / (2 TP + FP + FN), float64 of the counts' shape."""
    return _ratio(2 * counts.tp, 2 * counts.tp + counts.fp + counts.fn)


def iou(counts: Counts) -> Tensor:
    """Compute TP / (TP + FP + FN), float64 of the counts' shape."""
    return _ratio(counts.tp, counts.tp + counts.fp + counts.fn)


def precision(counts: Counts) -> Tensor:
    """Compute TP / (TP + FP), float64 of the counts' shape."""
    return _ratio(counts.tp, counts.tp + counts.fp)


def recall(counts: Counts) -> Tensor:
    """Compute TP / (TP + FN), float64 of the counts' shape."""
    return _ratio(counts.tp, counts.tp + counts.fn)


OVERLAP_METRICS = {"dice": dice, "iou": iou, "precision": precision, "recall": recall}


class OverlapSweep(Metric):
    """Overlap at T thresholds, averaged over images, patients and phrases; equal on every rank after `compute`.

    A distributed sampler may repeat images to fill its last batch: each pair of image and phrase counts once.
    """

    full_state_update = False
    higher_is_better = True
    counts: list[Tensor]
    names: list[Tensor]

    def __init__(self, thresholds: Sequence[float] = (0.5,), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.thresholds = tuple(float(t) for t in thresholds)
        if not self.thresholds or list(self.thresholds) != sorted(set(self.thresholds)):
            raise VesselError(f"thresholds {self.thresholds}: give one or more, ascending, each once")
        # Flat, so that the state of a rank can have any length. The names travel as UTF-8 lines beside the counts.
        self.add_state("counts", default=[], dist_reduce_fx="cat")
        self.add_state("names", default=[], dist_reduce_fx="cat")

    def update(
        self,
        probabilities: Sequence[Tensor],
        masks: Sequence[Tensor],
        *,
        ids: Sequence[str],
        patients: Sequence[str],
        phrases: Sequence[Sequence[str]],
    ) -> None:
        """Add the images of a batch.

        Args:
            probabilities: one float [K, H, W] an image, in [0, 1].
            masks: one bool [K, H, W] an image.
            ids: one an image, unique in the data set.
            patients: one an image.
            phrases: K an image.

        Raises:
            VesselError: when a probability is not finite; names the image.
        """
        images = zip(ids, patients, phrases, probabilities, masks, strict=True)
        for image, patient, image_phrases, probability, mask in images:
            try:
                thresholds = torch.tensor(self.thresholds, dtype=torch.float32, device=probability.device)
                counts = count(probability, mask, thresholds)
            except VesselError as error:
                raise VesselError(f"image {image}: {error}") from error
            lines = "".join(json.dumps([image, patient, phrase]) + "\n" for phrase in image_phrases).encode()
            stacked = torch.stack([counts.tp, counts.fp, counts.fn]).permute(2, 0, 1)  # [K, 3, T]
            self.counts.append(stacked.flatten().to(self.device))
            self.names.append(torch.tensor(list(lines), dtype=torch.uint8, device=self.device))

    def compute(self) -> dict[str, Tensor]:
        """Compute the mean scores, each float64 [T].

        Returns:
            For each of dice, iou, precision and recall: `dice` (the mean over images; an image's score is the mean over
            its phrases), `dice_patient` (the mean over patients of the mean over their images) and `dice/<phrase>` (the
            mean over the images with a row of the phrase). Empty when nothing was added.
        """
        rows, counts = self._rows()
        if not rows:
            return {}
        scores = _scores(counts)
        images, of_images = _group_means(scores, [row[0] for row in rows])
        patient_of = {row[0]: row[1] for row in rows}
        _, of_patients = _group_means(of_images, [patient_of[image] for image in images])
        phrases, of_phrases = _group_means(scores, [row[2] for row in rows])
        means = {"": of_images.mean(0), "_patient": of_patients.mean(0)}
        means |= {f"/{phrase}": mean for phrase, mean in zip(phrases, of_phrases, strict=True)}
        return {
            f"{m}{suffix}": mean[i].to(self.device)
            for i, m in enumerate(OVERLAP_METRICS)
            for suffix, mean in means.items()
        }

    def _rows(self) -> tuple[list[tuple[str, str, str]], Counts]:
        """Return (id, patient, phrase) of each row, repeats dropped, and the counts, each [R, T]."""
        if not len(self.counts):
            return [], Counts(*torch.empty(3, 0, len(self.thresholds), dtype=torch.int64))
        lines = bytes(dim_zero_cat(self.names).tolist()).decode().splitlines()
        rows: list[tuple[str, str, str]] = [tuple(json.loads(line)) for line in lines]
        first: dict[tuple[str, str], int] = {}
        for i, (image, _, phrase) in enumerate(rows):
            first.setdefault((image, phrase), i)
        keep = list(first.values())
        counts = dim_zero_cat(self.counts).cpu().view(-1, 3, len(self.thresholds))[keep]
        return [rows[i] for i in keep], Counts(*counts.unbind(1))


def _scores(counts: Counts) -> Tensor:
    """Compute the scores of counts [R, T], float64 [R, 4, T] in the order of `OVERLAP_METRICS`."""
    return torch.stack([metric(counts) for metric in OVERLAP_METRICS.values()], dim=1)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.where(denominator == 0, 1.0, numerator.double() / denominator)


def _group_means(values: Tensor, groups: Sequence[Hashable]) -> tuple[list[Any], Tensor]:
    """Return the groups in order of appearance and the mean of `values` [R, ...] over each, [G, ...]."""
    index = {name: i for i, name in enumerate(dict.fromkeys(groups))}
    member = torch.tensor([index[name] for name in groups])
    sums = torch.zeros(len(index), *values.shape[1:], dtype=values.dtype).index_add_(0, member, values)
    return list(index), sums / member.bincount().view(-1, *[1] * (values.dim() - 1))
