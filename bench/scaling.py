"""python -m bench.scaling: measure a run against the number of images, phrases, tiles, images a batch, and ranks.

On the CPU, with the network of conf/model/tiny.yaml, in one or two minutes. What grows along a row is measured in
turns, ranks excepted.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from bench.command import vessel
from bench.memory import sizes_of
from bench.pieces import step_loss
from bench.stopwatch import in_turns
from bench.true_sizes import for_prediction, network_of, sample_for

from vessel.batch import Sample, collate
from vessel.data.inputs import InputImage
from vessel.data.prompt import Prompt
from vessel.inference.predictor import Predictor
from vessel.inference.results import Prediction
from vessel.losses import NativeLoss
from vessel.memory_plan.engine import Engine
from vessel.memory_plan.plan import Images, Setup
from vessel.model.lora import Lora

IMAGES, PHRASES, TILES, BATCHES, RANKS = (2, 4, 8, 16), (1, 2, 4, 8), (1, 3, 7, 13), (1, 2, 4, 8), (1, 2)
_CPU = torch.device("cpu")
_ROUNDS = 5
_STEPS, _WARMING_UP = 16, 4  # of a run whose ranks are counted
Runs = Mapping[int, Callable[[], object]]


def scaling() -> dict[str, dict[str, float]]:
    """Measure the median seconds of each kind of work, by its size."""
    cost = _Cost()
    found = {}
    for name, runs in cost.runs().items():
        times = in_turns({str(value): run for value, run in runs.items()}, _CPU, rounds=_ROUNDS)
        found[name] = {value: measured.median for value, measured in times.items()}
    return {**found, "training, an image, against ranks of one core": _ranks()}


def table(found: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Format lines of Markdown: seconds, and their ratio to those of the first size."""
    lines = ["| how many: seconds (times the first) | | | | |", "|---|---|---|---|---|"]
    for name, seconds in found.items():
        first = next(iter(seconds.values()))
        cells = [f"{value}: {took:.3f} ({took / first:.2f})" for value, took in seconds.items()]
        lines.append(f"| {name} | {' | '.join(cells + [''] * (4 - len(cells)))} |")
    return lines


class _Cost:
    """The tiny network, in training and in prediction."""

    def __init__(self) -> None:
        self.prompt, sizes = Prompt(), sizes_of("model=tiny")
        self.setup = Setup(sizes, Lora(r=0), "all", NativeLoss(), Engine(), images=Images((256, 256)))
        self.network = network_of(self.setup, self.prompt, _CPU).train()
        network = network_of(for_prediction(self.setup), self.prompt, _CPU)
        model: Any = SimpleNamespace(network=network, prompt=self.prompt, geometry=sizes.geometry)
        self.predictor = Predictor(model, device="cpu")

    def runs(self) -> dict[str, Runs]:
        """Return the runs to measure, by name and size."""
        some = [self._sample() for _ in range(max(BATCHES))]
        phrases = {n: [self._sample(phrases=n)] * 2 for n in PHRASES}
        tiles = {n: [self._sample(tiles=n)] * 2 for n in TILES}
        predict, train = self._predict, self._train
        return {
            "prediction against images": {n: predict(some[:1] * n, 2) for n in IMAGES},
            "prediction of 2 images against phrases": {n: predict(samples, 2) for n, samples in phrases.items()},
            "prediction of 2 images against tiles": {n: predict(samples, 2) for n, samples in tiles.items()},
            "prediction of 8 images against the batch": {n: predict(some, n) for n in BATCHES},
            "a step of 2 images against phrases": {n: train(samples) for n, samples in phrases.items()},
            "a step of 2 images against tiles": {n: train(samples) for n, samples in tiles.items()},
            "a step against images of the batch": {n: train(some[:n]) for n in BATCHES},
        }

    def _sample(self, *, phrases: int = 1, tiles: int = 1) -> Sample:
        return sample_for(self.setup, self.prompt, phrases=phrases, tiles=tiles)

    def _predict(self, samples: Sequence[Sample], batch_size: int) -> Callable[[], None]:
        inputs = [InputImage(str(i), Path(), str(i)) for i in range(len(samples))]

        def run() -> None:
            for result in self.predictor.predict(inputs, samples.__getitem__, batch_size=batch_size):
                assert isinstance(result, Prediction), result

        return run

    def _train(self, samples: Sequence[Sample]) -> Callable[[], None]:
        batch = collate(list(samples), self.prompt.token_ids.pad)

        def run() -> None:
            self.network.zero_grad(set_to_none=True)
            step_loss(self.network, batch, self.setup.loss_function).backward()

        return run


def _ranks() -> dict[str, float]:
    """Measure the seconds an image of `vessel.train`, a core a rank, by the number of ranks."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        vessel(folder, "prepare", "source=synthetic", "out=data", "synthetic.patients=4", "synthetic.frames=8")
        for ranks in RANKS:
            vessel(folder, "train", *_training(ranks), f"hydra.run.dir=ranks{ranks}", threads=1)
        return {str(ranks): 1 / statistics.median(_rates(folder / f"ranks{ranks}")) for ranks in RANKS}


def _training(ranks: int) -> list[str]:
    return [
        *("experiment=tiny", "data.root=data", "data.repeats=8"),
        *("trainer=ddp", "trainer.accelerator=cpu", "trainer.precision=32-true", f"trainer.devices={ranks}"),
        *(f"trainer.max_steps={_STEPS}", "trainer.limit_val_batches=0", "trainer.log_every_n_steps=1"),
        *("+callbacks.throughput.window=1", "~callbacks.progress"),
    ]


def _rates(run: Path) -> Iterator[float]:
    """Yield the images a second of each step over all ranks, the first steps left out."""
    for line in (run / "metrics.jsonl").read_text().splitlines():
        measured = json.loads(line)
        if measured.get("throughput/samples_per_second") and measured["step"] >= _WARMING_UP:
            yield measured["throughput/samples_per_second"]


if __name__ == "__main__":
    print("\n".join(table(scaling())))
