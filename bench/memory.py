"""python -m bench.memory: measure the peak memory of loading a Sa2VA folder, against network and largest shard.

Writes a folder of a true architecture with random bf16 weights, loads it in a fresh process as training does, with
frozen weights in bf16, without and with adapters, and deletes it. `python -m bench.memory internvl3_8b 5` takes another
architecture and shards of so many GB; 2B with 1 GB, the default, needs 5 GB of disk and 8 GB of memory. Linux only.
Writes outputs/bench/memory.json and a table.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
from accelerate import init_empty_weights
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from vessel.cli.conf import CONF
from vessel.data.prompt import Prompt
from vessel.model.lora import Lora
from vessel.model.sa2va import Sa2VAConfig, build_sa2va
from vessel.weights.architecture import public_names
from vessel.weights.build import NetworkPlan
from vessel.weights.entry import Weights
from vessel.weights.files import INDEX
from vessel.weights.hub_config import public_config

OUT = Path("outputs/bench")
CHOICES = {"nothing": 0, "lora": 8}  # `trainable`, and the rank of the adapters


def main(model: str = "internvl3_2b", shard_gb: str = "1") -> None:
    """Write, measure, print, delete.

    Args:
        model: name of a configuration in conf/model.
        shard_gb: size of a shard, GB.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "sa2va"
        write(folder, sizes_of(f"model={model}"), int(float(shard_gb) * 1e9))
        found = {choice: measure(folder, choice, f"model={model}") for choice in CHOICES}
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "memory.json").write_text(json.dumps({"model": model, **found}, indent=1) + "\n")
    columns = ("trainable", "network GB", "largest shard GB", "peak GB", "peak less network and shard", "seconds")
    table = Table(*columns, title=f"loading {model}, bf16")
    for choice, output in found.items():
        gb = [output[key] / 1e9 for key in ("network", "shard", "peak")]
        table.add_row(choice, *(f"{value:.3f}" for value in (*gb, gb[2] - gb[0] - gb[1])), f"{output['seconds']:.0f}")
    Console().print(table)
    print(f"bench: {OUT / 'memory.json'}")


def sizes_of(*overrides: str) -> Sa2VAConfig:
    """Compose the configuration of the network that vessel.train builds with these options."""
    with initialize_config_dir(CONF, version_base="1.3"):
        return instantiate(compose("train", [*overrides, "data.root=none", "run=."]).model)


def write(folder: Path, sizes: Sa2VAConfig, shard: int) -> None:
    """Write a Sa2VA folder with random bf16 weights, never more than one shard in memory.

    Args:
        folder: must not exist.
        sizes: of the network.
        shard: bytes of a shard at most, unless one tensor is larger.

    Raises:
        OSError: the disk is too small.
    """
    tokens = Prompt().token_ids
    with init_empty_weights():
        state = build_sa2va(sizes, tokens).state_dict()
    outline = dict(public_names(sizes.language).to_public(state.items()))
    needed = 2 * sum(tensor.numel() for tensor in outline.values())
    folder.mkdir(parents=True)
    if shutil.disk_usage(folder).free < needed + 2**30:
        raise OSError(f"{folder}: {needed / 1e9:.1f} GB needed, {shutil.disk_usage(folder).free / 1e9:.1f} GB are free")
    config = public_config(sizes, tokens, template="qwen_chat", dtype=torch.bfloat16)
    (folder / "config.json").write_text(json.dumps(config))
    shards = list(_split_shards({name: tuple(tensor.shape) for name, tensor in outline.items()}, shard))
    weight_map = {}
    for number, part in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02) for name, shape in part.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": needed}, "weight_map": weight_map}))


def _split_shards(shapes: dict[str, tuple[int, ...]], limit: int) -> Iterator[dict[str, tuple[int, ...]]]:
    part: dict[str, tuple[int, ...]] = {}
    held = 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        if part and held + size > limit:
            yield part
            part, held = {}, 0
        part[name] = shape
        held += size
    yield part


def measure(folder: Path, choice: str, *overrides: str) -> dict[str, float]:
    """Load the network in a fresh process, and measure it.

    Args:
        folder: written with the sizes of `overrides`.
        choice: one of `CHOICES`.
        overrides: as in `sizes_of`.

    Returns:
        bytes of the network, of the largest shard, and of the peak above what the imports take; seconds.
    """
    command = [sys.executable, __file__, "load", str(folder), choice, *overrides]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    shard = max(file.stat().st_size for file in folder.glob("*.safetensors"))
    return {**json.loads(output.splitlines()[-1]), "shard": shard}


def load(folder: str, choice: str, *overrides: str) -> None:
    """Load the network, and print the bytes and seconds that it took."""
    sizes, prompt = sizes_of(*overrides), Prompt()
    plan = NetworkPlan(
        sizes, prompt.token_ids, prompt.new_tokens, lora=Lora(r=CHOICES[choice]), trainable=choice,
        weights=[Weights(folder)], frozen_dtype=torch.bfloat16,
    )  # fmt: skip
    with init_empty_weights():
        build_sa2va(sizes, prompt.token_ids)  # what is imported at first use
    before, start = psutil.Process().memory_info().rss, time.perf_counter()
    network = plan.build()
    seconds = time.perf_counter() - start
    held = sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))
    status = Path("/proc/self/status").read_text()
    peak = 1024 * int(status.split("VmHWM:")[1].split()[0])
    print(json.dumps({"network": held, "peak": peak - before, "seconds": seconds}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["load"]:
        load(*sys.argv[2:])
    else:
        main(*sys.argv[1:])
