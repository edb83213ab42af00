"""Measure the seconds until a command has printed `--help`, and until the first training step of `tiny` is logged."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

from bench.command import vessel

HELP, STEP = "answer to --help", "first training step of experiment=tiny"
_PREPARE = ("source=synthetic", "synthetic.patients=4", "synthetic.frames=4")
_TRAIN = ("experiment=tiny", "trainer.max_steps=1", "trainer.log_every_n_steps=1")


def startup(times: int = 3) -> dict[str, list[float]]:
    """Measure each command in a fresh process, from its start."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        vessel(folder, "prepare", *_PREPARE, "out=data")
        return {HELP: [_helped(folder) for _ in range(times)], STEP: [_stepped(folder, i) for i in range(times)]}


def table(found: dict[str, list[float]]) -> list[str]:
    """Format the results of `startup` as Markdown."""
    rows = [f"| {name} | {', '.join(f'{seconds:.1f}' for seconds in found[name])} |" for name in (HELP, STEP)]
    return ["| seconds from the command to the | runs |", "|---|---|", *rows]


def _helped(folder: Path) -> float:
    start = time.perf_counter()
    vessel(folder, "train", "--help")
    return time.perf_counter() - start


def _stepped(folder: Path, number: int) -> float:
    start, run = time.time(), folder / f"run{number}"
    vessel(folder, "train", *_TRAIN, "data.root=data", f"hydra.run.dir={run.name}")
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return next(line["time"] for line in lines if "train/loss" in line) - start
