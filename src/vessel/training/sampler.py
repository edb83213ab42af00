"""The order of samples: one permutation of the epoch, divided over ranks, never drawn by a worker."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import torch
from torch.utils.data import Sampler

# Numbers of samples, whatever the division: an epoch keeps its order when it is resumed with another.
_WINDOW, _RUN = 512, 32


@dataclass(frozen=True)
class EpochDivision:
    """The division of an epoch into optimizer steps, batches and ranks.

    Attributes:
        rank, ranks: this process and the number of processes.
        batch: samples of a batch on one rank.
        accumulated: batches of an optimizer step on one rank.
    """

    rank: int = 0
    ranks: int = 1
    batch: int = 1
    accumulated: int = 1

    @property
    def batch_of_ranks(self) -> int:
        """Return the samples of a batch over all ranks."""
        return self.ranks * self.batch

    @property
    def global_batch(self) -> int:
        """Return the samples of an optimizer step over all ranks."""
        return self.batch_of_ranks * self.accumulated

    def per_rank(self, samples: int) -> int:
        """Count the samples that each rank serves of `samples`: equally many and, with accumulation, whole steps."""
        whole = self.batch * self.accumulated if self.accumulated > 1 else 1
        return math.ceil(samples / (self.ranks * whole)) * whole

    def batches(self, samples: int) -> int:
        """Count the batches of each rank in which `samples` are served."""
        return math.ceil(self.per_rank(samples) / self.batch)


class EpochSampler(Sampler[int]):
    """A sampler of each sample once an epoch (`repeats` times when repeated), the same for any number of workers.

    Indices are `epoch * size + position`, so that a dataset can vary a sample by epoch without any state of its own.
    A step takes the same samples on any number of ranks. When the epoch is not a multiple of a step, its first
    samples are served again at its end: ranks stay in step, and accumulation ends with the epoch in every engine
    (Lightning would make a short step of the rest, DeepSpeed counts on into the next epoch).

    Args:
        size: samples of the data set.
        division: of the epoch, and this rank's part in it.
        repeats: passes over the data set in an epoch; each has its own permutation and its own variation.
        shuffle: permute; otherwise in order.
        seed: of the permutations.
        lengths: of each sample, for a shuffled epoch; samples of like length are then served together, as a batch is
            padded to its longest. Where all are equal the order is that of no lengths.
    """

    def __init__(
        self,
        size: int,
        division: EpochDivision | None = None,
        *,
        repeats: int = 1,
        shuffle: bool = False,
        seed: int = 0,
        lengths: Sequence[int] = (),
    ) -> None:
        self.size, self.division, self.repeats, self.shuffle, self.seed = (
            size,
            division or EpochDivision(),
            repeats,
            shuffle,
            seed,
        )
        self.lengths = lengths if len(set(lengths)) > 1 else ()
        self.epoch = 0
        self._start = (0, 0)

    @property
    def samples(self) -> int:
        """Return the samples of an epoch over all ranks, those served again at its end left out."""
        return self.size * self.repeats

    @property
    def batches(self) -> int:
        """Return the batches of an epoch on each rank."""
        return self.division.batches(self.samples)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; Lightning calls this at the start of each."""
        self.epoch = epoch

    def begin(self, epoch: int, served: int) -> None:
        """Leave out the first `served` samples of this epoch, which an earlier run has trained on."""
        self._start = (epoch, served)

    def first_batch(self, epoch: int) -> int:
        """Count the batches of the epoch that are done when it begins: whole steps, also after another division."""
        return self.batches - self.division.batches(self.samples - self._skipped(epoch))

    def served(self, epoch: int, batches: int) -> int:
        """Count the samples of the epoch served to all ranks after `batches` batches, an earlier run's included."""
        since = batches - self.first_batch(epoch)
        return min(self.samples, self._skipped(epoch) + since * self.division.batch_of_ranks)

    def __len__(self) -> int:
        """Return the samples of a whole epoch on this rank, wherever this one begins."""
        return self.division.per_rank(self.samples)

    def __iter__(self) -> Iterator[int]:
        indices: list[int] = []
        for repeat in range(self.repeats):
            turn = self.epoch * self.repeats + repeat
            indices += [turn * self.size + position for position in self._order(turn)]
        skipped = self._skipped(self.epoch)
        end = skipped + self.division.per_rank(self.samples - skipped) * self.division.ranks
        return islice(cycle(indices), skipped + self.division.rank, end, self.division.ranks)

    def _order(self, turn: int) -> Sequence[int]:
        if not self.shuffle:
            return range(self.size)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + turn)
        order: list[int] = torch.randperm(self.size, generator=generator).tolist()
        return _of_like_lengths(order, self.lengths, generator) if self.lengths else order

    def _skipped(self, epoch: int) -> int:
        return min(self.samples, self._start[1]) if epoch == self._start[0] else 0


def _of_like_lengths(order: list[int], lengths: Sequence[int], generator: torch.Generator) -> list[int]:
    """Sort by length inside windows and mix runs of the sorted samples, so that short ones do not always come first."""
    mixed: list[int] = []
    for start in range(0, len(order), _WINDOW):
        falling = bool(torch.randint(2, (), generator=generator))
        window = sorted(order[start : start + _WINDOW], key=lengths.__getitem__, reverse=falling)
        whole = len(window) // _RUN
        for run in torch.randperm(whole, generator=generator).tolist():
            mixed += window[run * _RUN : (run + 1) * _RUN]
        mixed += window[whole * _RUN :]  # last, so that batches do not lie across the ends of runs
    return mixed
