"""Callbacks that record a run for the tests of resuming, and a rank of it: `torchrun resume_ranks.py OVERRIDE...`."""

import json
import os
import sys
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch import Callback

from vessel.cli.conf import CONF
from vessel.training.run import train


class Recorder(Callback):
    """A writer of a line a batch, with samples and the exact loss, and a line a validation, with its exact numbers."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        loss = float(outputs["loss"]) * trainer.accumulate_grad_batches
        moments = {"epoch": trainer.current_epoch, "batch": batch_idx, "step": trainer.global_step}
        self._write(trainer, {**moments, "ids": batch.ids, "tiles": int(batch.tiles.sum()), "loss": loss.hex()})

    def on_validation_end(self, trainer, pl_module):
        numbers = {k: float(v).hex() for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        self._write(trainer, {"validated": trainer.global_step, **numbers})

    def on_train_epoch_end(self, trainer, pl_module):
        self._write(trainer, {"ended": trainer.current_epoch})

    def on_train_end(self, trainer, pl_module):
        parameters = [p.detach().double().sum() for p in pl_module.parameters() if p.requires_grad]
        self._write(trainer, {"trained": float(torch.stack(parameters).sum())})

    def _write(self, trainer, record):
        self.folder.mkdir(exist_ok=True)
        with (self.folder / f"rank{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")


class SaveAt(Callback):
    """A saver of a checkpoint named `HOOK-N` at the N-th call (1-based) of each hook given: `{"train_batch": [3]}`."""

    def __init__(self, folder: str, **calls: list[int]) -> None:
        self.folder, self.calls, self.counts = Path(folder), calls, dict.fromkeys(calls, 0)

    def _called(self, trainer, hook):
        self.counts[hook] = self.counts.get(hook, 0) + 1
        if self.counts[hook] in self.calls.get(hook, []):
            trainer.save_checkpoint(self.folder / f"{hook}-{self.counts[hook]}.ckpt")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._called(trainer, "train_batch")

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self._called(trainer, "validation_batch")

    def on_validation_end(self, trainer, pl_module):
        self._called(trainer, "validation")

    def on_train_epoch_end(self, trainer, pl_module):
        self._called(trainer, "epoch")

    def on_train_end(self, trainer, pl_module):
        self._called(trainer, "end")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with initialize_config_dir(CONF, version_base="1.3"):
        configuration = compose("train", sys.argv[1:])
    train(configuration)
    sys.stdout.flush()
    os._exit(0)  # threads of gloo now and then abort an interpreter that ends by itself
