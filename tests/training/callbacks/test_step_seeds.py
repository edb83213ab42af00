import random

import numpy as np
import torch

from vessel.training.callbacks.step_seeds import StepSeeds, seed_all


def draw():
    return torch.rand(()).item(), np.random.rand(), random.random()


def test_every_generator_follows_from_the_numbers():
    drawn = {}
    for numbers in [
        (0, 0, 0, 0, 0),
        (1, 0, 0, 0, 0),
        (0, 1, 0, 0, 0),
        (0, 0, 1, 0, 0),
        (0, 0, 0, 1, 0),
        (0, 0, 0, 0, 1),
    ]:
        seed_all(*numbers)
        drawn[numbers] = draw()
        draw()
        seed_all(*numbers)
        assert draw() == drawn[numbers]
    for column in zip(*drawn.values(), strict=True):
        assert len(set(column)) == len(drawn)


def test_a_step_draws_the_same_whatever_was_drawn_before(trainer, toy_task, batches):
    class Drawing(toy_task):
        def __init__(self, wasted):
            super().__init__()
            self.wasted, self.drawn, self.validated = wasted, [], []

        def training_step(self, batch, batch_idx):
            self.drawn.append(draw())
            return super().training_step(batch, batch_idx)

        def on_train_batch_end(self, *_):
            torch.rand(self.wasted)

        def validation_step(self, batch, batch_idx):
            self.validated.append(draw())
            return super().validation_step(batch, batch_idx)

    runs = {}
    for seed, wasted, validations in ((5, 0, 1), (5, 3, 2), (6, 0, 1)):
        task = Drawing(wasted)
        run = trainer(StepSeeds(seed), max_epochs=2, val_check_interval=1 / validations)
        run.fit(task, batches(4), batches(2))
        runs[seed, wasted] = task
    assert runs[5, 0].drawn == runs[5, 3].drawn
    assert len(set(runs[5, 0].drawn)) == 8
    assert not set(runs[5, 0].drawn) & set(runs[6, 0].drawn)
    assert runs[5, 0].validated == runs[5, 3].validated[:4]
    assert len(set(runs[5, 0].validated)) == 2
