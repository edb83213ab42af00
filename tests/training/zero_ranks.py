"""What each rank does in the tests of ZeRO: `torchrun zero_ranks.py OUT train KEY=VALUE...`, a run as `vessel.train`
makes it; the same with a fault of `FAULTS` for `train`; or `build "KEY=VALUE ..." "KEY=VALUE ..."`, a network for each.
DeepSpeed and Lightning are the real ones.
"""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning import LightningModule, Trainer
from lightning.pytorch import Callback
from omegaconf import DictConfig, OmegaConf
from torch import distributed as dist
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from typing_extensions import override

from vessel.batch import Batch, collate
from vessel.cli.conf import CONF
from vessel.data.prompt import Prompt
from vessel.errors import VesselError
from vessel.training.datamodule import VesselDataModule
from vessel.training.run import train
from vessel.training.task import VesselTask
from vessel.weights.build import NetworkPlan
from vessel.weights.entry import Weights
from vessel.weights.partition import gathered


class Recorder(Callback):
    """Writes what a rank saw to `<out>/rank<number>.pt`.

    Args:
        out: folder.
    """

    def __init__(self, out: str) -> None:
        self.out = Path(out)
        self.losses: dict[tuple[int, str], float] = {}  # by step and image
        self.norms: list[float] = []  # of the gradient before clipping, where it is whole
        self.begin: dict[str, Any] = {}
        self.step = 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.begin = held(trainer, pl_module)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        self.step = trainer.global_step

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self.norms.append(float(nn.utils.get_total_norm(p.grad for p in pl_module.parameters() if p.grad is not None)))

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self.losses[self.step, ",".join(batch.ids)] = float(trainer.callback_metrics["train/loss"])

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        facts = {"losses": self.losses, "norms": self.norms, "begin": self.begin, "end": held(trainer, pl_module)}
        torch.save(facts, self.out / f"rank{trainer.global_rank}.pt")


def held(trainer: Trainer, module: LightningModule) -> dict[str, Any]:
    """Whole tensors of the network, float32 values and moments of what trains, and settings of optimizer and engine."""
    optimizer: Any = trainer.optimizers[0]
    trained = {name: master(p, optimizer) for name, p in module.named_parameters() if p.requires_grad}
    with gathered(list(module.parameters())):
        state = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    torchs = getattr(optimizer, "optimizer", optimizer)
    return {
        "state": state, "trained": trained, "step": trainer.global_step, "optimizer": type(torchs).__name__,
        "buffers": {name: buffer.clone() for name, buffer in module.named_buffers()},
        "rates": [group["lr"] for group in torchs.param_groups], "engine": getattr(trainer.strategy, "config", None),
        "steps": sorted({float(state["step"]) for state in torchs.state.values() if "step" in state}),
        "own": sum(state["exp_avg"].numel() for state in torchs.state.values() if "exp_avg" in state),
    }  # fmt: skip


def master(parameter: nn.Parameter, optimizer: Any) -> dict[str, torch.Tensor]:
    """By DeepSpeed's own readers, which put the parts of all ranks together."""
    moments = ("exp_avg", "exp_avg_sq")
    if not (hasattr(parameter, "_z3_optimizer") or hasattr(parameter, "_hp_mapping")):
        state = optimizer.state.get(parameter, {})
        return {"value": parameter.detach().clone()} | {m: state[m].clone() for m in moments if m in state}
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    whole = {"value": safe_get_full_fp32_param(parameter)}
    if optimizer.optimizer.state:
        if hasattr(parameter, "_hp_mapping"):  # stage 2 links them once, before the last group has any
            optimizer._hp_optimizer_states_linked = False
            optimizer._lazy_init_hp_params_optimizer_state()
        whole |= {m: safe_get_full_optimizer_state(parameter, m) for m in moments}
    return {name: tensor.clone() for name, tensor in whole.items()}


def make_plan(config: DictConfig, prompt: Prompt) -> NetworkPlan:
    return NetworkPlan(
        instantiate(config.model), prompt.token_ids, prompt.new_tokens, lora=instantiate(config.lora),
        trainable=config.trainable, weights=Weights.listed(OmegaConf.to_container(config.weights)),
    )  # fmt: skip


def build(variants: list[str], out: Path) -> None:
    """Make networks under `zero.Init` as Lightning does, one by one, and write what this rank holds of each."""
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    for number, overrides in enumerate(variants):
        config = compose("train", overrides.split())
        bf16 = {"enabled": str(config.trainer.precision).startswith("bf16")}
        stage = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}, "bf16": bf16}
        torch.manual_seed(dist.get_rank())  # so that what is drawn differs, unless one rank draws for all
        with deepspeed.zero.Init(config_dict_or_path=stage):
            network = make_plan(config, instantiate(config.prompt)).build()
            later = torch.nn.Linear(8, 8)
        amount = sum(parameter.ds_tensor.nbytes + parameter.nbytes for parameter in network.parameters())
        with gathered(list(network.parameters())):
            state = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
        facts = {"held": amount, "later": hasattr(later.weight, "ds_id"), "state": state}
        torch.save(facts, out / f"{number}.rank{dist.get_rank()}.pt")


def uneven() -> None:
    """Rank 0 is given an image with one phrase that it does not show, every other rank one with eight."""

    def loader(data: VesselDataModule) -> DataLoader[Batch]:
        dataset = data.dataset("train")
        count = 1 if dist.get_rank() == 0 else 8
        batches = []
        for number in range(4):
            sample = dataset[number]
            phrases = tuple(f"phrase {i}" for i in range(count))
            ids, labels = data.prompt.encode(phrases, data.geometry.tokens_per_tile)
            masks = torch.zeros(count, *sample.size, dtype=torch.bool)
            masks[1:, 10:30, 10:30] = True
            batches.append(replace(sample, phrases=phrases, input_ids=ids, labels=labels, masks=masks))
        return DataLoader(batches, batch_size=1, collate_fn=partial(collate, pad_id=data.prompt.token_ids.pad))  # type: ignore[arg-type]

    VesselDataModule.train_dataloader = loader  # type: ignore[method-assign]


def changed_network(change: Callable[[nn.Module], object]) -> None:
    configure = VesselTask.configure_model

    def changed(task: VesselTask) -> None:
        configure(task)
        assert task.network is not None
        change(task.network)

    VesselTask.configure_model = changed  # type: ignore[method-assign]


def trained_heads() -> None:
    """Heads of the mask decoder that no loss reaches are left to train."""
    changed_network(lambda network: network.get_submodule("grounding.sam_mask_decoder").requires_grad_())


def detached() -> None:
    """No gradient comes through the projection of `[SEG]` on any rank."""
    changed_network(
        lambda network: network.get_submodule("text_hidden_fcs").register_forward_hook(lambda m, i, o: o.detach())
    )


def recomputed() -> None:
    changed_network(lambda network: network.checkpoint_activations())  # type: ignore[operator]


def nan(how: str) -> None:
    """In step 1, on rank 1 alone."""
    step = VesselTask.training_step

    def broken(task: VesselTask, batch: Batch, batch_idx: int) -> torch.Tensor:
        loss = step(task, batch, batch_idx)
        if task.global_rank != 1 or task.global_step != 1:
            return loss
        return loss * float("nan") if how == "loss" else loss + (0 * loss).sqrt()

    VesselTask.training_step = broken  # type: ignore[method-assign]


FAULTS: dict[str, Callable[[], None]] = {
    "train": lambda: None,
    "uneven": uneven,
    "trained_heads": trained_heads,
    "detached": detached,
    "recomputed": recomputed,
    "nan_loss": partial(nan, "loss"),
    "nan_gradient": partial(nan, "gradient"),
}


def main(folder: Path, job: str, overrides: list[str]) -> int:
    """Do a job; 1 for an error told to the user, which goes to `error<rank>.txt`."""
    torch.set_num_threads(1)
    try:
        with initialize_config_dir(CONF, version_base="1.3"):
            if job == "build":
                build(overrides, folder)
            else:
                FAULTS[job]()
                train(compose("train", overrides))
    except VesselError as error:
        (folder / f"error{os.environ['RANK']}.txt").write_text(str(error))
        time.sleep(2)  # torchrun ends the others as soon as one has
        return 1
    if dist.is_initialized():
        dist.barrier()
    return 0


if __name__ == "__main__":
    code = main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
    sys.stdout.flush()
    os._exit(code)  # threads of gloo now and then abort an interpreter that ends by itself
