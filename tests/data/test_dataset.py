import re
import shutil

import numpy as np
import pytest
import torch

from vessel.batch import InputGeometry
from vessel.data.catalog import Catalog
from vessel.data.dataset import VesselDataset
from vessel.data.images import read_rgb
from vessel.data.transforms import QuarterTurns
from vessel.errors import VesselError
from vessel.training.datamodule import VesselDataModule

VIEWS = InputGeometry(tile_size=56, tokens_per_tile=4, max_tiles=1, frame_size=64)


@pytest.fixture
def catalog(oct_set):
    return Catalog.open(oct_set)


@pytest.fixture
def make_dataset(catalog, prompt):
    def make(part="train", phrases=("lumen", "side branch"), **changes):
        frames = catalog.part(part)
        return VesselDataset(catalog.root, frames, phrases=phrases, prompt=prompt, geometry=VIEWS, **changes)

    return make


@pytest.fixture
def make_module(oct_set, prompt):
    def make(**changes):
        return VesselDataModule(str(oct_set), prompt=prompt, geometry=VIEWS, **changes)

    return make


def test_a_sample_holds_the_frame_and_its_masks(make_dataset, catalog):
    dataset = make_dataset()
    sample, frame = dataset[0], catalog.part("train")[0]
    assert (sample.id, sample.patient, sample.video) == (frame.id, frame.patient, frame.video)
    assert sample.masks.shape == (2, frame.height, frame.width)
    assert sample.masks.dtype == torch.bool
    assert sample.masks[0].any()
    assert np.array_equal(sample.frame.permute(1, 2, 0).numpy(), read_rgb(catalog.root / frame.image))  # 64 px as it is


def test_an_image_that_was_swapped_is_refused(make_dataset, catalog, tmp_path):
    first, second = catalog.part("train")[:2]
    shutil.copytree(catalog.root, tmp_path / "swapped")
    shutil.copy(catalog.root / second.image, tmp_path / "swapped" / first.image)
    dataset = make_dataset()
    dataset.root = tmp_path / "swapped"
    assert dataset[1].id == second.id
    with pytest.raises(VesselError, match=re.escape(first.image)):
        dataset[0]


def test_a_declared_absence_is_an_empty_mask(make_dataset, catalog):
    absent = [i for i, f in enumerate(catalog.part("train")) if f.masks["side branch"] is None]
    assert absent, "the synthetic set has frames without side branch"
    assert not make_dataset()[absent[0]].masks[1].any()


def test_only_training_varies(make_module, random_augmentation):
    module = make_module(augmentation=random_augmentation())
    val, train = module.dataset("val"), module.dataset("train")
    assert torch.equal(val[0].frame, val[0 + len(val)].frame)
    assert torch.equal(val[0].input_ids, val[0 + len(val)].input_ids)
    assert not torch.equal(train[0].frame, train[0 + len(train)].frame)


def test_an_index_gives_the_same_sample_in_any_process(make_dataset, random_augmentation):
    one, two = (make_dataset(augmentation=random_augmentation(), vary_templates=True, seed=3) for _ in range(2))
    list(map(two.__getitem__, range(3)))  # what was loaded before does not matter
    assert torch.equal(one[7].frame, two[7].frame)
    assert torch.equal(one[7].masks, two[7].masks)
    assert torch.equal(one[7].input_ids, two[7].input_ids)


@pytest.mark.parametrize("workers", [0, 2])
def test_guard_T5_an_epoch_holds_each_sample_once_whatever_the_workers(make_module, workers):
    module = make_module(workers=workers, batch_size=3)
    served = [i for batch in module.train_dataloader() for i in batch.ids]
    assert sorted(served) == sorted(f.id for f in module.catalog.part("train"))


def test_batches_do_not_depend_on_the_workers(make_module, random_augmentation):
    alone, helped = (
        list(make_module(workers=w, batch_size=3, augmentation=random_augmentation()).train_dataloader())
        for w in (0, 2)
    )
    assert all(torch.equal(a.frames, b.frames) and a.ids == b.ids for a, b in zip(alone, helped, strict=True))


def test_folds_replace_train_and_val_only(make_module):
    fixed, fold = make_module(), make_module(fold=0)
    assert {s.id for s in fixed.dataset("test").frames} == {s.id for s in fold.dataset("test").frames}
    assert not {s.patient for s in fold.dataset("train").frames} & {s.patient for s in fold.dataset("val").frames}


def test_phrases_are_normalised_and_unknown_ones_refused(make_module):
    assert make_module(phrases=["Side_Branch."]).phrases == ("side branch",)
    assert make_module().phrases == make_module().catalog.phrases
    with pytest.raises(VesselError, match=r"data\.phrases=.*aorta"):
        make_module(phrases=["aorta"])
    with pytest.raises(VesselError, match=r"data\.phrases=\[\]"):
        make_module(phrases=[])


def test_variants_of_an_image_are_known_without_endless_changes(make_dataset, random_augmentation):
    turned = make_dataset(augmentation=QuarterTurns(), seed=1)
    assert turned.is_finite
    variants = [torch.from_numpy(variant).permute(2, 0, 1) for variant in turned.image_variants(3)]
    served = [turned[3 + epoch * len(turned)].frame for epoch in range(30)]  # 64 px as it is
    assert all(any(torch.equal(one, variant) for variant in variants) for one in served)
    assert all(any(torch.equal(one, variant) for one in served) for variant in variants)
    plain = make_dataset()
    assert plain.is_finite
    assert torch.equal(torch.from_numpy(plain.image_variants(3)[0]).permute(2, 0, 1), plain[3].frame)
    assert not make_dataset(augmentation=random_augmentation()).is_finite
