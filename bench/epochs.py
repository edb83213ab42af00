"""Measure epochs of training with the frozen encoders' features from the cache, and without it."""

from __future__ import annotations

import tempfile
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path

import torch
from bench.pairs import Pairs, in_turns
from bench.sizes import SIDE, Case
from bench.steps import Steps
from bench.stopwatch import seconds
from hydra import compose, initialize_config_dir

from vessel.cli.conf import CONF
from vessel.cli.options import typed
from vessel.data.preparation import PrepareOptions, prepare
from vessel.data.prompt import Prompt
from vessel.feature_cache.encoders import cache_namespace, encode_inputs
from vessel.feature_cache.fill import Filler, Ranks, index_variants
from vessel.feature_cache.leases import Lease
from vessel.feature_cache.store import FeatureStore
from vessel.training.datamodule import VesselDataModule


@dataclass(frozen=True)
class Epochs:
    """The measured epochs.

    Attributes:
        pairs: seconds of an epoch from the cache, and of one that encodes every image.
        images: of an epoch.
        fill_seconds: to fill the cache, once.
        image_bytes: on disk.
    """

    pairs: Pairs
    images: int
    fill_seconds: float
    image_bytes: int


def compare(case: Case, prompt: Prompt, *, pairs: int, patients: int = 8) -> Epochs:
    """Train through the loader on synthetic pullbacks that are not augmented, everything in this process."""
    with tempfile.TemporaryDirectory() as temporary:
        data, cached = (_data(case, prompt, Path(temporary) / "data", patients) for _ in range(2))
        steps = Steps(case, prompt)
        store = FeatureStore(Path(temporary) / "features")
        store.namespace = cache_namespace(steps.network, data.geometry)
        filler = Filler(
            store,
            partial(encode_inputs, steps.network),
            ranks=Ranks(0, 1, reduce_any=bool, encode_together=False),
            batch_size=case.images,
            workers=0,
        )
        variants = index_variants(data.dataset("train"), 0)
        with Lease(store.root, store.namespace):
            fill_seconds = seconds(lambda: filler.fill(variants, show_progress=False), torch.device("cpu"))
            cached.features = store.get
            files = [file.stat().st_size for file in store.folder.iterdir()]
            found = in_turns(partial(_epoch, steps, cached), partial(_epoch, steps, data), pairs=pairs)
    return Epochs(found, len(variants), fill_seconds, sum(files) // len(files))


def _data(case: Case, prompt: Prompt, root: Path, patients: int) -> VesselDataModule:
    if not root.exists():
        given = ["source=synthetic", f"out={root}", "workers=0", f"synthetic.size={SIDE}"]
        with initialize_config_dir(CONF, version_base="1.3"):
            config = compose("prepare", [*given, f"synthetic.patients={patients}", "synthetic.frames=4"])
        with redirect_stdout(StringIO()):  # its tables are not the bench's
            prepare(typed(config, PrepareOptions, "vessel.prepare"))
    return VesselDataModule(
        str(root), prompt=prompt, geometry=case.sizes.geometry, phrases=["lumen"], batch_size=case.images
    )  # fmt: skip


def _epoch(steps: Steps, data: VesselDataModule) -> None:
    for batch in data.train_dataloader():
        steps.product(batch)
