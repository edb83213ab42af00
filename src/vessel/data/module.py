"""The LightningDataModule: parts of a prepared data set as loaders."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from lightning import LightningDataModule
from torch.utils.data import DataLoader

from vessel.batch import Batch, Views, collate
from vessel.data.annotations import normal_phrase
from vessel.data.catalog import Catalog
from vessel.data.dataset import VesselDataset
from vessel.data.prompt import Prompt
from vessel.data.sampler import EpochSampler
from vessel.data.transforms import Augmentation
from vessel.errors import VesselError


class VesselDataModule(LightningDataModule):
    """Loaders of a prepared data set.

    Args:
        root: folder that `vessel.prepare` wrote.
        prompt, views: wording and cutting that belong to the network.
        phrases: what to segment; None takes every phrase of the data set.
        fold: index of the cross-validation fold that replaces train and val; None keeps the fixed split.
        batch_size: images a step on each device.
        workers: loader processes on each device.
        repeats: passes over the training images in an epoch.
        augmentation: changes of training images; None for none.
        seed: of order, wording and augmentation.
    """

    def __init__(
        self,
        root: str,
        *,
        prompt: Prompt,
        views: Views,
        phrases: Sequence[str] | str | None = None,
        fold: int | None = None,
        batch_size: int = 1,
        workers: int = 0,
        repeats: int = 1,
        augmentation: Augmentation | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.catalog = Catalog.open(Path(root))
        self.phrases = self._known(phrases)
        self.prompt, self.views, self.fold = prompt, views, fold
        self.batch_size, self.workers, self.repeats = batch_size, workers, repeats
        self.augmentation, self.seed = augmentation, seed

    def dataset(self, part: str) -> VesselDataset:
        """The samples of `train`, `val` or `test`; only `train` is augmented and worded at random."""
        in_training = part == "train"
        return VesselDataset(
            self.catalog.root,
            self.catalog.part(part, self.fold),
            phrases=self.phrases,
            prompt=self.prompt,
            views=self.views,
            augmentation=self.augmentation if in_training else None,
            varied=in_training,
            seed=self.seed,
        )

    def train_dataloader(self) -> DataLoader[Batch]:
        """Augmented, shuffled."""
        return self.loader("train")

    def val_dataloader(self) -> DataLoader[Batch]:
        """In order."""
        return self.loader("val")

    def test_dataloader(self) -> DataLoader[Batch]:
        """In order."""
        return self.loader("test")

    def loader(self, part: str) -> DataLoader[Batch]:
        """Batches of a part, cut over the trainer's ranks."""
        dataset, in_training = self.dataset(part), part == "train"
        sampler = EpochSampler(
            len(dataset),
            repeats=self.repeats if in_training else 1,
            shuffle=in_training,
            seed=self.seed,
            rank=self.trainer.global_rank if self.trainer else 0,
            ranks=self.trainer.world_size if self.trainer else 1,
        )
        return DataLoader(
            dataset,  # type: ignore[arg-type]  # collate makes batches of its samples
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.workers,
            collate_fn=partial(collate, pad_id=self.prompt.token_ids.pad),
            worker_init_fn=_single_threaded,
            persistent_workers=self.workers > 0,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
        )

    def _known(self, phrases: Sequence[str] | str | None) -> tuple[str, ...]:
        if phrases is None:
            return self.catalog.phrases
        given = [phrases] if isinstance(phrases, str) else phrases
        asked = tuple(dict.fromkeys(normal_phrase(phrase) for phrase in given))
        unknown = [p for p in asked if p not in self.catalog.phrases]
        if unknown or not asked:
            raise VesselError(
                f"data.phrases={list(given)}: {unknown or 'an empty list'} is not in the data set; "
                f"it holds {list(self.catalog.phrases)}"
            )
        return asked


def _single_threaded(worker: int) -> None:
    """OpenCV would start a thread for every core in every worker."""
    import cv2

    cv2.setNumThreads(0)
