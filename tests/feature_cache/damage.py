"""A callback that spoils a cache in the middle of a run."""

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override


class Damage(Callback):
    """When the first epoch begins: flips a bit in every other file of the cache that was just filled.

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
                # As a disk would do it, under the same name; but a reader that has it open keeps what it had.
                file.unlink()
                file.write_bytes(content)
