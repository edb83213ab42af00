"""Small checkpoints, a disk that is nearly full, and a process that is killed at a chosen call."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch

CALLS = (
    (os, "open"), (os, "fsync"), (os, "replace"), (os, "rename"), (os, "unlink"), (os, "mkdir"), (os, "rmdir"),
    (shutil, "rmtree"), (torch, "save"),
)  # fmt: skip


def content(step: int) -> dict:
    """Return the keys of a checkpoint that vessel reads, with a few tensors."""
    generator = torch.Generator().manual_seed(step)
    return {
        "global_step": step, "vessel": {"name": "tiny"},
        "state_dict": {"a": torch.randn(50, generator=generator), "b": torch.arange(5)},
    }  # fmt: skip


def write_folder(folder: Path, step: int, ranks: int = 2) -> Path:
    """Write a folder as DeepSpeed under ZeRO-3: one trained tensor of eight numbers, partitioned over ranks."""
    ranks_folder = folder / "checkpoint"
    ranks_folder.mkdir(parents=True)
    full = torch.arange(8.0) + step
    for rank, part in enumerate(full.split(8 // ranks)):
        model = {
            "module": {}, "buffer_names": [], "param_shapes": [{"network.a": torch.Size([8])}], "shared_params": {},
            "frozen_param_shapes": None, "frozen_param_fragments": None, "dp_world_size": ranks,
            "global_steps": step, "global_step": step, "vessel": {"name": "tiny"}, "ds_config": {},
        }  # fmt: skip
        moments = {"step": torch.tensor(float(step)), "exp_avg": part * 0, "exp_avg_sq": part * 0}
        inner = {"state": {0: moments}, "param_groups": [{"params": [0]}]}
        optimizer = {"fp32_flat_groups": [part], "optimizer_state_dict": inner}
        torch.save(model, ranks_folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        torch.save(
            {"optimizer_state_dict": optimizer}, ranks_folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        )
    (folder / "latest").write_text("checkpoint")
    return folder


def killed(action, call: int) -> bool:
    """Run `action` in a process that kills itself before file-system call number `call`; True if it came that far."""
    child = os.fork()
    if child == 0:
        calls = iter(range(1, call + 1))

        def counted(function):
            def run(*args, **kwargs):
                if next(calls) == call:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return run

        status = 1
        try:
            for module, name in CALLS:
                setattr(module, name, counted(getattr(module, name)))
            action()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the process failed by itself"
    return os.WIFSIGNALED(status)


@pytest.fixture
def small_disk(tmp_path):
    """Mount a file system of four megabytes; skip where none can be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield disk
    # Lazily: an error that a test keeps may hold a file open.
    subprocess.run(["umount", "-l", str(disk)], check=True)
