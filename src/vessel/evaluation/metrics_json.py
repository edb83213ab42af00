"""The content of metrics.json: every number of an evaluation, and the facts that are needed to read them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vessel.checkpoints.reading import read_checkpoint
from vessel.data.catalog import Catalog
from vessel.data.inputs import requested_phrases
from vessel.errors import VesselError
from vessel.evaluation.results import METRICS_FILE, ROWS_FILE, present_use, rows_hash, seal
from vessel.evaluation.scoring import Ruler, Scored, missing_seg
from vessel.files import write_json
from vessel.inference.decision import DECISION_FILE, StoredDecision
from vessel.inference.loading import LoadedModel
from vessel.metrics.scores import METRICS
from vessel.metrics.summary import per_patient, summarise, write_per_image_csv
from vessel.model.baselines import require_known
from vessel.paths import display_path
from vessel.runs.manifest import without_places

_USES_FILE = "test_uses.jsonl"  # beside the results of each part: every use of the test part


@dataclass(frozen=True)
class Part:
    """The part of a data set that is scored.

    Attributes:
        catalog: the data set.
        name: `train`, `val` or `test`.
        fold: of a cross-validation; None keeps the fixed split.
        phrases: that are scored.
        own: it is the data set of the run.
    """

    catalog: Catalog
    name: str
    fold: int | None
    phrases: tuple[str, ...]
    own: bool


def phrases_to_score(model: LoadedModel, catalog: Catalog, phrases: Any) -> tuple[str, ...]:
    """Choose the phrases to score: those that the user names, else those of the run, else all of the data set.

    Raises:
        VesselError: the data set has no masks of one, or the network does not know it.
    """
    chosen = requested_phrases(phrases, model.manifest.phrases or catalog.phrases, model.prompt)
    if unknown := [phrase for phrase in chosen if phrase not in catalog.phrases]:
        raise VesselError(f"{catalog.root}: no masks of {unknown}; data.phrases=[...] may name {list(catalog.phrases)}")
    require_known(model.network, chosen)
    return chosen


def collect_report(
    model: LoadedModel, part: Part, scored: Scored, ruler: Ruler, *, uses: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """Collect the numbers of an evaluation before its files are written; `uses` comes from `record_test_use`."""
    manifest, catalog, rows = model.manifest, part.catalog, scored.rows
    phrases = ("all", *part.phrases)
    decision = model.decision
    return {
        "run": manifest.name,
        "source": display_path(model.source),
        "fingerprint": manifest.fingerprint,
        "network": manifest.network,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "data": {
            "name": catalog.manifest.get("name"),
            "fingerprint": catalog.fingerprint,
            "split_hash": catalog.split.hash,
            "same_as_run": part.own,
            **{key: catalog.manifest.get(key) for key in ("n_images", "n_patients", "n_videos")},
        },
        "split": part.name,
        "unit": catalog.split.unit,
        "fold": part.fold,
        "phrases": list(part.phrases),
        "note": " ".join(_notes(model, part, scored, uses)),
        "decision": decision.to_json(),
        "threshold": decision.threshold,
        "threshold_source": model.decision_source,
        "searched": _searched(model),
        "pixel_spacing": list(ruler.spacing) if ruler.unit == "mm" else None,
        "length_unit": ruler.unit,
        "tolerance": ruler.tolerance,
        "metrics": {name: asdict(metric) for name, metric in METRICS.items()},
        "n_ok": len({row.id for row in rows}),
        "n_failed": len(scored.failures),
        "failures": [asdict(failure) for failure in scored.failures],
        "seg_missing": missing_seg(scored.emitted),
        "summary": summarise(rows) if rows else {},
        "patients": _patients(scored, phrases),
        "reliability": {phrase: scored.reliability[phrase].bins() for phrase in phrases if rows},
        "curve": _curve(model),
        "test_uses": list(uses),
        "manifest": without_places(manifest.as_dict()),
    }


def write_results(out: Path, report: dict[str, Any], scored: Scored) -> None:
    """Write `per_image.csv` and `metrics.json`, sealed so that a number changed later is noticed."""
    write_per_image_csv(out / ROWS_FILE, scored.rows)
    report["rows_hash"] = rows_hash(out / ROWS_FILE)
    report["hash"] = seal(report)
    write_json(out / METRICS_FILE, report)


def record_test_use(model: LoadedModel, part: Part) -> list[dict[str, Any]]:
    """Record a use of a run's test part, and return every use so far, each with its weights and decision."""
    if model.run is None or part.name != "test" or not part.own:
        return []
    use = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "fingerprint": model.manifest.fingerprint,
        "decision": model.decision.to_json(),
    }
    file = model.run / "evaluate" / _USES_FILE
    file.parent.mkdir(exist_ok=True)
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(use) + "\n")
    return [present_use(json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]


def _patients(scored: Scored, phrases: Sequence[str]) -> dict[str, dict[str, Mapping[str, float]]]:
    by_metric = {name: per_patient(scored.rows, name) for name in METRICS} if scored.rows else {}
    return {phrase: {name: found[phrase] for name, found in by_metric.items() if phrase in found} for phrase in phrases}


def _searched(model: LoadedModel) -> list[Mapping[str, Any]]:
    """Read the trials of `search=true` for these weights."""
    if model.run is None or not (file := model.run / DECISION_FILE).is_file():
        return []
    stored = StoredDecision.read(file)
    return list(stored.searched) if stored.mismatch(model.manifest) is None else []


def _curve(model: LoadedModel) -> dict[str, list[float]] | None:
    """Read the scores of the last validation against the threshold from the checkpoint of a run."""
    if model.run is None:
        return None
    sweep = read_checkpoint(model.source).get("callbacks", {}).get("ThresholdSweep", {})
    return sweep.get("curve") or None


def _notes(model: LoadedModel, part: Part, scored: Scored, uses: Sequence[Mapping[str, Any]]) -> list[str]:
    split = part.catalog.split
    notes = [split.note] if split.note else []
    if not model.tuned:
        notes.append("vessel did not train this network; whether it was trained on these images is not known.")
        if (missing := missing_seg(scored.emitted)) is not None:
            notes.append(
                f"Answers were given to it; within those words [SEG] is its own choice in {100 * (1 - missing):.0f} %. "
                "Its own answers: vessel.predict decode=generate."
            )
    elif not part.own:
        notes.append("This is not the data set of the run; whether they share patients is not known.")
    elif part.name == "train":
        notes.append("These are training images: the figures say nothing about new ones.")
    elif part.name == "val":
        notes.append("Threshold and checkpoint were chosen on these images; figures to report come from split=test.")
    if model.manifest.threshold is None:
        notes.append("No threshold was chosen on validation.")
    settings = {json.dumps([use["fingerprint"], use["decision"]], sort_keys=True) for use in uses}
    if len(settings) > 1:
        notes.append(
            f"The test part was scored with {len(settings)} different weights or decisions of this run: choosing among "
            "them by these figures would be choosing on the test part."
        )
    return notes
