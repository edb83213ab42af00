"""Two ways to do the same, measured in turns: a machine that slows down slows both."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from bench import stopwatch


@dataclass
class Pairs:
    """What was measured of the product and of what it is compared with.

    Attributes:
        unit: of the values.
        product, reference: one value each a pair.
    """

    unit: str = "s"
    product: list[float] = field(default_factory=list)
    reference: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Median over the pairs: how many times less the product takes; of bytes, its share of the reference's."""
        pairs = zip(self.product, self.reference, strict=True)
        return statistics.median(own / other if self.unit == "bytes" else other / own for own, other in pairs)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"unit": self.unit, "product": self.product, "reference": self.reference}


def in_turns(product: Callable[[], object], reference: Callable[[], object], *, pairs: int) -> Pairs:
    """Wall seconds of each, after one run of each that does not count."""
    times = stopwatch.in_turns({"product": product, "reference": reference}, torch.device("cpu"), rounds=pairs)
    return Pairs(product=times["product"].seconds, reference=times["reference"].seconds)
