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
from vessel.training.sampler import EpochDivision, EpochSampler

log = logging.getLogger(__name__)


class EpochLoader(DataLoader[Batch]):
    """A loader that begins to load when the first batch is taken.

    Lightning takes an iterator before it has loaded a checkpoint (DeepSpeed) and before it has set the epoch of the
    sampler (a resumed run); workers would have read the wrong samples by then.
    """

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # an iterator is all that Lightning needs
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the data module has the position, for any number of ranks; without it Lightning warns."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing, see `state_dict`."""


class VesselDataModule(LightningDataModule):
    """Loaders of a prepared data set.

    Args:
        root: folder that `vessel.prepare` wrote.
        prompt, geometry: questions and answers, and the sizes of tiles and frame, as the network needs them.
        phrases: what to segment; None takes every phrase of the data set.
        fold: index of the cross-validation fold that replaces train and val; None keeps the fixed split.
        batch_size: images a step on each device.
        workers: loader processes on each device.
        repeats: passes over the training images in an epoch.
        augmentation: changes of training images; None for none.
        seed: of order, prompt templates and augmentation.

    Attributes:
        features: returns cached features of an image or None, for the data sets made from then on; None for no cache.
        complete_batch: turns a batch on the device into the one that the network takes; None where they are the same.
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
        self.phrases = self._choose_phrases(phrases)
        self.prompt, self.geometry, self.fold = prompt, geometry, fold
        self.batch_size, self.workers, self.repeats = batch_size, workers, repeats
        self.augmentation, self.seed = augmentation, seed
        self.features: Callable[[str], Features | None] | None = None
        self.complete_batch: Callable[[Batch], Batch] | None = None
        self._training: EpochSampler | None = None

    def dataset(self, part: str) -> VesselDataset:
        """Return the samples of `train`, `val` or `test`; only `train` is augmented and has random templates."""
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
        """Return the loader of training samples, augmented and shuffled."""
        return self.loader("train")

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return the loader of validation samples, in order."""
        return self.loader("val")

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return the loader of test samples, in order."""
        return self.loader("test")

    def loader(self, part: str) -> DataLoader[Batch]:
        """Build the loader of a part, whose samples are divided over the trainer's ranks."""
        dataset = self.dataset(part)
        if self.workers:
            atexit.unregister(end_workers)
            atexit.register(end_workers)
        sampler = self.training_sampler() if part == "train" else EpochSampler(len(dataset), self._division(1))
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
        return batch if self.complete_batch is None else self.complete_batch(batch)

    def training_sampler(self) -> EpochSampler:
        """Return the one order of training samples, divided over the trainer's ranks and steps."""
        if self._training is None:
            division = self._division(self.trainer.accumulate_grad_batches if self.trainer else 1)
            # Tiles make most of a sample's tokens.
            lengths = [tile_count(f.width, f.height, self.geometry) for f in self.dataset("train").frames]
            self._training = EpochSampler(
                len(lengths), division, repeats=self.repeats, shuffle=True, seed=self.seed, lengths=lengths
            )
        return self._training

    def state_dict(self) -> dict[str, Any]:
        """Return the position of training after its last optimizer step, in numbers that hold for any number of ranks.

        Returns:
            `epoch`; `served`, samples of it over all ranks; `validation_due`, whether a validation comes first;
            `validated`, samples of the next step after which one was done already; `global_batch`, samples of a step.
        """
        assert self.trainer is not None
        position, sampler = training_position(self.trainer), self.training_sampler()
        return {
            "epoch": position.epoch,
            "served": sampler.served(position.epoch, position.batches),
            "validation_due": position.validation_due,
            "validated": position.validated * sampler.division.batch_of_ranks,
            "global_batch": sampler.division.global_batch,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Begin training where `state_dict` was taken, also in a loader that is there already."""
        sampler = self.training_sampler()
        sampler.begin(state_dict["epoch"], state_dict["served"])
        if sampler.division.global_batch != state_dict["global_batch"]:
            log.info(
                "global batch: %d samples, %d in the run before; it goes on with the samples that one left",
                sampler.division.global_batch,
                state_dict["global_batch"],
            )

    def resume_position(self, state_dict: dict[str, Any]) -> TrainingPosition:
        """Turn the content of `state_dict` into a position in batches of this run."""
        sampler, epoch = self.training_sampler(), state_dict["epoch"]
        sampler.begin(epoch, state_dict["served"])
        validated, rest = divmod(state_dict["validated"], sampler.division.batch_of_ranks)
        return TrainingPosition(
            epoch,
            sampler.first_batch(epoch),
            state_dict["validation_due"],
            validated=0 if rest or validated >= sampler.division.accumulated else validated,
        )

    def _division(self, accumulated: int) -> EpochDivision:
        if self.trainer is None:
            return EpochDivision(batch=self.batch_size, accumulated=accumulated)
        return EpochDivision(self.trainer.global_rank, self.trainer.world_size, self.batch_size, accumulated)

    def _choose_phrases(self, phrases: Sequence[str] | str | None) -> tuple[str, ...]:
        if phrases is None:
            return self.catalog.phrases
        given = [phrases] if isinstance(phrases, str) else phrases
        chosen = tuple(dict.fromkeys(normal_phrase(phrase) for phrase in given))
        unknown = [p for p in chosen if p not in self.catalog.phrases]
        if unknown or not chosen:
            raise VesselError(
                f"data.phrases={list(given)}: {unknown or 'an empty list'} is not in the data set; "
                f"it holds {list(self.catalog.phrases)}"
            )
        return chosen


def _single_threaded(worker: int) -> None:
    """Keep OpenCV from starting a thread a core in every worker, and leave signals to the main process."""
    import cv2

    cv2.setNumThreads(0)
    outlive_signals()
