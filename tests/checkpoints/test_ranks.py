"""Ranks of DeepSpeed that write one checkpoint: one of them runs out of room, and none waits for it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vessel.checkpoints.reading import fault
from vessel.checkpoints.space import size_on_disk

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("full_disk_ranks.py")


def torchrun(*arguments: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(SCRIPT)]
    process = subprocess.Popen(
        [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=180)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output[-4000:]


@pytest.mark.parametrize(("stage", "failing"), [(3, 1), (2, 0)])
def test_guard_W9_a_rank_without_room_stops_all_ranks_at_once(tmp_path, stage, failing):
    torchrun(str(tmp_path), str(stage), str(failing))
    reports = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    assert "the disk or the quota is full" in reports[failing]["told"]
    assert "intact: last-000001.ckpt" in reports[failing]["told"]
    assert "another rank could not write" in reports[1 - failing]["told"]
    assert all(report["seconds"] < 20 for report in reports)
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["last-000001.ckpt", "last-000003.ckpt"]
    assert [fault(path) for path in folder.iterdir()] == [None, None]
    scripts = sum(size_on_disk(file) for file in folder.glob("last-000001.ckpt/*.py"))
    size = size_on_disk(folder / "last-000001.ckpt") - scripts
    assert size == pytest.approx(reports[0]["said"], rel=0.15)
