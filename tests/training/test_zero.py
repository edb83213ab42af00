"""Training under ZeRO with the real DeepSpeed on CPU ranks: as without it, and every failure told on every rank."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from tests.conftest import TINY_NETWORK
from tests.launching import ROOT, command, on_ranks
from tests.weights.layouts import write_sa2va

from vessel.checkpoints.reading import find_checkpoint
from vessel.errors import VesselError
from vessel.inference.loading import load_model
from vessel.training.task import VesselTask
from vessel.training.zero import ZeroStrategy
from vessel.weights.zero import open_zero_checkpoint

# Every parameter is cut and gathered, however small, and a group of the optimizer falls into several pieces.
CUT = (
    "+trainer.strategy.zero={stage3_param_persistence_threshold: 0, sub_group_size: 20000}",
    "trainer.precision=32-true",
)
BATCH = 4  # images of an optimizer step over all ranks
STEPS = 20
CLIP = 4.0  # less than the norms of the first steps, more than half of them: dividing by the batches twice shows
MOMENTS = ("exp_avg", "exp_avg_sq")


def options(out: Path, data: Path, ranks: int) -> list[str]:
    return [
        "experiment=tiny", f"run={out}/run", f"data.root={data}", "data.phrases=[lumen,side branch]", "data.workers=0",
        "data.batch_size=1", f"trainer.accumulate_grad_batches={BATCH // ranks}", f"trainer.devices={ranks}",
        "trainer.accelerator=cpu", "trainer.val_check_interval=1000", "trainer.log_every_n_steps=1",
        "+trainer.enable_progress_bar=false", "~callbacks.progress", "callbacks.mask_panels=null",
        f"trainer.gradient_clip_val={CLIP}", f"trainer.max_steps={STEPS}", "optimizer.warmup=0.1",
        "+optimizer.final=0.2", "+callbacks.recorder._target_=tests.training.zero_ranks.Recorder",
        f"+callbacks.recorder.out={out}", *TINY_NETWORK,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def ranks_run(oct_set, tmp_path_factory):
    """Run `tests/zero_ranks.py` on some ranks: `ranks_run(2, "trainer=zero3", job="train")` gives its folder."""

    def run(ranks: int, *overrides: str, job: str = "train", fails: bool = False) -> Path:
        out = tmp_path_factory.mktemp(job)
        arguments = [str(out), job, *options(out, oct_set, ranks), *overrides]
        status, printed = on_ranks(ranks, str(ROOT / "tests/training/zero_ranks.py"), *arguments, cwd=out)
        assert (status != 0) == fails, printed[-4000:]
        return out

    return run


def seen(out: Path, ranks: int) -> list[dict]:
    return [torch.load(out / f"rank{rank}.pt") for rank in range(ranks)]


def losses(out: Path, ranks: int) -> dict[tuple[int, str], float]:
    """Loss of each image in each step, none of which two ranks may have had."""
    found: dict[tuple[int, str], float] = {}
    for facts in seen(out, ranks):
        assert not found.keys() & facts["losses"].keys()
        found |= facts["losses"]
    return found


# As without -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(ranks_run):
    """A run of one process without any strategy."""
    return ranks_run(1, "trainer=cpu")


@pytest.fixture(scope="module")
def zero3(ranks_run):
    """A run on two ranks under stage 3, with a checkpoint of its last step."""
    return ranks_run(2, "trainer=zero3", *CUT, f"trainer.val_check_interval={STEPS * BATCH // 2}")


@pytest.fixture(scope="module")
def zero2(ranks_run):
    """The same under stage 2."""
    return ranks_run(
        2, "trainer=zero2", "trainer.precision=32-true", f"trainer.val_check_interval={STEPS * BATCH // 2}"
    )


def require_same_run(out: Path, ranks: int, alone: Path) -> None:
    """Losses of 20 steps to 1e-5 of about 5; weights, which moved by 6e-3, to 1e-4 and moments of up to 0.1 to 1e-6."""
    expected, found = losses(alone, 1), losses(out, ranks)
    assert len(expected) == STEPS * BATCH
    assert found == pytest.approx(expected, abs=1e-5)
    [one], many = seen(alone, 1), seen(out, ranks)
    assert all(torch.equal(tensor, many[0]["begin"]["state"][name]) for name, tensor in one["begin"]["state"].items())
    for facts in many:
        for name, trained in one["end"]["trained"].items():
            own = facts["end"]["trained"][name]
            torch.testing.assert_close(own["value"], trained["value"], atol=1e-4, rtol=0)
            torch.testing.assert_close(own["exp_avg"], trained["exp_avg"], atol=1e-6, rtol=0)
            torch.testing.assert_close(facts["end"]["state"][name], own["value"], atol=0, rtol=0)


@pytest.mark.slow
def test_two_ranks_of_ddp_train_as_one_process(alone, ranks_run):
    require_same_run(ranks_run(2, "trainer=ddp", "trainer.precision=32-true"), 2, alone)


@pytest.mark.slow
def test_two_ranks_of_zero3_train_as_one_process(alone, zero3):
    """With accumulation, decay of matrices alone and clipping of what was accumulated, as by Lightning and torch."""
    norms = seen(alone, 1)[0]["norms"]
    assert CLIP * 1.2 < max(norms) < CLIP * 2
    require_same_run(zero3, 2, alone)
    total = sum(trained["value"].numel() for trained in seen(alone, 1)[0]["end"]["trained"].values())
    assert [facts["end"]["own"] / total for facts in seen(zero3, 2)] == pytest.approx([0.5, 0.5], rel=1e-2)


@pytest.mark.slow
def test_guard_T12_four_ranks_of_zero3_that_recompute_layers_train_as_one_process(alone, ranks_run):
    require_same_run(ranks_run(4, "trainer=zero3", *CUT, job="recomputed"), 4, alone)


@pytest.mark.slow
def test_two_ranks_of_zero2_train_as_one_process(alone, zero2):
    require_same_run(zero2, 2, alone)


@pytest.mark.slow
def test_the_table_of_parameters_is_that_of_the_whole_network(alone, zero3):
    assert json.loads((zero3 / "run/parameters.json").read_text()) == json.loads(
        (alone / "run/parameters.json").read_text()
    )


# Checkpoints for any number of ranks ----------------------------------------------------------------------------------


def require_exact(out: Path, ranks: int, source: Path) -> None:
    """A run begins with the very tensors, moments, counts and rates that another ended with."""
    end = seen(source, 2)[0]["end"]
    for facts in seen(out, ranks):
        begin = facts["begin"]
        assert begin["step"] == STEPS
        assert begin["steps"] == [STEPS]
        assert begin["rates"] == pytest.approx(end["rates"], rel=1e-12)
        assert [name for name, tensor in end["state"].items() if not torch.equal(tensor, begin["state"][name])] == []
        for key in ("value", *MOMENTS):
            wrong = [n for n, t in end["trained"].items() if not torch.equal(t[key], begin["trained"][n][key])]
            assert wrong == [], key
    assert all(torch.isfinite(torch.tensor(list(losses(out, ranks).values()))))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "trainer"),
    [(1, ("trainer=zero3", *CUT)), (4, ("trainer=zero3", *CUT)), (2, ("trainer=zero2", "trainer.precision=32-true"))],
)
def test_a_folder_of_zero3_goes_on_exactly_on_other_ranks_and_stages(zero3, ranks_run, ranks, trainer):
    more = (f"ckpt={find_checkpoint(zero3 / 'run', ('last',))}", f"trainer.max_steps={STEPS + 1}")
    require_exact(ranks_run(ranks, *trainer, *more), ranks, zero3)


@pytest.mark.slow
def test_a_folder_of_zero2_goes_on_exactly_under_zero3(zero2, ranks_run):
    more = (f"ckpt={find_checkpoint(zero2 / 'run', ('last',))}", f"trainer.max_steps={STEPS + 1}")
    require_exact(ranks_run(2, "trainer=zero3", *CUT, *more), 2, zero2)


@pytest.mark.slow
@pytest.mark.parametrize("run", ["zero2", "zero3"])
def test_a_network_is_restored_exactly_from_either_stage(run, request):
    """With whatever was drawn at random and never trained, which is nowhere else."""
    folder = request.getfixturevalue(run)
    restored = load_model(str(find_checkpoint(folder / "run", ("last",))))
    state, end = restored.network.state_dict(), seen(folder, 2)[0]["end"]["state"]
    assert {f"network.{name}" for name in state} == end.keys()
    assert [name for name in state if not torch.equal(state[name], end[f"network.{name}"])] == []
    assert restored.manifest.fingerprint
    assert restored.manifest.threshold is not None


@pytest.mark.slow
def test_a_folder_without_what_was_drawn_at_random_is_refused(zero3, tmp_path):
    lost = shutil.copytree(find_checkpoint(zero3 / "run", ("last",)), tmp_path / "lost.ckpt")
    for file in (lost / "checkpoint").glob("*_model_states.pt"):
        content = torch.load(file, weights_only=False)
        content["frozen_param_shapes"] = content["frozen_param_fragments"] = None
        torch.save(content, file)
    with pytest.raises(VesselError, match="tensors that only this run has are not there"):
        load_model(str(lost))


@pytest.mark.slow
def test_a_checkpoint_without_zero_or_of_another_network_is_refused(alone, zero3, ranks_run, train_tiny, tmp_path):
    train_tiny(tmp_path, "trainer.max_steps=2")
    single = find_checkpoint(tmp_path)
    out = ranks_run(1, "trainer=zero3", *CUT, f"ckpt={single}", fails=True)
    assert "written without ZeRO" in (out / "error0.txt").read_text()
    with pytest.raises(VesselError, match="whose optimizer only ZeRO takes over: go on with trainer=zero3"):
        train_tiny(tmp_path / "alone", f"ckpt={find_checkpoint(zero3 / 'run', ('last',))}")
    wider = ("model.language.mlp=96", f"ckpt={find_checkpoint(zero3 / 'run', ('last',))}")
    out = ranks_run(1, "trainer=zero3", *CUT, *wider, fails=True)
    assert "trained tensors are missing or misshapen" in (out / "error0.txt").read_text()


# Adapters, bf16, the host's memory ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapted(zero3, ranks_run, tmp_path_factory):
    """Adapters on a public folder, in bf16, with optimizer and parameters on the host."""
    network = load_model(str(find_checkpoint(zero3 / "run"))).network
    base = write_sa2va(tmp_path_factory.mktemp("public"), network)
    started = (f"weights=[{base}]", "prompt=small")
    choices = (*started, "lora.r=8", "trainable=lora", "trainer.max_steps=2", "trainer.val_check_interval=4")
    return ranks_run(2, "trainer=zero3_offload", CUT[0], *choices)


@pytest.mark.slow
def test_offload_reaches_the_engine_and_needs_no_compiler(adapted):
    end = seen(adapted, 2)[0]["end"]
    settings = end["engine"]["zero_optimization"]
    assert settings["offload_optimizer"]["device"] == settings["offload_param"]["device"] == "cpu"
    assert end["optimizer"] == "AdamW"  # torch's
    assert end["engine"]["gradient_clipping"] == CLIP


@pytest.mark.slow
def test_in_bf16_buffers_and_what_the_optimizer_updates_stay_float32(adapted, alone):
    [facts, _] = seen(adapted, 2)
    exact = seen(alone, 1)[0]["begin"]["buffers"]
    floating = {name: tensor for name, tensor in exact.items() if tensor.is_floating_point()}
    assert any("inv_freq" in name for name in floating)
    assert any("gaussian" in name for name in floating)
    found = facts["end"]["buffers"]
    assert all(torch.equal(found[name], tensor) for name, tensor in floating.items())
    parameters = {name: facts["end"]["state"][name] for name in facts["end"]["trained"]}
    assert {tensor.dtype for tensor in parameters.values()} == {torch.bfloat16}
    values = {name: trained["value"] for name, trained in facts["end"]["trained"].items()}
    assert {value.dtype for value in values.values()} == {torch.float32}
    assert all(torch.equal(value.bfloat16(), parameters[name]) for name, value in values.items())
    assert any(not torch.equal(value, value.bfloat16().float()) for value in values.values())


@pytest.mark.slow
def test_a_checkpoint_of_adapters_holds_what_trains_and_restores_the_rest_from_the_base(adapted):
    path, end = find_checkpoint(adapted / "run", ("last",)), seen(adapted, 2)[0]["end"]
    saved = open_zero_checkpoint(path)
    assert saved.frozen == {}
    assert saved.trained.keys() == end["trained"].keys()
    state = load_model(str(path)).network.state_dict()
    values = {name.removeprefix("network."): trained["value"] for name, trained in end["trained"].items()}
    assert [name for name, value in values.items() if not torch.equal(state[name], value)] == []
    frozen = "mllm.model.language_model.layers.0.self_attn.q_proj.base_layer.weight"
    assert torch.equal(state[frozen].bfloat16(), end["state"][f"network.{frozen}"])


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["evaluate", "predict", "export"])
def test_commands_take_the_folder_of_zero3(zero3, oct_set, tmp_path, verb):
    more = {
        "evaluate": [f"out={tmp_path}/out"],
        "predict": [f"images={oct_set}", "phrases=[lumen]", f"out={tmp_path}/out"],
        "export": [f"out={tmp_path}/out"],
    }[verb]
    checkpoint = find_checkpoint(zero3 / "run", ("last",))
    done = command(f"vessel.{verb}", f"ckpt={checkpoint}", *more, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    made = {"evaluate": "metrics.json", "predict": "results.json", "export": "model.safetensors"}[verb]
    assert (tmp_path / "out" / made).is_file()


# Failures, told the same on every rank --------------------------------------------------------------------------------


def told(out: Path, ranks: int = 2) -> str:
    messages = {(out / f"error{rank}.txt").read_text() for rank in range(ranks)}
    assert len(messages) == 1, messages
    return messages.pop()


@pytest.mark.slow
def test_guard_T10_a_rank_without_masks_beside_one_with_eight_goes_on_under_zero3(ranks_run):
    few = ("trainer.max_steps=2", "trainer.accumulate_grad_batches=1")
    out = ranks_run(2, "trainer=zero3", *CUT, *few, job="uneven")
    ends = seen(out, 2)
    assert [len(facts["losses"]) for facts in ends] == [2, 2]  # FirstStepCheck saw a gradient in every module
    assert list(ends[0]["losses"].values()) != list(ends[1]["losses"].values())
    weights = [facts["end"]["trained"]["network.text_hidden_fcs.0.weight"]["value"] for facts in ends]
    assert torch.equal(*weights)
    assert weights[0].isfinite().all()


@pytest.mark.slow
def test_guard_T11_heads_that_no_loss_reaches_stop_every_rank_under_zero3(ranks_run):
    message = told(ranks_run(2, "trainer=zero3", *CUT, job="trained_heads", fails=True))
    assert "frozen heads: grounding.sam_mask_decoder.iou_prediction_head" in message
    assert "got no gradient: it takes no part in the loss; freeze it" in message


@pytest.mark.slow
@pytest.mark.parametrize("trainer", [("trainer=zero3", *CUT), ("trainer=zero2", "trainer.precision=32-true")])
def test_guard_T1_a_group_without_gradient_stops_every_rank_under_zero(ranks_run, trainer):
    message = told(ranks_run(2, *trainer, job="detached", fails=True))
    assert "text_hidden_fcs: text_hidden_fcs.0.weight" in message
    assert "mask_decoder" not in message


@pytest.mark.slow
@pytest.mark.parametrize("job", ["nan_loss", "nan_gradient"])
def test_guard_T13_what_is_not_finite_on_one_rank_stops_every_rank_under_zero3(ranks_run, job):
    """Images: of a loss those of the rank that had it, of a gradient, which belongs to all by then, those of all."""
    every_step = ("trainer.val_check_interval=2", "trainer.max_steps=4")
    out = ranks_run(2, "trainer=zero3", *CUT, *every_step, job=job, fails=True)
    message = told(out)
    assert message.startswith("step 1: the loss is nan on rank 1;" if job == "nan_loss" else "step 1: the gradient")
    [path] = (out / "run/checkpoints").glob("last-*.ckpt")
    assert path.name == "last-000001.ckpt"
    assert f"last good checkpoint: {path.parent}/best-000001.ckpt" in message
    assert all(torch.isfinite(trained.values.full()).all() for trained in open_zero_checkpoint(path).trained.values())
    ids = message.partition("images of the step: ")[2].partition(";")[0].split(", ")
    assert len(ids) == (1 if job == "nan_loss" else BATCH)


@pytest.mark.slow
def test_rows_of_new_tokens_train_under_zero3(ranks_run):
    """Peft keeps them in a buffer, which on ranks other than 0 has no content at first."""
    out = ranks_run(2, "trainer=zero3", *CUT, "lora.r=8", "lora.tokens=new", "trainable=lora", "trainer.max_steps=2")
    assert len(losses(out, 2)) > 0


def test_metrics_are_moved_before_validation(monkeypatch):
    """DeepSpeed places the network only, under stage 3; what NCCL adds up over ranks has to be on the GPU too."""

    class Elsewhere(ZeroStrategy):
        root_device = torch.device("meta")

    monkeypatch.setattr(DeepSpeedStrategy, "setup", lambda self, trainer: None)
    strategy, task = Elsewhere(3, accelerator="cpu"), VesselTask(
        None, loss_function=None, optimizer=None, keep_frozen=True, manifest={}
    )  # fmt: skip
    strategy.connect(task)
    strategy.setup(None)
    assert task.val_overlap.device.type == task.test_overlap.device.type == "meta"


def test_what_cannot_be_cut_is_refused():
    with pytest.raises(VesselError, match="stages are 2 and 3"):
        ZeroStrategy(1, accelerator="cpu")
    with pytest.raises(VesselError, match="only stage 3 has parameters to offload"):
        ZeroStrategy(2, accelerator="cpu", offload_parameters=True)
