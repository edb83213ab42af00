"""Compare what a step is planned to keep with what the same step really keeps on the CPU."""

from dataclasses import replace

import pytest
import torch
from sam2.modeling.position_encoding import PositionEmbeddingSine
from tests.conftest import SIZES
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_iter

from vessel.losses import NativeLoss, Sa2vaLoss, lm_loss
from vessel.memory_plan.engine import Engine
from vessel.memory_plan.gpu_emulation import GpuEmulation
from vessel.memory_plan.live_memory import LiveMemory
from vessel.memory_plan.plan import Images, Setup, batch_of, memory_plan
from vessel.model.baselines import PromptedSam2Config, UNetConfig
from vessel.model.lora import Lora
from vessel.model.sa2va import build_sa2va

SMALL = replace(
    SIZES,
    language=replace(SIZES.language, width=96, layers=5, mlp=256),
    vision=replace(SIZES.vision, tile_size=112, width=64, layers=4, mlp=256),
    grounding=replace(SIZES.grounding, frame_size=256, embed_dim=24, stages=(1, 2, 4, 1)),
)


class Kept:
    """Bytes of the distinct tensors that graphs hold beside `known` ones, as torch itself hands them over."""

    def __init__(self, known) -> None:
        self.known, self.bytes = {t.untyped_storage()._cdata for t in known}, {}
        self.alive = []  # so that no storage takes another's place

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.bytes[storage._cdata] = storage.nbytes()
            self.alive.append(storage)
        return tensor


def really_kept(setup, plan, prompt):
    """Count the bytes that the graph of a real step holds."""
    network = plan(
        sizes=setup.sizes, lora=setup.lora, trainable=setup.trainable, phrases=setup.images.names,
        activation_checkpointing=setup.activation_checkpointing,
    ).build().train()  # fmt: skip
    planned = batch_of(setup, prompt)
    batch = replace(
        planned,
        tiles=torch.zeros_like(planned.tiles, device="cpu"),
        frames=torch.zeros_like(planned.frames, device="cpu"),
        masks=tuple(torch.zeros_like(mask, device="cpu") for mask in planned.masks),
    )
    with Kept([*network.parameters(), *network.buffers()]) as kept:
        output = network(batch)
        losses = setup.loss_function(output.mask_logits, batch.masks, network.frame_size)
        total = sum(losses.values()) + lm_loss(output.lm_logits, output.lm_targets)
    total.backward()
    # SAM2 remembers the positions of its pyramid from the first frame on
    remembered = [t for m in network.modules() if isinstance(m, PositionEmbeddingSine) for t in m.cache.values()]
    return sum(kept.bytes.values()) + sum(t.nbytes for t in remembered)


ADAPTERS = Lora(r=8, dropout=0.0)  # on a GPU dropout keeps a byte an element, on the CPU a number
SETUP = Setup(SIZES, ADAPTERS, "lora", NativeLoss(), Engine())
SETUPS = {
    "adapters": SETUP,
    "adapters, small network": replace(SETUP, sizes=SMALL),
    "checkpointing, small network": replace(SETUP, sizes=SMALL, activation_checkpointing=True),
    "everything trains": replace(SETUP, sizes=SMALL, lora=Lora(r=0), trainable="all"),
    "everything trains, checkpointing": replace(
        SETUP, sizes=SMALL, lora=Lora(r=0), trainable="all", activation_checkpointing=True
    ),
    "decoder only": replace(SETUP, lora=Lora(r=0), trainable="decoder_only"),
    "three phrases": replace(SETUP, images=Images((64, 64), 3)),
    "new token rows": replace(SETUP, lora=replace(ADAPTERS, tokens="new")),
    "sampled points": replace(SETUP, loss_function=Sa2vaLoss(points=500)),
    "two images, one shorter": replace(SETUP, batch_size=2),
    "tiles": replace(SETUP, sizes=replace(SIZES, max_tiles=4), images=Images((96, 96))),
    "learned prompts": replace(
        SETUP, sizes=PromptedSam2Config(SMALL.grounding), lora=Lora(r=0), trainable="all", images=Images((64, 64), 3)
    ),
    "U-Net": replace(
        SETUP,
        sizes=UNetConfig("resnet18", frame_size=128),
        lora=Lora(r=0),
        trainable="all",
        images=Images((64, 64), 3),
        batch_size=2,
    ),
}


@pytest.mark.parametrize("name", SETUPS)
def test_planned_activations_are_those_of_a_real_step(plan, prompt, name, monkeypatch):
    monkeypatch.setattr(
        "vessel.memory_plan.live_memory._BLOCK", 1
    )  # of a GPU's allocator, whose ends weigh much in a small network
    setup = SETUPS[name]
    planned = sum(memory_plan(setup).measured.step.kept.values())
    assert planned == pytest.approx(really_kept(setup, plan, prompt), rel=0.1)


def test_dropout_keeps_a_byte_an_element():
    x = torch.empty(1000, device="meta", requires_grad=True)
    with GpuEmulation(), Kept([x]) as kept:
        torch.nn.functional.dropout(x, 0.1)
    assert sum(kept.bytes.values()) == 1000


def test_attention_keeps_no_scores():
    query, key, value = (torch.empty(2, 4, 512, 8, device="meta", requires_grad=True) for _ in range(3))
    with GpuEmulation(), Kept([query, key, value]) as kept:
        torch.nn.functional.scaled_dot_product_attention(query, key, value)
    assert sum(kept.bytes.values()) == 4 * (2 * 4 * 512 * 8 + 2 * 4 * 512)  # the result and a number a row
    mask = torch.empty(2, 1, 500, 500, dtype=torch.bool, device="meta")
    query, key, value = (torch.empty(2, 4, 500, 8, device="meta", requires_grad=True) for _ in range(3))
    with GpuEmulation(), Kept([query, key, value]) as kept:
        torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    # the mask as numbers, in rows of a multiple of eight
    assert sum(kept.bytes.values()) == 4 * (2 * 4 * 500 * 8 + 2 * 4 * 500 + 2 * 500 * 504)


def test_linear_layers_of_zero3_keep_their_input_for_frozen_weights():
    x = torch.empty(10, 4, device="meta", requires_grad=True)
    weight = torch.empty(3, 4, device="meta")
    for zero3, expected in ((False, 0), (True, 4 * 10 * 4)):
        with GpuEmulation(zero3=zero3), Kept([weight]) as kept:
            torch.nn.functional.linear(x, weight)
        assert sum(kept.bytes.values()) == expected


def _parts(network, device):
    """Return calls of parts of a network on a device."""
    sizes = SIZES
    network.to_empty(device=device)
    with torch.device(device):
        tile_size = sizes.vision.tile_size
        calls = {
            "vision": (network.mllm.model.vision_tower, (torch.empty(1, 3, tile_size, tile_size),)),
            "projector": (network.mllm.model.multi_modal_projector, (torch.empty(1, 4, sizes.vision.width * 4),)),
            "language": (_Reads(network.mllm.model.language_model), (torch.empty(1, 30, sizes.language.width),)),
            "encoder": (network.grounding.image_encoder, (torch.empty(1, 3, 64, 64),)),
            "decoder": (_Draws(network.grounding), (torch.empty(1, 3, 64, 64), torch.empty(2, sizes.grounding.width))),
            "losses": (_loss, (torch.empty(2, 16, 16, requires_grad=True),)),
        }  # fmt: skip
    return calls


class _Reads:
    def __init__(self, model) -> None:
        self.model = model

    def __call__(self, embeddings):
        # transformers would make a mask for tensors that only claim to be there
        mask = {"full_attention": None}
        return self.model(inputs_embeds=embeddings, attention_mask=mask, use_cache=False).last_hidden_state


class _Draws:
    def __init__(self, grounding) -> None:
        self.grounding = grounding

    def __call__(self, frames, prompts):
        twice = torch.zeros(2, dtype=torch.long, device=frames.device)
        return self.grounding.decode(self.grounding.encode(frames).of(twice), prompts)


def _loss(logits):
    masks = (torch.zeros(2, 48, 40, dtype=torch.bool, device=logits.device),)
    return torch.stack(list(NativeLoss()(logits, masks, 64).values()))


class AttentionOnlyEmulation(GpuEmulation):
    """Leaves all casts to torch but those of what enters attention, which torch never sees here."""

    def _cast(self, func, args, kwargs):
        is_attention = func is torch.nn.functional.scaled_dot_product_attention
        return super()._cast(func, args, kwargs) if is_attention else (args, kwargs)


@pytest.mark.parametrize("part", ["vision", "projector", "language", "encoder", "decoder", "losses"])
def test_autocast_is_that_of_torch(prompt, part):
    """torch's own rules for CUDA on tensors that claim to be there, against the stand-in's."""
    with torch.device("meta"):
        network = build_sa2va(SIZES, prompt.token_ids)
    call, args = _parts(network, "meta")[part]
    with GpuEmulation(autocast=torch.bfloat16), Kept([*network.parameters(), *network.buffers()]) as ours:
        made = call(*args)
    with FakeTensorMode(allow_non_fake_inputs=True):
        call, args = _parts(network, "cuda")[part]
        # torch.autocast itself wants to see a GPU
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        torch.autocast_increment_nesting()
        try:
            with (
                AttentionOnlyEmulation(autocast=torch.bfloat16),
                Kept([*network.parameters(), *network.buffers()]) as theirs,
            ):
                expected = call(*args)
        finally:
            torch.autocast_decrement_nesting()
            torch.clear_autocast_cache()
            torch.set_autocast_enabled("cuda", False)
    assert [t.dtype for t in tree_iter(made) if torch.is_tensor(t)] == [
        t.dtype for t in tree_iter(expected) if torch.is_tensor(t)
    ]
    assert sum(ours.bytes.values()) == pytest.approx(sum(theirs.bytes.values()), rel=0.02)


def test_what_lives_is_counted_and_what_dies_is_not():
    x = torch.empty(1024, device="meta")
    live = LiveMemory([x])
    with live:
        y = x * 2
        with live.part("second"):
            z = (y + 1).reshape(2, 512)  # a view is no memory
        del y
        assert live.now == {"activations: elsewhere": 0, "second": 4096}
        live.move(z, "third")
        x.add_(1)
        one = torch.empty(1, device="meta")  # CUDA's allocator knows no smaller block
    assert +live.now == {"third": 4096, "activations: elsewhere": 512}
    assert live.fullest == {"activations: elsewhere": 4096, "second": 4096}
    assert live.moment == "second"
    del z, one
    assert live.now.total() == 0
