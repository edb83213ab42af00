"""A short form of `make test-faults`."""

from random import Random

import pytest
from tests.faults import Engine, paint, table_of

pytestmark = pytest.mark.slow


def test_guard_W10_killed_training_goes_on_with_the_same_losses(tmp_path):
    paint(tmp_path)
    tally = Engine(tmp_path, "one", Random(7)).torture(3)
    assert tally.kills == tally.resumed + tally.anew == 3
    assert tally.holds, tally
    assert table_of({"one": tally}).row_count == 1
