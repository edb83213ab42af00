"""A callback that damages a cache in the middle of a run."""

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override


class Damage(Callback):
    """Flips a bit in every other file of a cache that was just filled, at the start of the first epoch.

    Args:
        root: of the cache.
    """

    def __init__(self, root: str) -> None:
        self.root = Path(root)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 0 and trainer.is_global_zero:
            for file in sorted(self.root.rglob("*.safetensors"))[::2]:
                content = bytearray(file.read_bytes())
                content[-7] ^= 1
                # Damage on a disk keeps the name; but here a reader that has the file open keeps the old content.
                file.unlink()
                file.write_bytes(content)
