"""Scores of a trained network on a part of a data set, at the threshold that validation chose."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from vessel.data.catalog import PARTS, Catalog
from vessel.data.dataset import VesselDataset
from vessel.data.images import read_rgb
from vessel.data.inputs import Target, asked_phrases
from vessel.errors import VesselError
from vessel.figures import panel_figure
from vessel.inference import Failure, Prediction, Predictor, choose_device
from vessel.metrics.overlap import OverlapSweep
from vessel.metrics.summary import ImageScore, summarise, write_per_image_csv
from vessel.places import expanded
from vessel.restore import NetworkOptions, Restored, restore

METRICS_FILE = "metrics.json"
_FIRST_PANELS = 3
_FAILURES_TOLD = 10


@dataclass
class DataOptions:
    """Which data set, and which of its phrases."""

    root: str | None
    phrases: Any


@dataclass
class Options:
    """The options of the command; conf/evaluate.yaml has the defaults, `--help` the explanations."""

    ckpt: str
    data: DataOptions
    split: str
    out: str | None
    other_data: bool
    overwrite: bool
    batch_size: int
    workers: int
    device: str
    network: NetworkOptions


def evaluate(options: Options, default_out: Path) -> Mapping[str, Any]:
    """Score, write and print.

    Args:
        options: of the command.
        default_out: results folder of a checkpoint that lies in no run folder.

    Returns:
        the content of metrics.json.

    Raises:
        VesselError: the checkpoint, the data set or the results folder will not do, or nothing could be scored.
    """
    if options.split not in PARTS:
        raise VesselError(f"split={options.split}: choose one of {', '.join(PARTS)}")
    device = choose_device(options.device)
    restored = restore(options.ckpt, options.network.reading(device))
    for told in restored.reports:
        Console().print(told.table())
    dataset, catalog = _data(options, restored)
    out = _results_folder(options, restored, catalog, default_out)
    targets = [Target(frame.id, catalog.root / frame.image, frame.image) for frame in dataset.frames]
    predictor = Predictor(restored, device=device, device_map=options.network.device_map)
    answers = predictor.predict(targets, dataset.__getitem__, batch_size=options.batch_size, workers=options.workers)
    scores = _Scores(restored.threshold)
    for answer in track(answers, "evaluating", len(targets), transient=True):
        scores.add(answer)
    rows = scores.sweep.image_scores()
    report = _report(options, restored, catalog, scores, rows)
    shutil.rmtree(out / "panels", ignore_errors=True)
    (out / "panels").mkdir(parents=True)
    write_per_image_csv(out / "per_image.csv", rows)
    panels, dice = _panels(rows, targets), {(row.id, row.phrase): row.dice for row in rows}
    shown = predictor.predict([targets[i] for i in panels.values()], lambda at: dataset[list(panels.values())[at]])
    for name, answer in zip(panels, shown, strict=True):
        if isinstance(answer, Prediction):
            labels = [f"{phrase} · Dice {dice[answer.sample.id, phrase]:.3f}" for phrase in answer.sample.phrases]
            _draw_panel(answer, restored.threshold, labels, out / "panels" / name)
    # Last, so that a results folder with numbers is a whole one.
    (out / METRICS_FILE).write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    _tell(report, out)
    if not rows:
        raise VesselError(f"none of {len(targets)} images could be scored; the first: {scores.failures[0].reason}")
    return report


class _Scores:
    """What is kept of every prediction: counts and failures."""

    def __init__(self, threshold: float) -> None:
        self.sweep = OverlapSweep((threshold,))
        self.failures: list[Failure] = []
        self.emitted: list[bool] = []

    def add(self, answer: Prediction | Failure) -> None:
        """Score one image."""
        if isinstance(answer, Failure):
            self.failures.append(answer)
            return
        sample = answer.sample
        assert sample.masks is not None, "frames of a data set have masks"
        self.sweep.update(
            [_stacked(answer)],
            [sample.masks],
            ids=[sample.id],
            patients=[sample.patient],
            videos=[sample.video],
            phrases=[sample.phrases],
        )
        self.emitted += answer.emitted


def _stacked(prediction: Prediction) -> torch.Tensor:
    maps = [one for one in prediction.probabilities if one is not None]
    assert len(maps) == len(prediction.probabilities), "a taught answer has every [SEG]"
    return torch.stack(maps)


def _data(options: Options, restored: Restored) -> tuple[VesselDataset, Catalog]:
    """The images to score, of the run's own data set unless the user says otherwise."""
    manifest = restored.manifest
    configured = manifest.config.get("data") or {}
    root = options.data.root or configured.get("root")
    if root is None:
        raise VesselError(f"{options.ckpt} does not say where its data set is; give data.root=DIR")
    catalog = Catalog.open(Path(root))
    found = {"fingerprint": catalog.fingerprint, "split_hash": catalog.split.hash}
    differing = [name for name, value in found.items() if manifest.data.get(name) != value]
    if differing and restored.tuned and not options.other_data:
        raise VesselError(
            f"{root}: {' and '.join(differing)} of this data set differ from those of run {manifest.name}, so images "
            "it was trained on may be among them; give the run's own data set, or say other_data=true"
        )
    phrases = asked_phrases(options.data.phrases, manifest.phrases or catalog.phrases, restored.prompt)
    if unknown := [phrase for phrase in phrases if phrase not in catalog.phrases]:
        raise VesselError(f"{root}: no masks of {unknown}, which are asked for; it holds {list(catalog.phrases)}")
    frames = catalog.part(options.split, None if options.other_data else configured.get("fold"))
    dataset = VesselDataset(catalog.root, frames, phrases=phrases, prompt=restored.prompt, views=restored.views)
    return dataset, catalog


def _results_folder(options: Options, restored: Restored, catalog: Catalog, default: Path) -> Path:
    """Where results go; one folder holds the results of one checkpoint on one data set."""
    part = f"{options.split}_other_data" if options.other_data else options.split
    usual = default if restored.run is None else restored.run / "evaluate" / part
    out = usual if options.out is None else expanded(options.out)
    if (file := out / METRICS_FILE).is_file() and not options.overwrite:
        there = json.loads(file.read_text(encoding="utf-8"))
        if there.get("fingerprint") != restored.manifest.fingerprint or there.get("split") != options.split:
            raise VesselError(
                f"{out} holds the results of other weights ({there.get('run')}, {there.get('fingerprint')}, "
                f"split {there.get('split')}); choose another out=, or replace them with overwrite=true"
            )
        data = there.get("data") or {}
        if data.get("fingerprint") != catalog.fingerprint:
            raise VesselError(
                f"{out} holds the results on another data set ({data.get('name')}, {data.get('fingerprint')}); "
                "choose another out=, or replace them with overwrite=true"
            )
    return out


def _report(
    options: Options,
    restored: Restored,
    catalog: Catalog,
    scores: _Scores,
    rows: Sequence[ImageScore],
) -> dict[str, Any]:
    manifest = restored.manifest
    stored = manifest.threshold is not None
    return {
        "run": manifest.name,
        "source": os.path.relpath(restored.source),
        "fingerprint": manifest.fingerprint,
        "data": {
            "name": catalog.manifest.get("name"),
            "fingerprint": catalog.fingerprint,
            "split_hash": catalog.split.hash,
            "same_as_run": restored.tuned and not options.other_data,
        },
        "split": options.split,
        "unit": catalog.split.unit,
        "note": " ".join(_notes(options, restored, catalog.split.note, scores.emitted)),
        "threshold": restored.threshold,
        "threshold_source": "chosen on validation, stored with the weights" if stored else "none stored, 0.5 taken",
        "n_ok": len({row.id for row in rows}),
        "n_failed": len(scores.failures),
        "failures": [asdict(failure) for failure in scores.failures],
        "seg_emission": float(np.mean(scores.emitted)) if scores.emitted else None,
        "summary": summarise(rows) if rows else {},
    }


def _notes(options: Options, restored: Restored, of_split: str, emitted: Sequence[bool]) -> list[str]:
    notes = [of_split] if of_split else []
    if not restored.tuned:
        notes.append("vessel did not train this network; whether it has seen these images is not known.")
        if emitted:
            share = 100 * np.mean(emitted)
            notes.append(
                f"Answers were given to it; within those words [SEG] is its own choice in {share:.0f} %. What it says "
                "by itself: vessel.predict decode=generate."
            )
    elif options.other_data:
        notes.append("This is not the data set of the run; whether they share patients is not known.")
    elif options.split == "train":
        notes.append("These are training images: the figures say nothing about new ones.")
    elif options.split == "val":
        notes.append("Threshold and checkpoint were chosen on these images; figures to report come from split=test.")
    if restored.manifest.threshold is None:
        notes.append("No threshold was chosen on validation.")
    return notes


def _panels(rows: Sequence[ImageScore], targets: Sequence[Target]) -> dict[str, int]:
    """File name of each panel and the index of its image: best, median and worst by Dice, and the first ones."""
    by_image: dict[str, list[float]] = {}
    for row in rows:
        by_image.setdefault(row.id, []).append(row.dice)
    ranked = sorted(by_image, key=lambda name: float(np.mean(by_image[name])))
    if not ranked:
        return {}
    chosen = {"worst": ranked[0], "median": ranked[len(ranked) // 2], "best": ranked[-1]}
    chosen |= {f"first_{i + 1}": name for i, name in enumerate(list(by_image)[:_FIRST_PANELS])}
    index = {target.id: i for i, target in enumerate(targets)}
    return {f"{label}_{name}.png": index[name] for label, name in chosen.items()}


def _draw_panel(prediction: Prediction, threshold: float, labels: Sequence[str], file: Path) -> None:
    sample = prediction.sample
    assert sample.masks is not None, "frames of a data set have masks"
    figure = panel_figure(
        read_rgb(prediction.target.file),
        sample.masks.numpy(),
        _stacked(prediction).numpy(),
        threshold=threshold,
        labels=labels,
        title=f"{sample.id}, threshold {threshold:.2f}",
    )
    figure.savefig(file)


def _tell(report: Mapping[str, Any], out: Path) -> None:
    console = Console()
    if report["summary"]:
        console.print(_table(report))
        unit = report["summary"]["all"]["dice"]["unit"]
        console.print(f"intervals: bootstrap over {unit}s", soft_wrap=True)
    for phrase, scores in report["summary"].items():
        if not scores["dice"]["n_present"] and phrase != "all":
            told = f"{phrase} is in none of these images: its scores only say that nothing was drawn"
            console.print(told, style="yellow", soft_wrap=True, markup=False)
    console.print(f"threshold {report['threshold']:.2f} ({report['threshold_source']})", soft_wrap=True)
    for failure in report["failures"][:_FAILURES_TOLD]:
        console.print(f"failed: {failure['file']}: {failure['reason']}", style="red", soft_wrap=True, markup=False)
    if report["n_failed"]:
        console.print(f"{report['n_failed']} of {report['n_failed'] + report['n_ok']} images failed", style="red")
    if report["note"]:
        console.print(f"note: {report['note']}", style="yellow", soft_wrap=True, markup=False)
    console.print(f"weights {report['fingerprint']}; results: {out}", soft_wrap=True)


def _table(report: Mapping[str, Any]) -> Table:
    """Fits 80 columns with phrases of two words."""
    title = escape(f"{report['run']} on {report['data']['name']}, {report['split']}")
    table = Table("phrase", "score", title=title, box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for column in ("mean", "95 % interval", "where\npresent", "present in", "patients"):
        table.add_column(column, justify="right")
    for phrase, scores in report["summary"].items():
        for name, score in scores.items():
            interval = "" if score["low"] is None else f"{score['low']:.3f} to {score['high']:.3f}"
            showing = score.get("mean_present")
            where_present = "" if showing is None else f"{showing:.3f}"
            counts = f"{score['n_present']} of {score['n_images']}", str(score["n_patients"])
            table.add_row(escape(phrase), name, f"{score['mean']:.3f}", interval, where_present, *counts)
        table.add_section()
    return table
