from itertools import chain
from random import Random

import pytest
import torch

from vessel.training.sampler import EpochDivision, EpochSampler


def over_ranks(size, ranks, *, batch=1, accumulated=1, begin=None, **settings):
    """Return the samples that each rank is served in an epoch."""
    served = []
    for rank in range(ranks):
        sampler = EpochSampler(size, EpochDivision(rank, ranks, batch, accumulated), **settings)
        if begin is not None:
            sampler.begin(0, begin)
        served.append(list(sampler))
    return served


def steps(size, ranks, *, batch=1, accumulated=1, **settings):
    """Return the samples that all ranks are served in each optimizer step."""
    served = over_ranks(size, ranks, batch=batch, accumulated=accumulated, **settings)
    size_of_step = batch * accumulated
    by_rank = [[one[i : i + size_of_step] for i in range(0, len(one), size_of_step)] for one in served]
    return [list(chain(*step)) for step in zip(*by_rank, strict=True)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_guard_T5_each_sample_once_an_epoch_over_all_ranks(ranks):
    assert sorted(chain(*over_ranks(12, ranks, shuffle=True, seed=5))) == list(range(12))


@pytest.mark.parametrize(("ranks", "batch", "accumulated"), [(1, 4, 1), (2, 2, 1), (4, 1, 1), (2, 1, 2), (1, 1, 4)])
@pytest.mark.parametrize("size", [4, 7, 12, 13])
def test_guard_T4_no_sample_twice_in_a_step_over_all_ranks(size, ranks, batch, accumulated):
    every = steps(size, ranks, batch=batch, accumulated=accumulated, shuffle=True, seed=1)
    assert all(len(set(step)) == len(step) for step in every)


@pytest.mark.parametrize(("ranks", "batch", "accumulated"), [(1, 2, 2), (2, 1, 2), (1, 1, 4)])
def test_a_step_takes_the_same_samples_on_any_number_of_ranks(ranks, batch, accumulated):
    expected = steps(13, 4, shuffle=True, seed=2)
    assert [set(step) for step in steps(13, ranks, batch=batch, accumulated=accumulated, shuffle=True, seed=2)] == [
        set(step) for step in expected
    ]


def test_ranks_stay_in_step_when_they_do_not_divide_the_epoch():
    served = over_ranks(10, 4)
    assert [len(s) for s in served] == [3, 3, 3, 3]
    assert set(chain(*served)) == set(range(10))


def test_accumulation_ends_with_the_epoch():
    """The rest of an epoch is filled up with its first samples; without accumulation it is a smaller batch."""
    assert steps(10, 1, batch=2, accumulated=2) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1]]
    assert steps(10, 1, batch=4) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert over_ranks(10, 2, batch=1, accumulated=2) == [[0, 2, 4, 6, 8, 0], [1, 3, 5, 7, 9, 1]]


@pytest.mark.parametrize(("ranks", "batch", "accumulated"), [(1, 4, 1), (2, 2, 1), (1, 1, 4), (2, 1, 2), (1, 2, 2)])
@pytest.mark.parametrize("size", [12, 14])
def test_guard_T5_the_rest_of_an_epoch_for_any_number_of_ranks(size, ranks, batch, accumulated):
    """One rank served four; any number of ranks serves the rest as that one would have."""
    whole = steps(size, 1, batch=4, shuffle=True, seed=3)
    rest = steps(size, ranks, batch=batch, accumulated=accumulated, shuffle=True, seed=3, begin=4)
    assert set(chain(*rest)) - set(chain(*whole[:1])) == set(chain(*whole[1:]))
    assert [set(step) for step in rest[:2]] == [set(step) for step in whole[1:3]]
    sampler = EpochSampler(size, EpochDivision(0, ranks, batch, accumulated))
    sampler.begin(0, 4)
    assert sampler.first_batch(0) == accumulated
    assert len(sampler) == len(list(sampler)) + sampler.first_batch(0) * batch


def test_a_rest_that_the_new_steps_do_not_divide_is_served_whole():
    rest = steps(12, 1, batch=5, accumulated=1, begin=4)
    assert rest == [[4, 5, 6, 7, 8], [9, 10, 11]]
    sampler = EpochSampler(12, EpochDivision(batch=5))
    sampler.begin(0, 4)
    assert (sampler.batches, sampler.first_batch(0)) == (3, 1)
    assert [sampler.served(0, batches) for batches in (1, 2, 3)] == [4, 9, 12]


def test_a_begin_counts_in_its_own_epoch_only():
    sampler = EpochSampler(12, EpochDivision(batch=4))
    sampler.begin(1, 8)
    assert list(sampler) == [*range(12)]
    assert (sampler.first_batch(0), sampler.served(0, 2)) == (0, 8)
    sampler.set_epoch(1)
    assert list(sampler) == [*range(12 + 8, 12 + 12)]
    assert (sampler.first_batch(1), sampler.served(1, 3)) == (2, 12)
    sampler.set_epoch(2)
    assert list(sampler) == [*range(24, 36)]


def test_an_epoch_that_was_served_is_over():
    sampler = EpochSampler(10, EpochDivision(ranks=2, batch=2, accumulated=2))
    sampler.begin(0, 10)
    assert list(sampler) == []
    assert sampler.first_batch(0) == sampler.batches == 4


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
    assert over_ranks(1, 3) == [[0], [0], [0]]


def mixed(size):
    """Draw the numbers of tiles of samples of many shapes."""
    return Random(0).choices([1, 5, 7, 9, 13], k=size)


@pytest.mark.parametrize("size", [1, 7, 33, 600])
@pytest.mark.parametrize(("ranks", "batch", "accumulated"), [(1, 4, 1), (2, 2, 1), (4, 1, 1), (2, 1, 2), (3, 5, 1)])
def test_guard_T5_samples_of_like_length_are_each_served_once(size, ranks, batch, accumulated):
    served = over_ranks(
        size, ranks, batch=batch, accumulated=accumulated, shuffle=True, seed=1, repeats=2, lengths=mixed(size)
    )
    assert len({len(one) for one in served}) == 1
    assert set(chain(*served)) == set(range(2 * size))
    alone = over_ranks(size, 1, batch=ranks * batch, accumulated=accumulated, shuffle=True, seed=1, repeats=2,
                       lengths=mixed(size))  # fmt: skip
    interleaved = [index for row in zip(*served, strict=True) for index in row]
    assert interleaved[: 2 * size] == alone[0][: 2 * size]  # the order of an epoch does not depend on ranks


def test_the_rest_of_an_epoch_of_like_lengths_is_what_another_batch_size_left():
    settings = {"shuffle": True, "seed": 3, "lengths": mixed(100)}
    [whole], [rest] = over_ranks(100, 1, batch=4, **settings), over_ranks(100, 1, batch=5, begin=40, **settings)
    assert rest == whole[40:]


def test_batches_hold_samples_of_like_length():
    """Compare the padded with the real length; also on four ranks, each with its own batches."""
    size, lengths = 1000, mixed(1000)

    def padded(**settings):
        held = 0
        for one in over_ranks(size, 4, batch=4, shuffle=True, seed=2, **settings):
            held += sum(4 * max(lengths[i] for i in one[at : at + 4]) for at in range(0, len(one), 4))
        return held / sum(lengths)

    assert padded() > 1.4
    assert padded(lengths=lengths) < 1.06


def test_short_samples_do_not_always_come_first():
    means = []
    for size in (24, 600):  # less than a run, more than a window
        lengths, sampler = mixed(size), EpochSampler(size, shuffle=True, lengths=mixed(size))
        for epoch in range(40):
            sampler.set_epoch(epoch)
            first = [lengths[i % size] for i in sampler][: size // 3]
            means.append(sum(first) / len(first) > sum(lengths) / size)
        assert 8 <= sum(means[-40:]) <= 32


def test_an_epoch_of_one_length_keeps_its_order():
    for lengths in ([], [5] * 700):
        sampler = EpochSampler(700, shuffle=True, seed=4, lengths=lengths)
        expected = torch.randperm(700, generator=torch.Generator().manual_seed(4 * 1_000_003))
        assert list(sampler) == expected.tolist()
