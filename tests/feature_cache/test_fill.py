"""Filling: everything once, whoever else is at it, and by ranks that cannot encode alone."""

import multiprocessing
import os
import threading
import time
from collections import Counter
from dataclasses import replace

import pytest
from tests.conftest import SIZES
from tests.feature_cache.conftest import NAMESPACE, equal

from vessel.data.images import pixel_hash
from vessel.data.transforms import QuarterTurns
from vessel.errors import VesselError
from vessel.feature_cache.encoders import EncoderInput, black_input, encode_inputs
from vessel.feature_cache.fill import Filler, Ranks, index_variants
from vessel.feature_cache.leases import Lease
from vessel.feature_cache.store import FeatureStore
from vessel.training.datamodule import VesselDataModule

ALONE = Ranks(0, 1, reduce_any=lambda decision: decision, encode_together=False)


@pytest.fixture
def dataset(oct_set, prompt):
    """Return a function that makes a data set of twelve images, given its augmentation."""

    def make(augmentation=None):
        module = VesselDataModule(str(oct_set), prompt=prompt, geometry=SIZES.geometry, augmentation=augmentation)
        return module.dataset("train")

    return make


def expected(network, variants):
    """Encode each image alone, from the sample that a loader makes."""
    samples = {key: variant.dataset[variant.position] for key, variant in variants.items()}
    inputs = {key: EncoderInput(key, sample.tiles, sample.frame) for key, sample in samples.items()}
    return {key: encode_inputs(network, [one])[0] for key, one in inputs.items()}


@pytest.mark.parametrize("workers", [0, 1])
def test_every_image_is_encoded_once_and_is_what_a_step_would_make(network, store, dataset, workers):
    variants, encoded_keys = index_variants(dataset(), workers), []

    def encode(inputs):
        encoded_keys.extend(one.key for one in inputs)
        return encode_inputs(network, inputs)

    Filler(store, encode, ranks=ALONE, batch_size=1, workers=workers).fill(variants, show_progress=False)
    assert sorted(encoded_keys) == sorted(variants) == sorted(store.keys())
    assert all(equal(store.get(key), one) for key, one in expected(network, variants).items())
    Filler(store, encode, ranks=ALONE, batch_size=1, workers=workers).fill(variants, show_progress=False)
    assert len(encoded_keys) == len(variants)


def test_each_process_has_its_own_order_and_ranks_begin_with_their_own_batches(network, tmp_path, dataset):
    variants, orders = index_variants(dataset(), 0), []
    for index, count in ((0, 1), (0, 1), (1, 3)):
        store, encoded_keys = FeatureStore(tmp_path / str(len(orders))), []
        store.namespace = NAMESPACE

        def encode(inputs, encoded_keys=encoded_keys):
            encoded_keys.extend(variants[one.key].position for one in inputs)
            return encode_inputs(network, inputs)

        with Lease(store.root, NAMESPACE):
            Filler(store, encode, ranks=replace(ALONE, index=index, count=count), batch_size=1, workers=0).fill(
                variants, show_progress=False
            )
        orders.append(encoded_keys)
    assert all(sorted(order) == list(range(12)) for order in orders)
    assert orders[0] != orders[1]
    assert set(orders[2][:4]) == {1, 4, 7, 10}


def test_batches_hold_at_most_so_many(network, store, dataset):
    sizes = []

    def encode(inputs):
        sizes.append(len(inputs))
        return encode_inputs(network, inputs)

    Filler(store, encode, ranks=ALONE, batch_size=5, workers=0).fill(index_variants(dataset(), 0), show_progress=True)
    assert sorted(sizes) == [2, 5, 5]
    assert len(store.keys()) == 12


def test_all_outcomes_of_quarter_turns_are_found_again_by_the_loader(network, store, dataset):
    """Find each variant by its own pixels, whatever the seed."""
    turned = dataset(QuarterTurns())
    variants = index_variants(turned, 0)
    assert len(variants) == 8 * len(turned)
    assert all(pixel_hash(variant.image()) == key for key, variant in list(variants.items())[:10])
    Filler(store, lambda p: encode_inputs(network, p), ranks=ALONE, batch_size=8, workers=0).fill(
        variants, show_progress=False
    )
    turned.features = store.get
    plain = dataset(QuarterTurns())
    for index in range(0, 5 * len(turned), 7):
        found, sample = turned[index], plain[index]
        assert found.features is not None
        [wanted] = encode_inputs(network, [EncoderInput("", sample.tiles, sample.frame)])
        assert float((found.features.tile_features - wanted.tile_features).abs().max()) < 1e-5
        assert float((found.features.pyramid.high - wanted.pyramid.high).abs().max()) < 1e-5
        assert (len(found.tiles), found.frame.numel()) == (0, 0)
        assert found.input_ids.tolist() == sample.input_ids.tolist()
        assert found.masks.equal(sample.masks)


def test_two_processes_divide_the_work(network, store, dataset):
    """Fill one store from two processes: each writes complete files, and skips those that exist."""
    variants = index_variants(dataset(), 0)
    context = multiprocessing.get_context("fork")
    counts, begin = context.Queue(), context.Barrier(2)

    def work():
        own = FeatureStore(store.root)
        own.namespace = NAMESPACE
        done = []

        def encode(inputs):
            time.sleep(0.03)  # as an encoder takes its time, so that both are at it
            done.append(len(inputs))
            return encode_inputs(network, inputs)

        begin.wait(60)
        with Lease(store.root, NAMESPACE):
            Filler(own, encode, ranks=ALONE, batch_size=1, workers=0).fill(variants, show_progress=False)
        counts.put(sum(done))

    processes = [context.Process(target=work) for _ in range(2)]
    for process in processes:
        process.start()
    done = [counts.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert sum(done) < 2 * len(variants)  # how much less depends on the disk
    assert store.keys() == set(variants)
    assert all(equal(store.get(key), one) for key, one in expected(network, variants).items())
    assert len(os.listdir(store.folder)) == len(variants), "nothing else is left"


@pytest.mark.parametrize("encode_together", [False, True])
def test_ranks_with_unequal_work_stay_in_step(network, store, dataset, encode_together):
    """Run threads as ranks; one of them finds half of the images stored, as on a node with a disk of its own."""
    variants = index_variants(dataset(), 0)
    barrier, votes, calls = threading.Barrier(2, timeout=20), [False, False], Counter()

    def work(rank: int) -> None:
        def reduce_any(vote: bool) -> bool:
            votes[rank] = vote
            barrier.wait()
            found = any(votes)
            barrier.wait()
            return found

        def encode(inputs):
            calls[rank] += 1
            if encode_together:
                barrier.wait()  # as a collective of the encoders
            return encode_inputs(network, inputs or [black_input(SIZES.geometry)])

        ranks = Ranks(rank, 2, reduce_any, encode_together)
        own = dict(list(variants.items())[: 12 if rank else 4])
        Filler(store, encode, ranks=ranks, batch_size=2, workers=0).fill(own, show_progress=False)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.keys() == set(variants)
    assert not encode_together or calls[0] == calls[1] > 0


def test_a_full_disk_ends_the_filling(network, dataset, small_disk):
    store = FeatureStore(small_disk)
    with Lease(small_disk, NAMESPACE):
        store.namespace = NAMESPACE
        (small_disk / "of the user").write_bytes(bytes(4 * 2**20 - 100_000))
        filler = Filler(store, lambda p: encode_inputs(network, p), ranks=ALONE, batch_size=1, workers=0)
        with pytest.raises(VesselError, match=r"quota.*cache\.root="):
            filler.fill(index_variants(dataset(), 0), show_progress=False)
        kept = store.keys()
        assert None not in map(store.get, kept)
        assert not list(store.folder.glob("*.part"))
