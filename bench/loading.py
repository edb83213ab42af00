"""python -m bench.loading: measure the time that a worker of the loader needs for an image.

Synthetic pullbacks of 512x512 pixels, cut as the public networks want them: tiles of 448 and a SAM2 frame of 1,024. One
process on one thread, as each worker is one. Writes outputs/bench/loading.json and a table.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random

import cv2
import torch
from bench.stopwatch import in_turns
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from rich.console import Console
from rich.table import Table

from vessel.batch import InputGeometry, collate
from vessel.cli.conf import CONF
from vessel.cli.options import typed
from vessel.data.catalog import Catalog, Frame
from vessel.data.dataset import VesselDataset
from vessel.data.images import PreparedImages
from vessel.data.masks import read_mask
from vessel.data.preparation import PrepareOptions, prepare
from vessel.data.prompt import Prompt
from vessel.data.transforms import QuarterTurns, cut_tiles, whole_frame

OUT = Path("outputs/bench")
SIDE, BATCH = 512, 4
GEOMETRY = InputGeometry(tile_size=448, tokens_per_tile=256, max_tiles=12, frame_size=1024)
PHRASES = tuple(f"phrase {number}" for number in range(4))
WHOLE, COLLATE = "an image, all of it", f"its share of collating {BATCH}"


def main(rounds: int = 32) -> None:
    """Measure, print and write.

    Args:
        rounds: images that each figure is the median of.
    """
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary) / "data"
        frames = write_synthetic(root)
        spent = {k: measure(root, frames, PHRASES[:k], rounds=rounds) for k in (1, len(PHRASES))}
    rates = {k: round(1 / (found[WHOLE] + found[COLLATE]), 1) for k, found in spent.items()}
    OUT.mkdir(parents=True, exist_ok=True)
    milliseconds = {k: {name: round(1000 * s, 3) for name, s in found.items()} for k, found in spent.items()}
    found = {"side": SIDE, "milliseconds": milliseconds, "images_per_second_of_a_worker": rates}
    (OUT / "loading.json").write_text(json.dumps(found, indent=1) + "\n")
    table = Table("part", *(f"{k} phrases, ms" for k in spent), title=f"median, one image of {SIDE}x{SIDE}, one thread")
    for name in milliseconds[1]:
        table.add_row(name, *(f"{parts[name]:.2f}" for parts in milliseconds.values()))
    table.add_section()
    table.add_row("images a second of a worker", *(f"{rate:.1f}" for rate in rates.values()))
    Console().print(table)
    print(f"bench: {OUT / 'loading.json'}")


def write_synthetic(root: Path) -> list[Frame]:
    """Write a synthetic data set; return its frames, each with the mask of its lumen for every phrase."""
    given = ["source=synthetic", f"out={root}", "synthetic.patients=4", "synthetic.frames=4", f"synthetic.size={SIDE}"]
    with initialize_config_dir(CONF, version_base="1.3"):
        prepare(typed(compose("prepare", given), PrepareOptions, "vessel.prepare"))
    frames = Catalog.open(root).part("train")
    return [replace(frame, masks=dict.fromkeys(PHRASES, frame.masks["lumen"])) for frame in frames]


def measure(root: Path, frames: list[Frame], phrases: tuple[str, ...], *, rounds: int) -> Mapping[str, float]:
    """Measure the median seconds of each part of loading an image of training, and of all of it."""
    prompt, frame = Prompt(), frames[0]
    with initialize_config_dir(CONF, version_base="1.3"):
        augmentation = instantiate(compose("train").data.augmentation, _convert_="all")
    dataset = VesselDataset(
        root, frames, phrases=phrases, prompt=prompt, geometry=GEOMETRY, augmentation=augmentation, vary_templates=True
    )
    samples = [dataset[position] for position in range(BATCH)]  # caches are filled from here on
    image, masks = PreparedImages().read(root / frame.image, frame.sha256), samples[0].masks
    assert masks is not None
    known, indices, seeds = PreparedImages(), itertools.count(), itertools.count()
    size, files = (frame.height, frame.width), [root / str(frame.masks[phrase]) for phrase in phrases]
    tokens = len(samples[0].tiles) * GEOMETRY.tokens_per_tile

    runs: dict[str, Callable[[], object]] = {
        "read it, for the first time": lambda: PreparedImages().read(root / frame.image, frame.sha256),
        "read it again": lambda: known.read(root / frame.image, frame.sha256),
        "read its masks": lambda: [read_mask(file, size) for file in files],
        "augmentation": lambda: augmentation(image, masks.numpy(), seed=next(seeds)),
        "or quarter turns": lambda: QuarterTurns()(image, masks.numpy(), seed=next(seeds)),
        "tiles": lambda: cut_tiles(image, GEOMETRY),
        "frame for SAM2": lambda: whole_frame(image, GEOMETRY),
        "tokens, in words that are new": lambda: prompt.encode([f"{p} {next(seeds)}" for p in phrases], tokens),
        "tokens, of cached texts": lambda: prompt.encode(phrases, tokens, rng=Random(next(seeds))),
        COLLATE: partial(collate, samples, prompt.token_ids.pad),
        WHOLE: lambda: dataset[next(indices)],
    }
    times = in_turns(runs, torch.device("cpu"), rounds=rounds)
    return {name: one.median / (BATCH if name == COLLATE else 1) for name, one in times.items()}


if __name__ == "__main__":
    main()
