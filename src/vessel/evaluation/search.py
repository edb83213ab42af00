"""Search a decision on validation (`search=true`), and write it where later commands find it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vessel.data.dataset import VesselDataset
from vessel.errors import VesselError
from vessel.evaluation.decision_search import MIN_GAIN, Search
from vessel.evaluation.metrics_json import Part
from vessel.evaluation.options import EvaluateOptions
from vessel.evaluation.probability_store import require_room
from vessel.evaluation.scoring import input_images
from vessel.inference.decision import DECISION_FILE, Decision, StoredDecision
from vessel.inference.loading import LoadedModel
from vessel.inference.options import choose_device
from vessel.inference.predictor import Failure, Predictor
from vessel.inference.results import Prediction
from vessel.paths import expanded


def check_search(options: EvaluateOptions) -> None:
    """Refuse to choose anything on images that it must not be chosen on.

    Raises:
        VesselError: another part than validation, or another data set than the run's.
    """
    if options.split != "val":
        why = "the test part is for one final evaluation" if options.split == "test" else "the network was fitted to it"
        raise VesselError(f"search=true with split={options.split}: {why}; decisions are made on split=val")
    if options.other_data:
        raise VesselError(
            "search=true with other_data=true: a decision is made on the validation part of the run's own data set"
        )


def run_search(model: LoadedModel, part: Part, dataset: VesselDataset, options: EvaluateOptions) -> Mapping[str, Any]:
    """Search on validation, print what was tried, and write `decision.json`, which later commands find by the run.

    Args:
        model: the network.
        part: the validation part of the run's data set.
        dataset: its images.
        options: of the command; `out` is needed where there is no run folder.

    Returns:
        the content of decision.json.

    Raises:
        VesselError: `check_search`, no folder for the decision, phrases left out, or no image gave a result.
    """
    check_search(options)
    folder = _folder(model, dataset, options)
    require_room(folder, dataset)
    images = input_images(dataset)
    predictor = Predictor(model, device=choose_device(options.device), device_map=options.network.device_map)

    def predict(tta: tuple[str, ...]) -> Iterable[Prediction | Failure]:
        title = f"predicting {len(images)} images" + (f" with {len(tta)} augmentations" if tta else "")
        answers = predictor.with_tta(tta).predict(
            images, dataset.__getitem__, batch_size=options.batch_size, workers=options.workers
        )
        return track(answers, title, len(images), transient=True)

    with tempfile.TemporaryDirectory(prefix=".search.", dir=folder) as temporary:
        search = Search(predict, Path(temporary))
        decision = search.run(Decision(model.threshold))
    stored = StoredDecision(
        model.manifest.fingerprint,
        decision,
        part.catalog.fingerprint,
        part.catalog.split.hash,
        part.fold,
        tuple(asdict(trial) for trial in search.trials),
    )
    stored.write(folder / DECISION_FILE)
    _print_search(search, folder / DECISION_FILE)
    return stored.to_json()


def _folder(model: LoadedModel, dataset: VesselDataset, options: EvaluateOptions) -> Path:
    trained = model.manifest.phrases
    if trained and set(trained) != set(dataset.phrases):
        raise VesselError(
            f"search=true with data.phrases={list(dataset.phrases)}: one decision serves all phrases of the run, "
            f"{list(trained)}; leave data.phrases= away"
        )
    if options.out is None and model.run is None:
        raise VesselError(
            f"search=true: {options.ckpt} lies in no run folder, where its decision would be found again; name a "
            "folder for decision.json with out=DIR"
        )
    folder = expanded(options.out) if options.out is not None else model.run
    assert folder is not None
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _print_search(search: Search, file: Path) -> None:
    console, unit = Console(), search.trials[0].unit
    title = f"mean Dice on validation, {len(search.kept)} images, {search.trials[0].clusters} {unit}s"
    table = Table("option", "value", title=title, box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for column in ("Dice", "change", "95 % interval", f"{unit}s\nbetter : worse"):
        table.add_column(column, justify="right", no_wrap=True)
    for trial in search.trials:
        if trial.dice is None or trial.gain is None:
            table.add_row(trial.option, trial.value, trial.note)
            continue
        interval = "" if trial.low is None else f"{trial.low:+.3f} to {trial.high:+.3f}"
        cells = (f"{trial.dice:.4f}", f"{trial.gain:+.4f}", interval, f"{trial.better} : {trial.worse}")
        table.add_row(trial.option, trial.value, *cells, style="bold green" if trial.adopted else None)
    console.print(table)
    for failure in search.kept.failures:
        console.print(f"failed: {failure.file}: {failure.reason}", style="red", soft_wrap=True, markup=False)
    console.print(
        f"kept (green): what raises the mean by {MIN_GAIN} or more, in more than half of the {unit}s. These images "
        "were chosen on: figures to report come from split=test",
        soft_wrap=True,
    )
    console.print(f"decision: {search.decision}: {file}", soft_wrap=True, markup=False, highlight=False)
