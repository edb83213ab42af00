"""Activation checkpointing: the same gradients from less memory, the same names, the same validation."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from vessel.losses import NativeLoss, lm_loss
from vessel.model.grounding import trains
from vessel.model.lora import Lora

# More layers than in other tests: of two, the activations are hardly measurable beside the rest.
LAYERS = 6


@pytest.fixture
def built(plan):
    """Return a function that builds networks equal but for its options, such as `activation_checkpointing=True`."""

    def make(**changes):
        made = plan()
        sizes = replace(
            made.sizes,
            language=replace(made.sizes.language, layers=LAYERS),
            vision=replace(made.sizes.vision, layers=LAYERS),
            grounding=replace(made.sizes.grounding, stages=(1, 2, 5, 1)),
        )
        network = plan(sizes=sizes, **changes).build()
        # LoRA's second matrix begins at zero, which would hide the first from every gradient.
        generator = torch.Generator().manual_seed(1)
        for name, parameter in network.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1, generator=generator)
        return network.train()

    return make


def step(network, batch):
    """Return gradients by name, and the bytes of the distinct tensors that the graph holds beside the parameters."""
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    held: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(3)  # the same dropout
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = network(batch)
        losses = NativeLoss()(output.mask_logits, batch.masks, network.grounding.image_size)
        loss = sum(losses.values()) + lm_loss(output.lm_logits, output.lm_targets)
    loss.backward()
    gradients = {name: p.grad for name, p in network.named_parameters() if p.requires_grad}
    return gradients, sum(held.values())


CHOICES = {
    "lora": {"lora": Lora(r=4, dropout=0.5), "trainable": "lora"},
    "only adapters train": {"lora": Lora(r=4, dropout=0.5, tokens="new"), "trainable": "lora"},
    "all": {"trainable": "all"},
}


@pytest.mark.parametrize("choice", CHOICES)
def test_guard_T12_checkpointing_gives_the_same_gradients_from_less_memory(built, make_batch, choice):
    batch = make_batch([["lumen", "cap"], ["lumen"]])
    plain, plain_bytes = step(built(**CHOICES[choice]), batch)
    network = built(activation_checkpointing=True, **CHOICES[choice])
    if choice == "only adapters train":  # nothing that enters the first layer requires a gradient
        network.mllm.model.multi_modal_projector.requires_grad_(False)
        network.mllm.get_input_embeddings().requires_grad_(False)
        plain = {name: g for name, g in plain.items() if network.get_parameter(name).requires_grad}
    saved, saved_bytes = step(network, batch)
    assert saved_bytes < 0.75 * plain_bytes
    assert saved.keys() == plain.keys()
    for name, gradient in plain.items():
        if gradient is None:
            assert saved[name] is None, name
        else:
            torch.testing.assert_close(saved[name], gradient, msg=lambda text, name=name: f"{name}: {text}")
    adapters = [name for name in saved if "lora_" in name]
    assert bool(adapters) == (choice != "all")
    assert all(saved[name].abs().sum() > 0 for name in adapters)


@pytest.mark.parametrize("trainable", ["lora", "all"])
def test_checkpointing_changes_neither_names_nor_validation(built, make_batch, trainable):
    choice = {"lora": Lora(r=4)} if trainable == "lora" else {}
    plain, recomputing = (
        built(activation_checkpointing=c, trainable=trainable, **choice).eval() for c in (False, True)
    )
    assert list(plain.state_dict()) == list(recomputing.state_dict())
    batch = make_batch([["lumen"]])
    with torch.inference_mode():
        ours, theirs = recomputing(batch), plain(batch)
    assert torch.equal(ours.mask_logits, theirs.mask_logits)
    assert torch.equal(ours.lm_logits, theirs.lm_logits)


def test_encoders_are_recomputed_only_where_they_train(built, make_batch):
    network = built(activation_checkpointing=True, lora=Lora(r=4), trainable="lora")
    assert not trains(network.grounding.image_encoder)
    assert not any(layer.gradient_checkpointing for layer in network.mllm.model.vision_tower.encoder.layer)
    network = built(activation_checkpointing=True, trainable="decoder_only")
    requires_grad = []
    network.mllm.get_input_embeddings().register_forward_hook(lambda *call: requires_grad.append(call[2].requires_grad))
    network(make_batch([["lumen"]]))
    assert requires_grad == [False]  # a frozen language model keeps no graph
