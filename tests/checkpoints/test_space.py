"""The size of a checkpoint is known before training, and a disk without space for it is refused."""

import pytest
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ModelCheckpoint
from tests.conftest import _configuration
from torch import nn

from vessel.checkpoints.space import checkpoint_bytes, count_checkpoints, require_checkpoint_space
from vessel.checkpoints.writing import AtomicCheckpointIO
from vessel.errors import VesselError
from vessel.files import readable, size_on_disk


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keep_frozen", [False, True])
def test_a_checkpoint_is_as_large_as_estimated(tmp_path, keep_frozen, dtype):
    network = nn.Sequential(*(nn.Linear(300, 300) for _ in range(10))).to(dtype)
    for layer in network[:5]:
        layer.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad])
    network(torch.ones(1, 300, dtype=dtype)).sum().backward()
    optimizer.step()
    state = {n: p for n, p in network.named_parameters() if keep_frozen or p.requires_grad}
    AtomicCheckpointIO().save_checkpoint(
        {"state_dict": state, "optimizer_states": [optimizer.state_dict()]}, tmp_path / "a"
    )
    estimate = checkpoint_bytes(network.parameters(), keep_frozen=keep_frozen)
    assert size_on_disk(tmp_path / "a") == pytest.approx(estimate, rel=0.08)
    assert checkpoint_bytes(network.to("meta").parameters(), keep_frozen=keep_frozen) == estimate


@pytest.mark.parametrize(("stage", "trained", "frozen"), [(0, 3 * 2, 2), (2, 2 + 12, 2), (3, 12, 2)])
def test_bytes_of_a_parameter_in_bf16(stage, trained, frozen):
    """Count itself and two moments of its dtype; with DeepSpeed 4 + 4 + 4 bytes, and below stage 3 itself."""
    with torch.device("meta"):
        network = nn.Linear(10**6, 1000, bias=False, dtype=torch.bfloat16)
    many = 10**9
    assert checkpoint_bytes(network.parameters(), keep_frozen=False, stage=stage) == pytest.approx(trained * many, 1e-3)
    network.requires_grad_(False)
    assert checkpoint_bytes(network.parameters(), keep_frozen=True, stage=stage) == pytest.approx(frozen * many, 1e-3)
    assert checkpoint_bytes(network.parameters(), keep_frozen=False, stage=stage) < 10**6


def test_a_run_plans_for_best_last_and_the_one_being_written():
    callbacks = _configuration("train", ["data.root=none"]).callbacks
    savers = [instantiate(callbacks[name], dirpath=None) for name in ("checkpoint", "last_checkpoint")]
    assert count_checkpoints(savers) == 3
    assert count_checkpoints([]) == 0
    assert count_checkpoints([ModelCheckpoint(save_top_k=0)]) == 0
    assert count_checkpoints([ModelCheckpoint(save_top_k=2, monitor="loss", save_last=True)]) == 4


def test_guard_W9_a_run_without_room_is_refused(tmp_path):
    folder = tmp_path / "run/checkpoints"
    require_checkpoint_space(folder, 1, 3)
    with pytest.raises(VesselError, match=r"3 checkpoints .*1000000000\.00 GB .*[\d.]+ [GM]B") as raised:
        require_checkpoint_space(folder, 10**18, 3)
    for named in (str(folder), "hydra.run.dir", "callbacks.checkpoint=null", "lora.r"):
        assert named in str(raised.value)
    assert not folder.exists()


def test_sizes_are_readable():
    assert [readable(size) for size in (0, 999, 8_400_000, 5_120_000_000)] == ["0.0 MB", "0.0 MB", "8.4 MB", "5.12 GB"]
