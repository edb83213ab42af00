"""The settings with which `bench.gpu` measures one size of the network."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from bench.flops import recipe

from vessel.data.prompt import Prompt
from vessel.memory_plan.plan import Setup


@dataclass
class Trial:
    """The settings of the measurements of one size.

    Attributes:
        name: of a configuration in conf/model.
        device: that is measured.
        rounds: timed runs of each.
        largest: images of a batch at most.
        until: of `time.monotonic`, after which no other measurement begins.
        best: batch at which the product made most samples a second, known after the first chapter on training.
    """

    name: str
    device: torch.device
    rounds: int
    largest: int
    until: float
    best: int = 1
    prompt: Prompt = field(default_factory=Prompt)

    @property
    def setup(self) -> Setup:
        """Return the published fine-tuning."""
        return recipe(self.name)

    @property
    def late(self) -> bool:
        """Return True if the time is over."""
        return time.monotonic() > self.until

    def autocast(self) -> AbstractContextManager[None]:
        """Return the autocast of `trainer=gpu`; on the CPU one that does nothing."""
        context: AbstractContextManager[None] = torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"
        )
        return context
