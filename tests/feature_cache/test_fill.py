"""Filling: everything once, whoever else is at it, and by ranks that cannot encode alone."""

import multiprocessing
import os
import threading
import time
from collections import Counter
from dataclasses import replace

import pytest
from tests.conftest import SIZES
from tests.feature_cache.conftest import GROUP, equal

from vessel.data.images import pixel_hash
from vessel.data.transforms import QuarterTurns
from vessel.errors import VesselError
from vessel.feature_cache.encoders import Picture, blank, encoded
from vessel.feature_cache.fill import Filler, Ranks, looks_of
from vessel.feature_cache.groups import Hold
from vessel.feature_cache.store import Store
from vessel.training.datamodule import VesselDataModule

ALONE = Ranks(0, 1, any=lambda said: said, together=False)


@pytest.fixture
def dataset(oct_set, prompt):
    """Twelve images; as augmented."""

    def make(augmentation=None):
        module = VesselDataModule(str(oct_set), prompt=prompt, geometry=SIZES.geometry, augmentation=augmentation)
        return module.dataset("train")

    return make


def expected(network, looks):
    """Features of each image, encoded alone from the sample that a loader makes."""
    samples = {key: look.dataset[look.position] for key, look in looks.items()}
    pictures = {key: Picture(key, sample.tiles, sample.frame) for key, sample in samples.items()}
    return {key: encoded(network, [picture])[0] for key, picture in pictures.items()}


@pytest.mark.parametrize("workers", [0, 1])
def test_every_image_is_encoded_once_and_is_what_a_step_would_make(network, store, dataset, workers):
    looks, asked = looks_of(dataset(), workers), []

    def encode(pictures):
        asked.extend(picture.key for picture in pictures)
        return encoded(network, pictures)

    Filler(store, encode, ranks=ALONE, batch_size=1, workers=workers).fill(looks, shown=False)
    assert sorted(asked) == sorted(looks) == sorted(store.keys())
    assert all(equal(store.get(key), one) for key, one in expected(network, looks).items())
    Filler(store, encode, ranks=ALONE, batch_size=1, workers=workers).fill(looks, shown=False)
    assert len(asked) == len(looks)


def test_each_begins_elsewhere_and_ranks_with_their_own_share(network, tmp_path, dataset):
    looks, orders = looks_of(dataset(), 0), []
    for index, of in ((0, 1), (0, 1), (1, 3)):
        store, asked = Store(tmp_path / str(len(orders))), []
        store.group = GROUP

        def encode(pictures, asked=asked):
            asked.extend(looks[picture.key].position for picture in pictures)
            return encoded(network, pictures)

        with Hold(store.root, GROUP):
            Filler(store, encode, ranks=replace(ALONE, index=index, of=of), batch_size=1, workers=0).fill(
                looks, shown=False
            )
        orders.append(asked)
    assert all(sorted(order) == list(range(12)) for order in orders)
    assert orders[0] != orders[1]
    assert set(orders[2][:4]) == {1, 4, 7, 10}


def test_batches_hold_at_most_so_many(network, store, dataset):
    sizes = []

    def encode(pictures):
        sizes.append(len(pictures))
        return encoded(network, pictures)

    Filler(store, encode, ranks=ALONE, batch_size=5, workers=0).fill(looks_of(dataset(), 0), shown=True)
    assert sorted(sizes) == [2, 5, 5]
    assert len(store.keys()) == 12


def test_all_outcomes_of_quarter_turns_are_found_again_by_the_loader(network, store, dataset):
    """Each by its own pixels, whatever the seed."""
    turned = dataset(QuarterTurns())
    looks = looks_of(turned, 0)
    assert len(looks) == 8 * len(turned)
    assert all(pixel_hash(look.image()) == key for key, look in list(looks.items())[:10])
    Filler(store, lambda p: encoded(network, p), ranks=ALONE, batch_size=8, workers=0).fill(looks, shown=False)
    turned.features = store.get
    plain = dataset(QuarterTurns())
    for index in range(0, 5 * len(turned), 7):
        found, shown = turned[index], plain[index]
        assert found.features is not None
        [wanted] = encoded(network, [Picture("", shown.tiles, shown.frame)])
        assert float((found.features.tile_features - wanted.tile_features).abs().max()) < 1e-5
        assert float((found.features.pyramid.high - wanted.pyramid.high).abs().max()) < 1e-5
        assert (len(found.tiles), found.frame.numel()) == (0, 0)
        assert found.input_ids.tolist() == shown.input_ids.tolist()
        assert found.masks.equal(shown.masks)


def test_two_processes_share_the_work(network, store, dataset):
    """Each keeps whole files, and passes over what it finds."""
    looks = looks_of(dataset(), 0)
    context = multiprocessing.get_context("fork")
    counts, begin = context.Queue(), context.Barrier(2)

    def work():
        own = Store(store.root)
        own.group = GROUP
        done = []

        def encode(pictures):
            time.sleep(0.03)  # as an encoder takes its time, so that both are at it
            done.append(len(pictures))
            return encoded(network, pictures)

        begin.wait(60)
        with Hold(store.root, GROUP):
            Filler(own, encode, ranks=ALONE, batch_size=1, workers=0).fill(looks, shown=False)
        counts.put(sum(done))

    processes = [context.Process(target=work) for _ in range(2)]
    for process in processes:
        process.start()
    done = [counts.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert sum(done) < 2 * len(looks)  # how much less depends on the disk
    assert store.keys() == set(looks)
    assert all(equal(store.get(key), one) for key, one in expected(network, looks).items())
    assert len(os.listdir(store.folder)) == len(looks), "nothing else is left"


@pytest.mark.parametrize("together", [False, True])
def test_ranks_with_unequal_work_stay_in_step(network, store, dataset, together):
    """Threads as ranks; one finds half of the images there, as on a node with a disk of its own."""
    looks = looks_of(dataset(), 0)
    barrier, votes, calls = threading.Barrier(2, timeout=20), [False, False], Counter()

    def work(rank: int) -> None:
        def agreed(said: bool) -> bool:
            votes[rank] = said
            barrier.wait()
            found = any(votes)
            barrier.wait()
            return found

        def encode(pictures):
            calls[rank] += 1
            if together:
                barrier.wait()  # as a collective of the encoders
            return encoded(network, pictures or [blank(SIZES.geometry)])

        ranks = Ranks(rank, 2, agreed, together)
        own = dict(list(looks.items())[: 12 if rank else 4])
        Filler(store, encode, ranks=ranks, batch_size=2, workers=0).fill(own, shown=False)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.keys() == set(looks)
    assert not together or calls[0] == calls[1] > 0


def test_a_full_disk_ends_the_filling(network, dataset, small_disk):
    store = Store(small_disk)
    with Hold(small_disk, GROUP):
        store.group = GROUP
        (small_disk / "of the user").write_bytes(bytes(4 * 2**20 - 100_000))
        filler = Filler(store, lambda p: encoded(network, p), ranks=ALONE, batch_size=1, workers=0)
        with pytest.raises(VesselError, match="the disk or the quota is full"):
            filler.fill(looks_of(dataset(), 0), shown=False)
        kept = store.keys()
        assert None not in map(store.get, kept)
        assert not list(store.folder.glob("*.part"))
