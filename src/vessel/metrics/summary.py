"""Summarise a set of scored images: means with intervals, and one CSV line for each phrase of an image.

Frames of a video resemble each other, and so do the videos of a patient. A mean is therefore taken over the images of
a video, then the videos of a patient, then the patients. Otherwise the longest video would have the greatest weight.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from vessel.errors import VesselError
from vessel.metrics.intervals import cluster_interval
from vessel.metrics.scores import METRICS, Scores

# An absent phrase without a prediction scores 1 on these, so never predicting a rare phrase seems excellent.
_REWARD_ABSENCE = ("dice", "iou")
_COLUMNS = ("id", "patient", "video", "phrase", "present")
_Tree = Mapping[str, Mapping[str, Mapping[str, float]]]  # patient -> video -> image -> mean over its phrases


@dataclass(frozen=True)
class ImageScore:
    """The scores of one phrase of one image.

    Attributes:
        id: of the image, unique in the data set; those of one video are in the order of its frames.
        patient: pseudonym.
        video: pseudonym.
        phrase: that was to be segmented.
        present: whether the ground truth has any pixel of the phrase.
        scores: from `vessel.metrics.scores.score`.
    """

    id: str
    patient: str
    video: str
    phrase: str
    present: bool
    scores: Scores


def summarise(
    rows: Sequence[ImageScore], *, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> dict[str, dict[str, dict[str, Any]]]:
    """Compute means and intervals for `all` and for each phrase.

    `all` counts an image once: its score is the mean over its phrases. A score that is not defined leaves its row out
    of that score and of its counts.

    Args:
        rows: one per image and phrase, not empty.
        level: as `cluster_interval` takes it.
        draws: as `cluster_interval` takes them.
        seed: of the draws.

    Returns:
        `summary[<phrase or "all">][<key of METRICS>]` = mean (over images, then videos, then patients), low and high
        (interval of that mean; None for a single cluster), unit and n_clusters (as of `cluster_means`), mean_images
        (over images alone), n_images, n_videos, n_patients and n_present (images that show the phrase, for `all` any
        phrase); for Dice and IoU mean_present: as mean, of the images that show the phrase (for `all`: an image's score
        is the mean over the phrases it shows). A mean of nothing is None.

    Raises:
        VesselError: `rows` is empty, holds an image and phrase twice, or a phrase is named "all".
    """
    if not rows:
        raise VesselError("no image was scored, so there is nothing to summarise; see the failures of the run")
    _require_sound(rows)
    return {
        name: {metric: _entry(group, metric, level=level, draws=draws, seed=seed) for metric in METRICS}
        for name, group in _by_phrase(rows).items()
    }


def per_patient(rows: Iterable[ImageScore], metric: str) -> dict[str, dict[str, float]]:
    """Compute the mean score of each patient (over images, then videos), by phrase or `all` and by patient."""
    return {
        name: {patient: _mean({patient: videos}) for patient, videos in sorted(_tree(group, metric).items())}
        for name, group in _by_phrase(rows).items()
    }


def cluster_means(rows: Iterable[ImageScore], metric: str) -> tuple[str, dict[str, float]]:
    """Return the means that an interval resamples: of the largest units of which there are several.

    These are patients; of one patient its videos; of one video its blocks of consecutive frames. Single frames are
    never drawn: neighbours are nearly equal, and n of them would count as n observations. A video of n frames gives
    about sqrt(n) blocks of about sqrt(n) frames, so that both their number and their length grow with the video. Blocks
    of one video still resemble each other, videos of one patient too: such an interval says nothing about new patients.

    Args:
        rows: of one phrase, or of several: an image's score is then their mean. Differences of scores do as well.
        metric: key of `METRICS`.

    Returns:
        `patient`, `video` or `block`, and the mean of each by its name.
    """
    tree = _tree(rows, metric)
    if len(tree) != 1:
        return "patient", {patient: _mean({patient: videos}) for patient, videos in sorted(tree.items())}
    (patient, videos), *_ = tree.items()
    if len(videos) > 1:
        return "video", {video: _mean({patient: {video: images}}) for video, images in sorted(videos.items())}
    frames = [value for images in videos.values() for _, value in sorted(images.items())]
    blocks = np.array_split(frames, round(math.sqrt(len(frames))))
    return "block", {f"block {i}": fmean(block) for i, block in enumerate(blocks, start=1)}


def value_range(metric: str) -> tuple[float, float]:
    """Return the least and the greatest value that a score can have."""
    return 0.0, 1.0 if METRICS[metric].unit == "" else math.inf


def _require_sound(rows: Iterable[ImageScore]) -> None:
    """Refuse rows that would count something twice or under two names.

    Raises:
        VesselError: names the image.
    """
    owner: dict[str, tuple[str, str]] = {}
    known: set[tuple[str, str]] = set()
    for row in rows:
        if row.phrase == "all":
            raise VesselError('the phrase "all" is the name of the summary over phrases; use another phrase')
        if (row.id, row.phrase) in known:
            raise VesselError(f"image {row.id} has two scores of {row.phrase!r}; each phrase of an image counts once")
        known.add((row.id, row.phrase))
        if (first := owner.setdefault(row.id, (row.patient, row.video))) != (row.patient, row.video):
            raise VesselError(f"image {row.id} belongs to {' '.join(first)} and to {row.patient} {row.video}")


def write_per_image_csv(path: Path, rows: Sequence[ImageScore]) -> None:
    """Write one line per image and phrase; a score that is not defined is an empty cell."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*_COLUMNS, *METRICS])
        for row in rows:
            scores = asdict(row.scores)
            values = ["" if scores[m] is None else repr(float(scores[m])) for m in METRICS]
            writer.writerow([*(getattr(row, column) for column in _COLUMNS), *values])


def read_per_image_csv(path: Path) -> list[ImageScore]:
    """Read the rows that `write_per_image_csv` wrote, equal to the last bit.

    Raises:
        VesselError: the file is not there, is damaged, or counts something twice; names the line.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, [])
            if header != [*_COLUMNS, *METRICS]:
                raise VesselError(f"{path}: the header is {header}, not {[*_COLUMNS, *METRICS]}; evaluate again")
            rows = [_row(cells, f"{path}, line {reader.line_num}") for cells in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise VesselError(f"{path} cannot be read ({error}); python -m vessel.evaluate writes it") from error
    try:
        _require_sound(rows)
    except VesselError as error:
        raise VesselError(f"{path}: {error}") from error
    return rows


def _row(cells: Sequence[str], where: str) -> ImageScore:
    if len(cells) != len(_COLUMNS) + len(METRICS):
        raise VesselError(f"{where}: {len(cells)} cells, expected {len(_COLUMNS) + len(METRICS)}; evaluate again")
    named = dict(zip([*_COLUMNS, *METRICS], cells, strict=True))
    if named["present"] not in ("True", "False"):
        raise VesselError(f"{where}: present is {named['present']!r}, neither True nor False; evaluate again")
    values = {metric: _number(named[metric], f"{where}, {metric}") for metric in METRICS}
    image, patient, video, phrase, _ = (named[column] for column in _COLUMNS)
    return ImageScore(image, patient, video, phrase, present=named["present"] == "True", scores=Scores(**values))


def _number(cell: str, where: str) -> float | None:
    if not cell:
        return None
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise VesselError(f"{where}: {cell!r} is not a finite number; evaluate again")
    return value


def _by_phrase(rows: Iterable[ImageScore]) -> dict[str, list[ImageScore]]:
    """Group the rows: all under `all`, and those of each phrase in order of appearance."""
    groups: dict[str, list[ImageScore]] = {"all": []}
    for row in rows:
        groups["all"].append(row)
        groups.setdefault(row.phrase, []).append(row)
    return groups


def _entry(rows: Sequence[ImageScore], metric: str, *, level: float, draws: int, seed: int) -> dict[str, Any]:
    defined = [row for row in rows if getattr(row.scores, metric) is not None]
    tree = _tree(defined, metric)
    unit, clusters = cluster_means(defined, metric)
    low, high = cluster_interval(
        list(clusters.values()), level=level, draws=draws, seed=seed, bounds=value_range(metric)
    )  # fmt: skip
    images = [value for videos in tree.values() for frames in videos.values() for value in frames.values()]
    entry = {
        "mean": _mean(tree) if tree else None,
        "low": low,
        "high": high,
        "unit": unit,
        "n_clusters": len(clusters),
        "mean_images": fmean(images) if images else None,
        "n_images": len(images),
        "n_videos": sum(len(videos) for videos in tree.values()),
        "n_patients": len(tree),
        "n_present": len({row.id for row in defined if row.present}),
    }
    if metric in _REWARD_ABSENCE:
        present = _tree([row for row in defined if row.present], metric)
        entry["mean_present"] = _mean(present) if present else None
    return entry


def _tree(rows: Iterable[ImageScore], metric: str) -> _Tree:
    """Collect the score of each image under its video and patient; rows without this score are left out."""
    values: dict[str, dict[str, dict[str, list[float]]]] = {}
    for row in rows:
        if (value := getattr(row.scores, metric)) is not None:
            values.setdefault(row.patient, {}).setdefault(row.video, {}).setdefault(row.id, []).append(value)
    return {
        patient: {video: {image: fmean(each) for image, each in images.items()} for video, images in videos.items()}
        for patient, videos in values.items()
    }


def _mean(tree: _Tree) -> float:
    """Average over images, then videos, then patients; `fmean` sums exactly, so the order of rows does not matter."""
    return fmean(fmean(fmean(images.values()) for images in videos.values()) for videos in tree.values())
