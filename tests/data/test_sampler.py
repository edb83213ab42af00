from itertools import chain

import pytest

from vessel.data.sampler import EpochSampler


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_guard_T5_each_sample_once_an_epoch_over_all_ranks(ranks):
    served = [list(EpochSampler(12, shuffle=True, seed=5, rank=rank, ranks=ranks)) for rank in range(ranks)]
    assert sorted(chain(*served)) == list(range(12))


def test_guard_T4_ranks_serve_different_samples():
    first, second = (set(EpochSampler(20, shuffle=True, seed=1, rank=rank, ranks=2)) for rank in range(2))
    assert not first & second


def test_ranks_stay_in_step_when_they_do_not_divide_the_epoch():
    served = [list(EpochSampler(10, rank=rank, ranks=4)) for rank in range(4)]
    assert [len(s) for s in served] == [3, 3, 3, 3]
    assert set(chain(*served)) == set(range(10))


def test_epochs_and_repeats_have_their_own_order_and_variation():
    sampler = EpochSampler(8, repeats=2, shuffle=True, seed=0)
    first = list(sampler)
    assert sorted(i % 8 for i in first) == sorted([*range(8)] * 2)
    assert {i // 8 for i in first} == {0, 1}
    assert [i % 8 for i in first[:8]] != [i % 8 for i in first[8:]]
    sampler.set_epoch(1)
    assert {i // 8 for i in sampler} == {2, 3}


def test_the_seed_decides_the_order():
    assert list(EpochSampler(50, shuffle=True, seed=3)) == list(EpochSampler(50, shuffle=True, seed=3))
    assert list(EpochSampler(50, shuffle=True, seed=3)) != list(EpochSampler(50, shuffle=True, seed=4))


def test_one_sample_on_many_ranks():
    assert [list(EpochSampler(1, rank=rank, ranks=3)) for rank in range(3)] == [[0], [0], [0]]
