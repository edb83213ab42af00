"""The LightningDataModule: parts of a prepared data set as loaders."""

from __future__ import annotations

import atexit
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader

from vessel.batch import Batch, Features, InputGeometry, collate
from vessel.data.catalog import Catalog
from vessel.data.dataset import VesselDataset
from vessel.data.phrases import normal_phrase
from vessel.data.prompt import Prompt
from vessel.data.transforms import Augmentation, QuarterTurns, tile_count
from vessel.errors import VesselError
from vessel.processes.signals import end_workers, outlive_signals
from vessel.training.resume import TrainingPosition, training_position
from vessel.training.sampler import Cut, EpochSampler

log = logging.getLogger(__name__)


class EpochLoader(DataLoader[Batch]):
    """Begins to load at the first batch that is asked for.

    Lightning takes an iterator before it has loaded a checkpoint (DeepSpeed) and before it has told the sampler which
    epoch it is (a run that goes on); workers would have read the wrong samples by then.
    """

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # an iterator is all that Lightning needs
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the data module keeps the place, for any number of ranks. Lightning warns of loaders without it."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to do, see `state_dict`."""


class VesselDataModule(LightningDataModule):
    """Loaders of a prepared data set.

    Args:
        root: folder that `vessel.prepare` wrote.
        prompt, geometry: wording and cutting that belong to the network.
        phrases: what to segment; None takes every phrase of the data set.
        fold: index of the cross-validation fold that replaces train and val; None keeps the fixed split.
        batch_size: images a step on each device.
        workers: loader processes on each device.
        repeats: passes over the training images in an epoch.
        augmentation: changes of training images; None for none.
        seed: of order, wording and augmentation.

    Attributes:
        features: where features of an image may be known, for the data sets made from then on.
        complete: makes of a batch on the device the one that the network takes; None where they are the same.
    """

    def __init__(
        self,
        root: str,
        *,
        prompt: Prompt,
        geometry: InputGeometry,
        phrases: Sequence[str] | str | None = None,
        fold: int | None = None,
        batch_size: int = 1,
        workers: int = 0,
        repeats: int = 1,
        augmentation: Augmentation | QuarterTurns | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.catalog = Catalog.open(Path(root))
        self.phrases = self._known(phrases)
        self.prompt, self.geometry, self.fold = prompt, geometry, fold
        self.batch_size, self.workers, self.repeats = batch_size, workers, repeats
        self.augmentation, self.seed = augmentation, seed
        self.features: Callable[[str], Features | None] | None = None
        self.complete: Callable[[Batch], Batch] | None = None
        self._training: EpochSampler | None = None

    def dataset(self, part: str) -> VesselDataset:
        """The samples of `train`, `val` or `test`; only `train` is augmented and worded at random."""
        in_training = part == "train"
        dataset = VesselDataset(
            self.catalog.root,
            self.catalog.part(part, self.fold),
            phrases=self.phrases,
            prompt=self.prompt,
            geometry=self.geometry,
            augmentation=self.augmentation if in_training else None,
            vary_templates=in_training,
            seed=self.seed,
        )
        dataset.features = self.features
        return dataset

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
        dataset = self.dataset(part)
        if self.workers:
            atexit.unregister(end_workers)
            atexit.register(end_workers)
        sampler = self.training_sampler() if part == "train" else EpochSampler(len(dataset), self._cut(1))
        return EpochLoader(
            dataset,  # type: ignore[arg-type]  # collate makes batches of its samples
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.workers,
            collate_fn=partial(collate, pad_id=self.prompt.token_ids.pad),
            worker_init_fn=_single_threaded,
            generator=torch.Generator().manual_seed(self.seed),  # else each epoch would draw from the global one
            persistent_workers=self.workers > 0,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
        )

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Move a batch while the device still computes; its memory is pinned."""
        return batch.to(device, non_blocking=True)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Complete a batch that has arrived on the device; every rank calls this for each of its batches."""
        return batch if self.complete is None else self.complete(batch)

    def training_sampler(self) -> EpochSampler:
        """The one order of training samples, cut over the trainer's ranks and steps."""
        if self._training is None:
            cut = self._cut(self.trainer.accumulate_grad_batches if self.trainer else 1)
            # Tiles make most of a sample's tokens.
            lengths = [tile_count(f.width, f.height, self.geometry) for f in self.dataset("train").frames]
            self._training = EpochSampler(
                len(lengths), cut, repeats=self.repeats, shuffle=True, seed=self.seed, lengths=lengths
            )
        return self._training

    def state_dict(self) -> dict[str, Any]:
        """Return the position of training after its last optimizer step, in numbers that hold for any number of ranks.

        Returns:
            `epoch`; `served`, samples of it over all ranks; `validation_due`, whether a validation comes first;
            `validated`, samples of the next step after which one was done already; `global_batch`, samples of a step.
        """
        assert self.trainer is not None
        place, sampler = training_position(self.trainer), self.training_sampler()
        return {
            "epoch": place.epoch,
            "served": sampler.served(place.epoch, place.batches),
            "validation_due": place.validation_due,
            "validated": place.validated * sampler.cut.together,
            "global_batch": sampler.cut.step,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Begin training where `state_dict` was taken, also in a loader that is there already."""
        sampler = self.training_sampler()
        sampler.begin(state_dict["epoch"], state_dict["served"])
        if sampler.cut.step != state_dict["global_batch"]:
            log.info(
                "global batch: %d samples, %d in the run before; it goes on with the samples that one left",
                sampler.cut.step,
                state_dict["global_batch"],
            )

    def resume_position(self, state_dict: dict[str, Any]) -> TrainingPosition:
        """Turn the content of `state_dict` into a position in batches of this run."""
        sampler, epoch = self.training_sampler(), state_dict["epoch"]
        sampler.begin(epoch, state_dict["served"])
        validated, rest = divmod(state_dict["validated"], sampler.cut.together)
        return TrainingPosition(
            epoch,
            sampler.first_batch(epoch),
            state_dict["validation_due"],
            validated=0 if rest or validated >= sampler.cut.accumulated else validated,
        )

    def _cut(self, accumulated: int) -> Cut:
        if self.trainer is None:
            return Cut(batch=self.batch_size, accumulated=accumulated)
        return Cut(self.trainer.global_rank, self.trainer.world_size, self.batch_size, accumulated)

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
    """OpenCV would start a thread for every core in every worker. A stop is for the main process to answer."""
    import cv2

    cv2.setNumThreads(0)
    outlive_signals()
