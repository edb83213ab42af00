"""Room for features: counted before they are written, made by removing what nobody uses, never by more than that."""

import os
from pathlib import Path

import pytest
from tests.feature_cache.conftest import NAMESPACE, OTHER

from vessel.errors import VesselError
from vessel.feature_cache.leases import Lease
from vessel.files import size_on_disk

THIRD = "c" * 32
GB = 10**9


def unused_namespace(root: Path, name: str, nbytes: int, *, used: float) -> Path:
    """Of a run that is over, `used` seconds after the epoch."""
    with Lease(root, name):
        (root / name / "1.safetensors").write_bytes(bytes(nbytes))
    os.utime(root / f"{name}.lock", (used, used))
    return root / name


def test_groups_used_longest_ago_make_room(tmp_path):
    old, recent = unused_namespace(tmp_path, OTHER, 400, used=1), unused_namespace(tmp_path, THIRD, 400, used=2)
    with Lease(tmp_path, NAMESPACE) as lease:
        lease.reserve(200, limit=1000)
        assert old.exists()
        lease.reserve(300, limit=1000)
        assert not old.exists()
        assert recent.exists()
        lease.reserve(700, limit=1000)
        assert not recent.exists()


def test_a_group_that_is_used_again_counts_as_recent(tmp_path):
    first, second = unused_namespace(tmp_path, OTHER, 400, used=1), unused_namespace(tmp_path, THIRD, 400, used=2)
    with Lease(tmp_path, OTHER):
        pass
    with Lease(tmp_path, NAMESPACE) as lease:
        lease.reserve(300, limit=1000)
    assert first.exists()
    assert not second.exists()


def test_a_group_in_use_is_never_removed_and_what_it_was_promised_counts(tmp_path):
    with Lease(tmp_path, OTHER) as other, Lease(tmp_path, NAMESPACE) as lease:
        other.reserve(600, limit=1000)  # nothing of it is written yet
        lease.reserve(400, limit=1000)
        with pytest.raises(VesselError, match=r"would take 0\.001 MB"):
            lease.reserve(401, limit=1000)
        (tmp_path / OTHER / "1.safetensors").write_bytes(bytes(700))  # more than it said
        with pytest.raises(VesselError):
            lease.reserve(400, limit=1000)
        assert size_on_disk(tmp_path / OTHER) == 700
        other.close()
        lease.reserve(400, limit=1000)
        assert not (tmp_path / OTHER).exists()


def test_two_users_of_one_group(tmp_path):
    with Lease(tmp_path, NAMESPACE) as one, Lease(tmp_path, NAMESPACE) as two:
        one.close()
        with Lease(tmp_path, OTHER) as other:
            other.reserve(100, limit=100)
            assert (tmp_path / NAMESPACE).exists(), "the second still uses it"
            two.close()
            other.reserve(100, limit=100)


def test_nothing_is_removed_where_it_would_not_do(tmp_path):
    old = unused_namespace(tmp_path, OTHER, 400, used=1)
    with Lease(tmp_path, NAMESPACE) as lease:
        with pytest.raises(VesselError, match=r"would take 1\.50 GB \(1\.50 GB of it new\).*cache\.max_gb=2") as raised:
            lease.reserve(3 * GB // 2, limit=GB)
        assert old.exists()
    for told in (str(tmp_path), "may take 1.00 GB", "cache=none"):
        assert told in str(raised.value)


def test_a_disk_without_room_is_told_before_anything_is_written(small_disk):
    with Lease(small_disk / "cache", NAMESPACE) as lease:
        lease.reserve(2 * 2**20, limit=GB)
        with pytest.raises(VesselError, match=r"take 8\.39 MB and 4\.\d+ MB are free there; .*cache\.root="):
            lease.reserve(8 * 2**20, limit=GB)


def test_old_groups_make_room_on_a_full_disk(small_disk):
    old = unused_namespace(small_disk, OTHER, 3 * 2**20, used=1)
    with Lease(small_disk, NAMESPACE) as lease:
        lease.reserve(2 * 2**20, limit=GB)
    assert not old.exists()


def test_what_others_will_write_is_not_free(small_disk):
    with Lease(small_disk, OTHER) as other, Lease(small_disk, NAMESPACE) as lease:
        other.reserve(3 * 2**20, limit=GB)
        with pytest.raises(VesselError, match="are free"):
            lease.reserve(2 * 2**20, limit=GB)


def test_folders_of_the_user_are_left_alone(tmp_path):
    mine = [tmp_path / "results", tmp_path / ("d" * 32)]  # the second looks like a group, but has no lock
    for folder in mine:
        folder.mkdir()
        (folder / "file").write_bytes(bytes(900))
    with Lease(tmp_path, NAMESPACE) as lease:
        lease.reserve(500, limit=600)
    assert all((folder / "file").exists() for folder in mine)


def test_a_place_that_cannot_be_used_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(VesselError, match=r"cache\.root=.*name a folder of yours"):
        Lease(tmp_path / "file", NAMESPACE)
