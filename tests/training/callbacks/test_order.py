"""Callbacks are called in the same order, however a configuration lists them."""

from random import Random

import pytest
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, RichProgressBar
from omegaconf import OmegaConf
from tests.conftest import _configuration

from vessel.training.callbacks.first_step_check import FirstStepCheck
from vessel.training.callbacks.graceful_stop import GracefulStop
from vessel.training.callbacks.last_checkpoint import LastCheckpoint
from vessel.training.callbacks.non_finite_stop import NonFiniteStop
from vessel.training.callbacks.order import ordered
from vessel.training.callbacks.step_seeds import StepSeeds
from vessel.training.run import _trainer

FIXED = [StepSeeds, FirstStepCheck, NonFiniteStop, GracefulStop, RichProgressBar, ModelCheckpoint, LastCheckpoint]


@pytest.mark.parametrize("seed", range(4))
def test_a_shuffled_configuration_gives_the_same_order(tmp_path, seed):
    config = _configuration("train", ["data.root=x", f"run={tmp_path}", "trainer.accelerator=cpu"])
    names = list(config.callbacks)
    Random(seed).shuffle(names)
    config.callbacks = OmegaConf.create({name: config.callbacks[name] for name in names})
    called = [type(callback) for callback in _trainer(config, tmp_path).callbacks]
    assert len(called) == len(names)
    assert [kind for kind in called if kind in FIXED] == FIXED
    assert called[:3] == FIXED[:3]
    assert called[-4:] == FIXED[-4:]


def test_callbacks_of_a_user_come_in_between_as_they_are_listed():
    class Mine(Callback):
        pass

    one, two, stop, seeds = Mine(), Mine(), GracefulStop(), StepSeeds(0)
    assert ordered([stop, two, one, seeds]) == [seeds, two, one, stop]
