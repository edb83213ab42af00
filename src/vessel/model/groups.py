"""Parameter groups, by which a run chooses what trains; modules, by which loads of weights are chosen and reported."""

from __future__ import annotations

from torch import nn

from vessel.errors import VesselError

HEADS = ("iou_prediction_head", "pred_obj_score_head")  # of the mask decoder; no loss reaches them
# First match wins; the rest of SAM2 (video memory, point and mask prompts, object pointers) has no part in images.
GROUPS = (
    ("lora", "lora_"),
    ("tokens", "modules_to_save"),
    ("tokens", "trainable_tokens"),
    ("tokens", "language_model.embed_tokens"),
    ("tokens", "lm_head"),
    ("vision", "vision_tower"),
    ("projector", "multi_modal_projector"),
    ("language", "language_model"),
    ("text_hidden_fcs", "text_hidden_fcs"),
    ("phrase_prompts", "phrase_prompts"),
    ("unet_encoder", "unet.encoder"),
    ("unet_decoder", "unet."),
    *(("frozen heads", head) for head in HEADS),
    ("mask_decoder", "sam_mask_decoder"),
    ("image_encoder", "image_encoder"),
    ("prompt", "not_a_point_embed"),
    ("prompt", "no_mask_embed"),
    ("prompt", "grounding.no_mem_embed"),
)
# First match wins.
MODULES = (
    ("mllm.lora", "lora_"),
    ("mllm.tokens", "embed_tokens"),
    ("mllm.tokens", "lm_head"),
    ("mllm.vision", "vision_tower"),
    ("mllm.projector", "multi_modal_projector"),
    ("mllm.language", "language_model"),
    ("text_hidden_fcs", "text_hidden_fcs"),
    ("phrase_prompts", "phrase_prompts"),
    ("unet.encoder", "unet.encoder"),
    ("unet.decoder", "unet."),
    ("grounding.image_encoder", "image_encoder"),
    ("grounding.mask_decoder", "sam_mask_decoder"),
    ("grounding.prompt_encoder", "sam_prompt_encoder"),
    ("grounding.memory", "grounding."),
)
TRAINABLE = {
    "lora": {"lora", "tokens", "projector", "text_hidden_fcs", "mask_decoder"},
    "decoder_only": {"text_hidden_fcs", "phrase_prompts", "mask_decoder"},
    "nothing": set(),
    "all": {group for group, _ in GROUPS} - {"frozen heads"},
}


def parameter_group(name: str) -> str:
    """Return the group of a parameter, by its name in the network."""
    return next((group for group, part in GROUPS if part in name), "video memory")


def module_of(name: str) -> str:
    """Return the module of a tensor, by its name in its network; `other` for a name that no network has."""
    return next((module for module, part in MODULES if part in name), "other")


def trained_by(choice: str) -> set[str]:
    """Return the groups that train under a choice of `trainable=`.

    Raises:
        VesselError: unknown choice.
    """
    if choice not in TRAINABLE:
        raise VesselError(f"trainable={choice}: use one of {', '.join(TRAINABLE)}")
    return TRAINABLE[choice]


def choose_trainable(network: nn.Module, choice: str) -> None:
    """Set `requires_grad` of every parameter.

    Heads that get no gradient stay frozen in every choice, so that plain DDP works. Where there are adapters, `all`
    keeps the adapted language model frozen and trains everything else.

    Raises:
        VesselError: unknown choice.
    """
    groups = trained_by(choice)
    adapted = any(parameter_group(name) == "lora" or _is_token_adapter(name) for name, _ in network.named_parameters())
    for name, parameter in network.named_parameters():
        group = parameter_group(name)
        is_base = adapted and (group == "language" or (group == "tokens" and not _is_token_adapter(name)))
        parameter.requires_grad_(group in groups and not is_base)


def _is_token_adapter(name: str) -> bool:
    return "modules_to_save" in name or "trainable_tokens" in name


def trainable_groups(network: nn.Module) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Return the trainable parameters by group, in the network's order."""
    groups: dict[str, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(parameter_group(name), []).append((name, parameter))
    return groups
