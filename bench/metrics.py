"""python -m bench.metrics: measure each metric on masks of 512x512, and scoring many of them in two processes.

Ground truth is synthetic angiograms (`tree`) and OCT frames (`oct`); predictions are made of it by blur and noise.
`python -m bench.metrics 1000` scores so many masks, half of each kind, 100 by default; a second number is their side.
Each process scores on one thread. Writes outputs/bench/metrics.json and a table.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy.ndimage import gaussian_filter

from vessel.data.masks import read_mask
from vessel.data.synthetic.source import KINDS, write_source
from vessel.metrics.calibration import Reliability
from vessel.metrics.scores import Scores, score
from vessel.metrics.shape import centreline_scores, component_error, surface_scores

OUT = Path("outputs/bench")
SIDE = 512
PROCESSES = 2
# Probability float32, prediction bool and ground truth bool, each [SIDE, SIDE].
Triple = tuple[np.ndarray, np.ndarray, np.ndarray]


def main(masks: str = "100", side: str = str(SIDE)) -> None:
    """Measure, print and write.

    Args:
        masks: how many are scored in the two processes.
        side: of each mask, pixels.
    """
    torch.set_num_threads(1)
    by_kind = {kind: make_triples(kind, int(side)) for kind in KINDS}
    parts = {kind: measure(triples) for kind, triples in by_kind.items()}
    alternating = [triple for pair in zip(*by_kind.values(), strict=True) for triple in pair]
    seconds = score_many(alternating, int(masks))
    OUT.mkdir(parents=True, exist_ok=True)
    found = {"side": int(side), "milliseconds": parts, "masks": int(masks), "processes": PROCESSES, "seconds": seconds}
    (OUT / "metrics.json").write_text(json.dumps(found, indent=1) + "\n")
    table = Table("metric", *(f"{kind}, ms" for kind in parts), title=f"median, one mask of {side}x{side}, one thread")
    for name in parts[KINDS[0]]:
        table.add_row(name, *(f"{parts[kind][name]:.1f}" for kind in parts))
    Console().print(table)
    print(f"{masks} masks in {PROCESSES} processes: {seconds:.1f} s, their start included")
    print(f"bench: {OUT / 'metrics.json'}")


def make_triples(kind: str, side: int, count: int = 8) -> list[Triple]:
    """Make probabilities, predictions and ground truths of `count` frames."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / kind
        write_source(folder, kind=kind, patients=count, frames=1, size=side)
        files = sorted((folder / "masks").rglob("*.png"))
        ground_truths = [
            read_mask(file, (side, side)) for file in files[:: len(files) // count][:count]
        ]  # of all phrases
    triples = []
    for true in ground_truths:
        noise = gaussian_filter(rng.standard_normal(true.shape), 3)
        blurred = gaussian_filter(true.astype(float), 2) + 0.15 * noise / noise.std()
        probability = blurred.clip(0, 1).astype(np.float32)
        triples.append((probability, probability > 0.5, true))
    return triples


def measure(triples: list[Triple]) -> dict[str, float]:
    """Measure the median milliseconds of each part of a score, and of all."""
    parts: dict[str, Callable[[Triple], object]] = {
        "clDice, centre-line sensitivity": lambda t: centreline_scores(t[1], t[2]),
        "HD95, normalised surface distance": lambda t: surface_scores(t[1], t[2], spacing=(1.0, 1.0), tolerance=2.0),
        "component error": lambda t: component_error(t[1], t[2]),
        "calibration error": lambda t: Reliability().add(t[0], t[2]),
        "all, with Dice, IoU, precision, recall": lambda t: score(*t),
    }
    return {name: round(statistics.median(_milliseconds(part, triples)), 2) for name, part in parts.items()}


def _milliseconds(part: Callable[[Triple], object], triples: list[Triple]) -> list[float]:
    part(triples[0])  # what is imported at first use
    found = []
    for triple in triples:
        start = time.perf_counter()
        part(triple)
        found.append(1000 * (time.perf_counter() - start))
    return found


def score_many(triples: list[Triple], count: int) -> float:
    """Measure the wall seconds that the processes take for `count` masks, each triple in turn."""
    jobs = [triples[i % len(triples)] for i in range(count)]
    start = time.perf_counter()
    with ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        done = sum(found.dice is not None for found in pool.map(_score, jobs, chunksize=8))
    assert done == count
    return round(time.perf_counter() - start, 2)


def _score(triple: Triple) -> Scores:
    return score(*triple)


if __name__ == "__main__":
    main(*sys.argv[1:])
