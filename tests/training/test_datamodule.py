import logging
from dataclasses import replace

import numpy as np
import pytest
import torch

from vessel.batch import InputGeometry
from vessel.data.catalog import Catalog
from vessel.training.datamodule import VesselDataModule
from vessel.training.resume import TrainingPosition
from vessel.training.sampler import EpochDivision

GEOMETRY = InputGeometry(tile_size=56, tokens_per_tile=4, max_tiles=1, frame_size=64)


@pytest.fixture
def make_module(oct_set, prompt):
    def make(**changes):
        return VesselDataModule(str(oct_set), prompt=prompt, geometry=GEOMETRY, batch_size=2, **changes)

    return make


def state(served, epoch=0, *, global_batch=2, **changes):
    usual = {"validation_due": False, "validated": 0}
    return usual | {"epoch": epoch, "served": served, "global_batch": global_batch} | changes


def served(loader):
    return [i for batch in loader for i in batch.ids]


@pytest.mark.parametrize("workers", [0, 2])
def test_guard_T5_a_loader_that_is_there_begins_where_the_run_before_stopped(make_module, workers):
    """Also when its iterator was taken before the checkpoint was read, as DeepSpeed does."""
    module = make_module(workers=workers)
    loader = module.train_dataloader()
    whole = served(loader)
    taken = iter(loader)
    module.load_state_dict(state(8))
    assert served(taken) == whole[8:]
    assert len(loader) == 6
    loader.sampler.set_epoch(1)
    assert sorted(served(loader)) == sorted(whole)


def test_loading_draws_nothing_from_the_global_generators(make_module):
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    served(make_module().train_dataloader())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


def test_a_place_is_told_in_batches_of_this_run(make_module):
    assert make_module().resume_position(state(8, epoch=3, validation_due=True)) == TrainingPosition(
        3, 4, validation_due=True
    )
    assert make_module().resume_position(state(12)) == TrainingPosition(0, 6)
    module = make_module()
    module.training_sampler().division = EpochDivision(batch=2, accumulated=2)
    assert module.resume_position(state(8, validated=2)) == TrainingPosition(0, 4, validated=1)
    assert module.resume_position(state(8, validated=3)) == TrainingPosition(0, 4)  # of a run with other batches
    assert module.resume_position(state(8, validated=4)) == TrainingPosition(0, 4)


def test_another_global_batch_is_logged(make_module, caplog):
    with caplog.at_level(logging.INFO, "vessel.training.datamodule"):
        make_module().load_state_dict(state(8))
        assert not caplog.messages
        make_module().load_state_dict(state(8, global_batch=8))
    assert caplog.messages == [
        "global batch: 2 samples, 8 in the run before; it goes on with the samples that one left"
    ]


def test_images_of_many_tiles_share_batches(make_module, monkeypatch):
    """The order depends on the shapes of the images: here every other one is twice as wide as high."""
    part = Catalog.part
    monkeypatch.setattr(
        Catalog, "part", lambda *a: [replace(f, width=64 * (1 + i % 2)) for i, f in enumerate(part(*a))]
    )
    module = make_module()
    assert not module.training_sampler().lengths  # of one tile each
    module = make_module()
    module.geometry = replace(GEOMETRY, max_tiles=2)
    sampler = module.training_sampler()
    assert sampler.lengths == [1, 3] * 6  # two tiles and the thumbnail
    tiles = [sampler.lengths[i] for i in sampler]
    assert tiles in ([1] * 6 + [3] * 6, [3] * 6 + [1] * 6)
