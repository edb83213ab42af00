"""The work of each rank in a test: `torchrun full_disk_ranks.py FOLDER STAGE FAILING` saves once, and again when rank
FAILING may write no more than a few bytes a file. DeepSpeed is the real one."""

import os
import resource
import sys
import time
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch
from deepspeed.ops import __compatible_ops__
from torch import distributed as dist

from vessel.checkpoints.space import checkpoint_bytes
from vessel.checkpoints.writing import atomic_write, defer_write_errors
from vessel.errors import VesselError

__compatible_ops__["deepspeed_shm_comm"] = False  # a kernel that would be compiled first


def agree(vote: bool) -> bool:
    """Return True if all ranks pass True."""
    votes = torch.tensor(int(vote))
    dist.all_reduce(votes)
    return int(votes) == dist.get_world_size()


def save(engine: deepspeed.DeepSpeedEngine, path: Path, step: int) -> None:
    """Save as `vessel.training.zero` does."""
    metadata = {"global_step": step, "vessel": {"name": "ranks"}}
    is_main = dist.get_rank() == 0
    with atomic_write(path, is_main=is_main, agree=agree) as folder:
        with defer_write_errors(engine):
            engine.save_checkpoint(
                str(folder), "checkpoint", metadata, save_latest=False, exclude_frozen_parameters=True
            )
        if is_main:
            (folder / "latest").write_text("checkpoint")


def main(folder: Path, stage: int, failing: int) -> None:
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    network = torch.nn.Sequential(*(torch.nn.Linear(200, 200, bias=False) for _ in range(4)))
    network[0].requires_grad_(False)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    config = {
        "train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True, "steps_per_print": 10**9,
    }  # fmt: skip
    engine, *_ = deepspeed.initialize(model=network, optimizer=torch.optim.AdamW(trained), config=config)
    engine.backward(engine(torch.ones(1, 200)).square().mean())
    engine.step()
    estimate = checkpoint_bytes(network.parameters(), keep_frozen=False, stage=stage)
    save(engine, folder / "checkpoints/last-000001.ckpt", 1)
    if dist.get_rank() == failing:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
    begun, message = time.monotonic(), ""
    try:
        save(engine, folder / "checkpoints/last-000002.ckpt", 2)
    except VesselError as error:
        message = str(error)
    if dist.get_rank() == failing:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    report = {"message": message, "seconds": time.monotonic() - begun, "estimate": estimate}
    assert agree(True), "the ranks are still in step"
    save(engine, folder / "checkpoints/last-000003.ckpt", 3)
    torch.save(report, folder / f"rank{dist.get_rank()}.pt")
    dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    sys.stdout.flush()
    os._exit(0)  # threads of gloo now and then abort an interpreter that ends by itself
