"""Compute the features of frozen encoders once, and serve them in every later epoch and run."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from typing_extensions import override

from vessel.batch import Batch, Features
from vessel.errors import VesselError
from vessel.feature_cache.encoders import (
    Picture,
    blank,
    cache_namespace,
    complete,
    encoded,
    is_cut,
    require_frozen,
    sizes_of,
)
from vessel.feature_cache.fill import Filler, Look, Ranks, looks_of
from vessel.feature_cache.groups import Hold, readable
from vessel.feature_cache.store import Store
from vessel.model.sa2va import Sa2VA
from vessel.paths import expanded
from vessel.training.datamodule import VesselDataModule

_ENDLESS = (
    "cache=features: training images are encoded in each step, since data.augmentation changes them without end; "
    "data.augmentation=null or data/augmentation=quarter_turns would let them be kept as well"
)

log = logging.getLogger(__name__)


class FeatureCache(Callback):
    """Keep features on disk, by weights and image content; see docs/speed.md.

    Loaders find them by the pixels of an image. An image without any is encoded in the step, as without a cache. It is
    called before all other callbacks: what measures time or listens to signals begins after it has filled.

    Args:
        root: folder of the cache, for any number of runs at once.
        max_gb: what everything in it may take, in 10^9 bytes.
    """

    def __init__(self, root: str, max_gb: float) -> None:
        self.store = Store(expanded(root))
        self.max_gb = max_gb
        self._looks: dict[str, Look] = {}
        self._hold: Hold | None = None
        self._filler: Filler | None = None
        self._nbytes = 0, 0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Before the loaders are made.

        Raises:
            VesselError: validation would begin before the cache is filled.
        """
        if trainer.num_sanity_val_steps:
            raise VesselError(
                f"trainer.num_sanity_val_steps={trainer.num_sanity_val_steps} with cache=features: loaders of a check "
                "before training would never find the features; leave it 0"
            )
        data = _data_of(trainer)
        data.features = self.store.get
        data.complete = lambda batch: self._completed(pl_module.network, batch)  # type: ignore[arg-type]

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fill it, now that all weights are in their place.

        Raises:
            VesselError: the encoders train, or there is no room.
        """
        network, data = require_frozen(pl_module.network), _data_of(trainer)  # type: ignore[arg-type]
        group = cache_namespace(
            network,
            data.geometry,
            device=trainer.strategy.root_device.type,
            precision=f"{type(trainer.precision_plugin).__name__} {trainer.precision}",  # DeepSpeed's is no autocast
        )
        self._hold = Hold(self.store.root, group)
        self.store.group = group
        self._filler = _filler(trainer, network, data, self.store)
        for part in ("train", "val"):
            dataset = data.dataset(part)
            if dataset.is_finite:
                self._looks |= looks_of(dataset, data.workers)
            else:
                rank_zero_only(log.info)(_ENDLESS)
        [probe] = self._filler.encode([])
        self._nbytes = sizes_of(probe)
        self._fill(trainer, first=True)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace what was found damaged in the epoch before."""
        self._fill(trainer)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let others remove these features when they need the room."""
        self._let_go()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """As at the end; the next job of a sweep runs in this process."""
        self._let_go()

    def _let_go(self) -> None:
        if self._hold is not None:
            self._hold.close()
            self._hold = None

    def _fill(self, trainer: Trainer, *, first: bool = False) -> None:
        assert self._hold is not None
        assert self._filler is not None
        there = self.store.keys()
        missing = {key: look for key, look in self._looks.items() if key not in there}
        if first:
            self._announce(missing)
        if missing:
            self._hold.reserve(self._bytes_of(missing.values()), int(self.max_gb * 1e9))
        trainer.strategy.barrier("features are counted")  # before any of them is written
        self._filler.fill(missing, shown=first)

    @rank_zero_only
    def _announce(self, missing: Mapping[str, Look]) -> None:
        whole, count = self._bytes_of(self._looks.values()), len(self._looks)
        log.info(
            "feature cache: %d images of %s, %s in all, %s to be computed; in %s, where %s are free (cache.max_gb=%g)",
            count,
            readable(whole / max(1, count)),
            readable(whole),
            readable(self._bytes_of(missing.values())),
            os.path.relpath(self.store.root),
            readable(shutil.disk_usage(self.store.root).free),
            self.max_gb,
        )

    def _bytes_of(self, looks: Iterable[Look]) -> int:
        per_tile, per_image = self._nbytes
        return sum(look.tiles * per_tile + per_image for look in looks)

    def _completed(self, network: Sa2VA, batch: Batch) -> Batch:
        """Encode on all ranks what one of them misses, where they can only encode together (ZeRO-3)."""
        filler = self._filler
        if filler is None or not filler.ranks.together:
            return batch
        has_all = batch.features is not None and all(known is not None for known in batch.features)
        if filler.ranks.any(has_all) and filler.ranks.any(not has_all):
            return complete(batch, network, filler.encode)
        return batch


def _data_of(trainer: Trainer) -> VesselDataModule:
    data = trainer.datamodule  # type: ignore[attr-defined]  # Lightning sets it in `fit`
    assert isinstance(data, VesselDataModule)
    return data


def _filler(trainer: Trainer, network: Sa2VA, data: VesselDataModule, store: Store) -> Filler:
    strategy = trainer.strategy

    def encode(pictures: Sequence[Picture]) -> list[Features]:
        with trainer.precision_plugin.forward_context():  # as in a step
            return encoded(network, pictures or [blank(data.geometry)])

    ranks = Ranks(
        trainer.global_rank,
        trainer.world_size,
        any=lambda said: strategy.reduce_boolean_decision(said, all=False),
        together=is_cut(network),
    )
    return Filler(store, encode, ranks=ranks, batch_size=data.batch_size, workers=data.workers)
