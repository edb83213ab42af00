"""Loading holds the network and one shard of its folder, as the system counts memory."""

import sys
from pathlib import Path

import pytest
from bench.memory import CHOICES, measure, sizes_of, write
from tests.weights.layouts import write_sa2va

from vessel.weights import load as loading
from vessel.weights.entry import Weights
from vessel.weights.partition import assign

# A public vision encoder of a quarter of its depth, the smallest SAM2, and a language model of two layers.
SIZES = (
    "model=internvl3_1b", "sam2@model.grounding=tiny", "+model.vision.layers=6", "model.language.layers=2",
    "+model.language.vocabulary=40000",
)  # fmt: skip
SLACK = 60e6  # pages of libraries that are used for the first time, and memory that allocators keep; less than a shard

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")


def test_one_shard_at_a_time_is_mapped(plan, tmp_path, monkeypatch):
    """Map one shard at a time; a view of a tensor would hold the whole shard."""
    folder = write_sa2va(tmp_path, plan().build(), shards=8)
    mapped = []

    def record(*arguments):
        lines = Path("/proc/self/maps").read_text().splitlines()
        mapped.append({Path(line.split()[-1]).name for line in lines if str(folder) in line})
        return assign(*arguments)

    monkeypatch.setattr(loading, "assign", record)
    loaded = plan(weights=[Weights(str(folder))]).build()
    assert len(mapped) == len(loaded.state_dict())
    assert set().union(*mapped) == {file.name for file in folder.glob("*.safetensors")}
    assert {len(shards) for shards in mapped} == {1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory") / "sa2va"
    write(folder, sizes_of(*SIZES), 72_000_000)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("choice", CHOICES)
def test_loading_takes_the_network_and_one_shard(folder, choice):
    assert len(list(folder.glob("*.safetensors"))) == 8
    found = measure(folder, choice, *SIZES)
    assert found["network"] > 5 * found["shard"]
    assert found["network"] < found["peak"] <= found["network"] + found["shard"] + SLACK
