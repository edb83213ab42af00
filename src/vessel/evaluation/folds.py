"""Score a cross-validation: each image is predicted by the run that did not train on it, and all are one set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track

from vessel.data.catalog import Catalog, Split, digest
from vessel.data.dataset import VesselDataset
from vessel.errors import VesselError
from vessel.evaluation.dashboards import log_evaluation
from vessel.evaluation.fold_runs import FoldRun, find_fold_runs, require_one_experiment
from vessel.evaluation.metrics_json import Part, collect_report, phrases_to_score, write_results
from vessel.evaluation.options import EvaluateOptions
from vessel.evaluation.results import METRICS_FILE, POOLED
from vessel.evaluation.scoring import Ruler, Scored, input_images, probability_maps, score_part
from vessel.evaluation.staging import require_own, staged
from vessel.evaluation.terminal import print_evaluation
from vessel.inference.decision import Decision
from vessel.inference.loading import LoadedModel, load_model
from vessel.inference.options import choose_device
from vessel.inference.predictor import Predictor
from vessel.inference.results import Prediction
from vessel.metrics.overlap import OVERLAP_METRICS, OverlapSweep
from vessel.metrics.thresholds import THRESHOLDS, best_index
from vessel.paths import display_path, expanded
from vessel.reporting.page import write_report
from vessel.runs.manifest import Manifest


@dataclass(frozen=True)
class Curve:
    """The mean scores of the images of one fold at each of `THRESHOLDS`.

    Attributes:
        images: how many were predicted.
        scores: for each of dice, iou, precision and recall float64 [T], the mean over those images.
    """

    images: int
    scores: Mapping[str, NDArray[np.float64]]


def evaluate_folds(paths: Sequence[str | Path], options: EvaluateOptions) -> Mapping[str, Any]:
    """Predict every image out of fold, score and print; the results lie in `evaluate/pooled` of the first path.

    Each network predicts twice: at all thresholds first, then, at the threshold that the other folds chose, for all
    scores. So neither memory nor disk has to hold the probabilities of the whole set.

    Args:
        paths: as `find_fold_runs` takes them.
        options: of the command; `ckpt`, `split` and `other_data` have no meaning here.

    Returns:
        the content of metrics.json: as of one run, with `fold` "pooled", and `folds`, an entry for each.

    Raises:
        VesselError: runs, data set or results folder will not do, or nothing could be scored.
    """
    runs = find_fold_runs(paths)
    catalog = Catalog.open(Path(options.data.root or runs[0].manifest.config["data"]["root"]))
    require_one_experiment(runs, catalog)
    ruler = Ruler.of(catalog, options.tolerance)
    out = expanded(paths[0]) / "evaluate" / POOLED if options.out is None else expanded(options.out)
    if not options.overwrite:
        _require_own(out, runs, catalog, options)
    thresholds = cross_fitted(curves := [_curve(run, catalog, options) for run in runs])
    pooled, folds = Scored(), []
    for run, threshold in zip(runs, thresholds, strict=True):
        model, phrases, scored = _scored(run, catalog, threshold, ruler, options)
        _add(pooled, scored)
        folds.append(_entry(run, model.manifest, threshold, scored))
    part, manifest = Part(catalog, "val", None, phrases, own=True), _pooled_manifest(model.manifest, folds)
    report = collect_report(replace(model, manifest=manifest), part, pooled, ruler)
    report |= {
        "source": display_path(expanded(paths[0])),
        "fold": POOLED,
        "note": " ".join(_notes(catalog.split, folds)),
        "decision": Decision().to_json() | {"threshold": manifest.threshold},
        "threshold": manifest.threshold,
        "threshold_source": "of each fold, chosen on the images of the other folds",
        "curve": {"threshold": list(THRESHOLDS), **mean_curve(curves)} if pooled.rows else None,
        "folds": folds,
        "panels": [],
    }
    with staged(out, catalog.root) as stage:
        write_results(stage, report, pooled)
        write_report(stage)
    print_evaluation(report, out)
    log_evaluation(options.logger, report, out, catalog.root)
    if not pooled.rows:
        raise VesselError(f"no image of any fold could be scored; the first: {pooled.failures[0].reason}")
    return report


def cross_fitted(curves: Sequence[Curve]) -> list[float]:
    """Choose the threshold of each fold on the images of all other folds, never on its own.

    It has the highest mean Dice over images; of equals, the one nearest 0.5, as `ThresholdSweep` chooses.

    Raises:
        VesselError: nothing could be predicted in the other folds.
    """
    chosen = []
    for fold in range(len(curves)):
        others = [curve for number, curve in enumerate(curves) if number != fold]
        if not any(curve.images for curve in others):
            raise VesselError(f"no image outside fold {fold} could be predicted, so nothing chooses its threshold")
        dice = mean_curve(others)["dice"]
        chosen.append(THRESHOLDS[best_index(THRESHOLDS, dice)])
    return chosen


def mean_curve(curves: Sequence[Curve]) -> dict[str, list[float]]:
    """Average the scores over the images of several folds; T numbers each."""
    weights = [curve.images for curve in curves]
    return {
        name: np.average([c.scores[name] for c in curves], axis=0, weights=weights).tolist() for name in OVERLAP_METRICS
    }


def _require_own(out: Path, runs: Sequence[FoldRun], catalog: Catalog, options: EvaluateOptions) -> None:
    """Refuse a results folder with other results before anything is predicted.

    Only weights that are loaded have a fingerprint. So where there are results, each network is loaded once more.

    Raises:
        VesselError: `out` holds other results.
    """
    if not (out / METRICS_FILE).is_file():
        return
    fingerprints = []
    for run in runs:
        model = _load(run, options)
        model.network.to("meta")  # room for the next fold
        fingerprints.append(model.manifest.fingerprint)
    manifest = replace(runs[0].manifest, fingerprint=digest(fingerprints))
    require_own(out, manifest, Part(catalog, "val", None, (), own=True))


def _load(run: FoldRun, options: EvaluateOptions) -> LoadedModel:
    """Load the last checkpoint of a fold."""
    return load_model(str(run.checkpoint), options.network.load_settings(choose_device(options.device)))


def _opened(run: FoldRun, catalog: Catalog, options: EvaluateOptions) -> tuple[LoadedModel, Predictor, VesselDataset]:
    """Load the network of a fold and the images that it was not trained on."""
    device = choose_device(options.device)
    model = _load(run, options)
    phrases = phrases_to_score(model, catalog, options.data.phrases)
    frames = catalog.part("val", run.fold)
    dataset = VesselDataset(catalog.root, frames, phrases=phrases, prompt=model.prompt, geometry=model.geometry)
    return model, Predictor(model, device=device, device_map=options.network.device_map), dataset


def _curve(run: FoldRun, catalog: Catalog, options: EvaluateOptions) -> Curve:
    """Score the images of a fold at every threshold; a failure is reported later, when it is scored."""
    _, predictor, dataset = _opened(run, catalog, options)
    sweep, images = OverlapSweep(THRESHOLDS), 0
    answers = predictor.predict(
        input_images(dataset), dataset.__getitem__, batch_size=options.batch_size, workers=options.workers
    )
    for answer in track(answers, f"thresholds, fold {run.fold}", len(dataset), transient=True):
        if isinstance(answer, Prediction):
            sample, images = answer.sample, images + 1
            assert sample.masks is not None, "frames of a data set have masks"
            sweep.update(
                [torch.from_numpy(probability_maps(answer))],
                [sample.masks],
                ids=[sample.id],
                patients=[sample.patient],
                phrases=[sample.phrases],
            )
    means = sweep.compute()
    nothing = torch.zeros(len(THRESHOLDS), dtype=torch.float64)
    return Curve(images, {name: means.get(name, nothing).numpy() for name in OVERLAP_METRICS})


def _scored(
    run: FoldRun, catalog: Catalog, threshold: float, ruler: Ruler, options: EvaluateOptions
) -> tuple[LoadedModel, tuple[str, ...], Scored]:
    """Score a fold; return its model without weights, its phrases and its scores."""
    model, predictor, dataset = _opened(run, catalog, options)
    scored = score_part(
        predictor, dataset, Decision(threshold), ruler, batch_size=options.batch_size, workers=options.workers
    )
    model.network.to("meta")  # room for those of the next fold
    return model, dataset.phrases, scored


def _add(pooled: Scored, fold: Scored) -> None:
    """Add the scores of a fold to the pooled ones."""
    pooled.rows += fold.rows
    pooled.failures += fold.failures
    pooled.emitted += fold.emitted
    for name, counted in fold.reliability.items():
        pooled.reliability[name].merge(counted)


def _entry(run: FoldRun, manifest: Manifest, threshold: float, scored: Scored) -> dict[str, Any]:
    """Build the entry of one fold in metrics.json."""
    return {
        "fold": run.fold,
        "source": display_path(run.checkpoint),
        "fingerprint": manifest.fingerprint,
        "seed": manifest.config.get("seed"),
        "threshold": threshold,
        "n_ok": len({row.id for row in scored.rows}),
        "n_failed": len(scored.failures),
        "n_patients": len({row.patient for row in scored.rows}),
        "stopped_early": run.stopped_early,
    }


def _pooled_manifest(manifest: Manifest, folds: Sequence[Mapping[str, Any]]) -> Manifest:
    """Build the manifest of all runs together from that of one of them."""
    thresholds = {fold["threshold"] for fold in folds}
    config = {**manifest.config, "data": {**manifest.config["data"], "fold": POOLED}}
    return replace(
        manifest,
        fingerprint=digest([fold["fingerprint"] for fold in folds]),
        threshold=thresholds.pop() if len(thresholds) == 1 else None,
        decision=None,
        config=config,
        data={**manifest.data, "fold": POOLED},
    )


def _notes(split: Split, folds: Sequence[Mapping[str, Any]]) -> list[str]:
    """List the notes that belong to pooled results."""
    chosen = ", ".join(f"{fold['threshold']:.2f}" for fold in folds)
    notes = [split.note] if split.note else []
    notes += [
        f"Cross-validation, {len(folds)} folds by {split.unit}: each image was predicted by the run that did not train "
        "on its fold; the test part is in none.",
        f"The threshold of a fold was chosen on the images of the others ({chosen}); its last checkpoint was taken, as "
        "the best one was chosen on the images that are scored here.",
    ]
    if early := [str(fold["fold"]) for fold in folds if fold["stopped_early"]]:
        notes.append(
            f"Early stopping monitored the images that are scored here when it ended training on fold "
            f"{', '.join(early)}: a length chosen beforehand (callbacks.early_stopping=null) avoids that."
        )
    return notes
