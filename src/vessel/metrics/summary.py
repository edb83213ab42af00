"""What a report says about a set of scored images: means with cluster-bootstrap intervals, and one CSV row an image."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from vessel.errors import VesselError

SCORES = ("dice", "iou", "precision", "recall")
# An absent phrase that was not drawn scores 1 on these, so a rare phrase looks excellent when nothing is ever drawn.
REWARD_ABSENCE = ("dice", "iou")


@dataclass(frozen=True)
class ImageScore:
    """How well one phrase of one image was predicted; `vessel.metrics.overlap` defines the scores, in [0, 1].

    `present` says whether the truth has any pixel of the phrase.
    """

    id: str
    patient: str
    video: str
    phrase: str
    present: bool
    dice: float
    iou: float
    precision: float
    recall: float
    threshold: float


def summarise(
    rows: Sequence[ImageScore], *, draws: int = 2000, level: float = 0.95, seed: int = 0
) -> dict[str, dict[str, dict[str, Any]]]:
    """Means and intervals for `all` and for each phrase.

    `all` counts an image once: its score is the mean over its phrases. The interval is a percentile interval of the
    mean over images when whole clusters are drawn with replacement. Clusters are patients; with one patient they are
    videos; with one video they are images, although neighbouring frames look alike. `unit` says which it was.

    Args:
        rows: one per image and phrase, not empty.
        draws: bootstrap draws.
        level: coverage of the interval, in (0, 1).
        seed: of the draws.

    Returns:
        `summary[<phrase or "all">][<score>]` = mean, low, high, n_images, n_patients, unit, n_present, and for Dice and
        IoU mean_present: the mean over the n_present images that show the phrase (for `all`: any phrase, an image's
        score being the mean over those it shows). low and high are None for a single image, mean_present for none.

    Raises:
        VesselError: when `rows` is empty or a phrase is named "all".
    """
    if not rows:
        raise VesselError("no image was scored, so there is nothing to summarise; look at the failures of the run")
    groups = {"all": list(rows)}
    for row in rows:
        if row.phrase == "all":
            raise VesselError('the phrase "all" is the name of the summary over phrases; use another phrase')
        groups.setdefault(row.phrase, []).append(row)
    return {name: _summarise_group(group, draws, level, seed) for name, group in groups.items()}


def write_per_image_csv(path: Path, rows: Sequence[ImageScore]) -> None:
    """Write one line per image and phrase under a header of the fields of `ImageScore`."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(ImageScore)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def _summarise_group(rows: Sequence[ImageScore], draws: int, level: float, seed: int) -> dict[str, dict[str, Any]]:
    images, values = _by_image(rows)
    unit, clusters = _clusters(images)
    low, high = _interval(values, clusters, draws=draws, level=level, seed=seed)
    showing, of_showing = _by_image([row for row in rows if row.present])
    shared = {"n_images": len(images), "n_patients": len({image.patient for image in images}), "unit": unit}
    shared["n_present"] = len(showing)
    means = values.mean(0)
    summary = {s: {"mean": float(means[i]), "low": low[i], "high": high[i], **shared} for i, s in enumerate(SCORES)}
    for score in REWARD_ABSENCE:
        summary[score]["mean_present"] = float(of_showing[:, SCORES.index(score)].mean()) if showing else None
    return summary


def _by_image(rows: Sequence[ImageScore]) -> tuple[list[ImageScore], np.ndarray]:
    """One row of each image, and the image's scores [images, 4]: means over its rows."""
    groups: dict[str, list[ImageScore]] = defaultdict(list)
    for row in rows:
        groups[row.id].append(row)
    values = [[np.mean([getattr(row, s) for row in group]) for s in SCORES] for group in groups.values()]
    return [group[0] for group in groups.values()], np.array(values)


def _clusters(images: Sequence[ImageScore]) -> tuple[str, np.ndarray]:
    """The largest unit of which there are several, and the number of the cluster of each image."""
    for unit, names in {"patient": [i.patient for i in images], "video": [i.video for i in images]}.items():
        if len(set(names)) > 1:
            return unit, np.unique(names, return_inverse=True)[1]
    return "image", np.arange(len(images))


def _interval(
    values: np.ndarray, clusters: np.ndarray, *, draws: int, level: float, seed: int
) -> tuple[Sequence[float | None], Sequence[float | None]]:
    n = int(clusters.max()) + 1
    if n == 1:
        return [None] * len(SCORES), [None] * len(SCORES)
    sums = np.zeros((n, values.shape[1]))
    np.add.at(sums, clusters, values)
    drawn = np.random.default_rng(seed).integers(n, size=(draws, n))
    means = sums[drawn].sum(1) / np.bincount(clusters)[drawn].sum(1)[:, None]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low.tolist(), high.tolist()
