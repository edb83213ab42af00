"""Right features or none: after every defect that a disk, a copy or a kill can cause."""

import logging
import os
import resource
import shutil
import signal
import stat
from pathlib import Path

import pytest
import torch
from tests.checkpoints.conftest import killed
from tests.feature_cache.conftest import KEY, NAMESPACE, OTHER, equal, features

from vessel.errors import VesselError
from vessel.feature_cache.leases import Lease
from vessel.feature_cache.store import FeatureStore

MEGABYTE = 2**20


def file_of(store: FeatureStore, key: str = KEY) -> Path:
    return store.folder / f"{key}.safetensors"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tiles", [1, 5])
def test_features_are_read_back_bit_by_bit(store, dtype, tiles):
    kept = features(tiles=tiles, dtype=dtype)
    assert not store.contains(KEY)
    assert store.get(KEY) is None
    store.put(KEY, kept)
    assert equal(store.get(KEY), kept)
    assert store.keys() == {KEY}
    assert store.contains(KEY)


def test_parts_of_a_batch_and_other_strides_are_written_whole(store):
    every = features(tiles=4)
    turned = every._replace(tile_features=every.tile_features.transpose(1, 2)[1:3])
    store.put(KEY, turned)
    assert equal(store.get(KEY), turned)
    assert file_of(store).stat().st_size < 1500


def test_only_the_owner_can_read_it_and_names_are_digests(store):
    store.put(KEY, features())
    assert stat.S_IMODE(store.root.stat().st_mode) == stat.S_IMODE(store.folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(file_of(store).stat().st_mode) == 0o600
    names = sorted(path.relative_to(store.root).as_posix() for path in store.root.rglob("*"))
    assert names == [NAMESPACE, f"{NAMESPACE}.lock", f"{NAMESPACE}/{KEY}.safetensors"]


# Damage --------------------------------------------------------------------------------------------------------------


def test_a_flipped_bit_in_any_byte_is_noticed(store):
    """Flip bits of header, metadata, every tensor and padding."""
    store.put(KEY, features(tiles=1))
    file = file_of(store)
    good = file.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    for offset in range(len(good)):
        damaged = bytearray(good)
        damaged[offset] ^= 1 << offset % 8
        file.write_bytes(damaged)
        found = store.get(KEY)
        # Some bits of a header are only layout, or make a name that is never read.
        assert found is None or (offset < header and equal(found, features(tiles=1))), offset
        assert file.exists() == (found is not None)


@pytest.mark.parametrize(
    ("old", "new"), [(b'"F32"', b'"I32"'), (b"[1,2,2,2]", b"[2,1,2,2]"), (b'"middle"', b'"Middle"')]
)
def test_another_reading_of_the_same_bytes_is_noticed(store, old, new):
    store.put(KEY, features(tiles=1))
    good = file_of(store).read_bytes()
    assert old in good
    file_of(store).write_bytes(good.replace(old, new))
    assert store.get(KEY) is None


def test_a_file_of_any_other_length_is_noticed(store):
    store.put(KEY, features(tiles=1))
    good = file_of(store).read_bytes()
    for length in (*range(len(good)), len(good) + 1):
        file_of(store).write_bytes((good + b"\0")[:length])
        assert store.get(KEY) is None, length


def test_the_features_of_another_image_or_of_other_weights_are_noticed(store):
    other = "1" * 64
    store.put(KEY, features())
    shutil.copy(file_of(store), file_of(store, other))
    shutil.copytree(store.folder, store.root / OTHER)
    assert store.get(other) is None
    store.namespace = OTHER
    assert store.get(KEY) is None
    store.namespace = NAMESPACE
    assert equal(store.get(KEY), features())


def test_damage_is_logged_once_and_repaired_by_the_next_write(store, caplog):
    store.put(KEY, features())
    file_of(store).write_bytes(file_of(store).read_bytes()[:-1])
    with caplog.at_level(logging.WARNING):
        assert [store.get(KEY) for _ in range(3)] == [None] * 3
    [message] = caplog.messages
    assert f"{file_of(store)} was damaged and is removed" in message
    store.put(KEY, features())
    assert equal(store.get(KEY), features())


def test_without_a_namespace_nothing_is_found(tmp_path):
    assert FeatureStore(tmp_path / "nowhere").get(KEY) is None


# Kills and full disks ------------------------------------------------------------------------------------------------


def test_a_kill_at_any_moment_leaves_whole_files_only(store):
    """Kill a writer: earlier files stay, what was written is whole or absent, and the next user clears the rest."""
    kept, call, found = "1" * 64, 1, []
    store.put(kept, features(1))
    while killed(lambda: store.put(KEY, features()), call):
        call += 1
        assert equal(store.get(kept), features(1))
        found.append(store.get(KEY))
        assert store.keys() == {kept} | ({KEY} if found[-1] is not None else set())
    assert len(found) >= 3
    assert all(one is None or equal(one, features()) for one in found)
    assert equal(store.get(KEY), features())


def test_a_file_has_its_name_only_once_it_is_flushed(store, monkeypatch):
    done: list[object] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (done.append(os.fstat(handle).st_size), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda part, file: (done.append(file), replace(part, file)))
    store.put(KEY, features())
    assert done == [file_of(store).stat().st_size, file_of(store)]


def test_what_a_killed_writer_left_is_cleared_by_who_comes_when_nobody_is_there(tmp_path):
    store = FeatureStore(tmp_path)
    store.namespace = NAMESPACE
    child = os.fork()
    if child == 0:
        Lease(tmp_path, NAMESPACE)
        os.fsync = lambda handle: (os.ftruncate(handle, 100), os.kill(os.getpid(), signal.SIGKILL))
        store.put(KEY, features())
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    [left] = store.folder.iterdir()
    assert left.stat().st_size == 100
    assert store.get(KEY) is None
    assert store.keys() == set()
    with Lease(tmp_path, NAMESPACE):
        assert list(store.folder.iterdir()) == []


def test_a_full_disk_is_refused_and_no_partial_file_stays(small_disk):
    store = FeatureStore(small_disk / "cache")
    with Lease(store.root, NAMESPACE):
        store.namespace = NAMESPACE
        store.put(KEY, features())
        with pytest.raises(VesselError, match=r"MB .*quota.*cache\.root=") as raised:
            store.put("1" * 64, features(side=512))
        assert str(store.folder) in str(raised.value)
        assert [path.name for path in store.folder.iterdir()] == [f"{KEY}.safetensors"]
        assert shutil.disk_usage(small_disk).used < MEGABYTE
        assert equal(store.get(KEY), features())


def test_a_limit_on_files_is_refused_as_a_full_disk(store):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(VesselError, match="quota"):
            store.put(KEY, features(side=64))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(store.folder.iterdir()) == []
