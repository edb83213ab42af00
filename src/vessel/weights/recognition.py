"""Open a source of weights: a folder, a file or a hub id, recognised by its contents and never by its name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vessel.errors import VesselError
from vessel.files import read_json
from vessel.weights.architecture import language_family
from vessel.weights.entry import Weights
from vessel.weights.files import NamedTensor, TensorFiles, open_files, open_pickle, open_safetensors
from vessel.weights.kinds import ADAPTER, ENCODER, INTERNVL, MMENGINE, NATIVE, RUN, SA2VA, SAM2, TRAINING, Kind
from vessel.weights.names import (
    PublicNames,
    from_resnet,
    from_sam2,
    from_transformers,
    public_of_mmengine,
    public_of_peft,
)
from vessel.weights.sources import ADAPTER_CONFIG, ADAPTER_WEIGHTS, LANGUAGE_PARTS, OTHER_WEIGHTS, WeightSource
from vessel.weights.zero import is_zero_folder, open_zero

# How tensors of public folders begin, and of adapters; those of .pth files of the public code begin otherwise.
_OF_FOLDERS = ("vision_model.", "language_model.", "mlp1.", "base_model.", "vision_tower.", "model.")


def open_source(entry: Weights | str) -> WeightSource:
    """Find the weights, recognise their kind, and read their headers.

    Raises:
        VesselError: missing, damaged, or of an unknown kind, with the remedy.
    """
    entry = Weights(entry) if isinstance(entry, str) else entry
    path, revision = entry.fetch()
    source = _of_folder(entry, path) if path.is_dir() else _of_file(entry, path)
    return replace(source, revision=revision)


def _of_folder(entry: Weights, folder: Path) -> WeightSource:
    if (folder / ADAPTER_CONFIG).is_file():
        return _of_adapter(entry, folder)
    if is_zero_folder(folder):
        return _of_run(entry, folder, open_zero(folder))
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else None
    if not any(part in (config or {}) for part in LANGUAGE_PARTS) and (file := _single_pickle(entry, folder)):
        return _of_file(entry, file)
    if config is None:
        raise VesselError(
            f"{folder}: no config.json and no {ADAPTER_CONFIG}, so neither weights nor an adapter. Of a run, name a "
            "checkpoint: outputs/<name>/<time>/checkpoints/*.ckpt"
        )
    files = open_safetensors(folder)
    heads = {name.split(".")[0] for name in files.outline}
    if "mllm" in heads:
        return WeightSource(entry, NATIVE, folder, files, lambda state, _: iter(state), config)
    if any(re.match(r"(model\.)*visual\.", name) for name in files.outline):
        raise VesselError(f"{folder}: a model built on Qwen-VL; vessel knows those built on InternVL")
    if any(re.match(r"(model\.)?vision_tower\.", name) for name in files.outline):
        return WeightSource(entry, INTERNVL, folder, files, lambda state, _: from_transformers(state), config)
    if not {"vision_model", "mlp1", "language_model"} <= heads:
        raise VesselError(
            f"{folder}: neither a Sa2VA nor an InternVL: its tensors begin with {', '.join(sorted(heads)[:6])}"
        )
    kind = SA2VA if "grounding_encoder" in heads else INTERNVL
    names = _names(folder, config, files)
    return WeightSource(entry, kind, folder, files, lambda state, _: names.to_native(state), config)


def _single_pickle(entry: Weights, folder: Path) -> Path | None:
    """Find the single pickle of a folder without other weights, as SAM 2.0 on the hub; None without any.

    Raises:
        VesselError: there are several.
    """
    files = sorted(file for file in folder.iterdir() if file.suffix in (".pt", ".pth") and file.is_file())
    if len(files) > 1:
        listed = ", ".join(file.name for file in files[:6])
        repository, _, at = entry.source.partition("@")
        named = f"{repository.rstrip('/')}/{files[0].name}" + (f"@{at}" if at else "")
        raise VesselError(f"{folder}: holds {len(files)} files of weights ({listed}); name one of them: {named}")
    return files[0] if files else None


def _names(folder: Path, config: Mapping[str, Any], files: TensorFiles) -> PublicNames:
    try:
        language = config["llm_config"]
        kv_heads, heads = language["num_key_value_heads"], language["num_attention_heads"]
    except (KeyError, TypeError) as error:
        raise VesselError(f"{folder}: config.json lacks {error} of the language model; copy it again") from error
    if not all(isinstance(value, int) and value > 0 for value in (kv_heads, heads)) or heads % kv_heads:
        raise VesselError(
            f"{folder}: config.json: llm_config.num_attention_heads={heads} are no multiple of "
            f"num_key_value_heads={kv_heads}; copy it again"
        )
    return PublicNames(language_family(files.outline), kv_heads, heads // kv_heads)


def _of_adapter(entry: Weights, folder: Path) -> WeightSource:
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise VesselError(f"{folder}: {ADAPTER_CONFIG} but no {ADAPTER_WEIGHTS}; copy the whole folder again")
    files = open_files([file for name in (ADAPTER_WEIGHTS, OTHER_WEIGHTS) if (file := folder / name).is_file()])
    source = _public(entry, ADAPTER, folder, files, public_of_peft)
    return replace(source, config=read_json(folder / ADAPTER_CONFIG))


def _of_file(entry: Weights, file: Path) -> WeightSource:
    with file.open("rb") as opened:
        start = opened.read(9)
    is_safetensors = start[8:9] == b"{"
    files = open_files([file]) if is_safetensors else open_pickle(file)
    names = files.outline
    if "vessel" in files.metadata:
        return _of_run(entry, file, files)
    if {"conv1.weight", "layer1.0.conv1.weight"} <= names.keys():
        return WeightSource(entry, ENCODER, file, files, lambda state, _: from_resnet(state))
    if any(name.startswith("image_encoder.trunk.") for name in names):
        return WeightSource(entry, SAM2, file, files, lambda state, _: from_sam2(state))
    has_config = any((file.parent / name).is_file() for name in ("config.json", ADAPTER_CONFIG))
    if is_safetensors and (has_config or any(name.startswith(_OF_FOLDERS) for name in names)):
        raise VesselError(
            f"{file}: one file of a folder, whose other files describe it; name the folder: "
            f"{entry.source.partition('@')[0].rpartition('/')[0] or '.'}"
        )
    if any("lora_A" in name for name in names):
        return _public(entry, TRAINING, file, files, public_of_mmengine)
    if any(name.startswith("mllm.model.vision_model.") for name in names):
        return _public(entry, MMENGINE, file, files, public_of_mmengine)
    if any(name.startswith(("mllm.", "grounding_encoder.", "text_hidden_fcs.")) for name in names):
        # Trained without adapters: a decoder and its projection, perhaps.
        return _public(entry, TRAINING, file, files, public_of_mmengine)
    raise VesselError(
        f"{file}: unknown kind of weights (first tensor: {next(iter(names))}); vessel reads Sa2VA and "
        "InternVL folders, SAM 2.0 files, ResNets, .pth of the public training code, peft adapters and its own runs"
    )


def _public(entry: Weights, kind: Kind, path: Path, files: TensorFiles, rename: Callable[[str], str]) -> WeightSource:
    """Make a source whose names become public ones by `rename`."""

    def translate(state: Iterable[NamedTensor], names: PublicNames) -> Iterator[NamedTensor]:
        return names.to_native((rename(name), tensor) for name, tensor in state)

    return WeightSource(entry, kind, path, files, translate)


def _of_run(entry: Weights, path: Path, files: TensorFiles) -> WeightSource:
    if "vessel" not in files.metadata:
        raise VesselError(f"{path}: a checkpoint of DeepSpeed, but none of vessel.train")
    return WeightSource(entry, RUN, path, files, _strip_task_prefix)


def _strip_task_prefix(state: Iterable[NamedTensor], _: PublicNames) -> Iterator[NamedTensor]:
    """Yield the tensors of the network from those of a task, without the prefix `network.`."""
    prefix = "network."
    return ((name.removeprefix(prefix), tensor) for name, tensor in state if name.startswith(prefix))
