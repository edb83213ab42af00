"""Small results folders, written by the code that writes real ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vessel.evaluation.metrics_json import write_results
from vessel.evaluation.scoring import Scored
from vessel.inference.predictor import Failure
from vessel.metrics.scores import METRICS, Scores
from vessel.metrics.summary import ImageScore, per_patient, summarise

PHRASES = ("lumen", "side branch")


def row(image: str, phrase: str, dice: float, **scores: float | None) -> ImageScore:
    """Make a row of image `<patient>_<number>`; HD95 falls as Dice rises, and nothing has a calibration error."""
    patient = image.split("_")[0]
    values = dict.fromkeys(METRICS, dice) | {"hd95": 40 * (1 - dice), "component_error": 1.0, "ece": None} | scores
    return ImageScore(image, patient, f"{patient}_v1", phrase, present=True, scores=Scores(**values))


def rows_of(dice: Callable[[str, str], float], *, patients: int = 4, images: int = 3) -> list[ImageScore]:
    names = [f"p{patient}_{number}" for patient in range(1, patients + 1) for number in range(images)]
    return [row(name, phrase, dice(name, phrase)) for name in names for phrase in PHRASES]


def results(folder: Path, rows: list[ImageScore], *, run: str = "tiny", failed: tuple[str, ...] = (), **changes: Any):
    """Write metrics.json and per_image.csv of these rows; `changes` replace entries, `data.split_hash` style too."""
    folder.mkdir(parents=True)
    data = {"name": "oct", "fingerprint": "d" * 64, "split_hash": "s" * 64, "same_as_run": True}
    weights = changes.pop("fingerprint", f"{run}-weights")
    report = {
        "run": run, "source": f"outputs/{run}/checkpoints/best.ckpt", "fingerprint": weights, "network": "sa2va",
        "data": data, "split": "test", "unit": "patient", "fold": None, "note": "", "phrases": list(PHRASES),
        "decision": {"threshold": 0.5}, "threshold": 0.5, "pixel_spacing": None, "length_unit": "px", "tolerance": 2.0,
        "metrics": {name: asdict(metric) for name, metric in METRICS.items()},
        "n_ok": len({one.id for one in rows}), "n_failed": len(failed),
        "failures": [asdict(Failure(name, f"{name}.png", "it is cut short")) for name in failed],
        "summary": summarise(rows) if rows else {},
        "patients": {"all": {"dice": per_patient(rows, "dice").get("all", {})}},
    }  # fmt: skip
    for key, value in changes.items():
        group, _, name = key.partition("__")
        if name:
            report[group] = {**report[group], name: value}
        else:
            report[group] = value
    if "manifest" not in changes:
        report["manifest"] = {"name": run, "fingerprint": weights, "data": report["data"]}
    write_results(folder, report, Scored(rows=rows))
    return folder


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change metrics.json as somebody with an editor would."""
    file = folder / "metrics.json"
    report = json.loads(file.read_text())
    change(report)
    file.write_text(json.dumps(report))
