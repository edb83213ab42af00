"""Disk space for the checkpoints that a run will write, checked before it begins."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn

from vessel.files import require_space

_PER_TENSOR = 512  # names, shapes and the alignment of each stored tensor, about
_PER_FILE = 100_000  # manifest, counters and states of callbacks


def checkpoint_bytes(parameters: Iterable[nn.Parameter], *, keep_frozen: bool, stage: int = 0) -> int:
    """Estimate the size of a checkpoint of a network under AdamW, in bytes.

    Args:
        parameters: of the network, in the dtype they train in; on the meta device or partitioned by ZeRO-3 as well.
        keep_frozen: save frozen parameters too, as where they come from no source of weights.
        stage: of ZeRO; 0 without DeepSpeed. DeepSpeed keeps the master weights and both moments in float32,
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


def count_checkpoints(callbacks: Iterable[Callback]) -> int:
    """Count the checkpoints that lie on the disk at once at most: those that are kept, and the one being written."""
    savers = [callback for callback in callbacks if isinstance(callback, ModelCheckpoint)]
    kept = sum(abs(saver.save_top_k) + bool(saver.save_last) for saver in savers)  # -1 keeps all: their number is open
    return kept + 1 if kept else 0


def require_checkpoint_space(run: Path, nbytes: int, number: int) -> None:
    """Refuse a run whose checkpoints the disk would not hold.

    Args:
        run: its folder, which need not exist yet.
        nbytes: of all of them, beside those already on the disk.
        number: of checkpoints.

    Raises:
        VesselError: names the bytes needed and free, and options that need less.
    """
    remedy = (
        "put the run on another disk with hydra.run.dir=FOLDER, or write less: callbacks.checkpoint=null keeps no best "
        "one, and a smaller lora.r or trainable=decoder_only makes each smaller"
    )
    require_space(run, nbytes, f"{number} checkpoints", remedy)
