"""Disk space for features: counted before they are written, freed by removing unused namespaces and nothing else."""

import os
import re
from pathlib import Path

import pytest
from tests.feature_cache.conftest import NAMESPACE, OTHER

from vessel.errors import VesselError
from vessel.feature_cache.leases import Lease
from vessel.files import size_on_disk

THIRD = "c" * 32
GB = 10**9


def unused_namespace(root: Path, name: str, nbytes: int, *, used: float) -> Path:
    """Leave a namespace of a run that is over, last used `used` seconds after the epoch."""
    with Lease(root, name):
        (root / name / "1.safetensors").write_bytes(bytes(nbytes))
    os.utime(root / f"{name}.lock", (used, used))
    return root / name


def test_the_least_recently_used_namespaces_are_removed(tmp_path):
    old, recent = unused_namespace(tmp_path, OTHER, 400, used=1), unused_namespace(tmp_path, THIRD, 400, used=2)
    with Lease(tmp_path, NAMESPACE) as lease:
        lease.reserve(200, limit=1000)
        assert old.exists()
        lease.reserve(300, limit=1000)
        assert not old.exists()
        assert recent.exists()
        lease.reserve(700, limit=1000)
        assert not recent.exists()


def test_a_namespace_that_is_used_again_counts_as_recent(tmp_path):
    first, second = unused_namespace(tmp_path, OTHER, 400, used=1), unused_namespace(tmp_path, THIRD, 400, used=2)
    with Lease(tmp_path, OTHER):
        pass
    with Lease(tmp_path, NAMESPACE) as lease:
        lease.reserve(300, limit=1000)
    assert first.exists()
    assert not second.exists()


def test_a_namespace_in_use_is_never_removed_and_its_reservation_counts(tmp_path):
    with Lease(tmp_path, OTHER) as other, Lease(tmp_path, NAMESPACE) as lease:
        other.reserve(600, limit=1000)  # nothing of it is written yet
        lease.reserve(400, limit=1000)
        with pytest.raises(VesselError, match=r"0\.001 MB.*cache\.max_gb="):
            lease.reserve(401, limit=1000)
        (tmp_path / OTHER / "1.safetensors").write_bytes(bytes(700))  # more than it reserved
        with pytest.raises(VesselError):
            lease.reserve(400, limit=1000)
        assert size_on_disk(tmp_path / OTHER) == 700
        other.close()
        lease.reserve(400, limit=1000)
        assert not (tmp_path / OTHER).exists()


def test_two_leases_on_one_namespace(tmp_path):
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
        with pytest.raises(VesselError, match=r"1\.50 GB \(1\.50 GB .*cache\.max_gb=2") as raised:
            lease.reserve(3 * GB // 2, limit=GB)
        assert old.exists()
    for named in (str(tmp_path), " 1.00 GB", "cache=none"):
        assert named in str(raised.value)


def test_a_disk_without_space_is_refused_before_anything_is_written(small_disk):
    with Lease(small_disk / "cache", NAMESPACE) as lease:
        lease.reserve(2 * 2**20, limit=GB)
        with pytest.raises(VesselError, match=r"8\.39 MB .*4\.\d+ MB .*cache\.root="):
            lease.reserve(8 * 2**20, limit=GB)


def test_old_namespaces_are_removed_on_a_full_disk(small_disk):
    old = unused_namespace(small_disk, OTHER, 3 * 2**20, used=1)
    with Lease(small_disk, NAMESPACE) as lease:
        lease.reserve(2 * 2**20, limit=GB)
    assert not old.exists()


def test_what_others_will_write_is_not_free(small_disk):
    with Lease(small_disk, OTHER) as other, Lease(small_disk, NAMESPACE) as lease:
        other.reserve(3 * 2**20, limit=GB)
        with pytest.raises(VesselError, match=r"cache\.root="):
            lease.reserve(2 * 2**20, limit=GB)


def test_folders_of_the_user_are_left_alone(tmp_path):
    mine = [tmp_path / "results", tmp_path / ("d" * 32)]  # the second is named as a namespace, but has no lock
    for folder in mine:
        folder.mkdir()
        (folder / "file").write_bytes(bytes(900))
    with Lease(tmp_path, NAMESPACE) as lease:
        lease.reserve(500, limit=600)
    assert all((folder / "file").exists() for folder in mine)


def test_a_root_that_cannot_be_used_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(VesselError, match=re.escape(f"cache.root={tmp_path}")):
        Lease(tmp_path / "file", NAMESPACE)
