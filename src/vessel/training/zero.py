"""ZeRO, as DeepSpeed has it, under Lightning: on GPUs and on CPU ranks, with checkpoints for any number of ranks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor
from typing_extensions import override

from vessel.checkpoints.writing import atomic_write, defer_write_errors
from vessel.errors import VesselError
from vessel.training.shards import load_shards
from vessel.weights.zero import LATEST, is_zero_folder, open_zero_checkpoint

_TAG = "checkpoint"  # folder within a checkpoint that holds the files of the ranks
_SETTINGS = {
    # torch's AdamW also where the optimizer is on the host: DeepSpeed's own would have to be compiled.
    "zero_force_ds_cpu_optimizer": False,
    # Gradients of bf16 parameters are added up in float32, as those of float32 ones are elsewhere.
    "data_types": {"grad_accum_dtype": "fp32"},
    "steps_per_print": 10**9,
}


class ZeroStrategy(DeepSpeedStrategy):
    """A strategy that shards gradients and optimizer over the ranks (stage 2), and the parameters as well (stage 3).

    Args:
        stage: 2 or 3.
        accelerator: of the trainer; `cpu` runs the same engine on processes of the host.
        offload_optimizer: keep float32 parameters and moments on the host, and update them there.
        offload_parameters: keep parameters on the host too; stage 3 only.
        zero: further keys of DeepSpeed's `zero_optimization` section, such as bucket sizes.

    Raises:
        VesselError: another stage, or parameters to offload under stage 2.
    """

    def __init__(
        self,
        stage: int = 3,
        *,
        accelerator: str = "auto",
        offload_optimizer: bool = False,
        offload_parameters: bool = False,
        zero: Mapping[str, Any] | None = None,
    ) -> None:
        if stage not in (2, 3) or (offload_parameters and stage != 3):
            raise VesselError(
                f"trainer.strategy: stage={stage} offload_parameters={offload_parameters}; stages are 2 and 3, and "
                "only stage 3 has parameters to offload"
            )
        on_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available())
        if on_cpu:
            os.environ["DS_ACCELERATOR"] = "cpu"  # read at DeepSpeed's first import
        super().__init__(stage=stage, offload_optimizer=offload_optimizer, offload_parameters=offload_parameters)
        if on_cpu:
            from deepspeed.ops import __compatible_ops__

            __compatible_ops__["deepspeed_shm_comm"] = False  # a kernel that would have to be compiled first
        assert isinstance(self.config, dict)
        self.config.update(_SETTINGS)
        self.config["zero_optimization"].update(zero or {})
        self._on_cpu = on_cpu

    @property
    @override
    def root_device(self) -> torch.device:
        # DeepSpeed wants an index, which Lightning's CPU has not.
        return torch.device("cpu", self.local_rank) if self._on_cpu else super().root_device

    @override
    def setup_environment(self) -> None:
        precision = str(self.precision_plugin.precision)
        if precision not in ("32-true", "bf16-mixed"):
            raise VesselError(
                f"trainer.precision={precision}: under ZeRO choose bf16-mixed (parameters in bf16, buffers and the "
                "optimizer's own copy in float32) or 32-true"
            )
        if self._on_cpu:  # the next class refuses a CPU
            super(DeepSpeedStrategy, self).setup_environment()
        else:
            super().setup_environment()

    @override
    def setup_distributed(self) -> None:
        if self._on_cpu:  # there are no device indices to check
            self.set_world_ranks()
            self._init_deepspeed_distributed()
        else:
            super().setup_distributed()

    @override
    def setup(self, trainer: Trainer) -> None:
        assert self.lightning_module is not None
        self.lightning_module.to(self.root_device)  # metrics: under stage 3 nobody else moves them, and the network is
        super().setup(trainer)

    @override
    def backward(self, closure_loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # Lightning has divided the loss by the accumulated batches already; DeepSpeed would do so again.
        return super().backward(closure_loss, *args, scale_wrt_gas=False, **kwargs)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write a folder with the shards of each rank; frozen parameters are in it where the task keeps them.

        Raises:
            VesselError: there is no room for it.
        """
        if storage_options is not None:
            raise TypeError("checkpoints are local folders, which have no storage_options")
        task: Any = self.lightning_module
        metadata = {key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states")}
        path = Path(self.broadcast(filepath))
        with atomic_write(path, is_main=self.is_global_zero, agree=self.reduce_boolean_decision) as folder:
            with defer_write_errors(self.deepspeed_engine):
                self.deepspeed_engine.save_checkpoint(
                    str(folder), _TAG, metadata, save_latest=False, exclude_frozen_parameters=not task.keep_frozen
                )
            if self.is_global_zero:
                (folder / LATEST).write_text(_TAG, encoding="utf-8")

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a folder of any number of ranks and either stage: each rank reads its own shards of it.

        Returns:
            everything that was saved beside the tensors; `state_dict` holds their shapes only.

        Raises:
            VesselError: damaged, incomplete, or no such folder.
        """
        path = Path(checkpoint_path)
        if not is_zero_folder(path):
            raise VesselError(
                f"ckpt={path}: written without ZeRO, so its optimizer cannot be sharded; go on with the trainer "
                f"of that run, or start from its weights: weights=[...,{path}]"
            )
        saved = open_zero_checkpoint(path)
        load_shards(saved, self.deepspeed_engine)
        shapes = {name: parts.outline() for name, parts in saved.tensors().items()}
        return dict(saved.metadata) | {"state_dict": shapes}
