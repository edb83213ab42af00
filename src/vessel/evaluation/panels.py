"""Panels of the best, the median and the worst image of a part, and of its first ones."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vessel.data.dataset import VesselDataset
from vessel.data.images import read_rgb
from vessel.evaluation.scoring import input_images, probability_maps
from vessel.inference.decision import Decision
from vessel.inference.predictor import Predictor
from vessel.inference.results import Prediction
from vessel.metrics.summary import ImageScore
from vessel.plotting.panels import panel_figure

FOLDER = "panels"
_FIRST = 3


def draw_panels(
    predictor: Predictor, dataset: VesselDataset, decision: Decision, rows: Sequence[ImageScore], *, out: Path
) -> list[dict[str, Any]]:
    """Write the panels of a part that was scored; those of an earlier evaluation go.

    Returns:
        an entry for each: `file` relative to `out`, `id`, `kind` and `dice`, the mean over the image's phrases.
    """
    shutil.rmtree(out / FOLDER, ignore_errors=True)
    (out / FOLDER).mkdir(parents=True)
    dice: dict[str, dict[str, float]] = {}
    for row in rows:
        assert row.scores.dice is not None, "Dice is always defined"
        dice.setdefault(row.id, {})[row.phrase] = row.scores.dice
    means = {name: float(np.mean(list(of_image.values()))) for name, of_image in dice.items()}
    chosen = _chosen(means)
    images = input_images(dataset)
    index = {image.id: i for i, image in enumerate(images)}
    indices = [index[name] for _, name in chosen]
    answers = predictor.predict([images[i] for i in indices], lambda at: dataset[indices[at]])
    panels = []
    for (kind, name), answer in zip(chosen, answers, strict=True):
        if isinstance(answer, Prediction):
            file = f"{FOLDER}/{kind}_{name}.png"
            _draw(answer, decision, dice[name], out / file)
            panels.append({"file": file, "id": name, "kind": kind, "dice": means[name]})
    return panels


def _chosen(means: Mapping[str, float]) -> list[tuple[str, str]]:
    """Choose the images to draw; return kind and id of each."""
    ranked = sorted(means, key=lambda name: means[name])
    if not ranked:
        return []
    extremes = [("best", ranked[-1]), ("median", ranked[len(ranked) // 2]), ("worst", ranked[0])]
    return extremes + [(f"first_{i + 1}", name) for i, name in enumerate(list(means)[:_FIRST])]


def _draw(prediction: Prediction, decision: Decision, dice: Mapping[str, float], file: Path) -> None:
    sample, maps = prediction.sample, probability_maps(prediction)
    assert sample.masks is not None, "frames of a data set have masks"
    panel_figure(
        read_rgb(prediction.target.file),
        sample.masks.numpy(),
        maps,
        predicted=np.stack([decision(one) for one in maps]),
        threshold=decision.threshold,
        labels=[f"{phrase} · Dice {dice[phrase]:.3f}" for phrase in sample.phrases],
        title=f"{sample.id}, threshold {decision.threshold:.2f}",
    ).savefig(file)
