"""Make a split: by whole patients, or by blocks of frames or single frames where the user chooses so."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from vessel.data.catalog import PARTS, Frame, Split
from vessel.errors import VesselError

FRACTIONS = {"train": 0.7, "val": 0.15, "test": 0.15}
NOTES = {
    "patient": "",
    "block": (
        "Split by blocks of frames within each video: training and test frames come from the same patients, "
        "so the figures say nothing about new patients."
    ),
    "frame": (
        "Split by single frames: neighbouring, nearly equal frames of one video are in training and test, "
        "so the figures are far too good and say nothing about new patients."
    ),
}
_TRIALS = 200

Parts = dict[str, tuple[str, ...]]


def make_split(frames: Sequence[Frame], *, unit: str = "patient", folds: int = 5, gap: int = 2, seed: int = 0) -> Split:
    """Assign frames to train, val and test (0.7, 0.15, 0.15 of the images), and to k folds of train + val.

    Args:
        frames: in any order that does not change between runs; the assignment depends on it and on the seed alone.
        unit: `patient` keeps patients whole; `block` cuts each video into train, val and test, in this order;
            `frame` draws single frames.
        folds: number of folds at most; there are never more than patients to divide. 0 makes none.
        gap: frames left out at each border of two blocks, for `block`.
        seed: of the draw.

    Raises:
        VesselError: when there are too few patients or frames for the unit.
    """
    order = [frame.id for frame in frames]
    rng = np.random.default_rng(seed)
    if unit == "patient":
        parts, fold_parts = _by_patient(frames, folds, rng)
    elif unit == "block":
        parts, fold_parts = _by_block(frames, folds, gap)
    else:
        parts, fold_parts = _by_frame(order, folds, rng)
    return Split(
        unit=unit,
        seed=seed,
        gap=gap if unit == "block" else 0,
        note=NOTES[unit],
        parts={name: tuple(sorted(parts[name])) for name in PARTS},
        folds=tuple({name: tuple(sorted(fold[name])) for name in ("train", "val")} for fold in fold_parts),
    )


def _by_patient(frames: Sequence[Frame], folds: int, rng: np.random.Generator) -> tuple[Parts, list[Parts]]:
    ids: defaultdict[str, list[str]] = defaultdict(list)
    for frame in frames:
        ids[frame.patient].append(frame.id)
    patients = list(ids)
    if len(patients) < len(PARTS):
        raise VesselError(
            f"{len(patients)} patient(s): too few to keep training, validation and test patients apart. "
            "Add patients, or cut each video into blocks with split=block, or draw frames with split=frame; "
            "every report will then warn that the figures are no estimate for new patients"
        )
    sizes = np.array([len(ids[patient]) for patient in patients])
    numbers = _portions(len(patients))
    targets = np.array([FRACTIONS[name] for name in PARTS]) * sizes.sum()
    borders = np.cumsum(numbers)[:-1]
    # Of many random draws of whole patients keep the one whose image counts come closest to the fractions.
    draws = [np.split(rng.permutation(len(patients)), borders) for _ in range(_TRIALS)]
    best = min(draws, key=lambda draw: sum(abs(sizes[p].sum() - t) for p, t in zip(draw, targets, strict=True)))
    parts = {name: tuple(i for p in chosen for i in ids[patients[p]]) for name, chosen in zip(PARTS, best, strict=True)}

    # Largest patient first into the smallest fold keeps the folds even.
    pool = sorted(np.concatenate(best[:2]).tolist(), key=lambda p: -sizes[p])
    bins: list[list[str]] = [[] for _ in range(min(folds, len(pool)))]
    for patient in pool if len(bins) > 1 else ():
        min(bins, key=len).extend(ids[patients[patient]])
    return parts, _rotations(bins)


def _by_block(frames: Sequence[Frame], folds: int, gap: int) -> tuple[Parts, list[Parts]]:
    videos: defaultdict[str, list[Frame]] = defaultdict(list)
    for frame in frames:
        videos[frame.video].append(frame)
    parts: defaultdict[str, list[str]] = defaultdict(list)
    fold_parts: list[defaultdict[str, list[str]]] = [defaultdict(list) for _ in range(folds if folds > 1 else 0)]
    for video in videos.values():
        ids = [frame.id for frame in sorted(video, key=lambda frame: frame.frame)]
        usable = len(ids) - 2 * gap
        if usable < len(PARTS):  # too short to be cut: whole into train
            for division in (parts, *fold_parts):
                division["train"] += ids
            continue
        train, val, test = _portions(usable)
        parts["train"] += ids[:train]
        parts["val"] += ids[train + gap : train + gap + val]
        parts["test"] += ids[-test:]
        pool = ids[: train + gap + val]
        for fold, block in zip(fold_parts, np.array_split(np.arange(len(pool)), len(fold_parts) or 1), strict=False):
            if len(block):
                fold["val"] += [pool[i] for i in block]
                fold["train"] += [*pool[: max(0, block[0] - gap)], *pool[block[-1] + 1 + gap :]]
    if not parts["test"]:
        longest = max(map(len, videos.values()))
        needed = len(PARTS) + 2 * gap
        raise VesselError(f"the longest video has {longest} frames; blocks with gap={gap} need {needed}; lower gap=")
    return {name: tuple(ids) for name, ids in parts.items()}, [
        {name: tuple(fold[name]) for name in ("train", "val")} for fold in fold_parts if fold["val"] and fold["train"]
    ]


def _by_frame(ids: Sequence[str], folds: int, rng: np.random.Generator) -> tuple[Parts, list[Parts]]:
    if len(ids) < len(PARTS):
        raise VesselError(f"{len(ids)} frame(s) cannot be split into train, val and test; add images")
    shuffled = [ids[i] for i in rng.permutation(len(ids))]
    train, val, _ = _portions(len(ids))
    parts = {"train": shuffled[:train], "val": shuffled[train : train + val], "test": shuffled[train + val :]}
    pool = shuffled[: train + val]
    number = min(folds, len(pool))
    return {name: tuple(part) for name, part in parts.items()}, _rotations([pool[k::number] for k in range(number)])


def _portions(count: int) -> tuple[int, int, int]:
    """Return the numbers of train, val and test out of `count` >= 3, at least one each."""
    val, test = (max(1, round(FRACTIONS[name] * count)) for name in ("val", "test"))
    return count - val - test, val, test


def _rotations(bins: Sequence[Sequence[str]]) -> list[Parts]:
    """Make a fold of each bin: it validates, the others train."""
    if len(bins) < 2:
        return []
    return [
        {"train": tuple(i for j, other in enumerate(bins) if j != k for i in other), "val": tuple(bins[k])}
        for k in range(len(bins))
    ]
