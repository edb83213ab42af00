"""LoRA on the language model and trainable token rows: injected by peft, folded in for export."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn

from vessel.errors import VesselError
from vessel.model.sa2va import Sa2VA

_ADAPTER = "default"


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


def add_lora(network: Sa2VA, lora: Lora, *, new_tokens: range, seg_is_trained: bool) -> None:
    """Inject adapters in place; the base of every adapted layer is frozen.

    Args:
        network: without adapters.
        lora: rank and kind.
        new_tokens: ids of the tokens added to the base vocabulary, `[SEG]` among them.
        seg_is_trained: the weights come from a Sa2VA, whose `[SEG]` rows are trained.

    Raises:
        VesselError: `tokens` is none of the three, or `[SEG]` would be random and frozen.
    """
    if lora.tokens not in ("full", "new", "frozen"):
        raise VesselError(f"lora.tokens={lora.tokens}: use full, new or frozen")
    if lora.tokens == "frozen" and not seg_is_trained:
        raise VesselError(
            "lora.tokens=frozen leaves the rows of [SEG] random for ever: the token would never be emitted. "
            "Use lora.tokens=full or new, or start from the weights of a Sa2VA"
        )
    rows = list(new_tokens)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=int(lora.r * lora.alpha_ratio),
        lora_dropout=lora.dropout,
        target_modules=r".*language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
        modules_to_save=["embed_tokens", "lm_head"] if lora.tokens == "full" else None,
        trainable_token_indices={"embed_tokens": rows, "lm_head": rows} if lora.tokens == "new" else None,
    )
    inject_adapter_in_model(config, network.mllm)


def merged_state(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The network's tensors with adapters folded in, under the names of a network without adapters.

    Every adapted weight is W + (alpha / r) B A, computed in float32; the live network is not touched.

    Yields:
        name and tensor, on the CPU; float32 for merged weights, as stored otherwise.
    """
    merged = set()
    for prefix, module in network.named_modules():
        if isinstance(module, LoraLinear):
            base: nn.Module = module.get_base_layer()
            weight = base.get_parameter("weight").detach().float().cpu()
            yield f"{prefix}.weight", weight + module.get_delta_weight(_ADAPTER).detach().float().cpu()
            merged.add(f"{prefix}.base_layer.weight")
        elif isinstance(module, TrainableTokensWrapper):
            merged_rows: Tensor = module.token_adapter.get_merged_weights([_ADAPTER])
            yield f"{prefix}.weight", merged_rows.detach().float().cpu()
    for name, tensor in network.state_dict().items():
        if "lora_" in name or "token_adapter" in name or "original_module" in name or name in merged:
            continue
        plain = name.replace(".base_layer.", ".").replace(f".modules_to_save.{_ADAPTER}.", ".")
        yield plain, tensor.detach().cpu()
