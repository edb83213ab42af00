"""Names that saved configurations may hold and that have moved since: each old name with the one of today."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vessel.hub import PREFIX, is_hub_name

# Classes, as `_target_` names them in manifests, in Hydra's records and in files of users.
CLASSES = {
    **{
        f"vessel.callbacks.{module}.{name}": f"vessel.training.callbacks.{module}.{name}"
        for module, name in {
            "first_step_check": "FirstStepCheck",
            "graceful_stop": "GracefulStop",
            "last_checkpoint": "LastCheckpoint",
            "mask_panels": "MaskPanels",
            "non_finite_stop": "NonFiniteStop",
            "parameter_table": "ParameterTable",
            "step_seeds": "StepSeeds",
            "threshold_sweep": "ThresholdSweep",
            "throughput": "Throughput",
        }.items()
    },
    "vessel.callbacks.feature_cache.FeatureCache": "vessel.feature_cache.callback.FeatureCache",
    "vessel.data.module.VesselDataModule": "vessel.training.datamodule.VesselDataModule",
    "vessel.sharding.Sharded": "vessel.training.zero.ZeroStrategy",
    "vessel.sweep.SweepSummary": "vessel.runs.sweep.SweepSummary",
    "vessel.task.OptimizerSettings": "vessel.training.optimizer.OptimizerSettings",
    "vessel.losses.NativeObjective": "vessel.losses.NativeLoss",
    "vessel.losses.Sa2vaObjective": "vessel.losses.Sa2vaLoss",
    "vessel.model.baselines.PromptedSizes": "vessel.model.baselines.PromptedSam2Config",
    "vessel.model.baselines.UNetSizes": "vessel.model.baselines.UNetConfig",
    "vessel.model.grounding.GroundingSizes": "vessel.model.grounding.GroundingConfig",
    "vessel.model.mllm.LanguageSizes": "vessel.model.mllm.LanguageConfig",
    "vessel.model.mllm.VisionSizes": "vessel.model.mllm.VisionConfig",
    "vessel.model.sa2va.Sizes": "vessel.model.sa2va.Sa2VAConfig",
}
# Keys of a class, by its name of today.
KEYS = {
    "vessel.model.baselines.UNetConfig": {"frame": "frame_size"},
    "vessel.model.grounding.GroundingConfig": {"frame": "frame_size"},
    "vessel.model.mllm.VisionConfig": {"tile": "tile_size"},
}
# Options of the commands, by command: a key, its sub-keys included, or one of its values.
OPTIONS: dict[str, dict[str, str]] = {
    "train": {
        "checkpointing": "activation_checkpointing",
        "model.frame": "model.frame_size",
        "model.grounding.frame": "model.grounding.frame_size",
        "model.vision.tile": "model.vision.tile_size",
        "objective": "loss",
        "sweep=optuna": "sweeper=optuna",
        "sweep=slurm": "launcher=slurm",
        "lora=none": "lora.r=0",
        **{f"lora=r{rank}": f"lora.r={rank}" for rank in (8, 16, 64, 128)},
    },
    "predict": {"low": "hysteresis", "views": "tta"},
}
# What a configuration without adapters once left to the signature.
LORA = {"alpha_ratio": 2.0, "dropout": 0.05, "tokens": "full"}
# The numbers that an augmentation once had for its transforms.
AUGMENTATION = {
    "flip": True, "rotate": 180.0, "scale": 0.1, "shift": 0.05, "brightness": 0.2, "contrast": 0.2, "gamma": 20.0,
    "blur": 0.1, "noise": 0.1,
}  # fmt: skip
_PUBLIC = re.compile(r"(ByteDance/Sa2VA|OpenGVLab/InternVL)[\w.-]*(@[\w.-]+)?")
_OPTION = re.compile(r"([+~]*)([^=]*)(.*)", re.DOTALL)
# Keys of a decision, in decision.json, in metrics.json and in manifests of exports.
DECISION = {"low": "hysteresis", "views": "tta"}


def present_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Replace the old names in a training configuration.

    Args:
        config: plain and nested, as a manifest or Hydra's record holds it; nothing of it is changed.

    Returns:
        a copy whose options and classes have the names of today.
    """
    present = {OPTIONS["train"].get(key, key): _present_classes(child) for key, child in config.items()}
    if isinstance(present.get("lora"), Mapping):
        present["lora"] = {**LORA, **present["lora"]}
    data = present.get("data")
    if isinstance(data, Mapping) and isinstance(data.get("augmentation"), Mapping):
        present["data"] = {**data, "augmentation": _present_augmentation(data["augmentation"])}
    if "weights" in present:
        present["weights"] = [_present_source(entry) for entry in present["weights"] or ()]
    return present


def present_option(option: str, command: str) -> str:
    """Replace the old name in an option as it is typed, such as `objective=sa2va` or `lora=r8,r16`.

    Args:
        option: `key=value`, with Hydra's `+`, `++` or `~` before it, if any.
        command: such as `train`.

    Returns:
        the option of today; the same text where it has no other name.
    """
    sign, key, value = _OPTION.fullmatch(option).groups()  # type: ignore[union-attr]  # which matches any text
    names = OPTIONS.get(command, {})
    head, dot, rest = key.partition(".")
    if key in names:
        return f"{sign}{names[key]}{value}"
    if head in names:
        return f"{sign}{names[head]}{dot}{rest}{value}"
    choices = [names.get(f"{key}={choice}", "").partition("=") for choice in value.removeprefix("=").split(",")]
    if any(not new for new, _, _ in choices):
        return option
    return f"{sign}{choices[0][0]}={','.join(choice for _, _, choice in choices)}"


def present_report(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return a load report of a manifest with the present form of its source."""
    return _present_source(report)


def present_decision(decision: Mapping[str, Any]) -> dict[str, Any]:
    """Replace the old keys of a decision, as `Decision.to_json` gives it, in a copy."""
    return {DECISION.get(key, key): value for key, value in decision.items()}


def _present_source(entry: Any) -> Any:
    """Name the hub in an entry of `weights` that has a commit there, or is of a known owner and is no path here.

    Such entries once held the bare `owner/name`.
    """
    if isinstance(entry, str) and _PUBLIC.fullmatch(entry) and not Path(entry).exists():
        return f"{PREFIX}{entry}"
    if not isinstance(entry, Mapping) or not entry.get("revision") or is_hub_name(entry["source"]):
        return entry
    return {**entry, "source": f"{PREFIX}{entry['source']}"}


def _present_augmentation(node: Mapping[str, Any]) -> Mapping[str, Any]:
    """Spell out the transforms of an augmentation that was once given by numbers."""
    if node.get("_target_") != "vessel.data.transforms.Augmentation" or "transforms" in node:
        return node
    numbers = {**AUGMENTATION, **node}
    rotate, scale, shift, gamma = (numbers[key] for key in ("rotate", "scale", "shift", "gamma"))
    affine = {"rotate": [-rotate, rotate], "scale": [1 - scale, 1 + scale], "translate_percent": [-shift, shift]}
    contrast = {"brightness_limit": numbers["brightness"], "contrast_limit": numbers["contrast"]}
    transforms: list[tuple[str, dict[str, Any]]] = [
        *([("HorizontalFlip", {"p": 0.5}), ("VerticalFlip", {"p": 0.5})] if numbers["flip"] else []),
        ("Affine", {**affine, "p": 0.9}),
        ("RandomBrightnessContrast", {**contrast, "p": 0.5}),
        ("RandomGamma", {"gamma_limit": [100 - gamma, 100 + gamma], "p": 0.3}),
        ("GaussianBlur", {"sigma_limit": [0.3, 1.0], "blur_limit": 0, "p": numbers["blur"]}),
        ("GaussNoise", {"std_range": [0.01, 0.05], "p": numbers["noise"]}),
    ]
    spelt = [{"_target_": f"albumentations.{name}", **arguments} for name, arguments in transforms]
    return {"_target_": node["_target_"], "transforms": spelt}


def _present_classes(node: Any) -> Any:
    if isinstance(node, Mapping):
        target = node.get("_target_")
        target = CLASSES.get(target, target) if isinstance(target, str) else target
        keys = KEYS.get(target, {}) if isinstance(target, str) else {}
        return {
            keys.get(key, key): target if key == "_target_" else _present_classes(child) for key, child in node.items()
        }
    if isinstance(node, list | tuple):
        return [_present_classes(child) for child in node]
    return node
