"""The bench of the loader writes what it prints, and its figures belong together."""

import json

import bench.loading
import pytest
from bench.loading import COLLATE, WHOLE

pytestmark = pytest.mark.slow


def test_the_bench_of_the_loader_writes_what_it_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    bench.loading.main(rounds=1)
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "outputs/bench/loading.json").read_text())
    for phrases, parts in found["milliseconds"].items():
        assert all(milliseconds > 0 for milliseconds in parts.values())
        assert all(f"│ {name} " in printed for name in parts)
        rate = found["images_per_second_of_a_worker"][phrases]
        assert rate == pytest.approx(1000 / (parts[WHOLE] + parts[COLLATE]), abs=0.1)
    assert found["milliseconds"].keys() == {"1", "4"}
