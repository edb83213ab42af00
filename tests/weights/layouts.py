"""Write small folders and files in the layouts of public checkpoints, with the libraries that write the real ones."""

import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tests.conftest import SIZES
from torch import nn
from transformers import Qwen2ForCausalLM

from vessel.model.sa2va import Sa2VA
from vessel.weights.names import PublicNames

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


_LANGUAGE, _VISION = SIZES.language, SIZES.vision
LANGUAGE_CONFIG = {
    "model_type": "qwen2", "hidden_size": _LANGUAGE.width, "num_hidden_layers": _LANGUAGE.layers,
    "num_attention_heads": _LANGUAGE.heads, "num_key_value_heads": _LANGUAGE.kv_heads,
    "intermediate_size": _LANGUAGE.mlp, "vocab_size": _LANGUAGE.vocabulary, "rms_norm_eps": 1e-6,
    "max_position_embeddings": _LANGUAGE.context, "rope_theta": 1e6, "tie_word_embeddings": False,
}  # fmt: skip
VISION_CONFIG = {
    "hidden_size": _VISION.width, "num_hidden_layers": _VISION.layers, "num_attention_heads": _VISION.heads,
    "intermediate_size": _VISION.mlp, "image_size": _VISION.tile_size, "patch_size": _VISION.patch, "qkv_bias": True,
    "qk_normalization": False, "norm_type": "layer_norm", "layer_norm_eps": 1e-6,
}  # fmt: skip
# config.json of a Sa2VA of the sizes that unit tests use.
CONFIG = {
    "model_type": "sa2va_chat", "template": "qwen_chat", "force_image_size": _VISION.tile_size, "downsample_ratio": 0.5,
    "ps_version": "v2", "select_layer": -1, "min_dynamic_patch": 1, "max_dynamic_patch": 1, "use_thumbnail": True,
    "llm_config": LANGUAGE_CONFIG, "vision_config": VISION_CONFIG,
}  # fmt: skip


def public_state(network: Sa2VA) -> dict[str, torch.Tensor]:
    """Return the tensors of a network without adapters under the names that the published key list confirms."""
    state = network.state_dict().items()
    return {name: tensor.clone().contiguous() for name, tensor in PublicNames().to_public(state)}


def write_folder(folder: Path, state: dict[str, torch.Tensor], *, shards: int = 1, **config) -> Path:
    """Write a Hugging Face folder; several shards get an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    if shards == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names, weight_map = sorted(state), {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: state[name] for name in names[shard::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def write_sa2va(folder: Path, network: Sa2VA, *, shards: int = 1, **config) -> Path:
    return write_folder(folder, public_state(network), shards=shards, **config)


def internvl_state(network: Sa2VA, rows: int) -> dict[str, torch.Tensor]:
    """Return the tensors of the language and vision part alone, with a vocabulary of `rows`."""
    parts = ("vision_model.", "mlp1.", "language_model.")
    state = {name: tensor for name, tensor in public_state(network).items() if name.startswith(parts)}
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        state[name] = state[name][:rows].clone()
    return state


def write_transformers(folder: Path, network: Sa2VA, *, old_names: bool = False) -> Path:
    """Write a folder as transformers writes its own InternVL today, or as it was written for the hub."""
    network.mllm.save_pretrained(folder)
    if old_names:
        state = {}
        for name, tensor in network.mllm.state_dict().items():
            for ours, theirs in (
                ("model.language_model.", "language_model.model."),
                ("lm_head.", "language_model.lm_head."),
                ("model.", ""),
            ):
                if name.startswith(ours):
                    state[theirs + name.removeprefix(ours)] = tensor.clone()
                    break
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_sam2(file: Path, network: Sa2VA, **more: torch.Tensor) -> Path:
    torch.save({"model": {**network.grounding.state_dict(), **more}}, file)
    return file


def training_tree(network: Sa2VA, rank: int) -> nn.Module:
    """Build the module tree of the public training code around the language model of `network`, adapters by peft."""
    config = network.mllm.config.text_config
    language = Qwen2ForCausalLM(config)
    language.model.load_state_dict(network.mllm.model.language_model.state_dict())
    language.lm_head.load_state_dict(network.mllm.lm_head.state_dict())
    adapters = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=LINEAR, modules_to_save=["embed_tokens", "lm_head"],
        init_lora_weights=False, task_type="CAUSAL_LM",
    )  # fmt: skip
    tree, mllm, model = nn.Module(), nn.Module(), nn.Module()
    model.language_model = get_peft_model(language, adapters)
    projector = network.mllm.model.multi_modal_projector
    model.mlp1 = nn.Sequential(projector.layer_norm, projector.linear_1, nn.GELU(), projector.linear_2)
    mllm.model = model
    tree.mllm = mllm
    grounding, sam2 = nn.Module(), nn.Module()
    sam2.sam_mask_decoder = network.grounding.sam_mask_decoder
    grounding.sam2_model = sam2
    tree.grounding_encoder = grounding
    tree.text_hidden_fcs = network.text_hidden_fcs
    return tree


def training_state(tree: nn.Module) -> dict[str, torch.Tensor]:
    """Make the state of the training code: adapters, saved modules, projector, mask decoder, projection of `[SEG]`."""
    parts = ("lora_", "modules_to_save", "mlp1", "sam_mask_decoder", "text_hidden_fcs")
    return {name: tensor.clone() for name, tensor in tree.state_dict().items() if any(part in name for part in parts)}
