"""Compare runs image by image: paired differences of patients, with intervals, on the same data only."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from itertools import combinations, product
from pathlib import Path
from statistics import fmean
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vessel.errors import VesselError
from vessel.evaluation.comparability import require_comparable, scored_by_all
from vessel.evaluation.results import Results, read_results
from vessel.evaluation.staging import staged
from vessel.metrics.intervals import cluster_interval
from vessel.metrics.scores import METRICS, Scores
from vessel.metrics.summary import ImageScore, cluster_means, per_patient, summarise, value_range
from vessel.reporting.page import write_comparison

COMPARISON_FILE = "comparison.json"
TABLE_FILE = "comparison.csv"
NOISE, BETTER, WORSE, UNKNOWN = "inside the noise", "better", "worse", "not known"
_EVERY_PAIR = 4  # runs up to which each is compared with each; more are compared with the first
_SHARED = ("data", "split", "unit", "fold", "phrases", "metrics", "pixel_spacing", "length_unit", "tolerance")
_HEADLINE = ("dice", "cldice", "hd95")
_COLUMNS = (
    *("a", "b", "phrase", "metric", "mean", "low", "high", "unit", "n_clusters", "n_patients", "n_images"),
    "verdict",
)


def compare(paths: Sequence[str | Path], out: Path, *, part: str = "test") -> dict[str, Any]:
    """Compare runs; write comparison.json, comparison.csv and their pages, and print.

    A difference is the score of `b` less that of `a` on the same image and phrase, averaged from images to videos,
    patients and the set as every score is. Images count that every run has scored.

    Args:
        paths: two or more runs or results folders; the first is what the others are compared with.
        out: folder for the two files.
        part: `val` or `test`, of paths that are runs.

    Returns:
        the content of comparison.json.

    Raises:
        VesselError: fewer than two, results that cannot be trusted, or that do not measure the same thing.
    """
    if len(paths) < 2:
        raise VesselError(f"compare={[str(path) for path in paths]}: give two runs or more, the reference first")
    found = [read_results(path, part) for path in paths]
    labels = _labels(found)
    require_comparable(found, labels, paths)
    scored = scored_by_all(found, labels)
    pairs = combinations(range(len(found)), 2) if len(found) <= _EVERY_PAIR else ((0, i) for i in range(1, len(found)))
    report: dict[str, Any] = {
        "runs": [_run(one, label, rows) for one, label, rows in zip(found, labels, scored, strict=True)],
        **{key: found[0].report.get(key) for key in _SHARED},
        "n_images": len({row.id for row in scored[0]}),
        "n_patients": len({row.patient for row in scored[0]}),
        "differences": [d for a, b in pairs for d in _differences(scored[a], scored[b], labels[a], labels[b])],
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    report["note"] = " ".join(_notes(found, labels, report))
    with staged(out) as stage:
        _write(report, stage)
        write_comparison(stage)
    _print_comparison(report, out)
    return report


def _labels(found: Sequence[Results]) -> list[str]:
    """Return a unique name for each: that of its run, with its weights and its number where needed."""
    names = [str(one.report["run"]) for one in found]
    for more in ([one.report["fingerprint"][:8] for one in found], [f"#{i}" for i in range(1, len(found) + 1)]):
        times = Counter(names)
        names = [name if times[name] == 1 else f"{name} {add}" for name, add in zip(names, more, strict=True)]
    return names


def _run(one: Results, label: str, rows: Sequence[ImageScore]) -> dict[str, Any]:
    kept = ("network", "source", "fingerprint", "decision", "threshold", "n_ok", "n_failed", "failures", "note")
    return {"run": label} | {key: one.report.get(key) for key in kept} | {"summary": summarise(rows)}


def _differences(
    a: Sequence[ImageScore], b: Sequence[ImageScore], name_a: str, name_b: str
) -> Iterator[dict[str, Any]]:
    """Yield one for each phrase and for `all`, by every metric that both runs have."""
    rows = [replace(one, scores=_subtract(other, one)) for one, other in zip(a, b, strict=True)]
    for phrase, metric in product(("all", *dict.fromkeys(row.phrase for row in rows)), METRICS):
        chosen = [row for row in rows if phrase in ("all", row.phrase)]
        if defined := [row for row in chosen if getattr(row.scores, metric) is not None]:
            named = {"a": name_a, "b": name_b, "phrase": phrase, "metric": metric}
            yield named | _difference(defined, metric)


def _difference(rows: Sequence[ImageScore], metric: str) -> dict[str, Any]:
    """Compute mean, interval and counts of the differences of one score."""
    least, greatest = value_range(metric)
    unit, clusters = cluster_means(rows, metric)
    low, high = cluster_interval(list(clusters.values()), bounds=(least - greatest, greatest - least))
    patients = clusters if unit == "patient" else per_patient(rows, metric)["all"]
    mean = fmean(patients.values())
    return {
        "mean": mean,
        "low": low,
        "high": high,
        "unit": unit,
        "n_clusters": len(clusters),
        "n_patients": len(patients),
        "n_videos": len({row.video for row in rows}),
        "n_images": len({row.id for row in rows}),
        "verdict": _verdict(low, high, better=METRICS[metric].better),
        "per_patient": patients,
    }


def _subtract(b: ImageScore, a: ImageScore) -> Scores:
    """Compute the scores of `b` less those of `a`; None where one of them has none."""
    pairs = {metric: (getattr(a.scores, metric), getattr(b.scores, metric)) for metric in METRICS}
    return Scores(**{metric: None if None in (x, y) else y - x for metric, (x, y) in pairs.items()})


def _verdict(low: float | None, high: float | None, *, better: str) -> str:
    """Judge `b` by the interval of the difference."""
    if low is None or high is None:
        return UNKNOWN
    if low <= 0 <= high:
        return NOISE
    return BETTER if (low > 0) == (better == "higher") else WORSE


def _notes(found: Sequence[Results], labels: Sequence[str], report: Mapping[str, Any]) -> list[str]:
    """List the notes that qualify the differences."""
    own = [str(one.report.get("note") or "") for one in found]
    shared = len(set(own)) == 1
    notes = own[:1] if shared else [f"{label}: {note}" for label, note in zip(labels, own, strict=True) if note]
    failed = [f"{one.report['n_failed']} of {label}" for one, label in zip(found, labels, strict=True)]
    if any(one.report["n_failed"] for one in found):
        notes.append(
            f"Images failed: {', '.join(failed)}. Figures are of the {report['n_images']} that all have scored."
        )
    for unit in sorted({entry["unit"] for entry in report["differences"]} - {"patient"}):
        notes.append(
            f"Where scores are of one patient, intervals are over its {unit}s and say nothing about other patients."
        )
    notes.append(
        f"{len(report['differences'])} differences were computed, and their intervals are not widened for that: "
        "decide beforehand which one counts."
    )
    return [note for note in notes if note]


def _write(report: Mapping[str, Any], out: Path) -> None:
    with (out / TABLE_FILE).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, _COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(report["differences"])
    text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    (out / COMPARISON_FILE).write_text(text, encoding="utf-8")


def _print_comparison(report: Mapping[str, Any], out: Path) -> None:
    console = Console()
    console.print(_runs_table(report))
    for a, b in dict.fromkeys((entry["a"], entry["b"]) for entry in report["differences"]):
        console.print(_differences_table(report, a, b))
    console.print(f"note: {report['note']}", style="yellow", soft_wrap=True, markup=False)
    console.print(
        f"page: {out / 'comparison.html'}; every score: {out / COMPARISON_FILE}", soft_wrap=True, markup=False
    )


def _runs_table(report: Mapping[str, Any]) -> Table:
    n = report["n_patients"]
    title = f"{report['n_images']} images of {n} patient{'s' if n > 1 else ''}, {report['split']}"
    table = Table(title=title, box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for column in ("run", "network"):
        table.add_column(column, overflow="fold", max_width=18)
    for metric in _HEADLINE:
        table.add_column(_titled(metric, report), justify="right")
    for run in report["runs"]:
        cells = [_with_interval(run["summary"]["all"][metric], "") for metric in _HEADLINE]
        table.add_row(escape(run["run"]), escape(str(run["network"])), *cells)
    return table


def _differences_table(report: Mapping[str, Any], a: str, b: str) -> Table:
    title = escape(f"{b} less {a}")
    table = Table(title=title, box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.add_column("phrase", overflow="fold", max_width=24)
    table.add_column("score")
    table.add_column("difference, 95 % interval", justify="right")
    table.add_column("over", justify="right")
    table.add_column("images", justify="right")
    table.add_column("", max_width=18)
    styles = {BETTER: "green", WORSE: "red", NOISE: "dim", UNKNOWN: "dim"}
    of_pair = [entry for entry in report["differences"] if (entry["a"], entry["b"]) == (a, b)]
    for entry in (entry for entry in of_pair if entry["metric"] in _HEADLINE):
        over = f"{entry['n_clusters']} {entry['unit']}s"
        cells = (_titled(entry["metric"], report), _with_interval(entry, "+"), over, str(entry["n_images"]))
        table.add_row(escape(entry["phrase"]), *cells, entry["verdict"], style=styles[entry["verdict"]])
    return table


def _titled(metric: str, report: Mapping[str, Any]) -> str:
    of_length = METRICS[metric].unit == "length"
    return f"{METRICS[metric].title} ({report['length_unit']})" if of_length else METRICS[metric].title


def _with_interval(entry: Mapping[str, Any], sign: str) -> str:
    if entry["mean"] is None:
        return ""
    spans = "" if entry["low"] is None else f" [{entry['low']:{sign}.3f}, {entry['high']:{sign}.3f}]"
    return f"{entry['mean']:{sign}.3f}{spans}"
