"""Which sample is served when: one permutation of the epoch, cut over ranks, never drawn by a worker."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import cycle, islice

import torch
from torch.utils.data import Sampler


class EpochSampler(Sampler[int]):
    """Each sample once an epoch (`repeats` times when repeated), the same for any number of workers.

    Indices are `epoch * size + position`, so that a dataset can vary a sample by epoch without any state of its own.
    When the ranks do not divide the epoch, the first samples are served again at its end to keep ranks in step.

    Args:
        size: samples of the data set.
        repeats: passes over the data set in an epoch; each has its own permutation and its own variation.
        shuffle: permute; otherwise in order.
        seed: of the permutations.
        rank, ranks: this process and the number of processes.
    """

    def __init__(
        self, size: int, *, repeats: int = 1, shuffle: bool = False, seed: int = 0, rank: int = 0, ranks: int = 1
    ) -> None:
        self.size, self.repeats, self.shuffle = size, repeats, shuffle
        self.seed, self.rank, self.ranks = seed, rank, ranks
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this at the start of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(self.size * self.repeats / self.ranks)

    def __iter__(self) -> Iterator[int]:
        indices: list[int] = []
        for repeat in range(self.repeats):
            turn = self.epoch * self.repeats + repeat
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + turn)
            order = torch.randperm(self.size, generator=generator) if self.shuffle else torch.arange(self.size)
            indices += (turn * self.size + order).tolist()
        filled = islice(cycle(indices), len(self) * self.ranks)
        return islice(filled, self.rank, None, self.ranks)
