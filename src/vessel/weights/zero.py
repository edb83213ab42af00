"""Read checkpoints that DeepSpeed writes under ZeRO: a folder with files of each rank, joined tensor by tensor.

Trained parameters and the states of Adam are partitioned over the ranks, in float32. Under stage 3 each parameter is
flattened and partitioned into as many equal parts as there are ranks (zeros pad the last), and the parts of a rank lie
one after the other. Under stage 2 all parameters of a group are concatenated, and the result is partitioned. Frozen
parameters, if saved at all, have their names: in parts under stage 3, whole under stage 2.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vessel.errors import VesselError
from vessel.weights.files import NamedTensor, TensorFiles, load_pickle

LATEST = "latest"  # names the folder within that holds the ranks' files
MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam, as torch names them
_SCRIPT = "zero_to_fp32.py"
_FILE = re.compile(r"(?:\w+_)?zero_pp_rank_(\d+)_mp_rank_00_(model|optim)_states\.pt")
_STAGE_2 = "mp_rank_00_model_states.pt"  # the one file of the parameters that all ranks hold
# Objects that DeepSpeed saves with its tensors.
_OBJECTS = tuple(
    f"deepspeed.{name}"
    for name in (
        *("runtime.zero.config.ZeroStageEnum", "utils.tensor_fragment.fragment_address"),
        *("runtime.fp16.loss_scaler.LossScaler", "runtime.fp16.loss_scaler.DynamicLossScaler"),
    )
)
_WEIGHTS = ("module", "buffer_names", "param_shapes", "frozen_param_shapes", "frozen_param_fragments", "shared_params")


@dataclass(frozen=True)
class PartitionedTensor:
    """A flattened tensor in consecutive parts; zeros may follow.

    Attributes:
        shape: of the full tensor.
        parts: of one dtype, each flat.
    """

    shape: torch.Size
    parts: Sequence[Tensor]

    def outline(self) -> Tensor:
        """Return the full tensor without content (meta device)."""
        return torch.empty(self.shape, dtype=self.parts[0].dtype, device="meta")

    def full(self) -> Tensor:
        """Return the full tensor."""
        return self.elements(0, self.shape.numel()).view(self.shape)

    def elements(self, start: int, stop: int) -> Tensor:
        """Return elements `start` to `stop` - 1 of the flattened tensor."""
        return torch.cat(_slices(self.parts, start, stop))


@dataclass(frozen=True)
class TrainedParameter:
    """A trained parameter.

    Attributes:
        values: float32.
        moments: of Adam, by the names in `MOMENTS`; empty before the first step.
    """

    values: PartitionedTensor
    moments: Mapping[str, PartitionedTensor]


@dataclass(frozen=True)
class ZeroCheckpoint:
    """The contents of a checkpoint folder.

    Attributes:
        trained, frozen, buffers: tensors by name.
        groups: settings of each group of the optimizer, the learning rate among them.
        steps: of the optimizer.
        metadata: all other values that were saved.
    """

    trained: Mapping[str, TrainedParameter]
    frozen: Mapping[str, PartitionedTensor]
    buffers: Mapping[str, Tensor]
    groups: Sequence[Mapping[str, Any]]
    steps: int
    metadata: Mapping[str, Any]

    def tensors(self) -> dict[str, PartitionedTensor]:
        """Return the parameters by name."""
        return {name: of.values for name, of in self.trained.items()} | dict(self.frozen)


def is_zero_folder(folder: Path) -> bool:
    """Return True if DeepSpeed wrote this folder."""
    return any((folder / name).is_file() for name in (LATEST, _SCRIPT))


def time_written(checkpoint: Path) -> float:
    """Return the time at which a checkpoint, a file or a folder of DeepSpeed, was written, in seconds since the epoch.

    The modification time of a folder does not change when files in it are rewritten; that of its `latest` does.
    """
    latest = checkpoint / LATEST
    return (latest if latest.is_file() else checkpoint).stat().st_mtime


def open_zero(folder: Path) -> TensorFiles:
    """Open trained parameters, in float32, buffers and saved frozen parameters; one tensor at a time in memory.

    Raises:
        VesselError: a file is missing or damaged, or the ranks' files do not belong together.
    """
    saved = open_zero_checkpoint(folder)
    outline = {name: torch.empty_like(buffer, device="meta") for name, buffer in saved.buffers.items()}
    outline |= {name: parts.outline() for name, parts in saved.tensors().items()}

    def read() -> Iterator[NamedTensor]:
        yield from saved.buffers.items()
        for name, parts in saved.tensors().items():
            yield name, parts.full()

    return TensorFiles(outline, read, saved.metadata)


def open_zero_checkpoint(folder: Path) -> ZeroCheckpoint:
    """Open a checkpoint with the state of the optimizer; tensors stay in the files until they are used.

    Raises:
        VesselError: as `open_zero`.
    """
    try:
        models, optimizers = _states(folder)
        first = models[0]
        inner = [optimizer[_inner(optimizer)] for optimizer in optimizers]
        return ZeroCheckpoint(
            trained=dict(_trained(folder, first["param_shapes"], optimizers, [state["state"] for state in inner])),
            frozen=dict(_frozen(models)),
            buffers={name: first["module"][name] for name in first["buffer_names"]},
            groups=inner[0]["param_groups"],
            steps=int(first["global_steps"]),
            metadata={key: value for key, value in first.items() if key not in _WEIGHTS},
        )
    except (LookupError, TypeError, AttributeError) as error:
        raise VesselError(f"{folder}: not what DeepSpeed writes under ZeRO ({error!r}); copy it again") from error


def _states(folder: Path) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """Open the model files, of each rank or one for all, and each rank's optimizer file; no tensor is read yet."""
    if not (folder / LATEST).is_file():
        raise VesselError(
            f"{folder}: {LATEST} is missing, which names the folder of the ranks' files; copy the whole folder again"
        )
    inner = folder / (folder / LATEST).read_text(encoding="utf-8").strip()
    found = {(m[2], int(m[1])): path for path in inner.glob("*.pt") if (m := _FILE.fullmatch(path.name))}
    for_all = inner / _STAGE_2
    if ("model", 0) not in found and not for_all.is_file():
        raise VesselError(
            f"{inner}: zero_pp_rank_0_mp_rank_00_model_states.pt is missing; only folders of ZeRO-2 and 3 are read"
        )
    first = _state(found.get(("model", 0), for_all), "dp_world_size")
    ranks = range(first["dp_world_size"])
    needed = [("model", rank) for rank in ranks if ("model", 0) in found] + [("optim", rank) for rank in ranks]
    if lost := [
        f"zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt" for kind, rank in needed if (kind, rank) not in found
    ]:
        raise VesselError(
            f"{inner}: {lost[0]} is missing ({len(lost)} of {len(needed)} files); copy the folders of all ranks"
        )
    of_ranks = [key for key in needed if key[0] == "model"]
    models = [first, *(_state(found[key], "dp_world_size") for key in of_ranks[1:])]
    optimizers = [_state(found["optim", r], "optimizer_state_dict")["optimizer_state_dict"] for r in ranks]
    if len({model["global_steps"] for model in models}) > 1 or len({_steps(state) for state in optimizers}) > 1:
        raise VesselError(
            f"{inner}: its files are of different steps, as of an interrupted save; take another checkpoint"
        )
    return models, optimizers


def _state(file: Path, key: str) -> Mapping[str, Any]:
    state = load_pickle(file, _OBJECTS)
    if not isinstance(state, dict) or key not in state:
        raise VesselError(f"{file}: not what DeepSpeed writes, it has no {key}; copy it again")
    return state


def _inner(optimizer: Mapping[str, Any]) -> str:
    """Return the state of torch's optimizer from where stage 2 or stage 3 keeps it."""
    return "base_optimizer_state" if "base_optimizer_state" in optimizer else "optimizer_state_dict"


def _steps(optimizer: Mapping[str, Any]) -> frozenset[float]:
    """Return the numbers of steps that an optimizer counts for its flat groups."""
    states = optimizer[_inner(optimizer)]["state"].values()
    return frozenset(float(state["step"]) for state in states if "step" in state)


def _trained(
    folder: Path,
    shapes: Sequence[Mapping[str, torch.Size]],
    optimizers: Sequence[Mapping[str, Any]],
    states: Sequence[Mapping[int, Mapping[str, Tensor]]],
) -> Iterator[tuple[str, TrainedParameter]]:
    stage_2 = "single_partition_of_fp32_groups" in optimizers[0]
    key = "single_partition_of_fp32_groups" if stage_2 else "fp32_flat_groups"
    partition = _partition_end_to_end if stage_2 else _partition_each
    for group, of_group in enumerate(shapes):
        flat = [optimizer[key][group] for optimizer in optimizers]
        found = sum(part.numel() for part in flat)
        sizes = [shape.numel() if stage_2 else math.ceil(shape.numel() / len(flat)) for shape in of_group.values()]
        required = sum(sizes) * (1 if stage_2 else len(flat))
        if found != required or (not stage_2 and any(part.numel() != sum(sizes) for part in flat)):
            raise VesselError(f"{folder}: holds {found} numbers of a parameter group of {required}; copy it again")
        known = [name for name in MOMENTS if all(name in state.get(group, {}) for state in states)]
        values = partition(flat, of_group)
        moments = {name: dict(partition([state[group][name] for state in states], of_group)) for name in known}
        for name, parts in values:
            yield name, TrainedParameter(parts, {moment: by_name[name] for moment, by_name in moments.items()})


def _partition_each(
    flat: Sequence[Tensor], shapes: Mapping[str, torch.Size]
) -> Iterator[tuple[str, PartitionedTensor]]:
    """Partition as stage 3: each parameter into equal parts."""
    start = 0
    for name, shape in shapes.items():
        stop = start + math.ceil(shape.numel() / len(flat))
        yield name, PartitionedTensor(shape, [part[start:stop] for part in flat])
        start = stop


def _partition_end_to_end(
    flat: Sequence[Tensor], shapes: Mapping[str, torch.Size]
) -> Iterator[tuple[str, PartitionedTensor]]:
    """Partition as stage 2: all parameters of a group concatenated."""
    start = 0
    for name, shape in shapes.items():
        yield name, PartitionedTensor(shape, _slices(flat, start, start + shape.numel()))
        start += shape.numel()


def _slices(parts: Sequence[Tensor], start: int, stop: int) -> list[Tensor]:
    """Return elements `start` to `stop` - 1 of consecutive flat tensors, as views."""
    ends = list(chain((0,), torch.tensor([part.numel() for part in parts]).cumsum(0).tolist()))
    slices = [part[max(0, start - at) : max(0, stop - at)] for part, at in zip(parts, ends, strict=False)]
    return [piece for piece in slices if piece.numel()] or [parts[0][:0]]


def _frozen(models: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, PartitionedTensor]]:
    for name, shape in (models[0]["frozen_param_shapes"] or {}).items():
        yield name, PartitionedTensor(shape, [model["frozen_param_fragments"][name].flatten() for model in models])
