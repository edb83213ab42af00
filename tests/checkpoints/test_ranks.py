"""Ranks of DeepSpeed that write one checkpoint: one of them runs out of room, and none waits for it."""

from pathlib import Path

import pytest
import torch
from tests.launching import on_ranks

from vessel.checkpoints.reading import find_defect
from vessel.files import size_on_disk

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("full_disk_ranks.py")


@pytest.mark.parametrize(("stage", "failing"), [(3, 1), (2, 0)])
def test_guard_W9_a_rank_without_room_stops_all_ranks_at_once(tmp_path, stage, failing):
    status, printed = on_ranks(2, str(SCRIPT), str(tmp_path), str(stage), str(failing), cwd=tmp_path)
    assert status == 0, printed[-4000:]
    reports = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    assert "quota" in reports[failing]["message"]
    assert "last-000001.ckpt" in reports[failing]["message"]
    assert "another rank" in reports[1 - failing]["message"]
    assert all(report["seconds"] < 20 for report in reports)
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["last-000001.ckpt", "last-000003.ckpt"]
    assert [find_defect(path) for path in folder.iterdir()] == [None, None]
    scripts = sum(size_on_disk(file) for file in folder.glob("last-000001.ckpt/*.py"))
    size = size_on_disk(folder / "last-000001.ckpt") - scripts
    assert size == pytest.approx(reports[0]["estimate"], rel=0.15)
