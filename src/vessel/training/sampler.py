"""The order of samples: one permutation of the epoch, divided over ranks, never drawn by a worker."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import torch
from torch.utils.data import Sampler

# Numbers of samples, whatever the cut: an epoch keeps its order when it goes on with another.
_WINDOW, _RUN = 512, 32


@dataclass(frozen=True)
class Cut:
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
    def together(self) -> int:
        """Samples of a batch over all ranks."""
        return self.ranks * self.batch

    @property
    def step(self) -> int:
        """Samples of an optimizer step over all ranks."""
        return self.together * self.accumulated

    def per_rank(self, samples: int) -> int:
        """Count what each rank serves of `samples`: as much as every other one and, with accumulation, whole steps."""
        whole = self.batch * self.accumulated if self.accumulated > 1 else 1
        return math.ceil(samples / (self.ranks * whole)) * whole

    def batches(self, samples: int) -> int:
        """Batches of each rank in which `samples` are served."""
        return math.ceil(self.per_rank(samples) / self.batch)


class EpochSampler(Sampler[int]):
    """Each sample once an epoch (`repeats` times when repeated), the same for any number of workers.

    Indices are `epoch * size + position`, so that a dataset can vary a sample by epoch without any state of its own.
    A step takes the same samples however many ranks share it. When the cut does not divide the epoch, its first
    samples are served again at its end: ranks stay in step, and accumulation ends with the epoch in every engine
    (Lightning would make a short step of the rest, DeepSpeed counts on into the next epoch).

    Args:
        size: samples of the data set.
        cut: this rank's share, see `Cut`.
        repeats: passes over the data set in an epoch; each has its own permutation and its own variation.
        shuffle: permute; otherwise in order.
        seed: of the permutations.
        lengths: of each sample, for a shuffled epoch; samples of like length are then served together, as a batch is
            padded to its longest. Where all are equal the order is that of no lengths.
    """

    def __init__(
        self,
        size: int,
        cut: Cut | None = None,
        *,
        repeats: int = 1,
        shuffle: bool = False,
        seed: int = 0,
        lengths: Sequence[int] = (),
    ) -> None:
        self.size, self.cut, self.repeats, self.shuffle, self.seed = size, cut or Cut(), repeats, shuffle, seed
        self.lengths = lengths if len(set(lengths)) > 1 else ()
        self.epoch = 0
        self._start = (0, 0)

    @property
    def samples(self) -> int:
        """Samples of an epoch over all ranks, those served again at its end left out."""
        return self.size * self.repeats

    @property
    def batches(self) -> int:
        """Batches of an epoch on each rank."""
        return self.cut.batches(self.samples)

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this at the start of each epoch."""
        self.epoch = epoch

    def begin(self, epoch: int, served: int) -> None:
        """Leave out the first `served` samples of this epoch, which a run before has seen."""
        self._start = (epoch, served)

    def first_batch(self, epoch: int) -> int:
        """Batches of the epoch that count as done when it begins: whole steps, also where the cut has changed."""
        return self.batches - self.cut.batches(self.samples - self._skipped(epoch))

    def served(self, epoch: int, batches: int) -> int:
        """Samples of the epoch that all ranks have seen after `batches` batches, those of a run before included."""
        since = batches - self.first_batch(epoch)
        return min(self.samples, self._skipped(epoch) + since * self.cut.together)

    def __len__(self) -> int:
        """Samples of a whole epoch on this rank, wherever this one begins."""
        return self.cut.per_rank(self.samples)

    def __iter__(self) -> Iterator[int]:
        indices: list[int] = []
        for repeat in range(self.repeats):
            turn = self.epoch * self.repeats + repeat
            indices += [turn * self.size + position for position in self._order(turn)]
        skipped = self._skipped(self.epoch)
        end = skipped + self.cut.per_rank(self.samples - skipped) * self.cut.ranks
        return islice(cycle(indices), skipped + self.cut.rank, end, self.cut.ranks)

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
    found: list[int] = []
    for start in range(0, len(order), _WINDOW):
        falling = bool(torch.randint(2, (), generator=generator))
        window = sorted(order[start : start + _WINDOW], key=lengths.__getitem__, reverse=falling)
        whole = len(window) // _RUN
        for run in torch.randperm(whole, generator=generator).tolist():
            found += window[run * _RUN : (run + 1) * _RUN]
        found += window[whole * _RUN :]  # last, so that batches do not lie across the ends of runs
    return found
