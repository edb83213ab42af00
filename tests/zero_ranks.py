"""What each rank of a ZeRO-3 group does in the tests, on the CPU: `torchrun zero_ranks.py OUT train KEY=VALUE...`, or
`build "KEY=VALUE ..." "KEY=VALUE ..."`, a network for each.

DeepSpeed, and Lightning's strategy for it, are the real ones; of the strategy only the look for GPUs is left out.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch
from deepspeed.ops import __compatible_ops__
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning import Trainer, seed_everything
from lightning.pytorch.strategies import DeepSpeedStrategy
from omegaconf import DictConfig, OmegaConf
from torch import distributed as dist
from torch.utils.data import DataLoader
from typing_extensions import override

from vessel.callbacks.threshold_sweep import ThresholdSweep
from vessel.conf_path import CONF
from vessel.data.prompt import Prompt
from vessel.model.plan import NetworkPlan
from vessel.model.sa2va import Sa2VA
from vessel.model.weights.entry import Weights
from vessel.run import Manifest
from vessel.task import VesselTask

__compatible_ops__["deepspeed_shm_comm"] = False  # a kernel that would be compiled first


class OnCpu(DeepSpeedStrategy):
    """The strategy without its look for GPUs."""

    @property
    @override
    def root_device(self) -> torch.device:
        return torch.device("cpu", self.local_rank)

    @override
    def setup_environment(self) -> None:
        super(DeepSpeedStrategy, self).setup_environment()

    @override
    def setup_distributed(self) -> None:
        self.set_world_ranks()
        self._init_deepspeed_distributed()


class Projection(VesselTask):
    """A task of which a step runs the projection of `[SEG]` alone."""

    @override
    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        assert self.network is not None
        return self.network.text_hidden_fcs(batch.to(self.dtype)).square().mean()


def make_plan(config: DictConfig, prompt: Prompt) -> NetworkPlan:
    return NetworkPlan(
        instantiate(config.model), prompt.token_ids, prompt.new_tokens, lora=instantiate(config.lora),
        trainable=config.trainable, weights=Weights.listed(OmegaConf.to_container(config.weights)),
    )  # fmt: skip


def gathered(network: Sa2VA) -> dict[str, torch.Tensor]:
    """Every tensor whole, as all ranks together hold it."""
    with deepspeed.zero.GatheredParameters(list(network.parameters())):
        return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


def build(variants: list[str], out: Path) -> None:
    """Make networks under `zero.Init` as Lightning does, one by one, and write what this rank holds of each."""
    deepspeed.init_distributed("gloo")
    for number, overrides in enumerate(variants):
        config = compose("train", overrides.split())
        bf16 = {"enabled": str(config.trainer.precision).startswith("bf16")}
        stage = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}, "bf16": bf16}
        torch.manual_seed(dist.get_rank())  # so that what is drawn differs, unless one rank draws for all
        with deepspeed.zero.Init(config_dict_or_path=stage):
            network = make_plan(config, instantiate(config.prompt)).build()
            later = torch.nn.Linear(8, 8)
        held = sum(parameter.ds_tensor.nbytes + parameter.nbytes for parameter in network.parameters())
        facts = {"held": held, "later": hasattr(later.weight, "ds_id"), "state": gathered(network)}
        torch.save(facts, out / f"{number}.rank{dist.get_rank()}.pt")


def train(overrides: list[str], out: Path) -> None:
    """One step through Lightning's strategy, then a checkpoint, and the parameters it must hold."""
    config = compose("train", overrides)
    prompt: Prompt = instantiate(config.prompt)
    plan = make_plan(config, prompt)
    plain = OmegaConf.to_container(config, resolve=True)
    manifest = Manifest("zero", plain, data={}, phrases=("lumen",), prompt=prompt.name)
    task = Projection(
        plan.build, objective=instantiate(config.objective), optimizer=instantiate(config.optimizer),
        keep_frozen=False, manifest=manifest.as_dict(),
    )  # fmt: skip
    ranks = int(os.environ["WORLD_SIZE"])
    sweep = ThresholdSweep()
    sweep.threshold, sweep.step = 0.35, 1
    strategy = OnCpu(
        stage=3, process_group_backend="gloo", exclude_frozen_parameters=bool(config.weights), sub_group_size=20_000
    )  # fmt: skip
    trainer = Trainer(
        accelerator="cpu", devices=ranks, strategy=strategy, precision=config.trainer.precision, max_steps=1,
        callbacks=[sweep], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, gradient_clip_val=1.0,
    )  # fmt: skip
    seed_everything(0, verbose=False)
    trainer.fit(task, DataLoader(torch.randn(4, plan.sizes.language.width), batch_size=2))
    task.manifest = replace(manifest, weights=tuple(report.summary() for report in plan.reports)).as_dict()
    trainer.save_checkpoint(out / "checkpoints/best.ckpt")
    assert task.network is not None
    state, trained = gathered(task.network), [n for n, p in task.network.named_parameters() if p.requires_grad]
    if trainer.is_global_zero:
        torch.save({"state": state, "trained": trained}, out / "gathered.pt")
        prompt.save(out / "tokenizer")


if __name__ == "__main__":
    folder, job, *overrides = sys.argv[1:]
    torch.set_num_threads(1)
    with initialize_config_dir(CONF, version_base="1.3"):
        {"train": train, "build": build}[job](overrides, Path(folder))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # threads of gloo now and then abort an interpreter that ends by itself
