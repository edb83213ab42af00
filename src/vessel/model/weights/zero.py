"""Checkpoints that DeepSpeed writes under ZeRO-3: a folder with two files a rank, put together tensor by tensor.

Each rank keeps, in float32, its part of every parameter that trains: the parameter is flattened, cut into as many equal
parts as there are ranks (zeros fill the last), and a rank's parts lie one after the other. Frozen parameters, where
they were saved at all, are kept in parts as well, each by its name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vessel.errors import VesselError
from vessel.model.weights.files import Named, TensorFiles, load_pickle

_LATEST = "latest"  # names the folder within that holds the ranks' files
_SCRIPT = "zero_to_fp32.py"
_FILE = re.compile(r"(?:\w+_)?zero_pp_rank_(\d+)_mp_rank_00_(model|optim)_states\.pt")
# Objects that DeepSpeed saves beside its tensors.
_OBJECTS = tuple(
    f"deepspeed.runtime.{name}"
    for name in ("zero.config.ZeroStageEnum", "fp16.loss_scaler.LossScaler", "fp16.loss_scaler.DynamicLossScaler")
)
_WEIGHTS = ("module", "buffer_names", "param_shapes", "frozen_param_shapes", "frozen_param_fragments", "shared_params")


@dataclass(frozen=True)
class _Parts:
    """A tensor in parts, one a rank, each flat."""

    shape: torch.Size
    parts: Sequence[Tensor]

    def outline(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.parts[0].dtype, device="meta")

    def whole(self) -> Tensor:
        return torch.cat(list(self.parts))[: self.shape.numel()].view(self.shape)


def is_zero(folder: Path) -> bool:
    """Whether DeepSpeed wrote this folder."""
    return any((folder / name).is_file() for name in (_LATEST, _SCRIPT))


def written(checkpoint: Path) -> float:
    """When a checkpoint, a file or a folder of DeepSpeed, was written: seconds of the clock.

    A folder is written over in place, which leaves its own time as it was.
    """
    latest = checkpoint / _LATEST
    return (latest if latest.is_file() else checkpoint).stat().st_mtime


def open_zero(folder: Path) -> TensorFiles:
    """What trained, in float32, with buffers and whatever frozen parameters were saved; one tensor at a time in memory.

    Raises:
        VesselError: a file is missing or damaged, or the ranks' files do not belong together.
    """
    try:
        models, optimizers = _states(folder)
        first = models[0]
        tensors = dict([*_trained(folder, first["param_shapes"], optimizers), *_frozen(models)])
        buffers = {name: first["module"][name] for name in first["buffer_names"]}
    except (LookupError, TypeError, AttributeError) as error:
        raise VesselError(f"{folder}: not what DeepSpeed writes under ZeRO-3 ({error!r}); copy it again") from error
    outline = {name: torch.empty_like(buffer, device="meta") for name, buffer in buffers.items()}
    outline |= {name: parts.outline() for name, parts in tensors.items()}

    def read() -> Iterator[Named]:
        yield from buffers.items()
        for name, parts in tensors.items():
            yield name, parts.whole()

    return TensorFiles(outline, read, {key: value for key, value in first.items() if key not in _WEIGHTS})


def _states(folder: Path) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """Each rank's model file and optimizer file, of which no tensor is read yet."""
    if not (folder / _LATEST).is_file():
        raise VesselError(f"{folder}: {_LATEST} is not there, which names its content; copy the whole folder again")
    inner = folder / (folder / _LATEST).read_text(encoding="utf-8").strip()
    found = {(m[2], int(m[1])): path for path in inner.glob("*.pt") if (m := _FILE.fullmatch(path.name))}
    if ("model", 0) not in found:
        raise VesselError(
            f"{inner}: zero_pp_rank_0_mp_rank_00_model_states.pt is not there; only ZeRO-3 folders are read"
        )
    first = _state(found["model", 0], "dp_world_size")
    needed = [(kind, rank) for kind in ("model", "optim") for rank in range(first["dp_world_size"])]
    if lost := [
        f"zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt" for kind, rank in needed if (kind, rank) not in found
    ]:
        raise VesselError(
            f"{inner}: {lost[0]} is not there ({len(lost)} of {len(needed)} files); copy the folders of all ranks"
        )
    models = [first, *(_state(found[key], "dp_world_size") for key in needed[1 : first["dp_world_size"]])]
    optimizers = [_state(found[key], "optimizer_state_dict")["optimizer_state_dict"] for key in needed[len(models) :]]
    if len({model["global_steps"] for model in models}) > 1 or len({_steps(state) for state in optimizers}) > 1:
        raise VesselError(f"{inner}: its files are of different steps, so its writing was cut short; take another")
    return models, optimizers


def _state(file: Path, key: str) -> Mapping[str, Any]:
    state = load_pickle(file, _OBJECTS)
    if not isinstance(state, dict) or key not in state:
        raise VesselError(f"{file}: not what DeepSpeed writes, it has no {key}; copy it again")
    return state


def _steps(optimizer: Mapping[str, Any]) -> frozenset[float]:
    """Steps that an optimizer has done, as it counts them for each of its flat groups."""
    states = optimizer["optimizer_state_dict"]["state"].values()
    return frozenset(float(state["step"]) for state in states if "step" in state)


def _trained(
    folder: Path, shapes: Sequence[Mapping[str, torch.Size]], optimizers: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[str, _Parts]]:
    for group, of_group in enumerate(shapes):
        flat = [optimizer["fp32_flat_groups"][group] for optimizer in optimizers]
        start = 0
        for name, shape in of_group.items():
            stop = start + math.ceil(shape.numel() / len(flat))
            yield name, _Parts(shape, [part[start:stop] for part in flat])
            start = stop
        if any(part.numel() != start for part in flat):
            raise VesselError(f"{folder}: holds {flat[0].numel()} numbers a rank for {start}; copy it again")


def _frozen(models: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, _Parts]]:
    for name, shape in (models[0]["frozen_param_shapes"] or {}).items():
        yield name, _Parts(shape, [model["frozen_param_fragments"][name] for model in models])
