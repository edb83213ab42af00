"""Room on the disk for the checkpoints that a run plans, asked for before it begins."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn

from vessel.disk import readable
from vessel.errors import VesselError

_PER_TENSOR = 512  # names, shapes and the alignment of each stored tensor, about
_PER_FILE = 100_000  # manifest, counters and whatever callbacks keep


def checkpoint_bytes(parameters: Iterable[nn.Parameter], *, keep_frozen: bool, stage: int = 0) -> int:
    """About how large a checkpoint of a network under AdamW is, in bytes.

    Args:
        parameters: of the network, in the dtype they train in; the meta device and parts of ZeRO-3 do.
        keep_frozen: whether frozen parameters are saved too, as where they are not the weights of a source.
        stage: of ZeRO; 0 without DeepSpeed. DeepSpeed keeps the masters of what trains and both moments in float32,
            and below stage 3 the parameters themselves as well.
    """
    total = _PER_FILE
    for parameter in parameters:
        numel, width = getattr(parameter, "ds_numel", parameter.numel()), parameter.element_size()
        if not parameter.requires_grad:
            total += keep_frozen * (numel * width + _PER_TENSOR)
        elif stage == 0:
            total += 3 * (numel * width + _PER_TENSOR)
        else:
            total += numel * (12 if stage == 3 else 12 + width) + _PER_TENSOR
    return int(total)


def planned(callbacks: Iterable[Callback]) -> int:
    """How many checkpoints lie on the disk at once at the most: those that are kept, and the one being written."""
    savers = [callback for callback in callbacks if isinstance(callback, ModelCheckpoint)]
    kept = sum(abs(saver.save_top_k) + bool(saver.save_last) for saver in savers)  # -1 keeps all: their number is open
    return kept + 1 if kept else 0


def require_space(folder: Path, nbytes: int, what: str) -> None:
    """Refuse to begin what the disk has no room for.

    Args:
        folder: where it will be written; it need not exist yet.
        nbytes: that will be written there, beside what is there already.
        what: that is.

    Raises:
        VesselError: says how much is needed and free, and what helps.
    """
    there = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
    free = shutil.disk_usage(there).free
    if free < nbytes:
        raise VesselError(
            f"{folder}: {what} take {readable(nbytes)} and {readable(free)} are free there; make room, put the run on "
            "another disk with hydra.run.dir=FOLDER, or write less: callbacks.checkpoint=null keeps no best one, and a "
            "smaller lora= or trainable=decoder_only makes each smaller"
        )
