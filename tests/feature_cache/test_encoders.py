"""The namespace depends on all that determines features, and the network's own code encodes them."""

import copy
from dataclasses import replace

import pytest
import torch
from tests.conftest import SIZES
from tests.feature_cache.conftest import equal

from vessel.batch import FeaturePyramid, Features
from vessel.errors import VesselError
from vessel.feature_cache.encoders import (
    EncoderInput,
    black_input,
    cache_namespace,
    complete_batch,
    encode_inputs,
    feature_nbytes,
    require_frozen,
)
from vessel.model.network import Network

GEOMETRY = SIZES.geometry


def encoder_input(seed: int, tiles: int) -> EncoderInput:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)

    return EncoderInput(
        f"{seed}",
        random(tiles, 3, GEOMETRY.tile_size, GEOMETRY.tile_size),
        random(3, GEOMETRY.frame_size, GEOMETRY.frame_size),
    )


def test_images_are_encoded_together_as_alone(network):
    inputs = [encoder_input(0, 1), encoder_input(1, 3), encoder_input(2, 2)]
    for one, features in zip(inputs, encode_inputs(network, inputs), strict=True):
        tile_features, pyramid = network.encode_tiles(one.tiles), network.encode_frame(one.frame[None])
        for found, expected in zip((features.tile_features, *features.pyramid), (tile_features, *pyramid), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
            assert not found.requires_grad


def test_bytes_of_a_tile_and_of_the_rest_of_an_image(network):
    [one] = encode_inputs(network, [black_input(GEOMETRY)])
    per_tile, per_image = feature_nbytes(one)
    [three] = encode_inputs(network, [encoder_input(0, 3)])
    nbytes = sum(tensor.nbytes for tensor in (three.tile_features, *three.pyramid))
    assert nbytes <= 3 * per_tile + per_image <= nbytes + 2000


# Namespaces ----------------------------------------------------------------------------------------------------------


def change_vision(network):
    with torch.no_grad():
        network.mllm.model.vision_tower.encoder.layer[0].mlp.fc1.bias[3] += 1e-3


def change_sam2(network):
    with torch.no_grad():
        network.grounding.image_encoder.neck.convs[0].conv.weight.view(-1)[5] += 1e-3


def change_window(network):
    network.grounding.image_encoder.trunk.blocks[1].window_size = 2


def change_heads(network):
    network.mllm.model.vision_tower.encoder.layer[0].attention.num_heads = 4


def change_dtype(network):
    network.grounding.image_encoder.bfloat16()


@pytest.mark.parametrize("change", [change_vision, change_sam2, change_window, change_heads, change_dtype])
def test_whatever_changes_features_changes_the_namespace(network, change):
    other = copy.deepcopy(network)
    assert cache_namespace(other, GEOMETRY) == cache_namespace(network, GEOMETRY)
    change(other)
    assert cache_namespace(other, GEOMETRY) != cache_namespace(network, GEOMETRY)


def test_geometry_and_other_facts_change_the_namespace(network):
    namespaces = {
        cache_namespace(network, geometry)
        for geometry in (GEOMETRY, replace(GEOMETRY, max_tiles=6), replace(GEOMETRY, frame_size=128))
    }
    namespaces |= {cache_namespace(network, GEOMETRY, device=device) for device in ("cpu", "cuda")}
    assert len(namespaces) == 5
    assert all(len(namespace) == 32 for namespace in namespaces)


def test_what_trains_and_how_it_trains_does_not(network):
    before = cache_namespace(network, GEOMETRY)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    network.eval()
    network.checkpoint_activations()
    assert cache_namespace(network, GEOMETRY) == before


# Refusals ------------------------------------------------------------------------------------------------------------


def test_encoders_that_train_are_refused(plan, network):
    assert require_frozen(network) is network
    with pytest.raises(VesselError, match=r"cache=features: .*vision.*SAM2.*trainable=lora"):
        require_frozen(plan().build())


def test_a_network_without_a_language_model_is_refused():
    with pytest.raises(VesselError, match=r"cache=features: .*language.*cache=none"):
        require_frozen(Network(64, ["lumen"]))


# Batches -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [(), (1,), (0, 2)])
def test_a_batch_is_completed_as_the_network_would(network, make_batch, known):
    batch = make_batch([["lumen"], ["lumen", "cap"], ["cap"]])
    every = encode_inputs(network, [EncoderInput("", batch.tiles[i : i + 1], batch.frames[i]) for i in range(3)])
    expected = network(batch)
    calls: list[int] = []

    def encode(inputs):
        calls.append(len(inputs))
        return encode_inputs(network, inputs)

    if known:
        left = [i for i in range(3) if i not in known]
        features = tuple(every[i] if i in known else None for i in range(3))
        batch = replace(batch, features=features, tiles=batch.tiles[left], frames=batch.frames[left])
        torch.testing.assert_close(network(batch).mask_logits, expected.mask_logits, atol=1e-5, rtol=1e-5)
    before = dict(vars(batch))
    completed = complete_batch(batch, network, encode)
    assert all(vars(batch)[name] is value for name, value in before.items()), "the batch itself was changed"
    assert calls == [3 - len(known)]
    assert len(completed.tiles) == len(completed.frames) == 0
    assert completed.features is not None
    for found, one in zip(completed.features, every, strict=True):
        torch.testing.assert_close(found, one, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(network(completed).mask_logits, expected.mask_logits, atol=1e-5, rtol=1e-5)


def test_a_complete_batch_runs_the_encoders_all_the_same(network, make_batch):
    """Run them with no image, as another rank may need it."""
    whole, known = make_batch([["lumen"]]), Features(torch.ones(1), FeaturePyramid(*torch.ones(3)))
    batch = replace(whole, features=(known,), tiles=whole.tiles[:0], frames=whole.frames[:0])
    calls: list[int] = []
    completed = complete_batch(batch, network, lambda inputs: [calls.append(len(inputs))])
    assert calls == [0]
    assert equal(completed.features[0], known)
