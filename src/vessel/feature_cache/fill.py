"""Filling a cache: what is missing is encoded in batches, by all ranks and beside other processes that do the same."""

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
from vessel.feature_cache.encoders import Picture
from vessel.feature_cache.store import Store
from vessel.processes.signals import outlive_signals


class Look(NamedTuple):
    """One of the ways in which an image is shown.

    Attributes:
        dataset: that shows it.
        position: of the image there.
        outcome: of the augmentation; 0 without one.
    """

    dataset: VesselDataset
    position: int
    outcome: int = 0

    @property
    def tiles(self) -> int:
        """Into how many tiles it is cut, thumbnail counted."""
        frame, geometry = self.dataset.frames[self.position], self.dataset.geometry
        return tile_count(frame.width, frame.height, geometry)

    def image(self) -> NDArray[Any]:
        """uint8 [H, W, 3]."""
        return self.dataset.image_variants(self.position)[self.outcome]


@dataclass(frozen=True)
class Ranks:
    """Processes of one run, which share the work.

    Attributes:
        index, of: this one, and how many there are.
        any: whether any of them says yes; all of them have to ask.
        together: whether none can run the encoders without the others (ZeRO-3).
    """

    index: int
    of: int
    any: Callable[[bool], bool]
    together: bool


def looks_of(dataset: VesselDataset, workers: int) -> dict[str, Look]:
    """All that a data set shows, by the digest of its pixels. Augmented images have to be read for that.

    Args:
        dataset: without augmentation, or with one of which all outcomes are known.
        workers: processes that read.
    """
    if dataset.augmentation is None:
        return {frame.sha256: Look(dataset, position) for position, frame in enumerate(dataset.frames)}
    found: dict[str, Look] = {}
    every = [[position] for position in range(len(dataset))]
    for position, [keys] in enumerate(_loaded(_Keys(dataset), every, workers)):
        found |= {key: Look(dataset, position, outcome) for outcome, key in enumerate(keys)}
    return found


class Filler:
    """Encodes what is missing and keeps it.

    Args:
        store: where it is kept.
        encode: what encodes pictures, see `vessel.feature_cache.encoders.encoded`; given none, a black one.
        ranks: of the run.
        batch_size: images that are encoded at once.
        workers: processes that read images.
    """

    def __init__(
        self,
        store: Store,
        encode: Callable[[Sequence[Picture]], Sequence[Features]],
        *,
        ranks: Ranks,
        batch_size: int,
        workers: int,
    ) -> None:
        self.store, self.encode, self.ranks = store, encode, ranks
        self.batch_size, self.workers = batch_size, workers

    def fill(self, missing: Mapping[str, Look], *, shown: bool) -> None:
        """Encode images and keep their features; all ranks call this, each with what it does not find.

        Args:
            missing: by their keys.
            shown: whether rank 0 has a progress bar.

        Raises:
            VesselError: the disk is full.
        """
        if not self.ranks.any(bool(missing)):
            return
        todo = _Todo(self.store, list(missing.items()))
        loaded = _loaded(todo, self._order(len(todo)), self.workers)
        found = filter(None, map(self._still_missing, loaded))
        writing: list[Future[None]] = []
        shown = shown and self.ranks.index == 0
        with _bar(len(missing), shown=shown) as told, ThreadPoolExecutor(1) as writer:
            while self.ranks.any((batch := next(found, None)) is not None):
                if batch is None and not self.ranks.together:
                    continue
                features = self.encode(batch or [])
                _wait(writing)  # for those before: a full disk is told, and they do not pile up
                if batch is not None:
                    kept = [one.map(Tensor.cpu) for one in features]
                    writing = [writer.submit(self.store.put, p.key, one) for p, one in zip(batch, kept, strict=True)]
                if shown:
                    told(len(missing.keys() - self.store.keys()))
            _wait(writing)

    def _still_missing(self, loaded: Iterable[Picture | None]) -> list[Picture]:
        return [picture for picture in loaded if picture is not None and not self.store.holds(picture.key)]

    def _order(self, size: int) -> list[list[int]]:
        """Batches, first those of this rank, each part in an order that no other process has.

        A batch always holds the same images, as far as they are missing: their number can change a last digit.
        """
        batches = [list(range(i, min(i + self.batch_size, size))) for i in range(0, size, self.batch_size)]
        own = batches[self.ranks.index :: self.ranks.of]
        others = [batch for i, batch in enumerate(batches) if i % self.ranks.of != self.ranks.index]
        for part in (own, others):
            random.SystemRandom().shuffle(part)  # the run's own generators stay as they are
        return own + others


class _Keys(Dataset[list[str]]):
    """Digests of all that each image of a data set may look like."""

    def __init__(self, dataset: VesselDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, position: int) -> list[str]:
        return [pixel_hash(image) for image in self.dataset.image_variants(position)]


class _Todo(Dataset[Picture | None]):
    """Images as the encoders want them; None for one that another process has kept meanwhile."""

    def __init__(self, store: Store, missing: Sequence[tuple[str, Look]]) -> None:
        self.store, self.missing = store, missing

    def __len__(self) -> int:
        return len(self.missing)

    def __getitem__(self, index: int) -> Picture | None:
        key, look = self.missing[index]
        if self.store.holds(key):
            return None
        image, geometry = look.image(), look.dataset.geometry
        return Picture(key, cut_tiles(image, geometry), whole_frame(image, geometry))


def _loaded(dataset: Dataset[Any], batches: Sequence[list[int]], workers: int) -> Iterator[list[Any]]:
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=_begin,
        generator=torch.Generator().manual_seed(0),  # else it would draw from the global one
    )
    yield from loader


def _begin(worker: int) -> None:
    """A stop is for the main process to answer."""
    outlive_signals()


@contextmanager
def _bar(total: int, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """A bar that takes what is missing yet."""
    with Progress(transient=True, disable=not shown) as progress:
        task = progress.add_task("encoding images", total=total)
        yield lambda missing: progress.update(task, completed=total - missing)


def _wait(writing: Iterable[Future[None]]) -> None:
    for one in writing:
        one.result()
