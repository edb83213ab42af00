"""Options of `vessel.evaluate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vessel.inference.options import NetworkOptions


@dataclass
class DataOptions:
    """The data set and its phrases."""

    root: str | None
    phrases: Any


@dataclass
class EvaluateOptions:
    """The options of the command; conf/evaluate.yaml has the defaults, `--help` the explanations."""

    ckpt: str | None
    data: DataOptions
    split: str
    search: bool
    decision: str | None
    compare: Any
    folds: Any
    out: str | None
    tolerance: float | None
    other_data: bool
    overwrite: bool
    run: str
    batch_size: int
    workers: int
    device: str
    network: NetworkOptions
    logger: Any = None  # no key in the configuration unless a logger is chosen
