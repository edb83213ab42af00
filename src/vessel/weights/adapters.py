"""The settings of `adapter_config.json`, and a refusal of all that is not plain LoRA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vessel.errors import VesselError

# Accepted settings: they change no number of a trained adapter, or the tensors show them. Any other setting, also of a
# peft newer than this list, is refused.
_FREE = {
    "base_model_name_or_path", "revision", "task_type", "auto_mapping", "inference_mode", "peft_version",
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform",
    "trainable_token_indices",
    "megatron_core", "qalora_group_size",  # only read by kinds that are refused
}  # fmt: skip
# Initialisations that leave the base weights as they were; others (pissa, olora, ...) change them.
_VALUES: Mapping[str, Sequence[Any]] = {
    "peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": (True, False, "gaussian"),
}  # fmt: skip


def require_plain_lora(config: Mapping[str, Any], new_tokens: range, path: Path) -> None:
    """Refuse an adapter of a kind that vessel does not compute, or with rows of other tokens.

    Args:
        config: content of `adapter_config.json`.
        new_tokens: ids of the tokens added to the base vocabulary.
        path: of the adapter, for the message.

    Raises:
        VesselError: names the setting.
    """
    for key, value in config.items():
        if key in _FREE:
            continue
        if value not in _VALUES[key] if key in _VALUES else value:
            raise VesselError(f"{path}: adapters with {key}={value}; vessel reads plain LoRA")
    rows = config.get("trainable_token_indices") or {}
    for table in rows.values() if isinstance(rows, Mapping) else [rows]:
        if list(table) != list(new_tokens):
            raise VesselError(
                f"{path}: its trained rows are those of tokens {list(table)}, and the added tokens of this network are "
                f"{list(new_tokens)}; choose the prompt= whose tokenizer it was trained with"
            )


def alpha_ratio(config: Mapping[str, Any], path: Path) -> float:
    """Return alpha over rank.

    Args:
        config: content of `adapter_config.json`.
        path: of the adapter, for the message.

    Raises:
        VesselError: one of the two is missing, or is no positive number.
    """
    alpha, rank = config.get("lora_alpha"), config.get("r")
    if not (isinstance(alpha, int | float) and isinstance(rank, int) and rank > 0):
        raise VesselError(f"{path}: adapter_config.json has lora_alpha={alpha} and r={rank}; copy it again")
    return float(alpha / rank)
