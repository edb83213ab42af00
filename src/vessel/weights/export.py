"""Write the tensors of an export in each layout, file by file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from vessel.errors import VesselError
from vessel.model.groups import module_of
from vessel.model.lora import adapter_state, is_adapter, merged_name, merged_state
from vessel.model.sa2va import Sa2VA
from vessel.weights.digests import combine_digests, digests
from vessel.weights.files import NamedTensor, open_pickle
from vessel.weights.layouts import EXPORT_DTYPES
from vessel.weights.names import PublicNames, mmengine_of_public
from vessel.weights.sources import ADAPTER_WEIGHTS, OTHER_WEIGHTS, WeightSource

DTYPES: dict[str, torch.dtype] = {option: getattr(torch, name) for option, name in EXPORT_DTYPES.items()}
SHARD_BYTES = 5 * 10**9


def exported_size(network: Sa2VA, layout: str, dtype: torch.dtype) -> int:
    """Count the bytes of the exported tensors."""
    state = network.state_dict()
    if layout == "adapter":
        numel = sum(tensor.numel() for _, tensor in (*adapter_state(network), *_trained_without_adapter(network)))
    else:  # adapters are merged into the tensors they change
        numel = sum(t.numel() for n, t in state.items() if not is_adapter(n))
    return numel * dtype.itemsize


def exported_state(network: Sa2VA, dtype: torch.dtype) -> Iterator[NamedTensor]:
    """Yield our names and tensors of a whole network, adapters merged in float32, then cast."""
    return ((name, tensor.to(dtype)) for name, tensor in merged_state(network))


def write_layout(
    folder: Path, network: Sa2VA, names: PublicNames, *, layout: str, dtype: torch.dtype
) -> dict[str, str]:
    """Write the tensors of a layout.

    Args:
        folder: to write into.
        network: with or without adapters; it is not changed.
        names: public names of this network.
        layout: one of `EXPORT_LAYOUTS`.
        dtype: of the tensors.

    Returns:
        digest of each tensor in memory, by its name in the files.
    """
    if layout != "adapter":
        state = exported_state(network, dtype)
        return write_weights(folder, names.to_public(state) if layout == "sa2va" else state)
    others = names.to_public(_trained_without_adapter(network))
    in_memory: dict[str, str] = {}
    for file, state in ((ADAPTER_WEIGHTS, adapter_state(network)), (OTHER_WEIGHTS, others)):
        # peft reads one file, so this one has no shards.
        if tensors := {name: _copy(tensor.to(dtype)) for name, tensor in state}:
            in_memory |= digests(tensors.items())
            _save(tensors, folder / file)
    return in_memory


def _trained_without_adapter(network: Sa2VA) -> Iterator[NamedTensor]:
    """Yield every tensor of the modules that trained without an adapter, under our names."""
    trained = {
        module_of(name) for group in network.trainable_groups().values() for name, _ in group if not is_adapter(name)
    }
    for name, tensor in network.state_dict().items():
        if module_of(name) in trained and not is_adapter(name):
            yield name, tensor.detach().cpu()


def write_weights(folder: Path, state: Iterable[NamedTensor], *, shard_bytes: int = SHARD_BYTES) -> dict[str, str]:
    """Write safetensors, and an index when there are several; one shard at a time is in memory.

    huggingface_hub's own function wants all tensors at once, which is a second network in memory.

    Returns:
        digest of each tensor in memory.
    """
    in_memory: dict[str, str] = {}
    shards: list[list[str]] = []
    waiting: dict[str, Tensor] = {}
    total = size = 0

    def flush() -> None:
        nonlocal waiting, size
        _save(waiting, folder / _shard(len(shards), 0))
        shards.append(list(waiting))
        waiting, size = {}, 0

    for name, tensor in state:
        if waiting and size + tensor.nbytes > shard_bytes:
            flush()
        waiting[name] = _copy(tensor)
        in_memory |= digests([(name, tensor)])
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    _name_shards(folder, shards, total)
    return in_memory


def _copy(tensor: Tensor) -> Tensor:
    """Copy a tensor: safetensors refuses tensors that share memory."""
    return tensor.contiguous().clone()


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(0o644)  # safetensors makes files for their owner only


def _name_shards(folder: Path, shards: list[list[str]], total: int) -> None:
    count = len(shards)
    if count == 1:
        (folder / _shard(0, 0)).rename(folder / "model.safetensors")
        return
    for index in range(count):
        (folder / _shard(index, 0)).rename(folder / _shard(index, count))
    weight_map = {name: _shard(index, count) for index, names in enumerate(shards) for name in names}
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _shard(index: int, count: int) -> str:
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def write_pth(file: Path, network: Sa2VA, names: PublicNames, dtype: torch.dtype) -> int:
    """Write the whole network as the public training code does: a dictionary of tensors by name.

    `torch.save` wants all tensors at once: this takes the memory of a second network.

    Returns:
        number of tensors; read back without running code, they equal those in memory.

    Raises:
        VesselError: a tensor read back differs; names it.
    """
    state = names.to_public(exported_state(network, dtype))
    tensors = {mmengine_of_public(name): tensor.contiguous() for name, tensor in state}
    in_memory = digests(tensors.items())
    torch.save(tensors, file)
    del tensors
    require_equal(in_memory, digests(open_pickle(file).read()), file.name)
    return len(in_memory)


def require_equal(in_memory: dict[str, str], on_disk: dict[str, str], where: str) -> None:
    """Refuse tensors read back that differ from those written; VesselError names the first."""
    for name in sorted(in_memory.keys() | on_disk.keys()):
        if in_memory.get(name) != on_disk.get(name):
            what = "is missing" if name not in on_disk else "is not the one in memory"
            raise VesselError(f"{where}: tensor {name} {what}, nothing was exported; check the disk")


def read_back(source: WeightSource, names: PublicNames, in_memory: dict[str, str]) -> str:
    """Read the written files once, and compare every tensor.

    Returns:
        the fingerprint of the tensors under our names, which is that of a load report.

    Raises:
        VesselError: a tensor differs from the one written; names it.
    """
    on_disk: dict[str, str] = {}

    def digesting() -> Iterator[NamedTensor]:
        for name, tensor in source.files.read():
            on_disk.update(digests([(name, tensor)]))
            yield name, tensor

    ours = digests(source.translate(digesting(), names))
    require_equal(in_memory, on_disk, source.path.name)
    return combine_digests(ours)


def trained_changes(network: Sa2VA, base: dict[str, str], dtype: torch.dtype) -> dict[str, tuple[str, str]]:
    """Compute the fingerprint of each trained group in the base and in the export; equal ones were not trained.

    An adapter that the base has as well is compared with it; a new one through the tensor it is merged into.

    Args:
        network: its parameters with `requires_grad` are those that trained.
        base: digests of the tensors that the training started from, under our names, cast to `dtype`.
        dtype: of the export.
    """
    groups = {
        group: {name if name in base else merged_name(name) for name, _ in members}
        for group, members in network.trainable_groups().items()
    }
    wanted = set().union(*groups.values())
    state = network.state_dict()
    now = digests((name, state[name].to(dtype)) for name in wanted if name in state)
    now |= digests((n, t.to(dtype)) for n, t in merged_state(network) if n in wanted and n not in now)
    return {
        group: (combine_digests({n: base[n] for n in names if n in base}), combine_digests({n: now[n] for n in names}))
        for group, names in groups.items()
    }
