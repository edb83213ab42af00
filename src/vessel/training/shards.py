"""The shard of a rank under ZeRO: values, gradient and moments of a parameter that trains.

DeepSpeed keeps them flat and in float32, several parameters in one tensor. Without ZeRO a rank holds every parameter
whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vessel.weights.partition import full_shape, is_partitioned
from vessel.weights.zero import MOMENTS, PartitionedTensor, ZeroCheckpoint


@dataclass(frozen=True)
class Shard:
    """The position of a rank's shard of a parameter in what DeepSpeed's optimizer holds.

    Attributes:
        group: index of the flat tensor that holds it.
        offset: of its first element in that flat tensor.
        start: of its first element in the flattened parameter.
        count: of its elements.
    """

    group: int
    offset: int
    start: int
    count: int

    def of(self, flat: Tensor) -> Tensor:
        """Return the shard in the flat tensor of the group, or in a moment of it."""
        return flat.narrow(0, self.offset, self.count)

    def out_of(self, parts: PartitionedTensor) -> Tensor:
        """Return the shard of a saved tensor."""
        return parts.elements(self.start, self.start + self.count)


def values(parameter: nn.Parameter) -> Tensor:
    """Return the elements of a parameter that this rank's optimizer updates, flat; none where other ranks hold them."""
    if not _is_sharded(parameter):
        return parameter.detach().flatten()
    owner: Any = parameter
    shard = shard_of(parameter)
    if shard is None:
        return torch.empty(0, device=parameter.device)
    if is_partitioned(parameter):
        return shard.of(owner._z3_optimizer.fp32_partitioned_groups_flat[shard.group]).detach()
    return owner._hp_mapping.hp_fragment.detach()


def gradient(parameter: nn.Parameter) -> Tensor | None:
    """Return the gradient of those elements, averaged over the ranks.

    It is there between the last backward pass of a step and the update. A parameter that got none has None, and under
    ZeRO zeros or what is left of an earlier step.
    """
    if parameter.grad is not None or not _is_sharded(parameter):
        return parameter.grad
    owner: Any = parameter
    if shard_of(parameter) is None:
        return torch.empty(0, device=parameter.device)
    if is_partitioned(parameter):
        return owner._z3_optimizer.get_local_fp32_grad_for_param(parameter)
    return owner._hp_mapping.get_lp_grad_fragment(owner._index_in_param_group)


def shard_of(parameter: nn.Parameter) -> Shard | None:
    """Find this rank's shard of a parameter that DeepSpeed trains; None when it has none."""
    owner: Any = parameter
    if is_partitioned(parameter):
        optimizer = owner._z3_optimizer
        group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = size * optimizer._get_param_partition_rank(parameter)
        count = min(size, owner.ds_numel - start)
        return Shard(group, offset, start, count) if count > 0 else None
    mapping = owner._hp_mapping
    if mapping is None:
        return None
    in_flat, in_parameter = mapping.hp_fragment_address, mapping.lp_fragment_address
    return Shard(mapping.param_group_index, in_flat.start, in_parameter.start, in_flat.numel)


@torch.no_grad()
def load_shards(saved: ZeroCheckpoint, engine: Any) -> None:
    """Load tensors, moments and counts of a checkpoint of any number of ranks into an engine; each reads its own shard.

    Tensors that the checkpoint lacks or has in another shape stay as they are.

    Args:
        saved: the checkpoint.
        engine: `deepspeed.DeepSpeedEngine` that trains.
    """
    optimizer = engine.optimizer
    is_stage_3 = engine.zero_optimization_partition_weights()
    if is_stage_3:
        optimizer.checkpoint_event_prologue()  # small parameters may lie whole on every rank
    flat = optimizer.fp32_partitioned_groups_flat if is_stage_3 else optimizer.single_partition_of_fp32_groups
    states = [_fresh_state(group, saved.steps) for group in flat]
    for name, parameter in engine.module.named_parameters():
        if name in saved.trained and parameter.requires_grad:
            _load_trained(saved, name, parameter, flat, states)
        elif name in saved.frozen and saved.frozen[name].shape == full_shape(parameter):
            _load_frozen(saved.frozen[name], parameter)
    optimizer.optimizer.state.update(zip(flat, states, strict=True))
    for name, buffer in engine.module.named_buffers():
        if name in saved.buffers:
            buffer.copy_(saved.buffers[name])
    for group, of_group in zip(optimizer.optimizer.param_groups, saved.groups, strict=True):
        group.update({key: of_group[key] for key in ("lr", "initial_lr") if key in of_group})
    if is_stage_3:
        for group in range(len(flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer.checkpoint_event_epilogue()
    else:
        optimizer.update_lp_params()
    engine.global_steps = saved.steps
    engine.global_samples = saved.steps * engine.train_batch_size()
    engine.micro_steps = saved.steps * engine.gradient_accumulation_steps()


def _fresh_state(flat: Tensor, steps: int) -> dict[str, Tensor]:
    step = torch.tensor(float(steps), device=flat.device)  # where fused AdamW wants it
    return {"step": step} | {name: torch.zeros_like(flat) for name in MOMENTS}


def _load_trained(
    saved: ZeroCheckpoint,
    name: str,
    parameter: nn.Parameter,
    flat: Sequence[Tensor],
    states: Sequence[Mapping[str, Tensor]],
) -> None:
    trained, shard = saved.trained[name], shard_of(parameter)
    if shard is None or trained.values.shape != full_shape(parameter):
        return
    shard.of(flat[shard.group]).copy_(shard.out_of(trained.values))
    for moment, parts in trained.moments.items():
        shard.of(states[shard.group][moment]).copy_(shard.out_of(parts))


def _load_frozen(parts: PartitionedTensor, parameter: nn.Parameter) -> None:
    if not is_partitioned(parameter):
        parameter.copy_(parts.full())
        return
    from deepspeed import comm

    own: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]  # DeepSpeed sets it
    start = own.numel() * comm.get_rank()
    piece = parts.elements(start, start + own.numel())
    own[: len(piece)].copy_(piece)


def _is_sharded(parameter: nn.Parameter) -> bool:
    """Return True if DeepSpeed trains a parameter."""
    return hasattr(parameter, "_z3_optimizer") or hasattr(parameter, "_hp_mapping")
