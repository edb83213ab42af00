"""Check that results can be compared: the same data, split, images, phrases and unit of length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from vessel.errors import VesselError
from vessel.evaluation.results import Results
from vessel.metrics.summary import ImageScore

# Facts that two sets of scores must have in common: name, keys in metrics.json, remedy.
_SAME = (
    ("data fingerprint", ("data", "fingerprint"), "evaluate both on the same data set"),
    (
        "split hash",
        ("data", "split_hash"),
        "one was split otherwise: train and evaluate both with the same splits.json",
    ),
    ("part", ("split",), "evaluate both with the same split="),
    ("fold", ("fold",), "compare runs of the same fold, or the pooled results of both: vessel.evaluate folds=SWEEP"),
    ("unit of the split", ("unit",), "evaluate both on the same data set"),
    ("phrases", ("phrases",), "evaluate both with the same data.phrases=[...]"),
    ("unit of lengths", ("length_unit",), "evaluate both with the same vessel"),
    ("pixel spacing", ("pixel_spacing",), "evaluate both on the same data set"),
    ("surface tolerance", ("tolerance",), "evaluate both with the same tolerance"),
    ("metrics", ("metrics",), "evaluate both with the same vessel"),
)


def require_comparable(found: Sequence[Results], labels: Sequence[str], paths: Sequence[str | Path]) -> None:
    """Refuse results that do not measure the same thing.

    Args:
        found: results, the reference first.
        labels: a name for each.
        paths: the paths that the user gave.

    Raises:
        VesselError: names two runs, what differs and both values; or the run that was evaluated on other data.
    """
    _refuse_the_same_twice(found, paths)
    for other, label in zip(found[1:], labels[1:], strict=True):
        _require_same(found[0], other, (labels[0], label))
    _refuse_other_data(found, labels)


def scored_by_all(found: Sequence[Results], labels: Sequence[str]) -> list[list[ImageScore]]:
    """Return the rows of the images that every run has scored, of each run in the same order.

    Raises:
        VesselError: the runs have different images, disagree on what an image is, or share none.
    """
    scored = [{(row.id, row.phrase): row for row in one.rows} for one in found]
    images = [{key[0] for key in rows} for rows in scored]
    requested = [
        n | {failure["id"] for failure in one.report["failures"]} for n, one in zip(images, found, strict=True)
    ]
    common = set.intersection(*images)
    for label, rows, ids in zip(labels[1:], scored[1:], requested[1:], strict=True):
        if odd := sorted(ids ^ requested[0]):
            who = labels[0] if odd[0] in requested[0] else label
            raise VesselError(
                f"{labels[0]} and {label} cannot be compared: only {who} was evaluated on image {odd[0]} "
                f"({len(requested[0])} and {len(ids)} images); evaluate both again"
            )
        for key in (key for key in scored[0] if key[0] in common):
            for what in ("patient", "video", "present"):
                if (a := getattr(scored[0][key], what)) != (b := getattr(rows[key], what)):
                    raise VesselError(
                        f"{labels[0]} and {label} cannot be compared: {what} of image {key[0]}, phrase {key[1]!r}, is "
                        f"{a} and {b}; one per_image.csv was changed, evaluate both again"
                    )
    if not common:
        raise VesselError(f"no image was scored by all of {', '.join(labels)}; their failures are in metrics.json")
    order = [key for key in scored[0] if key[0] in common]
    return [[rows[key] for key in order] for rows in scored]


def _refuse_the_same_twice(found: Sequence[Results], paths: Sequence[str | Path]) -> None:
    for (a, path_a), (b, path_b) in combinations(zip(found, paths, strict=True), 2):
        if all(a.report[key] == b.report[key] for key in ("fingerprint", "decision")):
            raise VesselError(
                f"{path_a} and {path_b} are the same weights ({a.report['fingerprint']}) with the same decision: "
                "there is nothing to compare; name each run once"
            )


def _require_same(a: Results, b: Results, names: tuple[str, str]) -> None:
    for what, keys, remedy in _SAME:
        values = [_at(one.report, keys) for one in (a, b)]
        if values[0] != values[1]:
            unequal = _first_unequal(*values)
            raise VesselError(
                f"{names[0]} and {names[1]} cannot be compared, they differ in {what}: "
                f"{unequal[0]} and {unequal[1]}; {remedy}"
            )


def _at(report: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        report = report.get(key)
    return report


def _first_unequal(a: Any, b: Any) -> tuple[Any, Any]:
    """Return the values, or of two mappings the first entry that differs: definitions of metrics are long."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        key = next(key for key in {**a, **b} if a.get(key) != b.get(key))
        return {key: a.get(key)}, {key: b.get(key)}
    return a, b


def _refuse_other_data(found: Sequence[Results], labels: Sequence[str]) -> None:
    for one, label in zip(found, labels, strict=True):
        trained_on = one.report["manifest"].get("data", {}).get("fingerprint")
        if trained_on and not one.report["data"]["same_as_run"]:
            data = one.report["data"]["fingerprint"]
            raise VesselError(
                f"{label} was trained on the data set {trained_on} and evaluated on {data} with other_data=true: "
                "it may have been trained on these images; evaluate it on its own data set"
            )
