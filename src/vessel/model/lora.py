"""LoRA on the language model and trainable token rows: injected by peft, folded in for export."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor, nn

from vessel.errors import VesselError
from vessel.model.network import Network
from vessel.model.sa2va import Sa2VA

if TYPE_CHECKING:
    from peft import LoraConfig

_ADAPTER = "default"
_ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_OF_ADAPTERS = re.compile(r"\.lora_[AB]\.|\.modules_to_save\.|\.trainable_tokens_delta\.")


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters (arXiv 2106.09685) on every linear layer of the language model.

    Attributes:
        r: rank; 0 stands for no adapters.
        alpha_ratio: alpha over rank; the update is scaled by it.
        dropout: dropout before the adapter.
        tokens: `full`: trainable copies of embedding and head, as the public code; `new`: only the rows of added
            tokens; `frozen`: neither, for a network whose `[SEG]` rows are trained already.
    """

    r: int = 128
    alpha_ratio: float = 2.0
    dropout: float = 0.05
    tokens: str = "full"


def add_lora(network: Network, lora: Lora, *, new_tokens: range, seg_is_trained: bool) -> None:
    """Inject adapters in place; the base of every adapted layer is frozen.

    Args:
        network: without adapters.
        lora: rank and kind.
        new_tokens: ids of the tokens added to the base vocabulary, `[SEG]` among them.
        seg_is_trained: the weights come from a Sa2VA, whose `[SEG]` rows are trained.

    Raises:
        VesselError: there is no language model to adapt, `tokens` is none of the three, or `[SEG]` would be random and
            frozen.
    """
    if not isinstance(network, Sa2VA):
        raise VesselError(f"lora.r={lora.r}: this network has no language model to adapt; leave lora.r=0")
    if lora.tokens not in ("full", "new", "frozen"):
        raise VesselError(f"lora.tokens={lora.tokens}: use full, new or frozen")
    if lora.tokens == "frozen" and not seg_is_trained:
        raise VesselError(
            "lora.tokens=frozen leaves the rows of [SEG] random for ever: the token would never be emitted. "
            "Use lora.tokens=full or new, or start from the weights of a Sa2VA"
        )
    from peft import LoraConfig, inject_adapter_in_model

    rows = list(new_tokens)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=int(lora.r * lora.alpha_ratio),
        lora_dropout=lora.dropout,
        target_modules=rf".*language_model\..*\.({'|'.join(_ADAPTED)})",
        modules_to_save=["embed_tokens", "lm_head"] if lora.tokens == "full" else None,
        trainable_token_indices={"embed_tokens": rows, "lm_head": rows} if lora.tokens == "new" else None,
    )
    inject_adapter_in_model(config, network.mllm)


def is_adapter(name: str) -> bool:
    """Return True for a tensor of an adapter or of a trained copy of embedding or head."""
    return bool(_OF_ADAPTERS.search(name))


def merged_name(name: str) -> str:
    """Return the name, in a network without adapters, of the tensor that this one is or changes."""
    name = re.sub(rf"\.(lora_[AB]|modules_to_save)\.{_ADAPTER}\.", ".", name)
    name = re.sub(rf"\.token_adapter\.trainable_tokens_delta\.{_ADAPTER}$", ".weight", name)
    return re.sub(r"\.(token_adapter\.)?(base_layer|original_module)\.", ".", name)


def merged_state(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the network's tensors with adapters folded in, under the names of a network without adapters.

    Every adapted weight is W + (alpha / r) B A, computed in float32; the live network is not touched.

    Yields:
        name and tensor, on the CPU; float32 for merged weights, as stored otherwise.
    """
    from peft.tuners.lora import Linear as LoraLinear
    from peft.utils.other import TrainableTokensWrapper

    merged = set()
    for prefix, module in network.named_modules():
        if isinstance(module, LoraLinear):
            base: nn.Module = module.get_base_layer()
            weight = base.get_parameter("weight").detach().float().cpu()
            yield f"{prefix}.weight", weight + module.get_delta_weight(_ADAPTER).detach().float().cpu()
            merged.add(f"{prefix}.weight")
        elif isinstance(module, TrainableTokensWrapper):
            merged_rows: Tensor = module.token_adapter.get_merged_weights([_ADAPTER])
            yield f"{prefix}.weight", merged_rows.detach().float().cpu()
            merged.add(f"{prefix}.weight")
    for name, tensor in network.state_dict().items():
        if merged_name(name) not in merged and ".original_module." not in name:
            yield merged_name(name), tensor.detach().cpu()


def adapter_state(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield adapters and trained copies as peft names them in a folder of the language model alone, on the CPU."""
    for name, tensor in network.state_dict().items():
        if is_adapter(name):
            language = name.replace("mllm.model.language_model.", "model.").removeprefix("mllm.")
            plain = language.replace(".modules_to_save", "").replace(f".{_ADAPTER}", "")
            yield f"base_model.model.{plain}", tensor.detach().cpu()


def adapter_config(network: Sa2VA, *, base: str | None, revision: str | None) -> LoraConfig:
    """Build the configuration with which peft puts those adapters into the language model alone.

    Args:
        network: with adapters.
        base: hub id of the network they were trained on; None where it has none.
        revision: of that.
    """
    injected: LoraConfig = network.mllm.peft_config[_ADAPTER]  # type: ignore[assignment]  # peft sets it
    return replace(
        injected,
        task_type="CAUSAL_LM",
        target_modules=list(_ADAPTED),
        base_model_name_or_path=base or "",
        revision=revision,
        inference_mode=True,
    )
