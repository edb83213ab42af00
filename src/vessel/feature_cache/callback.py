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
    EncoderInput,
    black_input,
    cache_namespace,
    complete_batch,
    encode_inputs,
    feature_nbytes,
    is_sharded,
    require_frozen,
)
from vessel.feature_cache.fill import Filler, ImageVariant, Ranks, index_variants
from vessel.feature_cache.leases import Lease, readable
from vessel.feature_cache.store import FeatureStore
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
    called before all other callbacks: those that measure time or handle signals begin after it has filled.

    Args:
        root: folder of the cache, for any number of runs at once.
        max_gb: largest size of the whole folder, in 10^9 bytes.
    """

    def __init__(self, root: str, max_gb: float) -> None:
        self.store = FeatureStore(expanded(root))
        self.max_gb = max_gb
        self._variants: dict[str, ImageVariant] = {}
        self._lease: Lease | None = None
        self._filler: Filler | None = None
        self._nbytes = 0, 0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Connect the cache with the data module, before the loaders are made.

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
        data.complete_batch = lambda batch: self._complete_batch(pl_module.network, batch)  # type: ignore[arg-type]

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fill the cache, once all weights are loaded.

        Raises:
            VesselError: the encoders train, or there is not enough space.
        """
        network, data = require_frozen(pl_module.network), _data_of(trainer)  # type: ignore[arg-type]
        namespace = cache_namespace(
            network,
            data.geometry,
            device=trainer.strategy.root_device.type,
            precision=f"{type(trainer.precision_plugin).__name__} {trainer.precision}",  # DeepSpeed's is no autocast
        )
        self._lease = Lease(self.store.root, namespace)
        self.store.namespace = namespace
        self._filler = _filler(trainer, network, data, self.store)
        for part in ("train", "val"):
            dataset = data.dataset(part)
            if dataset.is_finite:
                self._variants |= index_variants(dataset, data.workers)
            else:
                rank_zero_only(log.info)(_ENDLESS)
        [probe] = self._filler.encode([])
        self._nbytes = feature_nbytes(probe)
        self._fill(trainer, first=True)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Encode again the images whose files were found damaged in the epoch before."""
        self._fill(trainer)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close the lease, so that other processes may remove these features."""
        self._release()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the lease; the next job of a sweep runs in this process."""
        self._release()

    def _release(self) -> None:
        if self._lease is not None:
            self._lease.close()
            self._lease = None

    def _fill(self, trainer: Trainer, *, first: bool = False) -> None:
        assert self._lease is not None
        assert self._filler is not None
        stored = self.store.keys()
        missing = {key: variant for key, variant in self._variants.items() if key not in stored}
        if first:
            self._log_size(missing)
        if missing:
            self._lease.reserve(self._bytes_of(missing.values()), int(self.max_gb * 1e9))
        trainer.strategy.barrier("features are counted")  # before any of them is written
        self._filler.fill(missing, show_progress=first)

    @rank_zero_only
    def _log_size(self, missing: Mapping[str, ImageVariant]) -> None:
        total, count = self._bytes_of(self._variants.values()), len(self._variants)
        log.info(
            "feature cache: %d images of %s, %s in all, %s to be computed; in %s, where %s are free (cache.max_gb=%g)",
            count,
            readable(total / max(1, count)),
            readable(total),
            readable(self._bytes_of(missing.values())),
            os.path.relpath(self.store.root),
            readable(shutil.disk_usage(self.store.root).free),
            self.max_gb,
        )

    def _bytes_of(self, variants: Iterable[ImageVariant]) -> int:
        per_tile, per_image = self._nbytes
        return sum(variant.tiles * per_tile + per_image for variant in variants)

    def _complete_batch(self, network: Sa2VA, batch: Batch) -> Batch:
        """Encode on all ranks the images that one of them misses, where they can only encode together (ZeRO-3)."""
        filler = self._filler
        if filler is None or not filler.ranks.encode_together:
            return batch
        has_all = batch.features is not None and all(known is not None for known in batch.features)
        if filler.ranks.reduce_any(has_all) and filler.ranks.reduce_any(not has_all):
            return complete_batch(batch, network, filler.encode)
        return batch


def _data_of(trainer: Trainer) -> VesselDataModule:
    data = trainer.datamodule  # type: ignore[attr-defined]  # Lightning sets it in `fit`
    assert isinstance(data, VesselDataModule)
    return data


def _filler(trainer: Trainer, network: Sa2VA, data: VesselDataModule, store: FeatureStore) -> Filler:
    strategy = trainer.strategy

    def encode(inputs: Sequence[EncoderInput]) -> list[Features]:
        with trainer.precision_plugin.forward_context():  # as in a step
            return encode_inputs(network, inputs or [black_input(data.geometry)])

    ranks = Ranks(
        trainer.global_rank,
        trainer.world_size,
        reduce_any=lambda decision: strategy.reduce_boolean_decision(decision, all=False),
        encode_together=is_sharded(network),
    )
    return Filler(store, encode, ranks=ranks, batch_size=data.batch_size, workers=data.workers)
