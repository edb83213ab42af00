"""python -m bench: seconds per training step, samples per second of the loader, and images per second of prediction.

Measured on this machine with the tiny network on painted pullbacks, in about a minute. Writes outputs/bench/bench.json
and a table; machines and their load differ, so compare figures of one run only.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from vessel.conf_path import CONF
from vessel.data.module import VesselDataModule
from vessel.data.preparation import Options, prepare
from vessel.losses import lm_loss
from vessel.model.plan import NetworkPlan
from vessel.options import typed

OUT = Path("outputs/bench")


def main() -> None:
    """Measure, print and write."""
    with tempfile.TemporaryDirectory() as temporary, initialize_config_dir(CONF, version_base="1.3"):
        root = Path(temporary) / "data"
        given = ["source=synthetic", f"out={root}", "synthetic.patients=4", "synthetic.frames=8"]
        prepare(typed(compose("prepare", given), Options, "vessel.prepare"))
        seconds = measure(_parts(compose("train", ["experiment=tiny", f"data.root={root}", "data.repeats=8", "run=."])))
    medians = {name: round(statistics.median(values), 4) for name, values in seconds.items()}
    OUT.mkdir(parents=True, exist_ok=True)
    found = {"seconds": medians, "raw": seconds, "threads": torch.get_num_threads(), "torch": torch.__version__}
    (OUT / "bench.json").write_text(json.dumps(found, indent=1) + "\n")
    table = Table("part", "seconds, median", title=f"tiny, batch of 4 images, {torch.get_num_threads()} threads")
    for name, value in medians.items():
        table.add_row(name, f"{value:.3f}")
    Console().print(table)
    print(f"bench: {OUT / 'bench.json'}")


def _parts(config: DictConfig) -> SimpleNamespace:
    prompt, sizes = instantiate(config.prompt), instantiate(config.model)
    data: VesselDataModule = instantiate(config.data, _partial_=True)(prompt=prompt, views=sizes.views)
    plan = NetworkPlan(sizes, prompt.token_ids, prompt.new_tokens, trainable=config.trainable)
    return SimpleNamespace(network=plan.build(), objective=instantiate(config.objective), data=data)


def measure(parts: SimpleNamespace) -> dict[str, list[float]]:
    """Seconds of each part, several times.

    Args:
        parts: network, objective and data module of a configuration.
    """
    network, side = parts.network, parts.network.grounding.image_size
    batch = next(iter(parts.data.train_dataloader()))

    def loss() -> torch.Tensor:
        output = network(batch)
        masks = parts.objective(output.mask_logits, batch.masks, side)
        return sum(masks.values()) + lm_loss(output.lm_logits, output.lm_targets)

    def encode() -> None:
        with torch.no_grad():
            network.grounding.encode(torch.zeros(len(batch), 3, side, side))

    def predict() -> None:
        with torch.no_grad():
            network.probabilities(network(batch), batch)

    loading = iter(parts.data.train_dataloader())
    return {
        "load a batch": _timed(lambda: next(loading), 4),
        "training step: forward and backward": _timed(lambda: loss().backward(), 10),
        "of it: SAM2 image encoder, forward": _timed(encode, 10),
        "predict a batch": _timed(predict, 10),
    }


def _timed(action: Callable[[], object], times: int) -> list[float]:
    action()
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return seconds


if __name__ == "__main__":
    main()
