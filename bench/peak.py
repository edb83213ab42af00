"""Measure the peak memory of training steps, each mode in a process of its own. Linux only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import peft  # noqa: F401  # what adapters import at first use
import psutil
from accelerate import init_empty_weights
from bench.pairs import Pairs
from bench.sizes import SMALL, Case, tiny
from bench.steps import Steps

from vessel.data.prompt import Prompt
from vessel.model.sa2va import build_sa2va

STEPS = 2  # in the second the optimizer's own tensors are there too
# Freed memory goes back to the system at once: the peak is then of memory in use, not of what the allocator keeps.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_TRIM_THRESHOLD_": str(2**20)}


def compare(case: Case, *, pairs: int) -> Pairs:
    """Measure the bytes of the product and of the reference, weights, gradients and optimizer included."""
    found = Pairs(unit="bytes")
    for _ in range(pairs):
        found.product.append(_in_fresh_process("product", case.name))
        found.reference.append(_in_fresh_process("reference", case.name))
    return found


def _in_fresh_process(mode: str, name: str) -> float:
    command = [sys.executable, "-m", "bench.peak", mode, name]
    output = subprocess.run(command, env=os.environ | GIVE_BACK, check=True, stdout=subprocess.PIPE, text=True).stdout
    return float(json.loads(output.splitlines()[-1])["bytes"])


def main(mode: str, name: str) -> None:
    """Train, and print the highest resident memory above what imports took.

    The kernel's own high-water mark of this process; `ru_maxrss` would begin at that of the process that started it.
    """
    prompt, case = Prompt(), SMALL if name == SMALL.name else tiny()
    with init_empty_weights():
        build_sa2va(case.sizes, prompt.token_ids)  # what is imported at first use
    before = psutil.Process().memory_info().rss
    steps = Steps(case, prompt)
    for _ in range(STEPS):
        getattr(steps, mode)()
    status = Path("/proc/self/status").read_text()
    highest = 1024 * int(status.split("VmHWM:")[1].split()[0])
    print(json.dumps({"mode": mode, "bytes": highest - before}))


if __name__ == "__main__":
    main(*sys.argv[1:])
