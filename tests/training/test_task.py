from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from vessel.errors import VesselError
from vessel.losses import NativeLoss, lm_loss
from vessel.model.groups import choose_trainable
from vessel.model.lora import Lora, add_lora
from vessel.training.callbacks.first_step_check import check_gradients, gradient_flags
from vessel.training.optimizer import OptimizerSettings
from vessel.training.task import VesselTask


@pytest.fixture
def make_task(plan):
    def make(keep_frozen=True, **changes) -> VesselTask:
        settings = OptimizerSettings(lr=1e-3)
        build = plan(**changes).build
        return VesselTask(build, loss_function=NativeLoss(), optimizer=settings, keep_frozen=keep_frozen, manifest={})

    return make


@pytest.fixture
def fit(tmp_path):
    def run(task, batch, **settings):
        names = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
        quiet = dict.fromkeys(names, False)
        trainer = Trainer(max_steps=3, accelerator="cpu", default_root_dir=tmp_path, **{**quiet, **settings})
        trainer.fit(task, DataLoader([batch] * 3, batch_size=None), DataLoader([batch], batch_size=None))
        return trainer

    return run


def test_learning_rate_warms_up_then_falls_by_a_cosine_to_zero():
    factor = partial(OptimizerSettings(warmup=0.1).factor, steps=110)
    assert [factor(0), factor(5), factor(10), factor(11)] == pytest.approx([1 / 11, 6 / 11, 1, 1])
    assert factor(11 + 99 // 2) == pytest.approx(0.5, abs=0.01)
    assert factor(110) == pytest.approx(0)
    assert OptimizerSettings(final=0.1).factor(500, 100) == pytest.approx(0.1)


def test_vectors_do_not_decay_and_frozen_tensors_are_not_optimised(make_task, make_batch, fit):
    task = make_task(trainable="decoder_only")
    trainer = fit(task, make_batch([["lumen"]]))
    matrices, vectors = trainer.optimizers[0].param_groups
    assert matrices["weight_decay"] == 0.05
    assert vectors["weight_decay"] == 0.0
    assert all(p.ndim > 1 for p in matrices["params"])
    assert all(p.ndim <= 1 for p in vectors["params"])
    optimised = {id(p) for group in (matrices, vectors) for p in group["params"]}
    assert optimised == {id(p) for p in task.network.parameters() if p.requires_grad}


def test_what_decays_under_zero3_is_told_by_the_whole_shape(make_task, make_batch, fit):
    """DeepSpeed leaves of every parameter an empty vector, and its shape beside."""
    task = make_task(trainable="decoder_only")
    groups = fit(task, make_batch([["lumen"]])).optimizers[0].param_groups
    expected = [[id(parameter) for parameter in group["params"]] for group in groups]
    for parameter in task.network.parameters():
        parameter.ds_shape, parameter.data = parameter.shape, torch.empty(0)
    found = [group["params"] for group in task.configure_optimizers()["optimizer"].param_groups]
    assert [[id(parameter) for parameter in params] for params in found] == expected


def test_training_changes_what_trains_and_nothing_else(make_task, make_batch, fit):
    task = make_task(trainable="lora", lora=Lora(r=4))
    task.configure_model()
    before = {name: p.detach().clone() for name, p in task.network.named_parameters()}
    fit(task, make_batch([["lumen"]]))
    changed = {name for name, p in task.network.named_parameters() if not torch.equal(p, before[name])}
    trainable = {name for name, p in task.network.named_parameters() if p.requires_grad}
    assert changed <= trainable
    assert {"lora_A" in n or "lora_B" in n for n in changed} == {True, False}


def test_the_loss_is_the_sum_of_its_logged_parts(make_task, make_batch, fit):
    trainer = fit(make_task(), make_batch([["lumen", "cap"]]))
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    parts = sum(logged[f"train/{part}"] for part in ("lm_loss", "mask_loss", "dice_loss"))
    assert logged["train/loss"] == pytest.approx(parts, rel=1e-5)
    names = ("dice", "iou", "precision", "recall", "dice_patient", "dice/lumen", "seg_emission", "lm_loss")
    assert {f"val/{name}" for name in names} <= logged.keys()


def test_test_scores_as_validation_does(make_task, make_batch, fit):
    task, batch = make_task(), make_batch([["lumen"]])
    trainer = fit(task, batch)
    validated = float(trainer.validate(task, DataLoader([batch], batch_size=None), verbose=False)[0]["val/dice"])
    tested = trainer.test(task, DataLoader([batch], batch_size=None), verbose=False)[0]
    assert tested["test/dice"] == pytest.approx(validated)
    assert "val/dice" not in tested


def test_guard_T3_seg_emission_is_measured(make_task, make_batch):
    """The network's own choice where the answer holds [SEG]: forced to emit it, the rate is 1; forbidden, 0."""
    task = make_task()
    task.configure_model()
    network, batch = task.network, make_batch([["lumen"], ["lumen", "cap"]])
    for bias, rate in ((1e4, 1.0), (-1e4, 0.0)):
        with torch.no_grad():
            output = network(batch)
            output.lm_logits[:, network.tokens.seg] = bias
        emitted = network.emitted(output)
        assert emitted.shape == (3,)
        assert emitted.float().mean() == rate


def test_guard_T1_loss_reaches_the_adapters_through_the_mask(make_task, make_batch):
    """A teacher-forced forward has a graph from the mask to the language model; generation has none."""
    task = make_task(trainable="lora", lora=Lora(r=4))
    task.configure_model()
    batch = make_batch([["lumen"]])
    output = task.network(batch)
    NativeLoss()(output.mask_logits, batch.masks, 64)["dice_loss"].backward()
    up = [p.grad for name, p in task.network.trainable_groups()["lora"] if "lora_B" in name]
    assert len(up) == 14
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in up)


def test_guard_T12_checkpointing_that_cuts_the_graph_is_caught_at_the_first_step(plan, make_batch):
    """Re-entrant checkpointing gives no gradient where its input has none: frozen embeddings, frozen projector."""
    network = plan(trainable="lora").build()
    add_lora(network, Lora(r=4, tokens="frozen"), new_tokens=range(5), seg_is_trained=True)
    choose_trainable(network, "lora")
    network.mllm.model.multi_modal_projector.requires_grad_(False)
    network.mllm.gradient_checkpointing_enable({"use_reentrant": True})
    network.mllm.disable_input_require_grads()  # transformers asks for them by itself, which is the cure
    network.train()
    output = network(make_batch([["lumen"]]))
    (output.mask_logits.mean() + output.lm_logits.mean()).backward()
    groups = network.trainable_groups()
    arrived = {name for members in groups.values() for name, parameter in members if parameter.grad is not None}
    with pytest.raises(VesselError, match=r"lora: .*no gradient"):
        check_gradients(groups, gradient_flags(groups, arrived))


def test_adapters_learn_under_checkpointing_that_keeps_the_graph(make_task, make_batch):
    task = make_task(trainable="lora", lora=Lora(r=4))
    task.configure_model()
    task.network.mllm.gradient_checkpointing_enable({"use_reentrant": False})
    task.network.train()
    output = task.network(make_batch([["lumen"]]))
    lm_loss(output.lm_logits, output.lm_targets).backward()
    assert all(p.grad is not None for _, p in task.network.trainable_groups()["lora"])


def test_checkpoint_of_another_network_is_refused(make_task, make_batch, fit, tmp_path):
    batch = make_batch([["lumen"]])
    trainer = fit(make_task(trainable="decoder_only"), batch)
    trainer.save_checkpoint(tmp_path / "decoder.ckpt")
    task = make_task(trainable="lora", lora=Lora(r=4))
    trainer = Trainer(max_steps=5, accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(VesselError, match=r"^ckpt: .*network\.mllm\."):
        trainer.fit(task, DataLoader([batch], batch_size=None), ckpt_path=tmp_path / "decoder.ckpt", weights_only=True)
