"""Plans of configurations: the verdict, the refusal and what it advises."""

import re
from dataclasses import replace

import pytest
from rich.console import Console
from tests.conftest import SIZES, TINY_NETWORK, _configuration
from tests.launching import command

from vessel.errors import VesselError
from vessel.losses import NativeLoss
from vessel.memory_plan.advice import COARSER, ZERO_GPUS, advice, alternatives
from vessel.memory_plan.engine import BUCKETS, MASTERS, OPTIMIZER, PARAMETERS, Engine
from vessel.memory_plan.plan import CONTEXT, GB, Images, Setup, memory_plan
from vessel.memory_plan.request import print_plan, require_memory, setup_of
from vessel.memory_plan.step import GRADIENTS
from vessel.model.lora import Lora

SETUP = Setup(SIZES, Lora(r=32), "lora", NativeLoss(), Engine(), batch_size=3)


@pytest.fixture(scope="module")
def small():
    return memory_plan(SETUP)


def configuration(*overrides):
    return _configuration("train", ["run=x", "experiment=tiny", *TINY_NETWORK, *overrides])


@pytest.mark.slow
def test_guard_T7_what_cannot_fit_is_refused_with_the_settings_that_help(monkeypatch):
    config = configuration("data.root=nowhere", "lora.r=16", "trainable=lora", "trainer=cpu")
    assert require_memory(config) is None  # nothing to judge by
    config.gpu_gb = 24
    plan = require_memory(config)
    assert plan.fits(24)
    monkeypatch.setattr("vessel.memory_plan.plan._CONTEXT", 0)
    config.gpu_gb = 0.01
    with pytest.raises(VesselError) as refused:
        require_memory(config)
    message = str(refused.value)
    assert re.search(r"does not fit: 0\.\d GB on a GPU of 0\.0 GB", message)
    assert re.search(r"activation_checkpointing=true: 0\.\d GB \(0\.\d less\)", message)
    assert re.search(r"data\.batch_size=1: 0\.\d GB \(0\.\d less\)", message)
    assert "force=true" in message
    config.force = True
    assert require_memory(config).setup.activation_checkpointing  # what takes least, as nothing fits


def test_layers_are_computed_again_where_only_that_fits(monkeypatch):
    monkeypatch.setattr("vessel.memory_plan.plan._CONTEXT", 0)
    config = configuration("data.root=nowhere", "trainer=cpu", "gpu_gb=24")
    assert not require_memory(config).setup.activation_checkpointing
    setup = setup_of(config)
    kept, again = (memory_plan(replace(setup, activation_checkpointing=choice)).gigabytes for choice in (False, True))
    config.gpu_gb = (kept + again) / 2
    assert require_memory(config).setup.activation_checkpointing
    config.activation_checkpointing = False
    with pytest.raises(VesselError, match=r"activation_checkpointing=true.*fits"):
        require_memory(config)
    config.activation_checkpointing, config.gpu_gb = "auto", again / 2
    with pytest.raises(VesselError, match=r"force=true"):
        require_memory(config)


def test_the_present_gpu_counts_unless_another_size_is_given(monkeypatch):
    judged = []
    monkeypatch.setattr("vessel.memory_plan.request.gpu_size", lambda count: 11.0)
    monkeypatch.setattr("vessel.memory_plan.request.require_room", lambda plan, size: judged.append(size))
    config = configuration("data.root=nowhere")
    require_memory(config)
    config.gpu_gb = 80
    require_memory(config)
    config.gpu_gb, config.trainer.accelerator = None, "cpu"
    require_memory(config)
    assert judged == [11.0, 80.0]


def test_parts_add_up_and_are_printed(small):
    assert sum(small.rows.values()) == small.total
    console = Console(record=True, width=120, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(small.table())
    printed = console.export_text()
    assert re.search(rf"{PARAMETERS}\s+│\s+\d\.\d\d", printed)
    assert f"{small.total / GB:.2f}" in printed
    assert "3 x (512 x 512 px, 1 tile(s), 1 phrase(s)" in printed
    assert small.verdict(24) == f"fits: {small.total / GB:.1f} of 24.0 GB"


@pytest.mark.slow
def test_each_advice_is_planned_itself(small):
    lines = advice(small, 0.0)
    for option, setup in alternatives(SETUP):
        other = memory_plan(setup)
        line = f"{option}: {other.gigabytes:.1f} GB ({(small.total - other.total) / GB:.1f} less)"
        assert (line in lines) == (other.total < small.total), option
    assert "Not even all of them together are enough" in lines
    best = min(memory_plan(setup).gigabytes for _, setup in alternatives(SETUP))
    assert advice(small, best + 1e-6).count(", fits") == 1
    combined = advice(small, best - 1e-6).splitlines()[-1]
    assert re.match(r"Together: \S+ \S+.*: fits: ", combined)


OTHER_SETUPS = (
    ["trainer=gpu", "lora.r=128", "trainable=lora", "activation_checkpointing=false"],
    ["trainer=cpu", "lora.r=32", "trainable=lora", "trainer.devices=2"],
    ["trainer=zero2", "lora.r=8", "trainable=lora"],
    ["trainer=zero3", "lora.r=8", "trainable=lora"],
    ["trainer=gpu", "model.grounding.frame_size=1024"],
)


@pytest.mark.parametrize("overrides", OTHER_SETUPS, ids=lambda overrides: " ".join(overrides[:2]))
def test_advised_options_give_the_setup_that_was_planned_for_them(overrides):
    present = [*overrides, "data.root=nowhere", "data.batch_size=2", "model.max_tiles=2"]
    for option, setup in alternatives(setup_of(configuration(*present))):
        assert setup_of(configuration(*present, *option.removesuffix(COARSER).split())) == setup, option


def test_advised_number_of_gpus_is_that_of_the_shipped_trainer():
    for trainer in ("zero3", "zero3_offload"):
        assert configuration("data.root=nowhere", f"trainer={trainer}").trainer.devices == ZERO_GPUS


def test_a_step_is_measured_again_only_where_it_differs(small):
    ranks = replace(SETUP, engine=replace(SETUP.engine, ranks=2))
    assert memory_plan(ranks, like=small).measured is small.measured
    assert memory_plan(ranks, like=small).rows[BUCKETS] == memory_plan(ranks).rows[BUCKETS] > 0
    for setup in (replace(SETUP, batch_size=1), replace(SETUP, engine=replace(SETUP.engine, stage=3))):
        assert memory_plan(setup, like=small).measured is not small.measured


def test_image_size_and_phrases_come_from_an_existing_data_set(oct_set):
    assert setup_of(configuration(f"data.root={oct_set}")).images == Images((64, 64), 3)
    assert setup_of(configuration(f"data.root={oct_set}", "data.phrases=[lumen]")).images.phrases == 1
    assert setup_of(configuration("data.root=nowhere", "data.phrases=[a,b]")).images == Images((512, 512), 2)


@pytest.mark.slow
def test_a_plan_of_8b_needs_neither_data_nor_weights_nor_gpu(capsys):
    config = _configuration("train", ["run=x", "experiment=lora_r128"])
    setup = setup_of(config)
    plan = memory_plan(setup)
    # the elements of the specification: the whole, copies of embedding and head, adapters of rank 128
    tokens, adapters = 2 * 151_679 * 3584, 322_961_408
    trained = tokens + adapters + 27_540_480 + 13_763_840 + (4_215_109 - 264_453)
    assert plan.rows[MASTERS] == pytest.approx(4 * trained / 4, rel=1e-3)
    assert plan.rows[OPTIMIZER] == pytest.approx(8 * trained / 4, rel=1e-3)
    held = 2 * (8_182_606_386 + tokens + adapters) / 4
    assert plan.rows[PARAMETERS] == pytest.approx(held, rel=0.01)
    assert plan.rows[GRADIENTS] > plan.rows[MASTERS]  # the accumulated shard, and the gradient of the head as it comes
    assert plan.fits(24)
    alone = memory_plan(replace(setup, engine=Engine("bf16-mixed")))
    assert not alone.fits(24)
    assert alone.rows[CONTEXT] < plan.rows[CONTEXT]
    print_plan(config)
    assert "fits: " in capsys.readouterr().out


@pytest.mark.slow
def test_the_command_prints_the_plan(tmp_path):
    done = command("vessel.train", "experiment=tiny", *TINY_NETWORK, "plan=true", "data.root=nowhere", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "fits: " in done.stdout
