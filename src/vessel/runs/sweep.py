"""The jobs of a sweep (`python -m vessel.train -m ...`) in one table, the best one named."""

from __future__ import annotations

import csv
import json
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import CompactHydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, read_write

JOB = "job.json"
COLUMNS = ("job", "overrides", "val/dice_best", "threshold", "folder")


@dataclass(frozen=True)
class Job:
    """One job of a sweep.

    Attributes:
        job: number in the sweep, from 0.
        overrides: options on the command line.
        dice: best validation Dice; None when the job failed or never validated.
        threshold: probability threshold that the same validation chose.
        folder: of the run, from where the sweep was started.
        error: why it failed; empty when it did not.
    """

    job: int
    overrides: tuple[str, ...]
    dice: float | None
    threshold: float | None
    folder: str
    error: str = ""

    @property
    def result(self) -> str:
        """The Dice, or why there is none."""
        if self.error:
            return f"failed: {self.error.splitlines()[0]}"
        return "not validated" if self.dice is None else f"{self.dice:.4f}"


class SweepSummary(Callback):
    """Keep a sweep going when a job fails; sum its jobs up in `summary.csv`, `summary.md` and the terminal.

    Each job leaves `job.json` in its folder and the summary is written anew, so a sweep that was stopped has one as
    well, and jobs may run in other processes.
    """

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Prepare what the sweeper and the loggers expect."""
        folder = Path(config.hydra.sweep.dir)
        earlier = len(list(folder.parent.glob("sweep_*")))
        folder.mkdir(parents=True, exist_ok=True)  # the database of a study lies beside it
        os.environ["WANDB_RUN_GROUP"] = folder.name
        sampler = config.hydra.sweeper.get("sampler")
        if sampler is not None and sampler.get("seed") is not None:
            # A study that goes on would otherwise draw the random trials of its beginning again.
            with read_write(config.hydra):
                sampler.seed += earlier

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Note what came out. A failure is noted as well, and then no reason to stop the others."""
        if config.hydra.mode != RunMode.MULTIRUN:
            return
        run, sweep = Path(config.hydra.runtime.output_dir), Path(config.hydra.sweep.dir)
        dice, error = _outcome(job_return)
        job = Job(
            job=config.hydra.job.num,
            overrides=tuple(config.hydra.overrides.task),
            dice=dice,
            threshold=best_threshold(run / "metrics.jsonl"),
            folder=os.path.relpath(run),
            error=error,
        )
        (run / JOB).write_text(json.dumps(asdict(job), ensure_ascii=False) + "\n", encoding="utf-8")
        jobs = read_jobs(sweep)
        write_summary(jobs, sweep)
        if "wandb" in sys.modules:  # else the next job logs into this one's run
            sys.modules["wandb"].finish()
        searching = config.hydra.runtime.choices["hydra/sweeper"] == "optuna"
        if searching and all(job.dice is None for job in jobs):
            _print(jobs, sweep)
            raise SystemExit("error: the first trial of the search has no result; mend it and start again")

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print the table, and exit with status 1 when a job failed."""
        folder = Path(config.hydra.sweep.dir)
        jobs = read_jobs(folder)
        _print(jobs, folder)
        if any(job.error for job in jobs):
            raise SystemExit(1)


def read_jobs(sweep: Path) -> list[Job]:
    """Jobs of a sweep that have ended, in order."""
    found = (json.loads(file.read_text(encoding="utf-8")) for file in sweep.rglob(JOB))
    return sorted((Job(**{**job, "overrides": tuple(job["overrides"])}) for job in found), key=lambda job: job.job)


def best_job(jobs: Sequence[Job]) -> Job | None:
    """The job with the highest Dice, the first of equals; None when no job has one."""
    return max((job for job in jobs if job.dice is not None), key=lambda job: job.dice or 0.0, default=None)


def best_threshold(metrics: Path) -> float | None:
    """Threshold that the validation with the highest Dice chose; None when nothing was validated.

    Args:
        metrics: `metrics.jsonl` of the run.
    """
    if not metrics.is_file():
        return None
    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    validations = [record for record in records if record.get("val/dice_best") is not None]
    if not validations:
        return None
    best = max(validations, key=lambda record: record["val/dice_best"])
    return best.get("val/threshold")


def write_summary(jobs: Sequence[Job], folder: Path) -> None:
    """Write `summary.csv` and `summary.md`."""
    rows = list(_rows(jobs))
    with (folder / "summary.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (COLUMNS, *rows)]
    lines.insert(1, "|---" * len(COLUMNS) + "|")
    text = "\n".join([*lines, "", _verdict(jobs)]) + "\n"
    (folder / "summary.md").write_text(text, encoding="utf-8")


def _outcome(job_return: JobReturn) -> tuple[float | None, str]:
    try:
        return job_return.return_value, ""
    except Exception as error:
        if not isinstance(error, CompactHydraException):  # those have been told by `report_errors`
            traceback.print_exception(error)
        # Hydra would raise it again and leave out the summary.
        job_return.return_value, job_return.status = None, JobStatus.COMPLETED
        return None, str(error) or type(error).__name__


def _rows(jobs: Sequence[Job]) -> Iterator[tuple[str, ...]]:
    shared = set.intersection(*(set(job.overrides) for job in jobs)) if len(jobs) > 1 else set()
    for job in jobs:
        telling = " ".join(override for override in job.overrides if override not in shared)
        threshold = "" if job.threshold is None else f"{job.threshold:.2f}"
        yield str(job.job), telling, job.result, threshold, job.folder


def _verdict(jobs: Sequence[Job]) -> str:
    best = best_job(jobs)
    failed = sum(bool(job.error) for job in jobs)
    ending = f"; {failed} of {len(jobs)} jobs failed" if failed else ""
    return f"best: {f'job {best.job}, val/dice_best {best.result}, {best.folder}' if best else 'none'}{ending}"


def _print(jobs: Sequence[Job], folder: Path) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    best, table = best_job(jobs), Table(title=os.path.relpath(folder))
    for column in COLUMNS[:-1]:  # the folder of a job is its number
        table.add_column(column, overflow="fold")
    for job, row in zip(jobs, _rows(jobs), strict=True):
        table.add_row(*map(Text, row[:-1]), style="bold" if job == best else "red" if job.error else None)
    console = Console()
    console.print(table)
    console.print(Text(f"{_verdict(jobs)}\nsummary: {os.path.relpath(folder / 'summary.md')}"), soft_wrap=True)
    if len(folds := {override for job in jobs for override in job.overrides if override.startswith("data.fold=")}) > 1:
        # Each fold has its own validation images, so that none of these runs is better than another.
        told = f"{len(folds)} folds; pooled results: python -m vessel.evaluate folds={os.path.relpath(folder)}"
        console.print(Text(told), soft_wrap=True)
