"""Refuse to go on when the first optimizer step shows that a part of the network does not learn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from vessel.batch import Batch
from vessel.errors import VesselError

Groups = Mapping[str, Sequence[tuple[str, nn.Parameter]]]
Fingerprint = dict[str, tuple[float, float]]
CAUSES = (
    "likely causes: a detach() or no_grad() on the way to the loss, gradient checkpointing without input gradients, "
    "a loss weight of 0, or a module that the batch never ran"
)


class FirstStepCheck(Callback):
    """At the first optimizer step of a fresh run, see gradients in every trainable group, then see each group change.

    A learning rate that starts at 0 is allowed for: the change is then looked for after the second step.
    """

    def __init__(self) -> None:
        self._done = False
        self._moving = False
        self._before: Fingerprint | None = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._done = trainer.global_step > 0

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._done:
            return
        groups = pl_module.network.trainable_groups()  # type: ignore[union-attr, operator]
        if self._before is None:
            check_gradients(groups)
        self._before = fingerprint(groups)
        self._moving = any(group["lr"] > 0 for group in optimizer.param_groups)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Batch, batch_idx: int
    ) -> None:
        if self._done or self._before is None or (trainer.global_step < 2 and not self._moving):
            return
        check_change(pl_module.network.trainable_groups(), self._before)  # type: ignore[union-attr, operator]
        self._done = True


def check_gradients(groups: Groups) -> None:
    """See that every parameter has a finite gradient and that no group's gradients are all zero.

    Raises:
        VesselError: names every group and parameter at fault.
    """
    if not groups or not all(groups.values()):
        empty = sorted(name for name, members in groups.items() if not members)
        raise VesselError(
            f"first step: nothing to train in {empty or 'the network'}; choose another set of trainable groups"
        )
    faults = []
    for group, members in groups.items():
        gradients = {name: parameter.grad for name, parameter in members}
        if missing := [name for name, value in gradients.items() if value is None]:
            faults.append(f"{group}: {_some(missing)} got no gradient: it takes no part in the loss; freeze it")
        present = {name: value for name, value in gradients.items() if value is not None}
        if broken := [name for name, value in present.items() if not torch.isfinite(value).all()]:
            faults.append(
                f"{group}: {_some(broken)} got a gradient that is not finite; lower the rate or use bf16/fp32"
            )
        if present and not any(value.any() for value in present.values()):
            faults.append(f"{group}: the gradients of all {len(present)} tensors are zero; {CAUSES}")
    if faults:
        raise VesselError("first step: these would not learn\n" + "\n".join(f"  {fault}" for fault in faults))


def check_change(groups: Groups, before: Fingerprint) -> None:
    """See that each group differs from its fingerprint before the step.

    Raises:
        VesselError: names the groups that are as they were.
    """
    after = fingerprint(groups)
    same = [group for group, members in groups.items() if all(after[name] == before[name] for name, _ in members)]
    if same:
        raise VesselError(
            f"first step: the optimizer changed nothing in {', '.join(same)}; likely causes: the parameters are not in "
            "the optimizer, they were replaced after it was built, or the learning rate is 0 or too small for the dtype"
        )


@torch.no_grad()
def fingerprint(groups: Groups) -> Fingerprint:
    """Sum and sum of squares of each parameter, in float64."""
    return {name: _moments(parameter) for members in groups.values() for name, parameter in members}


def _moments(parameter: Tensor) -> tuple[float, float]:
    total = squares = 0.0
    # In pieces: a float64 copy of an 8B model's embedding would take 4 GB beside the training state.
    for piece in parameter.flatten().split(1 << 24):
        piece = piece.double()
        total += float(piece.sum())
        squares += float(piece.square().sum())
    return total, squares


def _some(names: Sequence[str], shown: int = 5) -> str:
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "")
