"""Refuse to go on when the first optimizer step shows that a part of the network does not learn."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from vessel.batch import Batch
from vessel.errors import VesselError
from vessel.training.callbacks.updates import is_update
from vessel.training.shards import gradient, values

Groups = Mapping[str, Sequence[tuple[str, nn.Parameter]]]
Fingerprint = dict[str, tuple[float, float]]
CAUSES = (
    "likely causes: a detach() or no_grad() on the way to the loss, gradient checkpointing without input gradients, "
    "a loss weight of 0, or a module that the batch never ran"
)


class FirstStepCheck(Callback):
    """A check at the first optimizer step of a new run: every trainable group has gradients, and then changes.

    A learning rate that starts at 0 is allowed for: the change is then checked after the second step. Under ZeRO each
    rank checks its own shards, nothing is gathered; all ranks come to the same verdict.
    """

    def __init__(self) -> None:
        self._done = False
        self._moving = False
        self._before: Fingerprint | None = None
        self._arrived: set[str] = set()
        self._handles: list[RemovableHandle] = []

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._done = trainer.global_step > 0
        if not self._done:
            # DeepSpeed removes `.grad` as soon as it is computed.
            for name, parameter in _members(pl_module.network.trainable_groups()):  # type: ignore[union-attr, operator]
                self._handles.append(parameter.register_post_accumulate_grad_hook(partial(self._note, name)))

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._done or not is_update(trainer):
            return
        groups = pl_module.network.trainable_groups()  # type: ignore[union-attr, operator]
        if self._before is None:
            check_gradients(groups, _reduce(trainer, gradient_flags(groups, self._arrived)))
            self._remove_hooks()
        self._before = fingerprint(groups)
        self._moving = any(group["lr"] > 0 for group in optimizer.param_groups)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Batch, batch_idx: int
    ) -> None:
        if self._done or self._before is None or (trainer.global_step < 2 and not self._moving):
            return
        groups = pl_module.network.trainable_groups()  # type: ignore[union-attr, operator]
        check_change(groups, _reduce(trainer, changes(groups, self._before)))
        self._done = True

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._remove_hooks()

    def _note(self, name: str, parameter: Tensor) -> None:
        self._arrived.add(name)

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def gradient_flags(groups: Groups, arrived: Collection[str]) -> Tensor:
    """Collect facts about the gradients that this rank holds.

    Args:
        groups: all of them.
        arrived: names of parameters that got a gradient.

    Returns:
        int64 [P, 3] of 0 and 1 in the order of the groups: the parameter got a gradient, which has a number that is
        not finite, and which has one that is not 0.
    """
    rows = []
    for name, parameter in _members(groups):
        part = gradient(parameter)
        broken = part is not None and not torch.isfinite(part).all()
        rows.append((name in arrived, bool(broken), part is not None and bool(part.any())))
    return torch.tensor(rows, dtype=torch.int64).view(-1, 3)


def check_gradients(groups: Groups, flags: Tensor) -> None:
    """Refuse parameters without a finite gradient, and groups whose gradients are all zero.

    Args:
        groups: all of them.
        flags: int64 [P, 3], see `gradient_flags`; the maximum over the ranks.

    Raises:
        VesselError: names every group and parameter at fault.
    """
    if not groups or not all(groups.values()):
        empty = sorted(name for name, members in groups.items() if not members)
        raise VesselError(
            f"first step: nothing to train in {empty or 'the network'}; choose another set of trainable groups"
        )
    by_name = dict(zip((name for name, _ in _members(groups)), flags.tolist(), strict=True))
    faults = []
    for group, members in groups.items():
        names = [name for name, _ in members]
        present = [name for name in names if by_name[name][0]]
        if missing := [name for name in names if name not in present]:
            faults.append(f"{group}: {_some(missing)} got no gradient: it takes no part in the loss; freeze it")
        if broken := [name for name in present if by_name[name][1]]:
            faults.append(
                f"{group}: {_some(broken)} got a gradient that is not finite; lower the rate or use bf16/fp32"
            )
        if present and not any(by_name[name][1] or by_name[name][2] for name in present):
            faults.append(f"{group}: the gradients of all {len(present)} tensors are zero; {CAUSES}")
    if faults:
        raise VesselError("first step: these would not learn\n" + "\n".join(f"  {fault}" for fault in faults))


def changes(groups: Groups, before: Fingerprint) -> Tensor:
    """Find the parameters that differ from their fingerprint: int64 [P] of 0 and 1, as far as this rank holds them."""
    after = fingerprint(groups)
    return torch.tensor([after[name] != before[name] for name, _ in _members(groups)], dtype=torch.int64)


def check_change(groups: Groups, changed: Tensor) -> None:
    """Refuse groups of which no parameter changed.

    Args:
        groups: all of them.
        changed: int64 [P], see `changes`; the maximum over the ranks.

    Raises:
        VesselError: names the groups that are as they were.
    """
    per_group = changed.split([len(members) for members in groups.values()])
    same = [group for group, rows in zip(groups, per_group, strict=True) if not rows.any()]
    if same:
        raise VesselError(
            f"first step: the optimizer changed nothing in {', '.join(same)}; likely causes: the parameters are not in "
            "the optimizer, they were replaced after it was built, or the learning rate is 0 or too small for the dtype"
        )


@torch.no_grad()
def fingerprint(groups: Groups) -> Fingerprint:
    """Compute sum and sum of squares of this rank's shard of each parameter, in float64."""
    return {name: _moments(values(parameter)) for name, parameter in _members(groups)}


def _members(groups: Groups) -> Iterator[tuple[str, nn.Parameter]]:
    for members in groups.values():
        yield from members


def _reduce(trainer: Trainer, flags: Tensor) -> Tensor:
    """Compute the maximum over the ranks, each of which calls this."""
    reduced = trainer.strategy.reduce(flags.to(trainer.strategy.root_device), reduce_op="max")
    assert isinstance(reduced, Tensor)
    return reduced.cpu()


def _moments(parameter: Tensor) -> tuple[float, float]:
    total = squares = 0.0
    # In pieces: a float64 copy of an 8B model's embedding would take 4 GB beside the training state.
    for piece in parameter.split(1 << 24):
        piece = piece.double()
        total += float(piece.sum())
        squares += float(piece.square().sum())
    return total, squares


def _some(names: Sequence[str], most: int = 5) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
