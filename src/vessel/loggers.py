"""Write `metrics.jsonl`, the numbers of a run; send them, figures and tables to dashboards."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from typing_extensions import override

from vessel.privacy.scanner import Scanner
from vessel.privacy.texts import text_of

# What W&B takes from the environment, and shows.
_SHOWN = tuple(f"WANDB_{what}" for what in ("NAME", "NOTES", "TAGS", "RUN_GROUP", "PROJECT", "JOB_TYPE", "RUN_ID"))


class JsonLines(Logger):
    """A logger that writes a JSON line a call: `step`, `epoch` where known, `time` (Unix seconds), then the metrics.

    It appends, so a resumed run continues in the same file; steps repeated after a resume appear again, the later line
    counts. A non-finite number becomes null, as JSON has none.
    """

    def __init__(self, save_dir: str | Path) -> None:
        super().__init__()
        self.path = Path(save_dir) / "metrics.jsonl"
        self._last: tuple[int | None, dict[str, float | None]] | None = None

    @property
    @override
    def name(self) -> str:
        return "jsonl"

    @property
    @override
    def version(self) -> str:
        return ""

    @property
    @override
    def save_dir(self) -> str:
        return str(self.path.parent)

    @override
    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Ignore hyperparameters: the run's manifest keeps the configuration."""

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append a line unless it is the last one again; it is in the file when this returns."""
        numbers = {name: _finite(value) for name, value in metrics.items()}
        if (step, numbers) == self._last:
            return
        self._last = step, dict(numbers)
        record: dict[str, Any] = {"step": step}
        if "epoch" in numbers:
            record["epoch"] = numbers.pop("epoch")
        line = json.dumps({**record, "time": round(time.time(), 3), **numbers}, allow_nan=False)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            # A run that was killed may have left half a line behind.
            if file.tell() and not _ends_with_newline(file):
                line = "\n" + line
            file.write(line.encode() + b"\n")


def wandb_environment() -> list[tuple[str, str]]:
    """List the environment variables that W&B shows: the name of each, and its value."""
    return [(f"the environment variable {name}", os.environ[name]) for name in _SHOWN if name in os.environ]


class PrivateWandb(WandbLogger):
    """A W&B logger that refuses raw identifiers before it sends anything, and sends nothing about this machine.

    By itself W&B sends the command line, folders, the host's name and what is printed; of these nothing goes.

    Attributes:
        scanner: knows what must not leave; patterns only until training gives it the names of its data set.
    """

    def __init__(
        self,
        *,
        save_dir: str | Path,
        project: str = "vessel",
        offline: bool = True,
        name: str | None = None,
        tags: Sequence[str] = (),
        notes: str | None = None,
    ) -> None:
        """Take arguments of `wandb.init`; its group and entity come from WANDB_RUN_GROUP and WANDB_ENTITY."""
        from wandb import Settings

        self.scanner = Scanner()
        self._names: set[str] = set()
        self._check(("options", "\n".join([project, name or "", notes or "", *tags])), *wandb_environment())
        quiet = Settings(
            console="off", x_disable_meta=True, x_save_requirements=False, disable_git=True, disable_code=True, host=""
        )
        super().__init__(
            name, save_dir, offline=offline, project=project, tags=list(tags) or None, notes=notes, settings=quiet
        )

    @override
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self._check(("hyperparameters", json.dumps(params, default=str, ensure_ascii=False)))
        super().log_hyperparams(params, *args, **kwargs)

    @override
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if fresh := metrics.keys() - self._names:  # a search at every step would take longer than the step's numbers
            self._check(("names of metrics", "\n".join(fresh)))
            self._names |= fresh
        super().log_metrics(metrics, step)

    @override
    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
        self._check(("the name of a figure", key))
        super().log_image(key, images, step, **kwargs)

    @override
    def log_table(self, key: str, columns: list[str], data: list[list[Any]], **kwargs: Any) -> None:  # type: ignore[override]
        cells = [cell for row in (columns, *data) for cell in row if isinstance(cell, str)]
        self._check((f"the table {key}", "\n".join([key, *cells])))
        super().log_table(key, columns, data, **kwargs)

    def log_page(self, key: str, page: Path) -> None:
        """Show an HTML file that needs no other."""
        from wandb import Html

        self._check((f"the page {page.name}", f"{key}\n{text_of(page)}"))
        self.experiment.log({key: Html(page.read_text(encoding="utf-8"), inject=False)})

    def _check(self, *texts: tuple[str, str]) -> None:
        self.scanner.require_clean(((f"W&B: {where}", text) for where, text in texts), doing="sending it")


@rank_zero_only
def log_figure(loggers: Iterable[Logger], name: str, png: Path, step: int) -> None:
    """Show a PNG in W&B and TensorBoard; the other loggers live in the run folder, where the file is already."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(name, [str(png)], step=step)
        elif isinstance(logger, TensorBoardLogger):
            with Image.open(png) as image:
                logger.experiment.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")


@rank_zero_only
def log_table(
    loggers: Iterable[Logger], name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], step: int
) -> None:
    """Show a table in W&B; the other loggers have no tables."""
    data = [list(row) for row in rows]
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.log_table(name, columns=list(columns), data=data, step=step)


@rank_zero_only
def log_page(loggers: Iterable[Logger], name: str, page: Path) -> None:
    """Show a report in W&B; the other loggers have no pages."""
    for logger in loggers:
        if isinstance(logger, PrivateWandb):
            logger.log_page(name, page)


def _finite(value: float) -> float | None:
    number = value if isinstance(value, int) else float(value)
    return number if math.isfinite(number) else None


def _ends_with_newline(file: Any) -> bool:
    file.seek(-1, 2)
    return file.read(1) == b"\n"
