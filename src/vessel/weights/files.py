"""Read files of tensors: names, shapes and dtypes from headers, and tensors one by one. No code is ever run."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vessel.errors import VesselError
from vessel.files import read_json

NamedTensor = tuple[str, Tensor]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d+-of-(\d+)\.safetensors")
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class TensorFiles:
    """Tensors in one file or several shards.

    Attributes:
        outline: tensors without content (meta device) by name, in the order of the files.
        read: yields names and tensors, one shard at a time in memory.
        metadata: the content of a pickle other than tensors.
    """

    outline: Mapping[str, Tensor]
    read: Callable[[], Iterator[NamedTensor]]
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Return the bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.outline.values())


def open_safetensors(folder: Path) -> TensorFiles:
    """Open the weights of a Hugging Face folder; every header is read.

    Raises:
        VesselError: no weights, no index for several shards, an index beside a file that it does not name, or a shard
            that is missing, damaged, or holds other tensors than the index states.
    """
    index = folder / INDEX
    if not index.is_file():
        if shards := sorted(file.name for file in folder.iterdir() if _SHARD.fullmatch(file.name)):
            raise VesselError(f"{folder}: {shards[0]} and others, but no {INDEX}; copy the whole folder again")
        if not (folder / SINGLE).is_file():
            raise VesselError(f"{folder}: no weights, neither {SINGLE} nor {INDEX}; only safetensors are read there")
        return open_files([folder / SINGLE])
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise VesselError(f"{index}: no weight_map with a file for each tensor, so no index of weights; copy it again")
    shards = sorted(set(weight_map.values()))
    if (folder / SINGLE).is_file() and SINGLE not in shards:  # one of them is outdated, and no file states which
        raise VesselError(
            f"{folder}: {SINGLE} and {INDEX}, which names {len(shards)} other files: two sets of weights; "
            "remove the one that is out of date"
        )
    if lost := [shard for shard in shards if not (folder / shard).is_file()]:
        raise VesselError(f"{folder}: {lost[0]} is missing ({len(lost)} of {len(shards)}); copy the whole folder again")
    files = open_files([folder / shard for shard in shards])
    if differing := sorted(weight_map.keys() ^ files.outline.keys()):
        raise VesselError(
            f"{folder}: {len(differing)} tensors are in the index or in the shards, but not in both (first: "
            f"{differing[0]}); copy the whole folder again"
        )
    return files


def open_files(files: Sequence[Path]) -> TensorFiles:
    """Open safetensors files as one.

    Raises:
        VesselError: a file is damaged or truncated.
    """
    outline: dict[str, Tensor] = {}
    for file in files:
        with _open(file) as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                part = opened.get_slice(name)
                dtype = _DTYPES.get(part.get_dtype())
                if dtype is None:
                    raise VesselError(f"{file}: {name} is of type {part.get_dtype()}, which no Sa2VA has")
                outline[name] = torch.empty(part.get_shape(), dtype=dtype, device="meta")

    def read() -> Iterator[NamedTensor]:
        for file in files:
            with _open(file) as opened:
                for name in opened.keys():  # noqa: SIM118
                    yield name, opened.get_tensor(name)

    return TensorFiles(outline, read)


def open_pickle(file: Path) -> TensorFiles:
    """Open a file written by `torch.save`: tensors at its root, or under `state_dict` or `model`.

    Raises:
        VesselError: not such a file, damaged, or one that would run code when read in full.
    """
    content = load_pickle(file)
    if not isinstance(content, dict):
        raise VesselError(f"{file}: holds a {type(content).__name__}, not tensors by name")
    inner = next((content[key] for key in ("state_dict", "model") if isinstance(content.get(key), dict)), content)
    tensors = {str(name): value for name, value in inner.items() if isinstance(value, Tensor)}
    if not tensors:
        raise VesselError(f"{file}: holds no tensors by name")
    outline = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    metadata = {key: value for key, value in content.items() if value is not inner and not isinstance(value, Tensor)}
    return TensorFiles(outline, lambda: iter(tensors.items()), metadata)


class _Ignored:
    """A stand-in for the few objects that libraries store with their tensors; their content is dropped."""

    def __new__(cls, *args: object) -> _Ignored:
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        pass


# Objects in the training files of the public code besides tensors: histories of logged values, as numpy arrays.
_NUMPY = ("multiarray._reconstruct", "multiarray.scalar")
_INERT = (
    "mmengine.logging.history_buffer.HistoryBuffer", "builtins.getattr", "_codecs.encode",
    "numpy.ndarray", "numpy.dtype",
    *(f"numpy.{core}.{name}" for core in ("core", "_core") for name in _NUMPY),
    *(f"numpy.dtypes.{name}DType" for name in ("Float64", "Float32", "Int64", "Int32", "Bool")),
)  # fmt: skip


def load_pickle(file: Path, ignored: Sequence[str] = ()) -> Any:
    """Read a pickle with `weights_only=True`; tensors stay in the file until they are used.

    Args:
        file: written by `torch.save`.
        ignored: classes by full name whose objects are replaced by an empty one, in addition to the few of mmengine.

    Raises:
        VesselError: damaged, or holds objects that could run code.
    """
    try:
        with torch.serialization.safe_globals([(_Ignored, name) for name in (*_INERT, *ignored)]):
            if file.suffix != ".safetensors":  # by which torch would take another reader
                try:
                    return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
                except RuntimeError as error:
                    if "mmap" not in str(error):
                        raise  # only files of torch before 1.6 cannot be mapped
            with file.open("rb") as opened:
                return torch.load(opened, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it holds {found[1]}, which could run code" if found else "it is no file of tensors"
        raise VesselError(f"{file}: not read, {reason}; ask its author for safetensors") from error
    except (RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        raise VesselError(f"{file}: damaged, or not a file of tensors ({error}); copy it again") from error


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise VesselError(f"{file}: damaged or truncated ({error}); copy it again") from error
