"""Build networks of true sizes with random weights on the device, and batches of random images for them."""

from __future__ import annotations

from dataclasses import replace

import torch

from vessel.batch import Batch, FeaturePyramid, Features, Sample
from vessel.data.prompt import Prompt
from vessel.memory_plan.plan import Images, Setup, batch_of
from vessel.model.lora import Lora
from vessel.model.sa2va import Sa2VA
from vessel.weights.build import NetworkPlan


def frozen_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of frozen weights, as the recipes have it for a device."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def network_of(setup: Setup, prompt: Prompt, device: torch.device, *, compiled: bool = False) -> Sa2VA:
    """Build the network as `vessel.train` does, with random weights made on the device in the dtype that they keep.

    Args:
        setup: sizes, adapters, trainable groups and activation checkpointing.
        prompt: whose tokens it has.
        device: of the weights.
        compiled: by torch's compiler; on the CPU its graphs are made and run as they are.
    """
    plan = NetworkPlan(
        setup.sizes,
        prompt.token_ids,
        prompt.new_tokens,
        setup.images.names,
        lora=setup.lora,
        trainable=setup.trainable,
        activation_checkpointing=setup.activation_checkpointing,
        frozen_dtype=frozen_dtype(device),
    )
    usual = torch.get_default_dtype()
    torch.set_default_dtype(frozen_dtype(device))
    try:
        with torch.device(device):
            network = plan.build()
    finally:
        torch.set_default_dtype(usual)
    assert isinstance(network, Sa2VA)
    if compiled:
        network.compile_layers(*(() if device.type == "cuda" else ("eager",)))
    return network


def for_prediction(setup: Setup) -> Setup:
    """Return the same network as a prediction has it: adapters folded in, nothing trains."""
    return replace(setup, lora=Lora(r=0), trainable="nothing", activation_checkpointing=False)


def batch_for(setup: Setup, prompt: Prompt, device: torch.device) -> Batch:
    """Make a batch of random images in the host's memory, as a loader does for that device."""
    planned = batch_of(setup, prompt)
    filled = replace(
        planned,
        tiles=_pixels(planned.tiles.shape),
        frames=_pixels(planned.frames.shape),
        masks=tuple(torch.rand(mask.shape) < 0.06 for mask in planned.masks or ()),
        input_ids=planned.input_ids.contiguous(),
        labels=planned.labels.contiguous(),
    )
    return filled.pin_memory() if device.type == "cuda" else filled


def with_features(network: Sa2VA, batch: Batch, setup: Setup, device: torch.device) -> Batch:
    """Return the same batch with the features of the frozen encoders, in the host's memory, as a cache gives them."""
    made = []
    for tiles, frame in zip(batch.tiles.split(setup.tiles), batch.frames, strict=True):
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            tile_features, pyramid = network.encode_tiles(tiles), network.encode_frame(frame[None])
            made.append(
                Features(tile_features, FeaturePyramid(*pyramid)).map(
                    lambda tensor: tensor.to("cpu", frozen_dtype(device))
                )
            )
    known = replace(batch, tiles=batch.tiles[:0], frames=batch.frames[:0], features=tuple(made))
    return known.pin_memory() if device.type == "cuda" else known


def sample_for(setup: Setup, prompt: Prompt, *, phrases: int = 1, tiles: int | None = None) -> Sample:
    """Make a random image with random masks.

    Args:
        setup: sizes of network and image.
        prompt: questions and answers.
        phrases: their number.
        tiles: their number; None derives it from the image's size.
    """
    geometry, names, tiles = (
        setup.sizes.geometry,
        Images(phrases=phrases).names,
        setup.tiles if tiles is None else tiles,
    )
    ids, labels = prompt.encode(names, tiles * geometry.tokens_per_tile)
    return Sample(
        id="0",
        patient="",
        video="",
        phrases=names,
        tiles=_pixels((tiles, 3, geometry.tile_size, geometry.tile_size)),
        frame=_pixels((3, geometry.frame_size, geometry.frame_size)),
        input_ids=ids,
        labels=labels,
        size=setup.images.size,
        masks=torch.rand(phrases, *setup.images.size) < 0.06,
    )


def _pixels(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randint(256, shape, dtype=torch.uint8)
