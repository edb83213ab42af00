"""Names of tensors: ours and those of every layout that is read or written, each a table for both directions.

Ours are those of `Sa2VA`: transformers' InternVL under `mllm`, the sam2 package's SAM2 under `grounding`. Some layouts
store query, key and value of a layer as one tensor; reading splits them and writing joins them again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vessel.errors import VesselError
from vessel.model.mllm import Language
from vessel.weights.files import NamedTensor

Pairs = Sequence[tuple[str, str]]

# (our prefix or part, public prefix or part); `{}` stands for a layer number. The first that fits is taken.
_VIT, _PUBLIC_VIT = "mllm.model.vision_tower.encoder.layer.{}.", "vision_model.encoder.layers.{}."
_SAM2 = "grounding_encoder.sam2_model."
_PUBLIC: Pairs = (
    ("mllm.lm_head.", "language_model.lm_head."),
    ("mllm.model.language_model.", "language_model.model."),
    ("mllm.model.multi_modal_projector.layer_norm.", "mlp1.0."),
    ("mllm.model.multi_modal_projector.linear_1.", "mlp1.1."),
    ("mllm.model.multi_modal_projector.linear_2.", "mlp1.3."),
    ("mllm.model.vision_tower.embeddings.cls_token", "vision_model.embeddings.class_embedding"),
    ("mllm.model.vision_tower.embeddings.position_embeddings", "vision_model.embeddings.position_embedding"),
    ("mllm.model.vision_tower.embeddings.patch_embeddings.projection.", "vision_model.embeddings.patch_embedding."),
    (f"{_VIT}attention.projection_layer.", f"{_PUBLIC_VIT}attn.proj."),
    (f"{_VIT}attention.", f"{_PUBLIC_VIT}attn."),
    (f"{_VIT}layernorm_before.", f"{_PUBLIC_VIT}norm1."),
    (f"{_VIT}layernorm_after.", f"{_PUBLIC_VIT}norm2."),
    (f"{_VIT}lambda_1", f"{_PUBLIC_VIT}ls1"),
    (f"{_VIT}lambda_2", f"{_PUBLIC_VIT}ls2"),
    (f"{_VIT}mlp.", f"{_PUBLIC_VIT}mlp."),
    ("grounding.memory_encoder.fuser.layers.{}.gamma", f"{_SAM2}memory_encoder.fuser.layers.{{}}.g_weight"),
    ("grounding.", _SAM2),
    ("text_hidden_fcs.", "text_hidden_fcs."),
)
# InternLM2 is a Llama with names of its own.
_LAYER, _INTERNLM2_LAYER = "mllm.model.language_model.layers.{}.", "language_model.model.layers.{}."
_INTERNLM2: Pairs = (
    ("mllm.lm_head.", "language_model.output."),
    ("mllm.model.language_model.embed_tokens.", "language_model.model.tok_embeddings."),
    (f"{_LAYER}self_attn.wqkv.", f"{_INTERNLM2_LAYER}attention.wqkv."),
    (f"{_LAYER}self_attn.o_proj.", f"{_INTERNLM2_LAYER}attention.wo."),
    (f"{_LAYER}mlp.gate_proj.", f"{_INTERNLM2_LAYER}feed_forward.w1."),
    (f"{_LAYER}mlp.down_proj.", f"{_INTERNLM2_LAYER}feed_forward.w2."),
    (f"{_LAYER}mlp.up_proj.", f"{_INTERNLM2_LAYER}feed_forward.w3."),
    (f"{_LAYER}input_layernorm.", f"{_INTERNLM2_LAYER}attention_norm."),
    (f"{_LAYER}post_attention_layernorm.", f"{_INTERNLM2_LAYER}ffn_norm."),
    *_PUBLIC,
)
# transformers' own InternVL folders: the names that checkpoints on the hub were written with, then today's.
_TRANSFORMERS: Pairs = (
    ("mllm.lm_head.", "language_model.lm_head."),
    ("mllm.model.language_model.", "language_model.model."),
    ("mllm.model.vision_tower.", "vision_tower."),
    ("mllm.model.multi_modal_projector.", "multi_modal_projector."),
    ("mllm.model.", "model."),
    ("mllm.lm_head.", "lm_head."),
)
_QKV = re.compile(r"(.*)\.([qkv])_proj\.(.*)")


def _rename(name: str, pairs: Pairs, source: int) -> str:
    for pair in pairs:
        pattern = re.escape(pair[source]).replace(r"\{\}", r"(\d+)")
        if match := re.match(pattern, name):
            return pair[1 - source].format(*match.groups()) + name[match.end() :]
    raise VesselError(f"tensor {name} belongs to no part of a Sa2VA")


@dataclass(frozen=True)
class PublicNames:
    """Names of tensors in public Sa2VA and InternVL folders.

    Attributes:
        language: `qwen2` or `internlm2`, as the folder names its language model.
        kv_heads: key and value heads of the language model; InternLM2 stores by them.
        groups: query heads for each of them.
    """

    language: Language = "qwen2"
    kv_heads: int = 1
    groups: int = 1

    @property
    def _pairs(self) -> Pairs:
        return _INTERNLM2 if self.language == "internlm2" else _PUBLIC

    def to_public(self, state: Iterable[NamedTensor]) -> Iterator[NamedTensor]:
        """Rename our tensors to public names; query, key and value are joined where the layout has one tensor."""
        waiting: dict[str, dict[str, Tensor]] = {}
        for name, tensor in state:
            joined = self._joined(name)
            if joined is None:
                yield _rename(name, self._pairs, 0), tensor
                continue
            fused, part = joined
            parts = waiting.setdefault(fused, {})
            parts[part] = tensor
            if len(parts) == 3:
                join = self._join_groups if "wqkv" in fused else torch.cat
                yield _rename(fused, self._pairs, 0), join([parts[k] for k in "qkv"])
                del waiting[fused]
        assert not waiting, f"query, key or value missing for {list(waiting)}"

    def to_native(self, state: Iterable[NamedTensor]) -> Iterator[NamedTensor]:
        """Rename public tensors to ours, the inverse of `to_public`; an adapter of a joined tensor becomes three.

        A tensor that cannot be split by these heads keeps its joined name, which no network has.
        """
        for name, tensor in state:
            native = _rename(name, self._pairs, 1)
            split: Callable[[Tensor], Sequence[Tensor]]
            if ".attention.qkv." in native:
                fused, split = ".qkv.", lambda t: t.chunk(3)
            elif ".self_attn.wqkv." in native and ("lora_A" in native or self._splits(tensor)):
                fused, split = ".wqkv.", self._split_groups
            else:
                yield native, tensor
                continue
            # The first factor of an adapter reads the layer's input, which is the same for all three.
            parts = [tensor] * 3 if "lora_A" in native else split(tensor)
            yield from zip((native.replace(fused, f".{k}_proj.") for k in "qkv"), parts, strict=True)
            del parts  # views would hold their shard in memory

    def _joined(self, name: str) -> tuple[str, str] | None:
        if match := _QKV.fullmatch(name):
            if "vision_tower" in name:
                return f"{match[1]}.qkv.{match[3]}", match[2]
            if self.language == "internlm2" and "language_model" in name:
                return f"{match[1]}.wqkv.{match[3]}", match[2]
        return None

    def _splits(self, tensor: Tensor) -> bool:
        return tensor.shape[0] % (self.kv_heads * (self.groups + 2)) == 0

    def _split_groups(self, tensor: Tensor) -> list[Tensor]:
        """Split [heads * head, d] of InternLM2: for each key head its query heads, then the key, then the value."""
        heads = tensor.unflatten(0, (self.kv_heads, self.groups + 2, -1))
        parts = heads[:, : self.groups], heads[:, -2:-1], heads[:, -1:]
        return [part.flatten(0, 2) for part in parts]

    def _join_groups(self, parts: Sequence[Tensor]) -> Tensor:
        heads = zip(parts, (self.groups, 1, 1), strict=True)
        return torch.cat([part.unflatten(0, (self.kv_heads, n, -1)) for part, n in heads], dim=1).flatten(0, 2)


def from_transformers(state: Iterable[NamedTensor]) -> Iterator[NamedTensor]:
    """Rename tensors of transformers' own InternVL folders to ours."""
    return ((_rename(name, _TRANSFORMERS, 1), tensor) for name, tensor in state)


def from_sam2(state: Iterable[NamedTensor]) -> Iterator[NamedTensor]:
    """Rename tensors of the sam2 package to ours."""
    return ((f"grounding.{name}", tensor) for name, tensor in state)


def from_resnet(state: Iterable[NamedTensor]) -> Iterator[NamedTensor]:
    """Rename tensors of a ResNet of torchvision or timm to ours; its classifier is dropped.

    Older files lack the batch counts of batch normalisation; they are not used, and set to 0.
    """
    tensors = {name: tensor for name, tensor in state if not name.startswith("fc.")}
    for name, tensor in tensors.items():
        yield f"unet.encoder.{name}", tensor
        counted = name.replace("running_var", "num_batches_tracked")
        if counted not in tensors:
            yield f"unet.encoder.{counted}", torch.zeros((), dtype=torch.int64, device=tensor.device)


def public_of_mmengine(name: str) -> str:
    """Translate a name of the public training code's files to that of public folders; adapters keep their suffix."""
    name = name.removeprefix("mllm.model.").replace("language_model.base_model.model.", "language_model.")
    return re.sub(r"(memory_encoder\.fuser\.layers\.\d+)\.gamma$", r"\1.g_weight", name)


def mmengine_of_public(name: str) -> str:
    """Translate a name of a whole network back; the inverse of `public_of_mmengine`."""
    if not name.startswith(("grounding_encoder.", "text_hidden_fcs.")):
        return f"mllm.model.{name}"
    return name.replace(".g_weight", ".gamma")


def public_of_peft(name: str) -> str:
    """Translate a name of a peft adapter of the language model to that of public folders, with the adapter's suffix.

    peft leaves the adapter's name out of its files, and calls a saved copy of a module like the module.
    """
    name = re.sub(r"^base_model\.model\.", "language_model.", name)
    if match := re.fullmatch(r"(.*\.lora_[AB])\.weight", name):
        return f"{match[1]}.default.weight"
    if name.endswith(".trainable_tokens_delta"):
        return f"{name}.default"
    return re.sub(r"(embed_tokens|lm_head|tok_embeddings|output)\.(weight)$", r"\1.modules_to_save.default.\2", name)
