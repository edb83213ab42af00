"""Take training steps of the product and of the reference, and split their time by part."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from bench.pairs import Pairs, in_turns
from bench.pieces import step_loss
from bench.sizes import Case
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW

from bench import reference
from vessel.batch import Batch
from vessel.data.prompt import Prompt
from vessel.training.optimizer import OptimizerSettings

FORWARD_REST, BACKWARD, OPTIMIZER = "losses and the rest of the forward pass", "backward pass", "optimizer"


class Steps:
    """Training steps of one network: gradients are clipped at 1 and AdamW updates the trainable weights, in both modes.

    Args:
        case: the network and its batch.
        prompt: questions and answers.

    Attributes:
        network: in training.
        spent: seconds of each part, one entry a step, by mode.
    """

    def __init__(self, case: Case, prompt: Prompt) -> None:
        self.network, self.loss_function = case.network(prompt).train(), case.loss_function
        self.batch = case.batch(prompt)
        self.trained = [p for p in self.network.parameters() if p.requires_grad]
        settings = OptimizerSettings()
        self.optimizer = AdamW(
            self.trained, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
        )
        self.spent: dict[str, list[dict[str, float]]] = {"product": [], "reference": []}
        self._within: defaultdict[str, float] = defaultdict(float)
        self._watch()

    def product(self, batch: Batch | None = None) -> None:
        """Take a step of `vessel.training.task`, the optimizer fused as there."""
        given = self.batch if batch is None else batch
        start = self._begin(fused=True)
        self._finish("product", start, step_loss(self.network, given, self.loss_function))

    def reference(self) -> None:
        """Take a step of the public code, with the AdamW that torch chooses by itself."""
        start = self._begin(fused=False)
        losses = reference.losses(self.network, self.batch, self.loss_function)
        self._finish("reference", start, torch.stack(list(losses.values())).sum())

    def _begin(self, *, fused: bool) -> float:
        for group in self.optimizer.param_groups:
            group["fused"] = fused
        self._within.clear()
        return time.perf_counter()

    def _finish(self, mode: str, start: float, loss: Tensor) -> None:
        after_forward = time.perf_counter()
        loss.backward()
        after_backward = time.perf_counter()
        clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        end = time.perf_counter()
        spent = dict(self._within)
        spent[FORWARD_REST] = after_forward - start - sum(spent.values())
        self.spent[mode].append(spent | {BACKWARD: after_backward - after_forward, OPTIMIZER: end - after_backward})

    def _watch(self) -> None:
        """Count the seconds of each part's own forward pass."""
        for name, module in self.network.parts().items():
            began: list[float] = []

            def enter(*_: object, began: list[float] = began) -> None:
                began.append(time.perf_counter())

            def leave(*_: object, name: str = name, began: list[float] = began) -> None:
                self._within[name] += time.perf_counter() - began.pop()

            module.register_forward_pre_hook(enter)
            module.register_forward_hook(leave)


def compare(case: Case, prompt: Prompt, *, pairs: int) -> tuple[Pairs, dict[str, dict[str, float]]]:
    """Measure the seconds of steps in turns, and the median seconds of each part by mode."""
    steps = Steps(case, prompt)
    found = in_turns(steps.product, steps.reference, pairs=pairs)
    return found, {mode: parts(spent[1:]) for mode, spent in steps.spent.items()}  # the first warmed up


def parts(spent: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Compute the median seconds of each part."""
    return {name: statistics.median(one.get(name, 0.0) for one in spent) for name in spent[0]}
