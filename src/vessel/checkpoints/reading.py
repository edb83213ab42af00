"""Checkpoints of a run: found in its folder, and read without running code."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vessel.errors import VesselError
from vessel.model.weights.zero import is_zero, open_zero, written
from vessel.run import MANIFEST


def find_checkpoint(run: Path, kinds: tuple[str, ...] = ("best", "last")) -> Path:
    """The newest checkpoint of a run folder, of the first kind that is there.

    Args:
        run: folder of the run, or a checkpoint that is a folder, as ZeRO-3 writes it.
        kinds: `best` by validation, `last` written.

    Raises:
        VesselError: the folder is no run, or has no checkpoint yet.
    """
    if is_zero(run):
        return run
    for kind in kinds:
        for folder in (run, run / "checkpoints"):
            if found := sorted(folder.glob(f"{kind}*.ckpt"), key=written):
                return found[-1]
    what = "a run without checkpoint" if (run / MANIFEST).is_file() else "neither a run nor an export of vessel"
    raise VesselError(f"{run}: {what}; give a run folder (outputs/<name>/<time>), one of its checkpoints, or an export")


def read_checkpoint(path: Path) -> Mapping[str, Any]:
    """Read a Lightning checkpoint of vessel, a file or what ZeRO-3 writes; code in it is never run.

    Raises:
        VesselError: damaged, or another kind of file, with the remedy.
    """
    try:
        if is_zero(path):
            checkpoint = open_zero(path).beside
        else:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError) as error:
        raise VesselError(
            f"{path}: not a checkpoint that can be read safely ({type(error).__name__}); vessel.train writes "
            "outputs/<name>/<time>/checkpoints/*.ckpt, base weights belong into its `weights=[...]`"
        ) from error
    if not isinstance(checkpoint, dict) or "vessel" not in checkpoint:
        raise VesselError(
            f"{path}: weights, but no checkpoint of vessel.train: nothing says what network or data they belong to. "
            "Base weights belong into `weights=[...]` of vessel.train"
        )
    return checkpoint
