"""Measure seconds and memory of work on a device, and the rate that its matrix units reach."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from vessel.errors import is_out_of_memory


@dataclass
class Times:
    """The measurements of one of several functions that ran in turns.

    Attributes:
        seconds: of each round.
        peak: bytes of the device at the fullest moment of any round, all that it holds counted; 0 on the CPU.
    """

    seconds: list[float] = field(default_factory=list)
    peak: int = 0

    @property
    def median(self) -> float:
        """Return the median of `seconds`."""
        return statistics.median(self.seconds)


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Measure the seconds until a device has done the work of a function; garbage of others is collected before."""
    gc.collect()
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - start


def in_turns(runs: Mapping[str, Callable[[], object]], device: torch.device, *, rounds: int) -> dict[str, Times]:
    """Run each once to warm up, then all in turns, so that a machine that slows down slows all of them.

    Returns:
        times by name, without those that did not fit the memory.
    """
    able = {name: run for name, run in runs.items() if fits(run, device)}
    times = {name: Times() for name in able}
    for _ in range(rounds):
        for name, run in able.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            times[name].seconds.append(seconds(run, device))
            if device.type == "cuda":
                times[name].peak = max(times[name].peak, torch.cuda.max_memory_allocated(device))
    return times


def fits(run: Callable[[], object], device: torch.device) -> bool:
    """Run once; return False where the memory was too small, which is free again then."""
    try:
        run()
        _wait(device)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    else:
        return True
    release(device)  # here, as the exception holds what was alive
    return False


def release(device: torch.device) -> None:
    """Free memory of a GPU that nothing refers to any more."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def matrix_rate(device: torch.device) -> float:
    """Measure the operations a second of a large product of bf16 matrices; a product and a sum are two."""
    side, rounds = (8192, 20) if device.type == "cuda" else (256, 3)
    left, right = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    times = in_turns({"product": lambda: left @ right}, device, rounds=rounds)
    return 2 * side**3 / times["product"].median


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
