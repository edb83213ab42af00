"""Print an evaluation on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vessel.evaluation.results import POOLED

_MAX_FAILURES = 10
_ALWAYS_PRINTED = ("dice", "iou", "precision", "recall", "cldice", "hd95")


def print_evaluation(report: Mapping[str, Any], out: Path) -> None:
    """Print the table, what has to be known to read it, and where the rest is."""
    console = Console()

    def line(text: str, style: str | None = None) -> None:
        console.print(text, style=style, soft_wrap=True, markup=False, highlight=False)

    if report["summary"]:
        console.print(_table(report))
        unit = report["summary"]["all"]["dice"]["unit"]
        line(f"means: image, video, patient, set; intervals: 95 %, bootstrap over {unit}s; other scores: metrics.json")
    for phrase, scores in report["summary"].items():
        if not scores["dice"]["n_present"] and phrase != "all":
            line(f"{phrase} is in none of these images: its scores only mean that nothing was predicted", "yellow")
    threshold = "differs" if report["threshold"] is None else f"{report['threshold']:.2f}"  # by fold
    line(f"threshold {threshold} ({report['threshold_source']})")
    for failure in report["failures"][:_MAX_FAILURES]:
        line(f"failed: {failure['file']}: {failure['reason']}", "red")
    if report["n_failed"]:
        line(f"{report['n_failed']} of {report['n_failed'] + report['n_ok']} images failed", "red")
    if report["note"]:
        line(f"note: {report['note']}", "yellow")
    line(f"weights {report['fingerprint']}; results: {out}")


def _table(report: Mapping[str, Any]) -> Table:
    """Build a table that fits 80 columns with phrases of two words."""
    part = "all folds" if report["fold"] == POOLED else report["split"]
    title = escape(f"{report['run']} on {report['data']['name']}, {part}")
    table = Table("phrase", "score", title=title, box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for column in ("mean", "95 % interval", "where\npresent", "present in", "patients"):
        table.add_column(column, justify="right")
    for phrase, scores in report["summary"].items():
        for name in _ALWAYS_PRINTED:
            score, metric = scores[name], report["metrics"][name]
            if score["mean"] is None:
                continue
            unit = f", {report['length_unit']}" if metric["unit"] == "length" else ""
            digits = 1 if unit.endswith("px") else 3
            interval = "" if score["low"] is None else f"{score['low']:.{digits}f} to {score['high']:.{digits}f}"
            mean_present = score.get("mean_present")
            where_present = "" if mean_present is None else f"{mean_present:.3f}"
            counts = f"{score['n_present']} of {score['n_images']}", str(score["n_patients"])
            table.add_row(
                escape(phrase),
                f"{metric['title']}{unit}",
                f"{score['mean']:.{digits}f}",
                interval,
                where_present,
                *counts,
            )
        table.add_section()
    return table
