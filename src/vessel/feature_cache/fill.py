"""Fill a cache: encode missing images in batches, by all ranks and beside other processes that do the same."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from rich.progress import Progress
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vessel.batch import Features
from vessel.data.dataset import VesselDataset
from vessel.data.images import pixel_hash
from vessel.data.transforms import cut_tiles, tile_count, whole_frame
from vessel.feature_cache.encoders import EncoderInput
from vessel.feature_cache.store import FeatureStore
from vessel.processes.signals import outlive_signals


class ImageVariant(NamedTuple):
    """One variant of an image under augmentation.

    Attributes:
        dataset: of the image.
        position: of the image in it.
        outcome: of the augmentation; 0 without one.
    """

    dataset: VesselDataset
    position: int
    outcome: int = 0

    @property
    def tiles(self) -> int:
        """Return the number of tiles that it is cut into, thumbnail included."""
        frame, geometry = self.dataset.frames[self.position], self.dataset.geometry
        return tile_count(frame.width, frame.height, geometry)

    def image(self) -> NDArray[Any]:
        """Read it and augment it: uint8 [H, W, 3]."""
        return self.dataset.image_variants(self.position)[self.outcome]


@dataclass(frozen=True)
class Ranks:
    """Processes of one run, between which the images are divided.

    Attributes:
        index: of this one.
        count: number of processes.
        reduce_any: returns True on all if one of them passes True; all of them call it.
        encode_together: whether none can run the encoders without the others (ZeRO-3).
    """

    index: int
    count: int
    reduce_any: Callable[[bool], bool]
    encode_together: bool


def index_variants(dataset: VesselDataset, workers: int) -> dict[str, ImageVariant]:
    """Return all variants of the images of a data set, by the digest of their pixels; augmented images are read for it.

    Args:
        dataset: without augmentation, or with one of a finite number of outcomes.
        workers: processes that read.
    """
    if dataset.augmentation is None:
        return {frame.sha256: ImageVariant(dataset, position) for position, frame in enumerate(dataset.frames)}
    found: dict[str, ImageVariant] = {}
    batches = [[position] for position in range(len(dataset))]
    for position, [keys] in enumerate(_load_batches(_VariantKeys(dataset), batches, workers)):
        found |= {key: ImageVariant(dataset, position, outcome) for outcome, key in enumerate(keys)}
    return found


class Filler:
    """Encoding of missing images into a store.

    Args:
        store: takes the features.
        encode: computes features, see `vessel.feature_cache.encoders.encode_inputs`; without images, of a black one.
        ranks: of the run.
        batch_size: images encoded at once.
        workers: processes that read images.
    """

    def __init__(
        self,
        store: FeatureStore,
        encode: Callable[[Sequence[EncoderInput]], Sequence[Features]],
        *,
        ranks: Ranks,
        batch_size: int,
        workers: int,
    ) -> None:
        self.store, self.encode, self.ranks = store, encode, ranks
        self.batch_size, self.workers = batch_size, workers

    def fill(self, missing: Mapping[str, ImageVariant], *, show_progress: bool) -> None:
        """Encode images and write their features; all ranks call this, each with the images that it misses.

        Args:
            missing: by their keys.
            show_progress: show a progress bar on rank 0.

        Raises:
            VesselError: the disk is full.
        """
        if not self.ranks.reduce_any(bool(missing)):
            return
        dataset = _MissingInputs(self.store, list(missing.items()))
        loaded = _load_batches(dataset, self._order(len(dataset)), self.workers)
        batches = filter(None, map(self._without_stored, loaded))
        writing: list[Future[None]] = []
        show_progress = show_progress and self.ranks.index == 0
        with _bar(len(missing), show_progress=show_progress) as update, ThreadPoolExecutor(1) as writer:
            while self.ranks.reduce_any((batch := next(batches, None)) is not None):
                if batch is None and not self.ranks.encode_together:
                    continue
                features = self.encode(batch or [])
                _wait(writing)  # for the batch before: its errors are raised, and at most one batch waits in memory
                if batch is not None:
                    on_cpu = [one.map(Tensor.cpu) for one in features]
                    writing = [writer.submit(self.store.put, p.key, one) for p, one in zip(batch, on_cpu, strict=True)]
                if show_progress:
                    update(len(missing.keys() - self.store.keys()))
            _wait(writing)

    def _without_stored(self, loaded: Iterable[EncoderInput | None]) -> list[EncoderInput]:
        return [one for one in loaded if one is not None and not self.store.contains(one.key)]

    def _order(self, size: int) -> list[list[int]]:
        """Return batches of indices, first those of this rank, each part in an order that no other process has.

        A batch always holds the same images, as far as they are missing: their number can change a last digit.
        """
        batches = [list(range(i, min(i + self.batch_size, size))) for i in range(0, size, self.batch_size)]
        own = batches[self.ranks.index :: self.ranks.count]
        others = [batch for i, batch in enumerate(batches) if i % self.ranks.count != self.ranks.index]
        for part in (own, others):
            random.SystemRandom().shuffle(part)  # the run's own generators stay as they are
        return own + others


class _VariantKeys(Dataset[list[str]]):
    """A data set of the digests of all variants of each image."""

    def __init__(self, dataset: VesselDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, position: int) -> list[str]:
        return [pixel_hash(image) for image in self.dataset.image_variants(position)]


class _MissingInputs(Dataset[EncoderInput | None]):
    """A data set of the inputs of the encoders; None for an image that another process has stored meanwhile."""

    def __init__(self, store: FeatureStore, missing: Sequence[tuple[str, ImageVariant]]) -> None:
        self.store, self.missing = store, missing

    def __len__(self) -> int:
        return len(self.missing)

    def __getitem__(self, index: int) -> EncoderInput | None:
        key, variant = self.missing[index]
        if self.store.contains(key):
            return None
        image, geometry = variant.image(), variant.dataset.geometry
        return EncoderInput(key, cut_tiles(image, geometry), whole_frame(image, geometry))


def _load_batches(dataset: Dataset[Any], batches: Sequence[list[int]], workers: int) -> Iterator[list[Any]]:
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=_begin_worker,
        generator=torch.Generator().manual_seed(0),  # else it would take numbers from the global one
    )
    yield from loader


def _begin_worker(worker: int) -> None:
    """Leave signals to the main process."""
    outlive_signals()


@contextmanager
def _bar(total: int, *, show_progress: bool) -> Iterator[Callable[[int], None]]:
    """Show a progress bar; yield a function that takes the number of images still missing."""
    with Progress(transient=True, disable=not show_progress) as progress:
        task = progress.add_task("encoding images", total=total)
        yield lambda missing: progress.update(task, completed=total - missing)


def _wait(writing: Iterable[Future[None]]) -> None:
    for one in writing:
        one.result()
