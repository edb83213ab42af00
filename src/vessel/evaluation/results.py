"""Results folders: hash their numbers when they are written, and check them when they are read."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vessel.data.catalog import digest
from vessel.errors import VesselError
from vessel.files import read_json
from vessel.metrics.summary import ImageScore, read_per_image_csv, summarise
from vessel.paths import expanded, hydra_option
from vessel.runs.manifest import MANIFEST
from vessel.runs.old_names import DECISION, present_decision

METRICS_FILE = "metrics.json"
ROWS_FILE = "per_image.csv"
_REMEDY = "evaluate again, with overwrite=true"
POOLED = "pooled"  # instead of the number of a fold: every image by the run that did not train on it
# What everything that reads results relies on.
_KEYS = {
    *("run", "source", "fingerprint", "data", "split", "unit", "fold", "decision", "length_unit", "tolerance"),
    *("metrics", "n_ok", "n_failed", "failures", "phrases", "summary", "manifest", "rows_hash", "hash"),
}


@dataclass(frozen=True)
class Results:
    """The checked results of an evaluation.

    Attributes:
        folder: that holds them.
        report: content of metrics.json.
        rows: of per_image.csv, one an image and phrase.
    """

    folder: Path
    report: Mapping[str, Any]
    rows: tuple[ImageScore, ...]


def rows_hash(path: Path) -> str:
    """Compute the SHA-256 of the bytes of per_image.csv."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def seal(report: Mapping[str, Any]) -> str:
    """Compute the SHA-256 of the content of metrics.json without `hash` itself."""
    return digest({key: value for key, value in plain(report).items() if key != "hash"})


def read_results(path: str | Path, part: str = "test") -> Results:
    """Read a results folder, and check its numbers against its rows and hashes.

    Args:
        path: folder of a run, whose results on `part` are meant, of a cross-validation, whose pooled ones, a results
            folder, or its metrics.json.
        part: `val` or `test`.

    Raises:
        VesselError: nothing there, of another version, or changed after it was written.
    """
    folder = _folder(expanded(path), part)
    report = read_json(folder / METRICS_FILE, _REMEDY)
    again = f"{_REMEDY}: {_command(report, part)}"
    if lacking := sorted(_KEYS - report.keys()):
        raise VesselError(f"{folder / METRICS_FILE} lacks {', '.join(lacking)}; another vessel wrote it: {again}")
    if not (folder / ROWS_FILE).is_file():
        raise VesselError(f"{folder}: {ROWS_FILE} is gone, so its figures rest on nothing; {again}")
    if rows_hash(folder / ROWS_FILE) != report["rows_hash"]:
        raise VesselError(
            f"{folder / ROWS_FILE} was changed after it was written: its hash is not the one in {METRICS_FILE}; {again}"
        )
    results = Results(folder, report, tuple(read_per_image_csv(folder / ROWS_FILE)))
    # The seal is checked last: the others name what differs.
    faults = (*_differences_from_rows(results), *_differences_from_manifest(results))
    if faults:
        raise VesselError(f"{folder / METRICS_FILE} was changed after it was written: {faults[0]}; {again}")
    if seal(report) != report["hash"]:
        raise VesselError(
            f"{folder / METRICS_FILE} was changed after it was written: its hash is not that of its content; {again}"
        )
    return replace(results, report=_present(report))


def present_use(use: Mapping[str, Any]) -> dict[str, Any]:
    """Replace the old keys in the decision of a recorded use of the test part."""
    return {**use, "decision": present_decision(use["decision"])}


def _present(report: Mapping[str, Any]) -> dict[str, Any]:
    """Replace the old keys of decisions in metrics.json; it was sealed with them, so this comes after its check."""
    present = {**report, "decision": present_decision(report["decision"])}
    if report.get("test_uses"):
        present["test_uses"] = [present_use(use) for use in report["test_uses"]]
    if report.get("searched"):
        present["searched"] = [
            {**trial, "option": DECISION.get(trial["option"], trial["option"])} for trial in report["searched"]
        ]
    return present


def plain(value: Any) -> Any:
    """Return a value as it comes back from JSON."""
    return json.loads(json.dumps(value))


def _folder(path: Path, part: str) -> Path:
    if path.name == METRICS_FILE and path.is_file():
        return path.parent
    if (path / METRICS_FILE).is_file():
        return path
    if not path.is_dir():
        raise VesselError(f"{path}: no such folder; give a run (outputs/<name>/<time>) or a results folder")
    for name in (part, POOLED):
        if (path / "evaluate" / name / METRICS_FILE).is_file():
            return path / "evaluate" / name
    if (path / MANIFEST).is_file():
        command = f"python -m vessel.evaluate {hydra_option('ckpt', path)} split={part}"
        raise VesselError(f"{path}: this run has no results on {part} yet; make them: {command}")
    raise VesselError(
        f"{path}: neither a run nor a results folder; what is no run is evaluated with out=FOLDER, and that folder "
        "is compared"
    )


def _command(report: Mapping[str, Any], part: str) -> str:
    source = report.get("source", "…")
    options = f"folds={source}" if report.get("fold") == POOLED else f"ckpt={source} split={report.get('split', part)}"
    return f"python -m vessel.evaluate {options}"


def _differences_from_rows(results: Results) -> Iterator[str]:
    """Yield every number of the report that its rows do not give."""
    report, rows = results.report, results.rows
    images = {row.id for row in rows}
    yield from _unequal(report["n_ok"], len(images), "n_ok", ROWS_FILE)
    yield from _unequal(report["n_failed"], len(report["failures"]), "n_failed", "its own list of failures")
    if both := images & {failure["id"] for failure in report["failures"]}:
        yield f"{min(both)} is among the failures and has scores in {ROWS_FILE}"
    expected = {(image, phrase) for image in images for phrase in report["phrases"]}
    if odd := sorted(expected ^ {(row.id, row.phrase) for row in rows}):
        image, phrase = odd[0]
        has = "no" if odd[0] in expected else "a"
        yield f"its phrases are {report['phrases']}, and {ROWS_FILE} has {has} row of {image}, {phrase!r}"
    yield from _unequal(report["summary"], plain(summarise(rows)) if rows else {}, "summary", ROWS_FILE)


def _differences_from_manifest(results: Results) -> Iterator[str]:
    """Compare run and data of the report with the manifest in it and the one in the folder of the run."""
    report, run = results.report, results.folder.parent.parent / MANIFEST
    if not report["data"].get("same_as_run"):
        return
    manifests = {"its manifest": report["manifest"]}
    if results.folder.parent.name == "evaluate" and run.is_file():
        manifests[str(run)] = read_json(run, _REMEDY)
    for where, manifest in manifests.items():
        yield from _unequal(report["run"], manifest.get("name"), "run", where)
        if manifest.get("fingerprint"):  # the manifest of a run does not know it
            yield from _unequal(report["fingerprint"], manifest["fingerprint"], "fingerprint", where)
        for key in ("fingerprint", "split_hash"):
            yield from _unequal(report["data"].get(key), manifest.get("data", {}).get(key), f"data.{key}", where)


def _unequal(stated: Any, found: Any, key: str, where: str) -> Iterator[str]:
    """Yield the leaves that differ, by their full key."""
    if isinstance(stated, Mapping) and isinstance(found, Mapping):
        for name in {**stated, **found}:
            yield from _unequal(stated.get(name), found.get(name), f"{key}.{name}", where)
    elif isinstance(stated, int | float) and isinstance(found, int | float):
        # Sums may be added up in another order by another numpy.
        if not math.isclose(stated, found, rel_tol=1e-6, abs_tol=1e-9):
            yield f"{key} is {stated}, and {where} gives {found}"
    elif stated != found:
        yield f"{key} is {stated}, and {where} gives {found}"
