"""Names that saved configurations may hold and that have moved since: each old name with the one of today."""

from __future__ import annotations

from collections.abc import Mapping
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
# Keys at the root of a training configuration.
OPTIONS = {"checkpointing": "activation_checkpointing", "objective": "loss"}
# Keys of a decision, in decision.json, in metrics.json and in manifests of exports.
DECISION = {"low": "hysteresis", "views": "tta"}


def present_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Replace the old names in a training configuration.

    Args:
        config: plain and nested, as a manifest or Hydra's record holds it; nothing of it is changed.

    Returns:
        a copy whose options and classes have the names of today.
    """
    present = {OPTIONS.get(key, key): _present_classes(child) for key, child in config.items()}
    if "weights" in present:
        present["weights"] = [_present_source(entry) for entry in present["weights"] or ()]
    return present


def present_report(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return a load report of a manifest with the present form of its source."""
    return _present_source(report)


def present_decision(decision: Mapping[str, Any]) -> dict[str, Any]:
    """Replace the old keys of a decision, as `Decision.to_json` gives it, in a copy."""
    return {DECISION.get(key, key): value for key, value in decision.items()}


def _present_source(entry: Any) -> Any:
    """Name the hub in an entry of `weights` that has a commit there; such entries once held the bare `owner/name`."""
    if not isinstance(entry, Mapping) or not entry.get("revision") or is_hub_name(entry["source"]):
        return entry
    return {**entry, "source": f"{PREFIX}{entry['source']}"}


def _present_classes(node: Any) -> Any:
    if isinstance(node, Mapping):
        return {
            key: CLASSES.get(child, child) if key == "_target_" else _present_classes(child)
            for key, child in node.items()
        }
    if isinstance(node, list | tuple):
        return [_present_classes(child) for child in node]
    return node
