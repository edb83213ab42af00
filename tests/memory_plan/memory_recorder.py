"""A callback that writes what a rank of DeepSpeed holds: `rank<N>.json`, bytes by kind, and its limits."""

import json
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch import Callback
from typing_extensions import override


class MemoryRecorder(Callback):
    """Write what a rank holds after the last step.

    Args:
        out: folder.
    """

    def __init__(self, out: str) -> None:
        self.out = Path(out)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        optimizer: Any = trainer.optimizers[0]
        parts = [getattr(p, "ds_tensor", p) for p in pl_module.parameters()]
        whole = [p for p in pl_module.parameters() if getattr(p, "ds_persist", False)]
        moments = [t for values in optimizer.optimizer.state.values() for t in values.values() if t.ndim]
        stage3 = hasattr(optimizer, "fp32_partitioned_groups_flat")
        masters = optimizer.fp32_partitioned_groups_flat if stage3 else optimizer.single_partition_of_fp32_groups
        limits = trainer.strategy.deepspeed_engine._config.zero_config  # type: ignore[attr-defined]
        facts = {
            "parameters": sum(t.nbytes for t in (*parts, *whole, *pl_module.buffers())),
            "masters": sum(t.nbytes for t in masters),
            "optimizer": sum(t.nbytes for t in moments),
            "gradients": optimizer.grad_partitions_flat_buffer.nbytes if stage3 else None,
            "limits": {
                "bucket": limits.reduce_bucket_size,
                "prefetch": limits.prefetch_bucket_size,
                "live": limits.max_live_parameters,
                "reuse": limits.max_reuse_distance,
                "persistent": limits.param_persistence_threshold,
            },
        }
        (self.out / f"rank{trainer.global_rank}.json").write_text(json.dumps(facts))
