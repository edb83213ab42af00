"""python -m bench.gpu [size=internvl3_1b,internvl3_8b] [minutes=10]: measure training and prediction on a GPU.

True sizes, random weights, LoRA r=128, bf16, images of 512 x 512, SAM2-L at 1024. For each size, in a process of its
own: samples a second, memory and fraction of the GPU's own matrix rate of the product and of the reference, batches
growing until the memory is full; with features from a cache, with activation checkpointing, compiled; seconds by part;
the slowest operators; prediction. Writes outputs/bench/gpu.json and gpu.md. Without a GPU it prints its plan and writes
nothing; device=cpu size=tiny does everything at a size for a CPU, and writes gpu_rehearsal.json and .md.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench.flops import NAMES, Cost, recipe, step_cost, table
from bench.gpu.chapters import measure
from bench.gpu.report import report
from bench.gpu.trial import Trial
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vessel.cli.conf import CONF
from vessel.memory_plan.plan import memory_plan

OUT = Path("outputs/bench")
_ROOT = Path(__file__).parents[2]
_GRACE = 120  # seconds that a size may take to end what it began


@dataclass
class GpuOptions:
    """The options of the command line.

    Attributes:
        size: names of configurations in conf/model, with commas between.
        device: `cuda`, or `cpu` for a rehearsal.
        minutes: of each size at most.
        rounds: timed runs of each.
        largest: images of a batch at most.
    """

    size: str = ",".join(NAMES)
    device: str = "cuda"
    minutes: float = 10.0
    rounds: int = 5
    largest: int = 512


def main(*options: str) -> None:
    """Measure each size, or print the plan where there is no GPU."""
    settings = _read_options(options)
    if settings.device == "cuda" and not torch.cuda.is_available():
        announce(settings)
        return
    name = "gpu" if settings.device == "cuda" else "gpu_rehearsal"
    OUT.mkdir(parents=True, exist_ok=True)
    found = {}
    for size in settings.size.split(","):
        found[size] = _in_own_process(size, OUT / f"{name}_{size}.json", options, settings)
        (OUT / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
        (OUT / f"{name}.md").write_text("\n".join(report(found)) + "\n")
    print((OUT / f"{name}.md").read_text())
    print(f"bench: {OUT / name}.json, {name}.md")
    if any("ended" in measured for measured in found.values()):
        sys.exit("bench.gpu: not complete, see above")


def _read_options(options: Sequence[str]) -> GpuOptions:
    try:
        merged = OmegaConf.merge(OmegaConf.structured(GpuOptions), OmegaConf.from_cli([*options]))
    except OmegaConfBaseException as error:
        sys.exit(f"bench.gpu: {error.args[0].splitlines()[0]}; the options are {', '.join(vars(GpuOptions()))}")
    settings = GpuOptions(**{str(option): value for option, value in merged.items()})
    if settings.device not in ("cuda", "cpu"):
        sys.exit(f"bench.gpu: device={settings.device}: use cuda or cpu")
    if unknown := [size for size in settings.size.split(",") if not (Path(CONF) / "model" / f"{size}.yaml").is_file()]:
        sys.exit(f"bench.gpu: size={settings.size}: conf/model has no {', '.join(unknown)}")
    return settings


def _in_own_process(size: str, file: Path, options: Sequence[str], settings: GpuOptions) -> dict[str, Any]:
    """Measure a size in a process; return its results until that ended, by itself or by force."""
    file.unlink(missing_ok=True)
    paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "bench.gpu", "one", size, str(file), *options]
    try:
        status = subprocess.run(
            command, env=environment, check=False, timeout=60 * settings.minutes + _GRACE
        ).returncode
        ended = None if status == 0 else f"the process ended with status {status}"
    except subprocess.TimeoutExpired:
        ended = "the process took too long and was stopped"
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {"model": size}
    file.unlink(missing_ok=True)
    return found if ended is None else {**found, "ended": ended}


def one(size: str, file: str, *options: str) -> None:
    """Measure one size, and write after each chapter."""
    settings = _read_options(options)
    until = time.monotonic() + 60 * settings.minutes
    trial = Trial(size, torch.device(settings.device), settings.rounds, settings.largest, until)

    def write(found: Mapping[str, Any]) -> None:
        part = Path(f"{file}.part")
        part.write_text(json.dumps(found))
        part.replace(file)

    measure(trial, write)


def announce(settings: GpuOptions) -> None:
    """Print the plan, and the memory and operations of each size."""
    print("bench.gpu: torch finds no GPU here, nothing is measured. On one with enough memory it would, for each size,")
    print("train (product, reference, cached features; batches 1, 2, 4, ... while they fit), time each part, profile a")
    print("step, predict, and train again with checkpointing and compiled:\n")
    costs: dict[str, Mapping[str, Cost]] = {}
    for size in settings.size.split(","):
        setup = recipe(size)
        print(
            f"{size}: training takes {memory_plan(setup).gigabytes:.1f} GB with a batch of one, by vessel.memory_plan"
        )
        costs[size] = step_cost(setup)
    print("", *table(costs), "\nsize=tiny device=cpu goes the whole way on the CPU.", sep="\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:
        one(*sys.argv[2:])
    else:
        main(*sys.argv[1:])
