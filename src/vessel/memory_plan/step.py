"""Run one training step of a network without content, and count the bytes of its activations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from vessel.batch import Batch
from vessel.losses import Loss, lm_loss
from vessel.memory_plan.gpu_emulation import GpuEmulation
from vessel.memory_plan.live_memory import LiveMemory
from vessel.model.network import Network

GRADIENTS, BACKWARD, CASTS = "gradients", "temporaries of the backward pass", "weights cast to 16 bits"
LOSSES = "activations: losses"


@dataclass(frozen=True)
class StepSettings:
    """The settings of a training step.

    Attributes:
        autocast: as in `GpuEmulation`.
        zero3: as in `GpuEmulation`.
        shard_gradients: each gradient is sharded over the ranks as soon as it is computed.
        bucket: elements; with sharded gradients, one that is larger stays until the next one is computed.
        accumulating: gradients of an earlier batch exist already.
    """

    autocast: torch.dtype | None = None
    zero3: bool = False
    shard_gradients: bool = False
    bucket: int = 200_000_000
    accumulating: bool = False


@dataclass(frozen=True)
class Step:
    """Bytes of a step, parameters and optimizer not counted.

    Attributes:
        kept: bytes that the graph holds when the forward pass is over, by the part that made them.
        fullest: bytes that are alive at the fullest moment, by part; `gradients` among them.
        moment: the pass that runs then, and the part.
        order: modules with parameters of their own in the order of the forward pass, and whether gradients pass them.
    """

    kept: Mapping[str, int]
    fullest: Mapping[str, int]
    moment: str
    order: Sequence[tuple[nn.Module, bool]]


def run_step(network: Network, batch: Batch, loss_function: Loss, settings: StepSettings) -> Step:
    """Run forward and backward pass.

    Args:
        network: on the meta device, in the dtypes of training.
        batch: token ids, labels and attention mask with content; images and masks on the meta device.
        loss_function: mask loss.
        settings: precision and engine.
    """
    network.train()
    trained = [p for p in network.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter) if settings.accumulating and not settings.shard_gradients else None
    known = [*network.parameters(), *network.buffers(), *(p.grad for p in trained if p.grad is not None)]
    live = LiveMemory([*known, batch.tiles, batch.frames, *(batch.masks or ())])
    lengths = batch.attention_mask.sum(1)
    gpu = GpuEmulation(
        autocast=settings.autocast,
        zero3=settings.zero3,
        padded=bool((lengths != lengths.max()).any()),
        casting=lambda: live.part(CASTS),
    )
    order: list[tuple[nn.Module, bool]] = []
    with ExitStack() as stack:
        for handle in [
            *_watch_parts(network, live),
            *_watch_order(network, order),
            *_watch_gradients(trained, live, settings),
        ]:
            stack.callback(handle.remove)
        stack.enter_context(gpu)
        stack.enter_context(live)
        output = network(batch)
        with live.part(LOSSES):
            assert batch.masks is not None
            losses = dict(loss_function(output.mask_logits, batch.masks, network.frame_size))
            losses["lm_loss"] = lm_loss(output.lm_logits, output.lm_targets.to(output.lm_logits.device))
            loss = torch.stack(list(losses.values())).sum()
        del output, losses
        gpu.forget_casts()
        kept = +live.now
        forward = list(order)
        with live.part(BACKWARD):
            _backward(loss)
    for parameter in trained:
        parameter.grad = None
    moment = "backward pass" if live.moment == BACKWARD else f"forward pass ({live.moment})"
    return Step(kept, _with_gradients_before(live, trained, settings), moment, forward)


def _backward(loss: Tensor) -> None:
    # `Tensor.backward` is itself a function that the emulation would intercept, and everything inside would run without
    # it; layers that are computed again need it.
    engine: Any = torch.autograd.Variable._execution_engine
    engine.run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


def _with_gradients_before(live: LiveMemory, trained: Sequence[Tensor], settings: StepSettings) -> Mapping[str, int]:
    if not settings.accumulating or settings.shard_gradients:
        return +live.fullest
    return live.fullest + Counter({GRADIENTS: sum(tensor.nbytes for tensor in trained)})


def _watch_parts(network: Network, live: LiveMemory) -> list[Any]:
    handles = []
    for part, module in network.parts().items():
        name = f"activations: {part}"
        inside: list[AbstractContextManager[None]] = []

        def enter(*_: Any, name: str = name, inside: list[AbstractContextManager[None]] = inside) -> None:
            inside.append(live.part(name))
            inside[-1].__enter__()

        def leave(*_: Any, inside: list[AbstractContextManager[None]] = inside) -> None:
            inside.pop().__exit__(None, None, None)

        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    return handles


def _watch_order(network: nn.Module, order: list[tuple[nn.Module, bool]]) -> list[Any]:
    def note_order(module: nn.Module, _: Any, made: Any) -> None:
        order.append((module, any(isinstance(t, Tensor) and t.requires_grad for t in tree_iter(made))))

    return [module.register_forward_hook(note_order) for module in network.modules()]


def _watch_gradients(trained: Sequence[Tensor], live: LiveMemory, settings: StepSettings) -> list[Any]:
    waiting: list[Tensor] = []

    def count_gradient(parameter: Tensor) -> None:
        assert parameter.grad is not None
        live.move(parameter.grad, GRADIENTS)
        if settings.shard_gradients:
            waiting[:] = [parameter.grad] if parameter.numel() > settings.bucket else []
            parameter.grad = None

    return [parameter.register_post_accumulate_grad_hook(count_gradient) for parameter in trained]
