"""Compare what a rank holds for good with real optimizers and with the arithmetic of ZeRO."""

import math

import pytest
import torch
from omegaconf import OmegaConf
from tests.conftest import SIZES

from vessel.losses import NativeLoss, lm_loss
from vessel.memory_plan.engine import BUCKETS, MASTERS, OPTIMIZER, PARAMETERS, UPDATE, Engine
from vessel.memory_plan.gathering import gathered_elements
from vessel.memory_plan.plan import Setup, memory_plan
from vessel.memory_plan.step import GRADIENTS
from vessel.model.lora import Lora

ADAPTERS = Lora(r=8)


def planned(engine, lora=ADAPTERS, trainable="lora"):
    return memory_plan(Setup(SIZES, lora, trainable, NativeLoss(), engine))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_one_process_holds_what_is_planned_to_the_byte(plan, make_batch, precision):
    engine = Engine(precision)
    network = plan(lora=ADAPTERS, trainable="lora", frozen_dtype=engine.dtype).build()
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    batch = make_batch([["lumen"]])
    with torch.autocast("cpu", torch.bfloat16, enabled=precision != "32-true"):
        output = network(batch)
        losses = NativeLoss()(output.mask_logits, batch.masks, 64)
        total = sum(losses.values()) + lm_loss(output.lm_logits, output.lm_targets)
    total.backward()
    optimizer.step()
    states = engine.states(planned(engine).measured.network)
    tensors = [*network.parameters(), *network.buffers()]
    assert states.held[PARAMETERS] == sum(t.nbytes for t in tensors)
    assert states.in_update[GRADIENTS] == sum(p.grad.nbytes for p in trained)
    moments = [t for values in optimizer.state.values() for t in values.values()]
    assert states.held[OPTIMIZER] == sum(t.nbytes for t in moments if t.ndim)
    counters = sum(t.nbytes for t in moments if not t.ndim)  # one number a tensor, on the host
    assert counters == 4 * len(trained)


@pytest.mark.parametrize(
    ("trainer", "expected"),
    [
        ("cpu", Engine("32-true")),
        ("gpu", Engine("bf16-mixed")),
        ("ddp", Engine("bf16-mixed", ranks=4)),
        ("zero2", Engine("bf16-mixed", ranks=4, stage=2)),
        ("zero3", Engine("bf16-mixed", ranks=4, stage=3)),
        (
            "zero3_offload",
            Engine("bf16-mixed", ranks=4, stage=3, offload_optimizer=True, offload_parameters=True),
        ),
    ],
)
def test_engines_of_the_shipped_trainers(trainer, expected):
    assert _engine(f"trainer={trainer}") == expected


def test_options_of_the_command_line_change_the_engine():
    engine = _engine(
        "trainer=zero3", "trainer.devices=2", "trainer.num_nodes=3", "trainer.accumulate_grad_batches=8",
        "+trainer.strategy.zero.stage3_max_live_parameters=3e8",
    )  # fmt: skip
    assert engine == Engine("bf16-mixed", ranks=6, stage=3, accumulate=8, live=300_000_000)
    assert _engine("trainer=gpu", "trainer.strategy=deepspeed_stage_2").stage == 2
    assert _engine("trainer=gpu", "trainer.devices=[0,2]").ranks == 2
    assert _engine("trainer=gpu", "trainer.devices='3'").ranks == 3


def _engine(*overrides):
    from tests.conftest import _configuration

    config = _configuration("train", ["data.root=x", "run=x", *overrides])
    return Engine.of(OmegaConf.to_container(config.trainer, resolve=True))


def test_zero_shards_as_its_stage_says():
    alone = planned(Engine("bf16-mixed", ranks=3, stage=3)).measured.network
    numbers = [p.numel() for p in alone.parameters()]
    trained = [p.numel() for p in alone.parameters() if p.requires_grad]
    own = sum(math.ceil(n / 3) for n in trained)
    buffers = sum(b.nbytes for b in alone.buffers())
    small = sum(n for n in numbers if n <= 100_000)
    held = Engine("bf16-mixed", ranks=3, stage=3).states(alone).held
    assert held[PARAMETERS] == 2 * (sum(math.ceil(n / 3) for n in numbers) + small) + buffers
    assert (held[MASTERS], held[OPTIMIZER], held[BUCKETS]) == (4 * own, 8 * own, 2 * 2 * sum(trained))
    states = Engine("bf16-mixed", ranks=3, stage=2).states(alone)
    assert states.held[PARAMETERS] == 2 * sum(numbers) + buffers
    assert states.held[OPTIMIZER] == 8 * own
    assert states.in_update == {GRADIENTS: 4 * own, UPDATE: 4 * own}
    engine = Engine("bf16-mixed", ranks=3, stage=3, offload_optimizer=True, offload_parameters=True)
    states = engine.states(alone)
    assert states.held == {PARAMETERS: 2 * small + buffers, BUCKETS: 2 * 2 * sum(trained)}
    assert states.host == 2 * sum(math.ceil(n / 3) for n in numbers) + 16 * own


def test_gathered_layers_follow_the_limits():
    modules = [torch.nn.Linear(100, 100, bias=False) for _ in range(6)]
    order = [(module, True) for module in modules]

    def most(**limits):
        return gathered_elements(order, Engine(ranks=2, stage=3, persistent=10, **limits))

    layer = 100 * 100
    assert most(prefetch=0, live=0, reuse=0) == layer
    # one ahead, however small the bucket: what begins inside it is fetched whole; at the turn the last is there still
    assert most(prefetch=1, live=100 * layer, reuse=0) == 3 * layer
    # of the last layer's neighbours those that come again within two layers stay
    assert most(prefetch=0, live=0, reuse=3 * layer) == 2 * layer
    assert most(prefetch=0, live=0, reuse=100 * layer) == 6 * layer
    # three that are fetched together lie in one buffer until each has its copy
    assert most(prefetch=3 * layer, live=4 * layer, reuse=0) == (1 + 3 + 3) * layer
    with_bias = [(torch.nn.Linear(100, 100), True)]
    assert gathered_elements(with_bias, Engine(ranks=2, stage=3, persistent=10)) == 2 * (layer + 100)
    assert gathered_elements(with_bias, Engine(ranks=2, stage=3, persistent=100)) == layer
    assert gathered_elements(with_bias, Engine(ranks=1, stage=3, persistent=10)) == 0
