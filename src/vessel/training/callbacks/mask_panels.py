"""Panels of the same few validation images after every validation, on which people see the network learn."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from vessel.batch import Batch, StepOutput
from vessel.data.images import read_rgb
from vessel.loggers import log_figure
from vessel.metrics.overlap import count, dice
from vessel.plotting.panels import panel_figure
from vessel.training.callbacks.validation import ValidationCallback


@dataclass(frozen=True)
class _Panel:
    id: str
    video: str
    phrases: tuple[str, ...]
    image: Tensor  # uint8 [H, W, 3]
    masks: Tensor  # bool [K, H, W]
    probability: Tensor  # float32 [K, H, W]


class MaskPanels(ValidationCallback):
    """A drawing of image, ground truth, probability and errors: `<run>/panels/step_000250_<id>.png` and the loggers.

    The images are chosen in the first validation: the first ones, but of different videos as far as possible, since the
    frames of a video look alike. Files and titles carry the data set's ids, which are pseudonyms.

    Args:
        images: how many.
        every_n_validations: draw at the first validation and then at every n-th.
        threshold: for the errors and the Dice of the panel.
    """

    def __init__(self, images: int = 4, every_n_validations: int = 1, threshold: float = 0.5) -> None:
        self.images = images
        self.every_n_validations = every_n_validations
        self.threshold = threshold
        self._chosen: frozenset[str] = frozenset()
        self._panels: list[_Panel] = []
        self._validations = 0

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._panels = []

    @override
    def collect(self, trainer: Trainer, batch: Batch, outputs: StepOutput) -> None:
        """Keep the images of a batch that are to be drawn."""
        if not trainer.is_global_zero or self._validations % self.every_n_validations:
            return
        for index, (name, video) in enumerate(zip(batch.ids, batch.videos, strict=True)):
            position = self._position(name, video)
            if position is not None:
                self._panels[position : position + 1] = [_panel(trainer, batch, outputs, index)]

    @override
    def conclude(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw what was kept."""
        self._validations += 1
        self._chosen = self._chosen or frozenset(panel.id for panel in self._panels)
        for panel in self._panels:
            self._draw(trainer, panel)
        self._panels = []

    def _position(self, name: str, video: str) -> int | None:
        """Return the position of an image among the kept panels; None where it has none."""
        if any(panel.id == name for panel in self._panels):
            return None
        if self._chosen:
            return len(self._panels) if name in self._chosen else None
        if len(self._panels) < self.images:
            return len(self._panels)
        videos = [panel.video for panel in self._panels]
        repeated = [i for i, other in enumerate(videos) if other in videos[:i]]
        return repeated[-1] if repeated and video not in videos else None

    def _draw(self, trainer: Trainer, panel: _Panel) -> None:
        counts = count(panel.probability, panel.masks, torch.tensor([self.threshold]))
        labels = [f"{p} · Dice {d:.3f}" for p, d in zip(panel.phrases, dice(counts)[0].tolist(), strict=True)]
        figure = panel_figure(
            panel.image.numpy(),
            panel.masks.numpy(),
            panel.probability.numpy(),
            threshold=self.threshold,
            labels=labels,
            title=f"{panel.id}, step {trainer.global_step}, threshold {self.threshold:.2f}",
        )
        name = re.sub(r"[^\w.-]", "_", panel.id)
        file = Path(trainer.default_root_dir) / "panels" / f"step_{trainer.global_step:06d}_{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file)
        log_figure(trainer.loggers, f"panels/{name}", file, trainer.global_step)


def _panel(trainer: Trainer, batch: Batch, outputs: StepOutput, index: int) -> _Panel:
    assert batch.masks is not None
    return _Panel(
        id=batch.ids[index],
        video=batch.videos[index],
        phrases=batch.phrases[index],
        image=_image(trainer, batch, index),
        masks=batch.masks[index].cpu(),
        probability=outputs.probabilities[index].float().cpu(),
    )


def _image(trainer: Trainer, batch: Batch, index: int) -> Tensor:
    """Return the image uint8 [H, W, 3] at its own size."""
    features = batch.features or (None,) * len(batch)
    if features[index] is not None:  # its frame is not in the batch
        catalog = trainer.datamodule.catalog  # type: ignore[attr-defined]  # features come from our data module only
        return torch.from_numpy(read_rgb(catalog.root / catalog.frames[batch.ids[index]].image))
    # The SAM2 frame is the image squeezed into a square; bring it back to the image's own size.
    squeezed = batch.frames[features[:index].count(None)][None].float()
    frame = F.interpolate(squeezed, batch.sizes[index], mode="bilinear", antialias=True)
    return frame[0].permute(1, 2, 0).round().clamp(0, 255).byte().cpu()
