"""Two ways to do the same, measured in turns: a machine that slows down slows both."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


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
    product()
    reference()
    found = Pairs()
    for _ in range(pairs):
        found.product.append(seconds(product))
        found.reference.append(seconds(reference))
    return found


def seconds(run: Callable[[], object]) -> float:
    """Wall seconds of a run, what was left by others cleared away before."""
    gc.collect()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
