"""Check that an export differs from its base in all that trained."""

from __future__ import annotations

import torch

from vessel.errors import VesselError
from vessel.inference.loading import LoadedModel
from vessel.weights.architecture import public_names
from vessel.weights.digests import digests
from vessel.weights.export import trained_changes
from vessel.weights.recognition import open_source


def compare_with_base(model: LoadedModel, dtype: torch.dtype) -> str:
    """Compare every trained group with all that the training started from.

    Args:
        model: what is exported.
        dtype: of the export, which decides what is left of a difference.

    Returns:
        fingerprints before and after, a sentence.

    Raises:
        VesselError: a group equals its base in every tensor; names it.
    """
    if not model.network.trainable_groups():
        return "nothing was trained here: the same network in another form"
    if not model.base:
        return "no base to differ from: training began with random weights"
    names, before = public_names(model.sa2va_config.language), dict[str, str]()
    for entry, report in zip(model.base, model.reports[:-1], strict=True):
        loaded = set(report.names("loaded"))
        tensors = open_source(entry).tensors(names)
        before |= digests((name, tensor.to(dtype)) for name, tensor in tensors if name in loaded)
    changes = trained_changes(model.sa2va, before, dtype)
    if same := [group for group, (old, new) in changes.items() if old == new]:
        raise VesselError(
            f"{', '.join(same)}: to be trained, yet equal to the base in every tensor. Either the wrong checkpoint was "
            "named or nothing was learnt there; nothing was exported"
        )
    told = ", ".join(f"{group} {old[:8]} -> {new[:8]}" for group, (old, new) in changes.items())
    return f"every trained group differs from its base: {told}"
