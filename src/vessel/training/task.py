"""The system around the network: steps, losses, metrics, optimizer, and what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.utilities.types import STEP_OUTPUT, OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from vessel.batch import Batch, Output, StepOutput
from vessel.errors import VesselError
from vessel.losses import Loss, lm_loss
from vessel.metrics.overlap import OverlapSweep
from vessel.model.network import Network
from vessel.training.datamodule import VesselDataModule
from vessel.training.optimizer import OptimizerSettings
from vessel.training.resume import set_loop_counters
from vessel.weights.partition import full_shape


class VesselTask(LightningModule):
    """A network in training, validation and test.

    Args:
        build: makes the network, weights loaded and adapters added; called once, by `configure_model`.
        loss_function: mask loss and weight of the language-model loss.
        optimizer: learning rate, its schedule, and weight decay.
        keep_frozen: whether a checkpoint holds frozen tensors too; needed when they are not the weights of a source.
        manifest: plain facts of the run that every checkpoint carries.
    """

    def __init__(
        self,
        build: Callable[[], Network],
        *,
        loss_function: Loss,
        optimizer: OptimizerSettings,
        keep_frozen: bool,
        manifest: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.build, self.loss_function, self.optimizer_settings = build, loss_function, optimizer
        self.keep_frozen, self.manifest = keep_frozen, dict(manifest)
        self.strict_loading = False  # `on_load_checkpoint` checks by name what has to be there
        self.network: Network | None = None
        self._validated: tuple[int, int] | None = None
        self.val_overlap = OverlapSweep()
        self.test_overlap = OverlapSweep()

    def configure_model(self) -> None:
        """Build the network, under the strategy's own context."""
        if self.network is None:
            self.network = self.build()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute the loss of a batch."""
        return self._step(batch, "train")[0]

    def validation_step(self, batch: Batch, batch_idx: int) -> StepOutput:  # type: ignore[override]
        """Compute loss and probabilities of a batch."""
        return self._scored(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> StepOutput:  # type: ignore[override]
        """Compute loss and probabilities of a batch."""
        return self._scored(batch, "test")

    def on_train_batch_end(self, outputs: STEP_OUTPUT, batch: Batch, batch_idx: int) -> None:
        """Leave out a validation that was done before the run went back to the start of an accumulation."""
        if self._validated == (self.trainer.current_epoch, batch_idx + 1):
            self.trainer.fit_loop.epoch_loop._skip_next_val = True  # early stopping would count it twice

    def on_validation_epoch_end(self) -> None:
        """Log Dice, IoU, precision and recall per image, patient and phrase."""
        self._log_overlap("val")

    def on_test_epoch_end(self) -> None:
        """Log Dice, IoU, precision and recall per image, patient and phrase."""
        self._log_overlap("test")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build AdamW over the trainable parameters, and its schedule by steps."""
        settings = self.optimizer_settings
        trainable = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trainable if len(full_shape(p)) > 1], "weight_decay": settings.weight_decay},
            {"params": [p for p in trainable if len(full_shape(p)) <= 1], "weight_decay": 0.0},
        ]
        optimizer: Optimizer = AdamW(
            [g for g in groups if g["params"]], lr=settings.lr, betas=settings.betas, fused=True
        )
        # It could unscale gradients itself, for which Lightning would refuse to clip them.
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = LambdaLR(optimizer, lambda step: settings.factor(step, steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what cannot be found elsewhere: trained tensors, frozen ones on demand, and the run's manifest."""
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        trained |= set(_statistics(self))
        state = checkpoint["state_dict"]
        if not self.keep_frozen:
            checkpoint["state_dict"] = {name: tensor for name, tensor in state.items() if name in trained}
        checkpoint["vessel"] = self.manifest

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that lacks a tensor this run trains; set Lightning's counters to its position."""
        state = checkpoint["state_dict"]
        own = {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}
        wrong = [n for n, p in own.items() if n not in state or tuple(state[n].shape) != full_shape(p)]
        if wrong:
            raise VesselError(
                f"ckpt: {len(wrong)} of {len(own)} trained tensors are missing or misshapen (first: {wrong[0]}); "
                "resume with the configuration of the run that wrote it"
            )
        for optimizer in checkpoint.get("optimizer_states", ()):
            for group in optimizer.get("param_groups", ()):
                group["fused"] = True  # also of a run that was not
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, VesselDataModule) and data.__class__.__qualname__ in checkpoint:
            position = data.resume_position(checkpoint[data.__class__.__qualname__])
            batches, by_steps = data.training_sampler().batches, self.trainer.max_steps != -1
            set_loop_counters(checkpoint["loops"]["fit_loop"], position, batches_in_epoch=batches, by_steps=by_steps)
            self._validated = (position.epoch, position.batches + position.validated) if position.validated else None

    def _step(self, batch: Batch, stage: str) -> tuple[Tensor, Output]:
        assert self.network is not None
        assert batch.masks is not None
        output = self.network(batch)
        losses = dict(self.loss_function(output.mask_logits, batch.masks, self.network.frame_size))
        losses["lm_loss"] = self.loss_function.lm_weight * lm_loss(output.lm_logits, output.lm_targets)
        loss = torch.stack(list(losses.values())).sum()
        if not len(output.lm_targets):
            del losses["lm_loss"]  # a network without a language model has none to log
        logged = {f"{stage}/{name}": value.detach() for name, value in (losses | {"loss": loss}).items()}
        in_training = stage == "train"
        self.log_dict(
            logged,
            batch_size=len(batch),
            on_step=in_training,
            on_epoch=not in_training,
            sync_dist=not in_training,
        )
        return loss, output

    def _scored(self, batch: Batch, stage: str) -> StepOutput:
        assert self.network is not None
        assert batch.masks is not None
        loss, output = self._step(batch, stage)
        probabilities = self.network.probabilities(output, batch)
        self._overlap(stage).update(
            probabilities,
            batch.masks,
            ids=batch.ids,
            patients=batch.patients,
            phrases=batch.phrases,
        )
        emitted = self.network.emitted(output)
        if len(emitted):
            rate = emitted.float().mean()
            self.log(f"{stage}/seg_emission", rate, batch_size=len(emitted), on_epoch=True, sync_dist=True)
        return StepOutput(loss.detach(), probabilities)

    def _overlap(self, stage: str) -> OverlapSweep:
        return self.val_overlap if stage == "val" else self.test_overlap

    def _log_overlap(self, stage: str) -> None:
        metric = self._overlap(stage)
        self.log_dict({f"{stage}/{name}": value.float() for name, value in metric.compute().items()})
        metric.reset()


def _statistics(module: nn.Module) -> Iterator[str]:
    """Yield the names of buffers that training changes: the statistics of batch normalisation."""
    for prefix, part in module.named_modules():
        if isinstance(part, _BatchNorm):
            yield from (name for name, _ in part.named_buffers(prefix))
