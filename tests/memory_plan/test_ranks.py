"""Compare what two real ranks of DeepSpeed hold with the plan of their configuration."""

import json

import pytest
from tests.conftest import _configuration
from tests.launching import ROOT, on_ranks
from tests.training.test_zero import options

from vessel.memory_plan.engine import MASTERS, OPTIMIZER, PARAMETERS
from vessel.memory_plan.plan import memory_plan
from vessel.memory_plan.request import setup_of
from vessel.memory_plan.step import GRADIENTS


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["zero3", "zero2"])
def test_two_ranks_hold_what_is_planned(oct_set, tmp_path, trainer):
    overrides = [
        *options(tmp_path, oct_set, 2), "~callbacks.recorder", f"trainer={trainer}", "trainer.max_steps=2",
        "callbacks.checkpoint=null", "callbacks.last_checkpoint=null", "lora.r=8", "trainable=lora",
        "+callbacks.memory_recorder._target_=tests.memory_plan.memory_recorder.MemoryRecorder",
        f"+callbacks.memory_recorder.out={tmp_path}",
    ]  # fmt: skip
    status, printed = on_ranks(
        2, str(ROOT / "tests/training/zero_ranks.py"), str(tmp_path), "train", *overrides, cwd=tmp_path
    )
    assert status == 0, printed[-4000:]
    setup = setup_of(_configuration("train", [*overrides]))
    engine, network = setup.engine, memory_plan(setup).measured.network
    assert (engine.ranks, engine.stage) == (2, int(trainer[-1]))
    states = engine.states(network)
    for rank in range(2):
        facts = json.loads((tmp_path / f"rank{rank}.json").read_text())
        # Stage 2 shards each group of the optimizer at a multiple of its alignment.
        exact = pytest.approx if trainer == "zero3" else lambda n: pytest.approx(n, rel=0.01)
        assert facts["parameters"] == pytest.approx(states.held[PARAMETERS], rel=0.01)
        assert facts["masters"] == exact(states.held[MASTERS])
        assert facts["optimizer"] == exact(states.held[OPTIMIZER])
        if trainer == "zero3":
            assert facts["gradients"] == states.in_step[GRADIENTS]
        assert facts["limits"] == {name: getattr(engine, name) for name in facts["limits"]}
