"""A system of a few weights with the contract of VesselTask, real batches, and a quiet trainer."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from vessel.batch import Batch, StepOutput

SIZE = (12, 16)
PHRASES = ("lumen", "cap")


def make_batch(number: int, images: int = 2) -> Batch:
    """Make images of bright discs on noise; image 0 of video v<number>."""
    generator = torch.Generator().manual_seed(number)
    frames = torch.randint(0, 90, (images, 3, 8, 8), generator=generator, dtype=torch.uint8)
    frames[:, :, 2:6, 2:6] += 150
    masks = torch.zeros(2, *SIZE, dtype=torch.bool)
    masks[0, 3:9, 4:12] = True
    return Batch(
        ids=tuple(f"p{number}/v{number}_{i:03d}" for i in range(images)),
        patients=(f"p{number}",) * images,
        videos=(f"v{number}",) * images,
        phrases=(PHRASES,) * images,
        sizes=(SIZE,) * images,
        tiles=torch.zeros(images, 3, 2, 2, dtype=torch.uint8),
        frames=frames,
        input_ids=torch.zeros(images, 3, dtype=torch.int64),
        attention_mask=torch.ones(images, 3, dtype=torch.bool),
        labels=torch.zeros(images, 3, dtype=torch.int64),
        masks=(masks,) * images,
    )


class ToyNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(3, 3, 1)
        self.projector = nn.Conv2d(3, 4, 1)
        self.mask_decoder = nn.Conv2d(4, len(PHRASES), 1)
        self.encoder.requires_grad_(False)

    def trainable_groups(self):
        return {name: list(getattr(self, name).named_parameters(name)) for name in ("projector", "mask_decoder")}

    def forward(self, batch: Batch):
        features = self.projector(self.encoder(batch.frames / 255)).tanh()
        return F.interpolate(self.mask_decoder(features), SIZE)


class ToyTask(LightningModule):
    def __init__(self, lr: float = 0.1, warmup: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network, self.lr, self.warmup = ToyNetwork(), lr, warmup

    def _step(self, batch: Batch) -> StepOutput:
        logits = self.network(batch)
        loss = F.binary_cross_entropy_with_logits(logits, torch.stack(batch.masks).float())
        return StepOutput(loss=loss, probabilities=tuple(logits.sigmoid()))

    def training_step(self, batch: Batch, batch_idx: int):
        return self._step(batch).loss

    def validation_step(self, batch: Batch, batch_idx: int):
        return self._step(batch)

    def test_step(self, batch: Batch, batch_idx: int):
        return self._step(batch)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr)
        if not self.warmup:
            return optimizer
        rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / self.warmup))
        return [optimizer], [{"scheduler": rate, "interval": "step"}]


@pytest.fixture
def batches():
    return lambda count=3: DataLoader([make_batch(i) for i in range(count)], batch_size=None)


@pytest.fixture
def toy_task():
    return ToyTask


@pytest.fixture
def trainer(tmp_path):
    """Build a trainer whose run folder is tmp_path."""

    def build(*callbacks, **options) -> Trainer:
        defaults = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "num_sanity_val_steps": 0}
        return Trainer(
            default_root_dir=tmp_path,
            callbacks=list(callbacks),
            accelerator="cpu",
            enable_progress_bar=False,
            enable_model_summary=False,
            log_every_n_steps=1,
            **(defaults | options),
        )

    return build
