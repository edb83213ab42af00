"""Names of tensors: ours and those of the public Sa2VA folders, one table read both ways; and reading such folders."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from vessel.errors import VesselError

# (our prefix or part, public prefix or part); `{}` stands for a layer number.
_OUR_LAYER = "mllm.model.vision_tower.encoder.layer.{}."
_LAYER = "vision_model.encoder.layers.{}."
_SAM2 = "grounding_encoder.sam2_model."
_NAMES = (
    ("mllm.lm_head.", "language_model.lm_head."),
    ("mllm.model.language_model.", "language_model.model."),
    ("mllm.model.multi_modal_projector.layer_norm.", "mlp1.0."),
    ("mllm.model.multi_modal_projector.linear_1.", "mlp1.1."),
    ("mllm.model.multi_modal_projector.linear_2.", "mlp1.3."),
    ("mllm.model.vision_tower.embeddings.cls_token", "vision_model.embeddings.class_embedding"),
    ("mllm.model.vision_tower.embeddings.position_embeddings", "vision_model.embeddings.position_embedding"),
    ("mllm.model.vision_tower.embeddings.patch_embeddings.projection.", "vision_model.embeddings.patch_embedding."),
    (f"{_OUR_LAYER}attention.projection_layer.", f"{_LAYER}attn.proj."),
    (f"{_OUR_LAYER}attention.qkv.", f"{_LAYER}attn.qkv."),
    (f"{_OUR_LAYER}layernorm_before.", f"{_LAYER}norm1."),
    (f"{_OUR_LAYER}layernorm_after.", f"{_LAYER}norm2."),
    (f"{_OUR_LAYER}lambda_1", f"{_LAYER}ls1"),
    (f"{_OUR_LAYER}lambda_2", f"{_LAYER}ls2"),
    (f"{_OUR_LAYER}mlp.", f"{_LAYER}mlp."),
    ("grounding.memory_encoder.fuser.layers.{}.gamma", f"{_SAM2}memory_encoder.fuser.layers.{{}}.g_weight"),
    ("grounding.", _SAM2),
    ("text_hidden_fcs.", "text_hidden_fcs."),
)
_QKV = re.compile(r"(.*\.attention\.)([qkv])_proj(\..*)")


def _rename(name: str, source: int) -> str:
    for pair in _NAMES:
        pattern = re.escape(pair[source]).replace(r"\{\}", r"(\d+)")
        if match := re.match(pattern, name):
            return pair[1 - source].format(*match.groups()) + name[match.end() :]
    raise VesselError(f"tensor {name} belongs to no part of a Sa2VA")


def to_public(state: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Our tensors under public names; the vision encoder's query, key and value are stacked into one tensor."""
    waiting: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state:
        if match := _QKV.fullmatch(name) if "vision_tower" in name else None:
            fused = f"{match[1]}qkv{match[3]}"
            parts = waiting.setdefault(fused, {})
            parts[match[2]] = tensor
            if len(parts) == 3:
                yield _rename(fused, 0), torch.cat([waiting[fused][k] for k in "qkv"])
                del waiting[fused]
        else:
            yield _rename(name, 0), tensor
    assert not waiting, f"query, key or value missing for {list(waiting)}"


def to_native(state: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The inverse of `to_public`."""
    for name, tensor in state:
        native = _rename(name, 1)
        if ".attention.qkv." in native:
            for k, part in zip("qkv", tensor.chunk(3), strict=True):
                yield native.replace(".qkv.", f".{k}_proj."), part
        else:
            yield native, tensor


@dataclass(frozen=True)
class LoadReport:
    """What a load did, from the load that matters.

    Attributes:
        source: what was read.
        loaded: tensors taken.
        missing: tensors of the network that the source lacks.
        unexpected: tensors of the source that the network lacks.
        mismatched: tensors whose shapes differ, with both shapes.
    """

    source: str
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]

    def summary(self) -> dict[str, Any]:
        """Counts for a manifest."""
        counts = {f.name: len(getattr(self, f.name)) for f in fields(self) if f.name != "source"}
        return {"source": self.source, **counts}

    def require_complete(self) -> None:
        """Refuse a load that is not exact.

        Raises:
            VesselError: naming the first of each kind of difference.
        """
        wrong = {
            "missing": self.missing, "unexpected": self.unexpected, "of another shape": self.mismatched,
        }  # fmt: skip
        if any(wrong.values()):
            told = "; ".join(f"{len(names)} {kind} (first: {names[0]})" for kind, names in wrong.items() if names)
            raise VesselError(f"{self.source}: the weights do not fit this network: {told}")


def load_state(network: nn.Module, state: Iterable[tuple[str, Tensor]], source: str) -> LoadReport:
    """Copy tensors into the network one by one and report; nothing is skipped in silence.

    Args:
        network: its tensors are overwritten in place, in their own dtype and on their own device.
        state: names as in the network.
        source: how to call the state in the report.
    """
    own: Mapping[str, Tensor] = network.state_dict()
    loaded, unexpected, mismatched = [], [], []
    with torch.no_grad():
        for name, tensor in state:
            if name not in own:
                unexpected.append(name)
            elif own[name].shape != tensor.shape:
                mismatched.append(f"{name}: {tuple(tensor.shape)} for {tuple(own[name].shape)}")
            else:
                own[name].copy_(tensor)
                loaded.append(name)
    wrong = {m.split(":")[0] for m in mismatched}
    missing = [name for name in own if name not in set(loaded) | wrong]
    return LoadReport(source, tuple(loaded), tuple(missing), tuple(unexpected), tuple(mismatched))


def read_safetensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a Hugging Face folder, shard by shard.

    Raises:
        VesselError: no weights there, or a shard is missing or damaged.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names: dict[str, Any] = json.loads(index.read_text())["weight_map"]
        shards = sorted(set(names.values()))
    else:
        shards = ["model.safetensors"]
    for shard in shards:
        path = folder / shard
        if not path.is_file():
            raise VesselError(f"{folder}: {shard} is not there; copy the whole folder again")
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    yield name, file.get_tensor(name)
        except Exception as error:
            if isinstance(error, VesselError):
                raise
            raise VesselError(f"{path}: damaged or truncated ({error}); copy it again") from error


def digests(state: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """SHA-256 over name, dtype, shape and bytes of each tensor, by name."""
    found = {}
    for name, tensor in state:
        digest = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        found[name] = digest.hexdigest()
    return found


def fingerprint(state: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, independent of order: 16 hexadecimal digits."""
    return combined(digests(state))


def combined(digests: Mapping[str, str]) -> str:
    """The fingerprint of tensors whose digests are known."""
    return hashlib.sha256("".join(sorted(digests.values())).encode()).hexdigest()[:16]
