import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from vessel.errors import VesselError
from vessel.training.callbacks.non_finite_stop import NonFiniteStop


def breaking_at(toy_task, step: int, fault: str):
    class Breaking(toy_task):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if batch_idx < step:
                return loss
            # The square root has an infinite slope at 0 and a value of 0: a finite loss with a NaN gradient.
            return loss * float("nan") if fault == "loss" else loss + (0 * loss).sqrt()

    return Breaking()


@pytest.mark.parametrize(("fault", "reason"), [("loss", "the loss is nan"), ("gradient", "the gradient norm is nan")])
def test_guard_T13_stops_before_the_weights_are_touched(tmp_path, trainer, toy_task, batches, fault, reason):
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1, auto_insert_metric_name=False)
    task = breaking_at(toy_task, 2, fault)
    with pytest.raises(VesselError) as error:
        trainer(NonFiniteStop(), saver, enable_checkpointing=True).fit(task, batches(4))
    message = str(error.value)
    assert message.startswith(f"step 2: {reason}")
    assert "p2/v2_000, p2/v2_001" in message
    assert "p1/" not in message
    assert str(tmp_path / "2.ckpt") in message
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["1.ckpt", "2.ckpt"]
    saved = torch.load(tmp_path / "2.ckpt", weights_only=True)["state_dict"]
    for name, value in task.state_dict().items():
        assert torch.equal(value, saved[name])
        assert torch.isfinite(value).all()


def test_names_all_images_of_an_accumulated_step(trainer, toy_task, batches):
    with pytest.raises(VesselError, match=r"step 1: .*p2/v2_000, p2/v2_001, p3/v3_000"):
        trainer(NonFiniteStop(), accumulate_grad_batches=2).fit(breaking_at(toy_task, 3, "loss"), batches(4))


def test_a_healthy_run_goes_on(trainer, toy_task, batches):
    run = trainer(NonFiniteStop())
    run.fit(toy_task(), batches())
    assert run.global_step == 3
