"""Measure two ways to do the same in turns: a machine that slows down slows both."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from bench import stopwatch


@dataclass
class Pairs:
    """Measurements of the product and of the reference.

    Attributes:
        unit: of the values.
        product, reference: one value each a pair.
    """

    unit: str = "s"
    product: list[float] = field(default_factory=list)
    reference: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Return the median over the pairs: the reference's time by the product's; of bytes, the inverse."""
        pairs = zip(self.product, self.reference, strict=True)
        return statistics.median(own / other if self.unit == "bytes" else other / own for own, other in pairs)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {"unit": self.unit, "product": self.product, "reference": self.reference}


def in_turns(product: Callable[[], object], reference: Callable[[], object], *, pairs: int) -> Pairs:
    """Measure the wall seconds of each, after one run of each that does not count."""
    times = stopwatch.in_turns({"product": product, "reference": reference}, torch.device("cpu"), rounds=pairs)
    return Pairs(product=times["product"].seconds, reference=times["reference"].seconds)
