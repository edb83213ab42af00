"""The bench measures every part and writes what it prints."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def test_the_bench_writes_what_it_measured(tmp_path):
    root = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-m", "bench"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "outputs/bench/bench.json").read_text())
    assert found["seconds"].keys() == found["raw"].keys()
    assert all(seconds > 0 for seconds in found["seconds"].values())
    assert "predict a batch" in done.stdout
