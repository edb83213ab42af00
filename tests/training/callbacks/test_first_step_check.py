import pytest
import torch
from torch import nn

from vessel.errors import VesselError
from vessel.training.callbacks.first_step_check import (
    FirstStepCheck,
    changes,
    check_change,
    check_gradients,
    fingerprint,
    gradient_flags,
)


def test_a_healthy_run_passes_with_accumulation_and_warm_up(trainer, toy_task, batches):
    check = FirstStepCheck()
    run = trainer(check, accumulate_grad_batches=2)
    run.fit(toy_task(warmup=2), batches(6))  # the rate of the first step is 0
    assert run.global_step == 3
    assert check._done


def test_guard_T1_detached_network_is_refused(trainer, toy_task, batches):
    class Detached(toy_task):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx).detach().requires_grad_()

    with pytest.raises(VesselError, match=r"(?s)projector: projector.weight.*no gradient.*mask_decoder: "):
        trainer(FirstStepCheck()).fit(Detached(), batches())


def test_guard_T1_zero_gradients_are_refused(trainer, toy_task, batches):
    class Multiplied(toy_task):
        def training_step(self, batch, batch_idx):
            return 0 * super().training_step(batch, batch_idx)

    with pytest.raises(VesselError, match=r"projector: .* 2 tensors .*zero"):
        trainer(FirstStepCheck()).fit(Multiplied(), batches())


def test_guard_T1_a_step_that_changes_nothing_is_refused(trainer, toy_task, batches):
    class Stale(toy_task):
        def configure_optimizers(self):
            return torch.optim.SGD(self.network.mask_decoder.parameters(), lr=0.1)

    with pytest.raises(VesselError, match=r"optimizer .*projector;"):
        trainer(FirstStepCheck(), accumulate_grad_batches=2).fit(Stale(), batches(4))


def test_guard_T1_a_learning_rate_that_stays_at_zero_is_refused(trainer, toy_task, batches):
    with pytest.raises(VesselError, match=r"optimizer .*projector, mask_decoder;"):
        trainer(FirstStepCheck()).fit(toy_task(lr=0.0), batches())


def test_a_resumed_run_is_not_checked(tmp_path, trainer, toy_task, batches):
    first = trainer()
    first.fit(toy_task(), batches())
    first.save_checkpoint(tmp_path / "run.ckpt")
    check = FirstStepCheck()
    resumed = trainer(check, max_epochs=2)
    resumed.fit(toy_task(), batches(), ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    assert resumed.global_step == 6
    assert check._before is None


def groups():
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    a.grad, b.grad = torch.ones(2), torch.zeros(3)
    return {"lora": [("lora_b", a), ("lora_a", b)]}, a, b


def check(members):
    arrived = {name for group in members.values() for name, parameter in group if parameter.grad is not None}
    check_gradients(members, gradient_flags(members, arrived))


def test_one_zero_tensor_in_a_group_is_fine():
    check(groups()[0])  # LoRA: the gradient of A is zero while B is


def test_every_fault_is_listed_at_once():
    members, a, b = groups()
    a.grad[0], b.grad = float("inf"), None
    with pytest.raises(VesselError) as error:
        check(members)
    assert "lora_b got a gradient that is not finite" in str(error.value)
    assert "lora_a got no gradient: it takes no part in the loss; freeze it" in str(error.value)


def test_nothing_trainable_is_refused():
    with pytest.raises(VesselError, match=r"train in the network"):
        check({})
    with pytest.raises(VesselError, match=r"train in \['tokens'\]"):
        check({"tokens": [], **groups()[0]})


def test_fingerprint_differs_after_a_swap_of_sign_and_a_small_change():
    members, a, _ = groups()
    before = fingerprint(members)
    with pytest.raises(VesselError, match=r"optimizer .*lora;"):
        check_change(members, changes(members, before))
    with torch.no_grad():
        a[0] += 1e-6
    check_change(members, changes(members, before))
    with torch.no_grad():
        a.copy_(torch.tensor([-1.0, 1.0]))  # the norm is as before
    check_change(members, changes(members, before))
