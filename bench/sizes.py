"""Networks and batches that the bench measures with, small enough for two CPU cores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from bench.memory import sizes_of
from torch import Tensor

from vessel.batch import Batch, Sample, collate
from vessel.data.prompt import Prompt
from vessel.losses import NativeLoss
from vessel.model.grounding import GroundingConfig
from vessel.model.lora import Lora
from vessel.model.mllm import LanguageConfig, VisionConfig
from vessel.model.sa2va import Sa2VA, Sa2VAConfig
from vessel.weights.build import NetworkPlan

SIDE = 512  # pixels of an image
PHRASES = ("lumen", "side branch", "lipid core", "fibrous cap")
PUBLISHED = Lora(r=128, tokens="full")


@dataclass(frozen=True)
class Case:
    """A network, its trainable part, and the size of its batches.

    Attributes:
        name: in tables.
        sizes: of the network.
        lora, trainable: as in `vessel.weights.build.NetworkPlan`.
        images: of a batch.
        phrases: of an image in training.
    """

    name: str
    sizes: Sa2VAConfig
    lora: Lora
    trainable: str
    images: int = 8
    phrases: int = 1

    @property
    def loss_function(self) -> NativeLoss:
        """Return the product's default loss."""
        return NativeLoss()

    def network(self, prompt: Prompt) -> Sa2VA:
        """Build the network with random weights, the same at every call."""
        torch.manual_seed(0)
        plan = NetworkPlan(self.sizes, prompt.token_ids, prompt.new_tokens, lora=self.lora, trainable=self.trainable)
        network = plan.build()
        assert isinstance(network, Sa2VA)
        return network

    def sample(self, prompt: Prompt, seed: int, *, phrases: int) -> Sample:
        """Make a sample of one tile of noise, with noise for masks."""
        geometry = self.sizes.geometry
        generator = torch.Generator().manual_seed(seed)
        ids, labels = prompt.encode(PHRASES[:phrases], geometry.tokens_per_tile)

        def noise(*shape: int) -> Tensor:
            return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)

        return Sample(
            id=str(seed),
            patient="p",
            video="v",
            phrases=PHRASES[:phrases],
            tiles=noise(1, 3, geometry.tile_size, geometry.tile_size),
            frame=noise(3, geometry.frame_size, geometry.frame_size),
            input_ids=ids,
            labels=labels,
            size=(SIDE, SIDE),
            masks=noise(phrases, SIDE, SIDE) > 200,
        )

    def batch(self, prompt: Prompt) -> Batch:
        """Make a batch of training."""
        samples = [self.sample(prompt, i, phrases=self.phrases) for i in range(self.images)]
        return collate(samples, prompt.token_ids.pad)


SMALL = Case(
    "small",
    Sa2VAConfig(
        LanguageConfig(width=512, layers=8, heads=8, kv_heads=2, mlp=1408, vocabulary=151_679, context=4096),
        VisionConfig(tile_size=448, width=192, layers=4, heads=4, mlp=768),
        GroundingConfig(
            frame_size=512, embed_dim=24, heads=1, stages=(1, 2, 3, 1), windows=(8, 4, 8, 4), global_blocks=(4,),
            width=128, memory_width=16, memory_layers=1, memory_mlp=256,
        ),
        max_tiles=1,
    ),
    PUBLISHED,
    "lora",
)  # fmt: skip
ENCODERS = Case(
    "encoders",
    Sa2VAConfig(
        LanguageConfig(width=128, layers=4, heads=4, kv_heads=2, mlp=352, vocabulary=512, context=4096),
        VisionConfig(tile_size=448, width=256, layers=8, heads=4, mlp=1024),
        GroundingConfig(
            frame_size=512, embed_dim=32, heads=1, stages=(1, 2, 7, 2), windows=(8, 4, 8, 4), global_blocks=(5, 7),
            width=64, memory_width=16, memory_layers=1, memory_mlp=128,
        ),
        max_tiles=1,
    ),
    Lora(r=16, tokens="full"),
    "lora",
    images=4,
)  # fmt: skip


def tiny() -> Case:
    """Return the network that `experiment=tiny` trains, every parameter of it."""
    return Case("tiny", sizes_of("experiment=tiny"), Lora(r=0), "all", images=4)
