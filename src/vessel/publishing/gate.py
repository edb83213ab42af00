"""What an export and its base must be to each other: the base that the run had, and left behind in all that trained."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vessel.errors import VesselError
from vessel.model.architecture import public_names
from vessel.model.hub import trained_changes
from vessel.model.weights.digests import digests
from vessel.model.weights.entry import Weights
from vessel.model.weights.sources import open_source
from vessel.restore import Restored


def require_same_base(restored: Restored) -> None:
    """Raise VesselError where the base is not, tensor by tensor, the one that the run was trained on."""
    if not restored.network.trainable_groups():
        return
    then = [str(report["fingerprint"]) for report in restored.manifest.weights]
    now = [report.fingerprint for report in restored.reports[:-1]]
    if then != now:
        sources = ", ".join(report.source for report in restored.reports[:-1]) or "none"
        raise VesselError(
            f"base {sources}: its tensors (fingerprint {', '.join(now)}) are not those that the run was trained on "
            f"({', '.join(then)}); put the old ones back. Nothing was exported"
        )


def differs_from_base(restored: Restored, base: Sequence[Weights], dtype: torch.dtype) -> str:
    """Compare every trained group with all that the training started from.

    Args:
        restored: what is exported.
        base: sources in the order of loading.
        dtype: of the export, which decides what is left of a difference.

    Returns:
        fingerprints before and after, a sentence.

    Raises:
        VesselError: a group equals its base in every tensor; names it.
    """
    if not restored.network.trainable_groups():
        return "nothing was trained here: the same network in another form"
    if not base:
        return "no base to differ from: training began with random weights"
    names, before = public_names(restored.sizes.language), dict[str, str]()
    for entry, report in zip(base, restored.reports[:-1], strict=True):
        loaded = set(report.all("loaded"))
        tensors = open_source(entry).tensors(names)
        before |= digests((name, tensor.to(dtype)) for name, tensor in tensors if name in loaded)
    changes = trained_changes(restored.network, before, dtype)
    if same := [group for group, (old, new) in changes.items() if old == new]:
        raise VesselError(
            f"{', '.join(same)}: to be trained, yet equal to the base in every tensor. Either the wrong checkpoint was "
            "named or nothing was learnt there; nothing was exported"
        )
    told = ", ".join(f"{group} {old[:8]} -> {new[:8]}" for group, (old, new) in changes.items())
    return f"every trained group differs from its base: {told}"
