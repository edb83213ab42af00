"""Features of an image by the frozen encoders of a network, and the digest of all that determines them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vessel.batch import Batch, FeaturePyramid, Features, InputGeometry
from vessel.errors import VesselError
from vessel.model.grounding import trains
from vessel.model.network import Network
from vessel.model.sa2va import Sa2VA
from vessel.weights.digests import digests
from vessel.weights.partition import gathered, is_partitioned

_FORMAT = 2  # to be counted up when tiles, frames, `encode_tiles` or `encode_frame` come out differently
_HEADER = 1024  # of a file, about
_LIBRARIES = ("torch", "transformers", "sam2", "pillow")  # what cuts, resizes and computes


class EncoderInput(NamedTuple):
    """The tiles and the frame of an image, as the encoders take them.

    Attributes:
        key: of its features.
        tiles: uint8 [T, 3, t, t].
        frame: uint8 [3, S, S].
    """

    key: str
    tiles: Tensor
    frame: Tensor


def black_input(geometry: InputGeometry) -> EncoderInput:
    """Make a black image of one tile."""
    tile, frame = (torch.zeros(3, side, side, dtype=torch.uint8) for side in (geometry.tile_size, geometry.frame_size))
    return EncoderInput("", tile[None], frame)


def require_frozen(network: Network) -> Sa2VA:
    """Return the network if its encoders are frozen, so that features of an image stay the same in training.

    Raises:
        VesselError: its encoders train, or it is a baseline.
    """
    if not isinstance(network, Sa2VA):
        raise VesselError("cache=features: only a network with a language model has features to keep; use cache=none")
    names = {"vision encoder": network.mllm.model.vision_tower, "SAM2 image encoder": network.grounding.image_encoder}
    if training := [name for name, encoder in names.items() if trains(encoder)]:
        raise VesselError(
            f"cache=features: the {' and the '.join(training)} train, so that the features of an image change with "
            "every step; choose trainable=lora or trainable=decoder_only, or leave the cache out with cache=none"
        )
    return network


def encode_inputs(network: Sa2VA, inputs: Sequence[EncoderInput]) -> list[Features]:
    """Compute the features of each image, on the network's device."""
    with torch.no_grad():
        tile_features = network.encode_tiles(torch.cat([one.tiles for one in inputs]))
        pyramid = network.encode_frame(torch.stack([one.frame for one in inputs]))
    parts = tile_features.split([len(one.tiles) for one in inputs])
    levels = zip(*(level.split(1) for level in pyramid), strict=True)
    return [Features(one, FeaturePyramid(*own)) for one, own in zip(parts, levels, strict=True)]


def feature_nbytes(features: Features) -> tuple[int, int]:
    """Return the bytes of one tile in a file, and those of the rest of an image."""
    return features.tile_features[:1].nbytes, sum(level.nbytes for level in features.pyramid) + _HEADER


def complete_batch(
    batch: Batch, network: Sa2VA, encode: Callable[[Sequence[EncoderInput]], Sequence[Features]]
) -> Batch:
    """Return a batch with features in place of tiles and frames; the encoders run even where no features are missing.

    Args:
        batch: is not changed.
        network: takes the batch.
        encode: computes features of images; called with an empty list where none are missing.
    """
    known = batch.features or (None,) * len(batch)
    of_each = (batch.input_ids == network.tokens.image).sum(1) // network.mllm.config.image_seq_length
    counts = [int(count) for count, features in zip(of_each, known, strict=True) if features is None]
    tiles = batch.tiles.split(counts) if counts else ()
    fresh = iter(encode([EncoderInput("", *own) for own in zip(tiles, batch.frames, strict=True)]))
    features = tuple(next(fresh) if one is None else one for one in known)
    return replace(batch, features=features, tiles=batch.tiles[:0], frames=batch.frames[:0])


def cache_namespace(network: Sa2VA, geometry: InputGeometry, **facts: str) -> str:
    """Compute a digest of all that determines the features of an image, 32 hexadecimal digits.

    Under ZeRO-3 every rank calls this.

    Args:
        network: its encoders' weights and settings count.
        geometry: sizes to which images are cut and resized.
        facts: other causes of different numbers, such as the device.
    """
    encoders = network.mllm.model.vision_tower, network.grounding.image_encoder
    plain: Mapping[str, Any] = {
        "format": _FORMAT,
        "geometry": repr(geometry),
        "libraries": {name: version(name) for name in _LIBRARIES},
        "settings": [_settings(encoder) for encoder in encoders],
        **facts,
    }
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode())
    for name, tensor in _tensors(encoders):
        with gathered([tensor]):
            digest.update(digests([(name, tensor)])[name].encode())
    return digest.hexdigest()[:32]


def is_sharded(network: Sa2VA) -> bool:
    """Return True if the ranks hold parts of the encoders, so that all have to run them together (ZeRO-3)."""
    encoders = network.mllm.model.vision_tower, network.grounding.image_encoder
    return any(is_partitioned(tensor) for _, tensor in _tensors(encoders))


def _tensors(encoders: Sequence[nn.Module]) -> Iterator[tuple[str, Tensor]]:
    for encoder in encoders:
        yield from chain(encoder.named_parameters(), encoder.named_buffers())


def _settings(encoder: nn.Module) -> list[str]:
    """List what modules compute with beside tensors, such as windows and numbers of heads; without DeepSpeed's."""
    found = []
    for name, module in encoder.named_modules():
        own = {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, bool | int | float | tuple) and key != "training" and not key.startswith(("_", "ds_"))
        }
        found.append(f"{name} {type(module).__name__} {sorted(own.items())}")
    return found
