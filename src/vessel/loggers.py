"""`metrics.jsonl`, the numbers of a run, and what sends figures and tables to dashboards, which are views of them."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from typing_extensions import override


class JsonLines(Logger):
    """One JSON object a line and a call: `step`, `epoch` where known, `time` (Unix seconds), then the metrics.

    Appended to, so a resumed run goes on in the same file; steps repeated after a resume appear again, the later line
    counts. A non-finite number becomes null, as JSON has none.
    """

    def __init__(self, save_dir: str | Path) -> None:
        super().__init__()
        self.path = Path(save_dir) / "metrics.jsonl"

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
        """Nothing to do: the run's manifest keeps the configuration."""

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append a line; it is on disk when this returns."""
        numbers = {name: _finite(value) for name, value in metrics.items()}
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


def _finite(value: float) -> float | None:
    number = value if isinstance(value, int) else float(value)
    return number if math.isfinite(number) else None


def _ends_with_newline(file: Any) -> bool:
    file.seek(-1, 2)
    return file.read(1) == b"\n"
