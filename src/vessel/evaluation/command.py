"""Score a trained network on a part of a data set, with the threshold and post-processing that validation chose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from vessel.data.catalog import PARTS, Catalog
from vessel.data.dataset import VesselDataset
from vessel.errors import VesselError
from vessel.evaluation.comparison import compare
from vessel.evaluation.dashboards import log_evaluation
from vessel.evaluation.folds import evaluate_folds
from vessel.evaluation.metrics_json import Part, collect_report, phrases_to_score, record_test_use, write_results
from vessel.evaluation.options import EvaluateOptions
from vessel.evaluation.panels import draw_panels
from vessel.evaluation.scoring import Ruler, score_part
from vessel.evaluation.search import check_search, run_search
from vessel.evaluation.staging import require_own, staged
from vessel.evaluation.terminal import print_evaluation
from vessel.inference.decision import read_given_decision
from vessel.inference.loading import LoadedModel, load_model
from vessel.inference.options import choose_device
from vessel.inference.predictor import Predictor
from vessel.paths import expanded
from vessel.reporting.page import write_report


def evaluate(options: EvaluateOptions, default_out: Path) -> Mapping[str, Any]:
    """Score a network, search its decision, compare runs, or pool the runs of a cross-validation.

    Args:
        options: of the command.
        default_out: results folder of what lies in no run folder.

    Returns:
        the content of the file with the numbers.

    Raises:
        VesselError: options that exclude each other, or input that will not do.
    """
    if options.split not in PARTS:
        raise VesselError(f"split={options.split}: choose one of {', '.join(PARTS)}")
    inputs = {"ckpt": options.ckpt, "compare": options.compare, "folds": options.folds}
    if len(given := [name for name, value in inputs.items() if value is not None]) != 1:
        names = " and ".join(f"{name}=" for name in given) or "nothing"
        raise VesselError(f"{names} given: name one of ckpt=RUN, compare=[RUN,RUN,...], folds=SWEEP")
    if options.search and options.ckpt is None:
        raise VesselError(f"search=true searches for one run: ckpt=RUN, without {given[0]}=")
    if options.search:
        check_search(options)
    if options.compare is not None:
        out = _expanded(options.out) or default_out
        return compare(_listed(options.compare), out, part=options.split)
    if options.folds is not None:
        return evaluate_folds(_listed(options.folds), options)
    return _score(options, default_out)


def _listed(paths: Any) -> list[str]:
    return [paths] if isinstance(paths, str) else list(paths)


def _expanded(out: str | None) -> Path | None:
    return None if out is None else expanded(out)


def _score(options: EvaluateOptions, default_out: Path) -> Mapping[str, Any]:
    assert options.ckpt is not None
    device = choose_device(options.device)
    model = load_model(options.ckpt, options.network.load_settings(device))
    for load_report in model.reports:
        Console().print(load_report.table())
    part, dataset = _data(options, model)
    if options.search:
        return run_search(model, part, dataset, options)
    if options.decision is not None:
        model = _with_decision(options.decision, model, part)
    ruler = Ruler.of(part.catalog, options.tolerance)
    out = _expanded(options.out) or _results_folder(options, model, default_out)
    if not options.overwrite:
        require_own(out, model.manifest, part)
    decision = model.decision
    predictor = Predictor(model, device=device, device_map=options.network.device_map, tta=decision.tta)
    scored = score_part(predictor, dataset, decision, ruler, batch_size=options.batch_size, workers=options.workers)
    report = collect_report(model, part, scored, ruler, uses=record_test_use(model, part))
    with staged(out, part.catalog.root) as stage:
        report["panels"] = draw_panels(predictor, dataset, decision, scored.rows, out=stage)
        write_results(stage, report, scored)
        write_report(stage)
    print_evaluation(report, out)
    # Last: no dashboard's failure takes the results with it.
    log_evaluation(options.logger, report, out, part.catalog.root)
    if not scored.rows:
        raise VesselError(f"none of {len(dataset)} images could be scored; the first: {scored.failures[0].reason}")
    return report


def _with_decision(path: str, model: LoadedModel, part: Part) -> LoadedModel:
    """Give weights without a run folder the decision that was searched for them."""
    if model.run is not None:
        raise VesselError(f"decision={path}: a run keeps its own, see search=true; this is for what lies in none")
    data = {"fingerprint": part.catalog.fingerprint, "split_hash": part.catalog.split.hash}
    decision, _ = read_given_decision(path, model.manifest, data)
    return replace(model, manifest=replace(model.manifest, decision=decision.to_json()))


def _results_folder(options: EvaluateOptions, model: LoadedModel, default: Path) -> Path:
    """Return the folder of the results unless the user names one."""
    part = f"{options.split}_other_data" if options.other_data else options.split
    return default if model.run is None else model.run / "evaluate" / part


def _data(options: EvaluateOptions, model: LoadedModel) -> tuple[Part, VesselDataset]:
    """Open the images to score, of the run's own data set unless the user gives another."""
    manifest = model.manifest
    configured = manifest.config.get("data") or {}
    root = options.data.root or configured.get("root")
    if root is None:
        raise VesselError(f"{options.ckpt} does not name its data set; give data.root=DIR")
    catalog = Catalog.open(Path(root))
    found = {"fingerprint": catalog.fingerprint, "split_hash": catalog.split.hash}
    differing = [name for name, value in found.items() if manifest.data.get(name) != value]
    if differing and model.tuned and not options.other_data:
        raise VesselError(
            f"{root}: {' and '.join(differing)} of this data set differ from those of run {manifest.name}, so images "
            "it was trained on may be among them; give the run's own data set, or other_data=true"
        )
    phrases = phrases_to_score(model, catalog, options.data.phrases)
    fold = None if options.other_data else configured.get("fold")
    part = Part(catalog, options.split, fold, phrases, own=model.tuned and not options.other_data)
    dataset = VesselDataset(
        catalog.root,
        catalog.part(options.split, fold),
        phrases=phrases,
        prompt=model.prompt,
        geometry=model.geometry,
    )
    return part, dataset
