"""Find the checkpoint that a run resumes from, and make sure that it may."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lightning import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig

from vessel.checkpoints.reading import find_checkpoint, find_newest_intact
from vessel.errors import VesselError
from vessel.paths import expanded
from vessel.runs.manifest import EXPORT_MANIFEST, Manifest
from vessel.runs.record import differing
from vessel.weights.digests import fingerprint
from vessel.weights.recognition import open_source
from vessel.weights.zero import is_zero_folder


def find_start(config: DictConfig, run: Path) -> Path | None:
    """Find the checkpoint to resume from: of this very folder with `resume=`, else the one that `ckpt=` names.

    Args:
        config: of the run.
        run: its folder.

    Returns:
        the checkpoint; None for a new run.

    Raises:
        VesselError: the run that is named has no good checkpoint, or `ckpt=` is an export.
    """
    if config.resume is not None:
        found, skipped = find_newest_intact(run)
        if found is None and config.resume != "auto":
            reasons = "".join(f"\n  {reason}" for reason in skipped) or " it has none"
            raise VesselError(f"resume={config.resume}: no good checkpoint to go on from;{reasons}")
        _print_skipped(run, found, skipped)
        if found is not None:
            return found
    if config.ckpt is None:
        return None
    path = expanded(config.ckpt)
    if (path / EXPORT_MANIFEST).is_file():
        raise VesselError(
            f"ckpt={config.ckpt}: an export has no optimizer to go on with; start from it with weights=[{config.ckpt}]"
        )
    return find_checkpoint(path, ("last", "best")) if path.is_dir() else path


def continued(manifest: Manifest, parent: Manifest, resumed: Path, run: Path) -> Manifest:
    """Return the manifest of a run that continues another one, which may be that very run.

    Args:
        manifest: of the run that begins.
        parent: of the run that wrote the checkpoint.
        resumed: the checkpoint.
        run: folder of the run that begins.

    Raises:
        VesselError: data, split or phrases differ, or with `resume=auto` any other setting.
    """
    same = ("fingerprint", "split_hash", "fold")
    different = [key for key in same if parent.data.get(key) != manifest.data.get(key)]
    if different or parent.phrases != manifest.phrases:
        raise VesselError(
            f"ckpt={resumed}: {', '.join(different) or 'phrases'} of that run differ from this one's: patients it was "
            "trained on could be validated on; go on with its own data set, split and phrases"
        )
    if resumed.is_relative_to(run):
        if manifest.config["resume"] == "auto" and (others := differing(parent.config, manifest.config)):
            listed = ", ".join(others)
            raise VesselError(f"{run}: trained with other settings: {listed}; resume={run} goes on with these")
        return replace(manifest, created=parent.created, parent=parent.parent)
    return replace(
        manifest, parent={"name": parent.name, "fingerprint": fingerprint(open_source(str(resumed)).tensors())}
    )


def require_same_engine(resumed: Path | None, trainer: Trainer) -> None:
    """Refuse to resume a checkpoint of ZeRO with another engine.

    Raises:
        VesselError: says what to do instead.
    """
    if resumed is not None and is_zero_folder(resumed) and not isinstance(trainer.strategy, DeepSpeedStrategy):
        raise VesselError(
            f"{resumed}: written under ZeRO, whose optimizer only ZeRO takes over: go on with trainer=zero3, on one "
            f"device with trainer.devices=1 too; or begin with its weights, weights=[...,{resumed}]"
        )


@rank_zero_only
def _print_skipped(run: Path, found: Path | None, skipped: Sequence[str]) -> None:
    for reason in skipped:
        print(f"passed over {reason}")
    if skipped and found is None:
        print(f"no good checkpoint in {os.path.relpath(run)}: training begins anew")
