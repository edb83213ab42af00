"""Benches of their own measure every part and write what they print."""

import json
import os
import subprocess
import sys

import pytest
from tests.launching import SEARCH_PATH

pytestmark = pytest.mark.slow


def run(folder, *arguments):
    """Run `python -m ...` in a folder, with the bench of this repository."""
    environment = os.environ | {"PYTHONPATH": SEARCH_PATH}
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


def test_the_bench_of_the_metrics_writes_what_it_measured(tmp_path):
    done = run(tmp_path, "bench.metrics", "3", "96")
    found = json.loads((tmp_path / "outputs/bench/metrics.json").read_text())
    assert f"3 masks in 2 processes: {found['seconds']:.1f} s" in done.stdout
    assert found["milliseconds"].keys() == {"oct", "tree"}
    for parts in found["milliseconds"].values():
        assert all(0 < milliseconds < 10_000 for milliseconds in parts.values())
        assert all(f"│ {name} " in done.stdout for name in parts)
