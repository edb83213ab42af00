"""Derive from a trainer how training is spread over devices, and the bytes that each of them holds between steps."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vessel.memory_plan.step import GRADIENTS, StepSettings
from vessel.processes.ranks import device_count

PARAMETERS, OPTIMIZER, UPDATE = "parameters", "moments of the optimizer", "temporaries of the optimizer step"
BUCKETS = "buckets of communication"
MASTERS = "parameters of the optimizer, float32"
_MOMENTS = 2  # of AdamW, in the dtype of the parameter; its fused step takes nothing beside them


@dataclass(frozen=True)
class Engine:
    """The settings of a trainer that decide about memory; sizes are elements, defaults Lightning's and DeepSpeed's.

    Attributes:
        precision: as the trainer has it.
        ranks: processes, one a GPU.
        stage: of ZeRO; 0 for the whole network, its gradients and its optimizer on every rank.
        offload_optimizer, offload_parameters: kept on the host.
        accumulate: batches an update.
        bucket: gradients that are reduced at a time.
        prefetch, live, reuse: of gathered parameters: fetched ahead; fetched ahead at most in all; kept when used again
            within so many.
        persistent: largest parameter that every rank keeps whole.
    """

    precision: str = "32-true"
    ranks: int = 1
    stage: int = 0
    offload_optimizer: bool = False
    offload_parameters: bool = False
    accumulate: int = 1
    bucket: int = 200_000_000
    prefetch: int = 50_000_000
    live: int = 1_000_000_000
    reuse: int = 1_000_000_000
    persistent: int = 100_000

    @classmethod
    def of(cls, trainer: Mapping[str, Any]) -> Engine:
        """Read the engine from a trainer's configuration."""
        engine = cls(
            precision=str(trainer["precision"]),
            ranks=device_count(trainer["devices"], str(trainer["accelerator"])) * int(trainer.get("num_nodes", 1)),
            accumulate=int(trainer.get("accumulate_grad_batches", 1)),
        )
        strategy = trainer.get("strategy", "auto")
        if not isinstance(strategy, Mapping):
            return replace(engine, **_named(str(strategy)))
        zero = dict(strategy.get("zero") or {})
        names = {
            "bucket": "reduce_bucket_size",
            "prefetch": "stage3_prefetch_bucket_size",
            "live": "stage3_max_live_parameters",
            "reuse": "stage3_max_reuse_distance",
            "persistent": "stage3_param_persistence_threshold",
        }
        changes: dict[str, Any] = {own: int(zero[name]) for own, name in names.items() if name in zero}
        changes |= {key: strategy[key] for key in ("offload_optimizer", "offload_parameters") if key in strategy}
        return replace(engine, stage=int(strategy.get("stage", 0)), **changes)

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of frozen tensors; under ZeRO, and where the precision is a `true` one, of all tensors."""
        return next((d for bits, d in _DTYPES.items() if self.precision.startswith(bits)), torch.float32)

    @property
    def step_settings(self) -> StepSettings:
        """Return the settings of a step."""
        mixed = self.precision.endswith("mixed") and self.stage == 0
        return StepSettings(
            autocast=self.dtype if mixed else None,
            zero3=self.stage == 3,
            shard_gradients=self.stage > 1,
            bucket=self.bucket,
            accumulating=self.accumulate > 1,
        )

    def prepare(self, network: nn.Module) -> None:
        """Give parameters the dtypes that they train in."""
        mixed = self.precision.endswith("mixed") and self.stage == 0
        for parameter in network.parameters():
            parameter.data = parameter.data.to(torch.float32 if mixed and parameter.requires_grad else self.dtype)

    def states(self, network: nn.Module) -> StateBytes:
        """Count what a rank holds of a prepared network between two steps, and what an update takes beside it."""
        everything = list(network.parameters())
        trained = [p for p in everything if p.requires_grad]
        buffers = sum(buffer.nbytes for buffer in network.buffers())
        if self.stage == 0:
            gradients = sum(p.nbytes for p in trained)
            held = {PARAMETERS: sum(p.nbytes for p in everything) + buffers, OPTIMIZER: _MOMENTS * gradients}
            if self.ranks > 1:
                held[BUCKETS] = gradients
            return StateBytes(held, {}, {GRADIENTS: gradients}, 0)
        return self._shard_states(everything, trained, buffers)

    def _shard_states(self, everything: Sequence[Tensor], trained: Sequence[Tensor], buffers: int) -> StateBytes:
        own = sum(math.ceil(p.numel() / self.ranks) for p in trained)
        state = _MOMENTS * 4 * own
        size, halved = self.dtype.itemsize, (self.stage == 3)
        parts = sum(math.ceil(p.numel() / self.ranks) if halved else p.numel() for p in everything) * size
        whole = sum(p.numel() for p in everything if halved and p.numel() <= self.persistent) * size
        on_host = parts * self.offload_parameters
        held = {
            PARAMETERS: parts - on_host + (whole if self.ranks > 1 or self.offload_parameters else 0) + buffers,
            # a buffer that gradients are moved into, and the copy that is sharded
            BUCKETS: 2 * min(self.bucket, sum(p.numel() for p in trained)) * size,
        }
        accumulated = 4 * own  # vessel.training.zero adds gradients up in float32
        if self.offload_optimizer:
            return StateBytes(held, {}, {}, on_host + state + 4 * own + accumulated)
        held |= {MASTERS: 4 * own, OPTIMIZER: state}
        # the flat copy of the gradients that the optimizer is given
        return StateBytes(held, {GRADIENTS: accumulated}, {GRADIENTS: accumulated, UPDATE: 4 * own}, on_host)


@dataclass(frozen=True)
class StateBytes:
    """Bytes by kind.

    Attributes:
        held: at all times.
        in_step: while a batch is computed, beside what the step itself makes.
        in_update: while the optimizer steps.
        host: on the host, of what is offloaded.
    """

    held: Mapping[str, int]
    in_step: Mapping[str, int]
    in_update: Mapping[str, int]
    host: int


_DTYPES = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}


def _named(strategy: str) -> dict[str, Any]:
    """Read a name of Lightning's, such as `deepspeed_stage_3_offload`."""
    found = re.search(r"deepspeed_stage_(\d)", strategy)
    stage, offload = int(found[1]) if found else 0, "offload" in strategy
    return {"stage": stage, "offload_optimizer": offload, "offload_parameters": offload and stage == 3}
