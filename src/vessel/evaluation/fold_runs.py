"""Find the runs of a cross-validation in a sweep over `data.fold`, and refuse runs that are not one experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from vessel.checkpoints.reading import find_checkpoint, read_checkpoint
from vessel.data.catalog import Catalog
from vessel.errors import VesselError
from vessel.files import read_json
from vessel.paths import expanded
from vessel.runs.manifest import MANIFEST, RESULT, Manifest, read_result
from vessel.runs.record import differing
from vessel.runs.sweep import JOB, read_jobs

_LENGTH = ("max_epochs", "max_steps", "max_time")


@dataclass(frozen=True)
class FoldRun:
    """A run that did not train on the images of its fold.

    Attributes:
        fold: its number, from 0.
        folder: of the run.
        manifest: of the run.
    """

    fold: int
    folder: Path
    manifest: Manifest

    @property
    def checkpoint(self) -> Path:
        """Return the last one: the best one was chosen on the very images that are to be scored."""
        return find_checkpoint(self.folder, ("last",))

    @property
    def stopped_early(self) -> bool:
        """Return True if early stopping, which monitors the images that are to be scored, ended its training."""
        states = read_checkpoint(self.checkpoint).get("callbacks", {})
        of_stopping = [state for name, state in states.items() if name.startswith("EarlyStopping")]
        return any(state["wait_count"] >= state["patience"] for state in of_stopping)


def find_fold_runs(paths: Sequence[str | Path]) -> list[FoldRun]:
    """Find the runs of a sweep, in the order of their folds.

    Args:
        paths: folder of the sweep; or several, of sweeps or single runs, where a fold was trained again by itself.

    Raises:
        VesselError: no run there, one that has not come to its end or has no fold, or two of one fold.
    """
    runs: dict[int, FoldRun] = {}
    for folder in chain.from_iterable(_folders(expanded(path)) for path in paths):
        if read_result(folder) is None:
            raise VesselError(f"{folder}: this run has not come to its end (no {RESULT}); train it on with resume=auto")
        manifest = Manifest.from_dict(read_json(folder / MANIFEST))
        fold = manifest.data.get("fold")
        if fold is None:
            raise VesselError(
                f"{folder}: trained on the fixed split, not on a fold; train all of them: python -m vessel.train -m "
                "experiment=NAME data.root=DIR data.fold=0,1,2,3,4"
            )
        if fold in runs:
            raise VesselError(f"{runs[fold].folder} and {folder} are both of fold {fold}; give one run a fold")
        runs[fold] = FoldRun(fold, folder, manifest)
    return [runs[fold] for fold in sorted(runs)]


def require_one_experiment(runs: Sequence[FoldRun], catalog: Catalog) -> None:
    """Refuse runs that are not the folds of one cross-validation of this data set.

    Raises:
        VesselError: another data set or split, other phrases or settings than fold and seed, or a fold that is missing.
    """
    first = runs[0]
    for run in runs:
        for key, value in {"fingerprint": catalog.fingerprint, "split_hash": catalog.split.hash}.items():
            if run.manifest.data.get(key) != value:
                raise VesselError(
                    f"{run.folder}: {key} of its data set is {run.manifest.data.get(key)}, that of {catalog.root} is "
                    f"{value}: it may have trained on what would be scored; give the data set that it was trained on"
                )
        if run.manifest.phrases != first.manifest.phrases:
            phrases = f"{list(first.manifest.phrases)} and {list(run.manifest.phrases)}"
            raise VesselError(f"{first.folder} and {run.folder} were trained on other phrases: {phrases}")
        if others := differing(_settings(first), _settings(run)):
            raise VesselError(
                f"{first.folder} and {run.folder} differ in more than fold and seed, so they are no one "
                f"cross-validation: {', '.join(others)}"
            )
    expected = set(range(len(catalog.split.folds)))
    found = {run.fold for run in runs}
    if found != expected:
        missing = ", ".join(map(str, sorted(expected ^ found)))
        raise VesselError(
            f"folds are 0 to {len(expected) - 1}, and fold {missing} has no run here: its images would not be "
            f"predicted; train it (data.fold={missing}) and name both folders: folds=[SWEEP,RUN]"
        )
    held_out = [frame_id for fold in catalog.split.folds for frame_id in fold["val"]]
    if len(held_out) > len(set(held_out)):
        raise VesselError(f"{catalog.root}: an image is held out by two folds; prepare the data set again")


def _folders(path: Path) -> list[Path]:
    """Return folders of runs: the folder itself, or those of the jobs of a sweep."""
    if (path / MANIFEST).is_file():
        return [path]
    folders = [file.parent for file in path.rglob(JOB)]
    if not folders:
        raise VesselError(
            f"{path}: neither a sweep nor a run; a cross-validation is python -m vessel.train -m experiment=NAME "
            "data.root=DIR data.fold=0,1,2,3,4, whose folder is outputs/NAME/sweep_<time>"
        )
    # A job that failed may have been trained again elsewhere; a fold that is missing in the end is an error.
    failed = {job.job for job in read_jobs(path) if job.error}
    return [folder for folder in folders if read_json(folder / JOB)["job"] not in failed]


def _settings(run: FoldRun) -> Mapping[str, Any]:
    """Return the settings that all folds must have in common."""
    config = run.manifest.config
    data = {key: value for key, value in config["data"].items() if key != "fold"}
    # A run may be trained for longer than its first settings say, so `differing` leaves that out.
    length = {key: str(config["trainer"].get(key)) for key in _LENGTH}
    stopping = (config.get("callbacks") or {}).get("early_stopping")
    kept = {key: value for key, value in config.items() if key != "seed"}
    return {**kept, "data": data, "length": length, "stopping": stopping}
