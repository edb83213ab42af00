"""Measure one size of the network for `bench.gpu`, chapter by chapter, each written as soon as it is known."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from bench.flops import step_cost
from bench.gpu import prediction
from bench.gpu.trial import Trial
from bench.pieces import Result, backward, pieces, step_loss
from bench.stopwatch import fits, in_turns, matrix_rate, release
from bench.true_sizes import batch_for, network_of, with_features
from torch import Tensor
from torch.autograd import DeviceType
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW
from torch.profiler import ProfilerActivity, profile

from bench import reference
from vessel.batch import Batch
from vessel.losses import NativeLoss
from vessel.memory_plan.plan import GB, Setup
from vessel.model.sa2va import Sa2VA

PRODUCT, REFERENCE, CACHED = "product", "reference", "product, cached features"
_PROFILED = 3  # steps
Chapter = Callable[[Trial], Any]


def measure(trial: Trial, write: Callable[[Mapping[str, Any]], None]) -> None:
    """Measure the chapters while there is time; one that fails takes no other with it.

    Args:
        trial: of one size.
        write: is called with all results so far, after each chapter.

    Raises:
        RuntimeError: chapters failed, for another reason than memory; their tracebacks were printed.
    """
    found: dict[str, Any] = {"model": trial.name}
    failed = []
    for title, chapter in CHAPTERS.items():
        try:
            found[title] = {"left_out": "the time was over"} if trial.late else _run_chapter(chapter, trial)
        except Exception as error:  # time on a GPU is dear: the other chapters are worth having
            traceback.print_exc()
            failed.append(title)
            found[title] = {"left_out": f"it failed with {type(error).__name__}"}
        release(trial.device)
        write(found)
    if failed:
        raise RuntimeError(f"{trial.name}: {', '.join(failed)} failed")


def _run_chapter(chapter: Chapter, trial: Trial) -> Any:
    results: list[Any] = []
    has_room = fits(lambda: results.append(chapter(trial)), trial.device)
    return results[0] if has_room else {"left_out": "the memory was too small"}


def _machine(trial: Trial) -> dict[str, Any]:
    rate = matrix_rate(trial.device)
    if trial.device.type != "cuda":
        return {"device": "CPU", "threads": torch.get_num_threads(), "torch": torch.__version__, "matrix_rate": rate}
    facts = torch.cuda.get_device_properties(trial.device)
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda}
    return {"device": facts.name, "gb": facts.total_memory / GB, **versions, "matrix_rate": rate}


def _operations(trial: Trial) -> dict[str, Any]:
    """Count the operations of one image, by part; forward and backward pass."""
    return {part: list(cost) for part, cost in step_cost(trial.setup).items()}


def _training(*names: str, activation_checkpointing: bool = False, compiled: bool = False) -> Chapter:
    def chapter(trial: Trial) -> list[dict[str, Any]]:
        setup = replace(trial.setup, activation_checkpointing=activation_checkpointing)
        network = network_of(setup, trial.prompt, trial.device, compiled=compiled).train()
        steps, able = Steps(trial, network), names
        rows: list[dict[str, Any]] = []
        size = trial.best if compiled else 1  # each size is compiled again
        while able and size <= trial.largest and not trial.late:
            runs = steps.of(replace(setup, batch_size=size), able)
            times = in_turns(runs, trial.device, rounds=trial.rounds)
            rows += [
                {
                    "mode": name,
                    "batch": size,
                    "seconds": measured.seconds,
                    "samples_per_second": size / measured.median,
                    "peak_gb": measured.peak / GB,
                }
                for name, measured in times.items()
            ]
            able = tuple(times)
            size *= 2
        if not (activation_checkpointing or compiled):
            made = [(row["samples_per_second"], row["batch"]) for row in rows if row["mode"] == PRODUCT]
            trial.best = max(made, default=(0, 1))[1]
        return rows

    return chapter


class Steps:
    """Training steps of one network by the product and by the reference, both with the product's optimizer.

    Args:
        trial: device and rounds.
        network: in training mode.
    """

    def __init__(self, trial: Trial, network: Sa2VA) -> None:
        self.trial, self.network = trial, network
        self.trained = [p for p in network.parameters() if p.requires_grad]
        self.optimizer = AdamW(self.trained, lr=4e-5, weight_decay=0.05, fused=True)

    def of(self, setup: Setup, names: tuple[str, ...]) -> dict[str, Callable[[], None]]:
        """Return a step of each mode on the same random batch, which is in the host's memory when it begins."""
        batch, loss_function = batch_for(setup, self.trial.prompt, self.trial.device), setup.loss_function
        assert isinstance(loss_function, NativeLoss)
        batches = dict.fromkeys(names, batch)
        if CACHED in names:
            batches[CACHED] = with_features(self.network, batch, setup, self.trial.device)

        def product(batch: Batch) -> Tensor:
            return step_loss(self.network, batch, loss_function)

        def plain(batch: Batch) -> Tensor:
            return torch.stack(list(reference.losses(self.network, batch, loss_function).values())).sum()

        return {name: partial(self._step, plain if name == REFERENCE else product, batches[name]) for name in names}

    def _step(self, loss: Callable[[Batch], Tensor], batch: Batch) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with self.trial.autocast():
            value = loss(batch.to(self.trial.device, non_blocking=True))
        value.backward()
        clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()


def _parts(trial: Trial) -> dict[str, Any]:
    """Measure the median seconds of each part alone, forward and with its backward pass."""
    setup = replace(trial.setup, batch_size=trial.best)
    network = network_of(setup, trial.prompt, trial.device).train()
    batch = batch_for(setup, trial.prompt, trial.device).to(trial.device)
    with trial.autocast():
        runs = pieces(network, batch, setup.loss_function)
    rows = {}
    for name, run in runs.items():
        forward = partial(_forward, trial, run)
        with_backward = partial(_backward, forward)
        times = in_turns({"forward": forward, "both": with_backward}, trial.device, rounds=trial.rounds)
        rows[name] = {kind: measured.median for kind, measured in times.items()}
        network.zero_grad(set_to_none=True)
    return {"batch": trial.best, "seconds": rows}


def _forward(trial: Trial, run: Callable[[], Result]) -> Result:
    with trial.autocast():  # a new one each time, as it keeps its casts until it ends
        return run()


def _backward(forward: Callable[[], Result]) -> None:
    backward(forward())


def _profile(trial: Trial) -> dict[str, Any]:
    """Find the slowest operators of the product's step, by their own time on the device."""
    setup = replace(trial.setup, batch_size=trial.best)
    network = network_of(setup, trial.prompt, trial.device).train()
    step = Steps(trial, network).of(setup, (PRODUCT,))[PRODUCT]
    step()
    cuda = trial.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as watched:
        for _ in range(_PROFILED):
            step()
    costs = [
        (event.key, (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6 / _PROFILED)
        for event in watched.key_averages()
        if event.device_type == DeviceType.CPU  # kernels stand beside the operators that start them
    ]
    costs.sort(key=lambda cost: -cost[1])
    total = sum(seconds for _, seconds in costs)
    rows = [{"operator": name, "seconds": seconds, "share": seconds / total} for name, seconds in costs[:10]]
    return {"batch": trial.best, "seconds": total, "operators": rows}


CHAPTERS: dict[str, Chapter] = {
    "machine": _machine,
    "operations": _operations,
    "training": _training(PRODUCT, REFERENCE, CACHED),
    "parts": _parts,
    "profile": _profile,
    "prediction": prediction.chapter,
    "training, checkpointing": _training(PRODUCT, REFERENCE, activation_checkpointing=True),
    "training, compiled": _training(PRODUCT, CACHED, compiled=True),
}
