"""python -m bench: measure, in seconds and bytes, the work of the public code that vessel leaves out.

The product against `bench.reference`, which computes what the public training and inference do on the same weights, in
turns and in one process (memory: a fresh process each); a training step split by part; and the cost of a run against
the number of images, phrases, tiles, images a batch and ranks. About eleven minutes and 10 GB of memory on two quiet
cores, Linux. Writes outputs/bench/bench.json and bench.md; machines and their load differ, so compare figures of one
run only.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from bench.flops import whole_cost
from bench.pairs import Pairs
from bench.sizes import ENCODERS, SMALL, Case, tiny
from bench.stopwatch import seconds

from bench import answers, epochs, peak, report, scaling, startup, steps
from vessel.data.prompt import Prompt
from vessel.memory_plan.engine import Engine
from vessel.memory_plan.plan import Setup

OUT = Path("outputs/bench")
PAIRS = 5
MEMORY_PAIRS = 2  # which hardly differ


def main() -> None:
    """Measure, write and print."""
    prompt, smallest = Prompt(), tiny()
    print("bench: peak memory", flush=True)
    found: dict[str, Pairs] = {"peak_memory": peak.compare(SMALL, pairs=MEMORY_PAIRS)}
    parts: dict[str, dict[str, dict[str, float]]] = {}
    for case in (smallest, SMALL):  # of the latter the pairs are kept
        print(f"bench: training steps, {case.name}", flush=True)
        found["train_step"], parts[case.name] = steps.compare(case, prompt, pairs=PAIRS)
    print("bench: epochs from the feature cache", flush=True)
    cached = epochs.compare(ENCODERS, prompt, pairs=PAIRS)
    print("bench: prediction", flush=True)
    found |= {
        "cached_epoch": cached.pairs,
        **answers.compare(SMALL, prompt, pairs=PAIRS),
    }
    print("bench: cost against size", flush=True)
    written = {
        "ratios": {name: round(pairs.ratio, 3) for name, pairs in found.items()},
        "pairs": {name: pairs.as_dict() for name, pairs in found.items()},
        "machine": machine(),
        "networks": {case.name: describe(case) for case in (smallest, SMALL, ENCODERS)},
        "cache": {key: getattr(cached, key) for key in ("images", "image_bytes", "fill_seconds")},
        "parts": parts,
        "images_per_second": {case.name: rates(parts[case.name], case) for case in (smallest, SMALL)},
        "flop": flop(SMALL, found["train_step"]),
        "scaling": scaling.scaling(),
        "startup": startup.startup(),
    }
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "bench.json").write_text(json.dumps(written, indent=1) + "\n")
    (OUT / "bench.md").write_text(report.table(written))
    print((OUT / "bench.md").read_text())
    print(f"bench: {OUT / 'bench.json'}")


def machine() -> dict[str, Any]:
    """Collect the facts that the figures depend on, without the machine's name."""
    return {
        "cores": os.cpu_count(),
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def describe(case: Case) -> str:
    """Describe a network in one line."""
    language, vision, grounding = case.sizes.language, case.sizes.vision, case.sizes.grounding
    trains = f"LoRA r={case.lora.r}, trained copies of embedding and head" if case.lora.r else "every parameter trains"
    return (
        f"language model {language.width} wide, {language.layers} layers, vocabulary {language.vocabulary:,}; vision "
        f"encoder {vision.width} wide, {vision.layers} layers, tiles of {vision.tile_size} pixels; SAM2 at "
        f"{grounding.frame_size} pixels; {trains}; {case.images} images a training step, {case.phrases} phrase each"
    )


def rates(parts: Mapping[str, Mapping[str, float]], case: Case) -> dict[str, float]:
    """Compute the images a second of training by mode."""
    return {mode: case.images / sum(seconds.values()) for mode, seconds in parts.items()}


def flop(case: Case, trained: Pairs) -> dict[str, float]:
    """Count the operations of the product's step, those it does a second, and those of a product of two matrices."""
    setup = Setup(case.sizes, case.lora, case.trainable, case.loss_function, Engine(), batch_size=case.images)
    total = whole_cost(setup).total
    left, right = torch.randn(2048, 2048), torch.randn(2048, 2048)
    matrices = min(seconds(lambda: left @ right, left.device) for _ in range(5))
    fastest = min(trained.product)
    rate = 2 * 2048**3 / matrices
    return {"step": total, "per_second": total / fastest, "matrices_per_second": rate, "share": total / fastest / rate}


if __name__ == "__main__":
    main()
