"""Small features, and a network whose encoders are frozen."""

from collections.abc import Iterator

import pytest
import torch
from tests.checkpoints.conftest import small_disk  # noqa: F401  # a fixture

from vessel.batch import FeaturePyramid, Features
from vessel.feature_cache.leases import Lease
from vessel.feature_cache.store import FeatureStore
from vessel.model.lora import Lora

NAMESPACE, OTHER = "a" * 32, "b" * 32
KEY = "0" * 64


def features(seed: int = 0, *, tiles: int = 2, dtype: torch.dtype = torch.float32, side: int = 1) -> Features:
    """Make random features; `side` of the coarsest level."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return Features(random(tiles, 2, 3), FeaturePyramid(*(random(1, 2, side * n, side * n) for n in (4, 2, 1))))


def equal(one: Features, two: Features) -> bool:
    """Compare bit by bit, dtype and shape included."""
    pairs = zip((one.tile_features, *one.pyramid), (two.tile_features, *two.pyramid), strict=True)
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


@pytest.fixture
def store(tmp_path) -> Iterator[FeatureStore]:
    """Make an empty store with a lease."""
    store = FeatureStore(tmp_path / "cache")
    with Lease(store.root, NAMESPACE):
        store.namespace = NAMESPACE
        yield store


@pytest.fixture
def network(plan):
    """Build a network whose adapters and decoder train."""
    return plan(lora=Lora(r=2), trainable="lora").build()
