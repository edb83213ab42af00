"""python -m bench.flops [NAME ...]: count floating-point operations of a training step, by part, at true sizes.

Counted by torch.utils.flop_counter on a network without content: a product and a sum are two operations, attention is
counted in full although its kernels skip what the causal mask hides. Not counted are elementwise work, the optimizer,
and what activation checkpointing computes again. Names are those of conf/model.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from bench.memory import sizes_of
from bench.pieces import backward, pieces, step_loss
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from vessel.data.prompt import Prompt
from vessel.losses import NativeLoss
from vessel.memory_plan.engine import Engine
from vessel.memory_plan.plan import Setup, batch_of
from vessel.model.groups import choose_trainable
from vessel.model.lora import Lora, add_lora
from vessel.model.sa2va import Sa2VA

NAMES = ("internvl3_1b", "internvl3_2b", "internvl3_8b")


class Cost(NamedTuple):
    """Floating-point operations."""

    forward: int
    backward: int

    @property
    def total(self) -> int:
        """Return the operations of both passes."""
        return self.forward + self.backward


def recipe(name: str, *, batch_size: int = 1) -> Setup:
    """Return the published fine-tuning at the sizes of conf/model/<name>.yaml: LoRA r=128 in bf16, 512 x 512 images."""
    return Setup(
        sizes_of(f"model={name}"),
        Lora(r=128),
        "lora",
        NativeLoss(),
        Engine(precision="bf16-mixed"),
        batch_size=batch_size,
    )


def step_cost(setup: Setup) -> Mapping[str, Cost]:
    """Count the operations of each part of a step, by the names of `bench.pieces`."""
    network, prompt = _network(setup)
    batch = batch_of(setup, prompt)
    with _Values():
        parts = pieces(network, batch, setup.loss_function)
        return {name: _counted(run) for name, run in parts.items()}


def whole_cost(setup: Setup) -> Cost:
    """Count the operations of a step in one piece, to which those of its parts add up."""
    network, prompt = _network(setup)
    batch = batch_of(setup, prompt)
    with _Values():
        return _counted(lambda: step_loss(network, batch, setup.loss_function))


def _network(setup: Setup) -> tuple[Sa2VA, Prompt]:
    prompt = Prompt()  # questions and answers are of nearly the same length with every tokenizer
    with torch.device("meta"):
        network = setup.sizes.build(prompt.token_ids, setup.images.names)
        if setup.lora.r > 0:
            # The dropout before an adapter has no operations that count.
            add_lora(network, setup.lora, new_tokens=prompt.new_tokens, seg_is_trained=True)
    choose_trainable(network, setup.trainable)
    assert isinstance(network, Sa2VA)
    return network.train(), prompt


def _counted(run: Any) -> Cost:
    with FlopCounterMode(display=False) as counter:
        result = run()
        forward = counter.get_total_flops()
        backward(result)
    return Cost(forward, counter.get_total_flops() - forward)


class _Values(TorchFunctionMode):
    """A mode that answers the one question about values which a network without content has: are all tokens read?"""

    def __torch_function__(self, func: Any, types: Iterable[Any], args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__bool__ and args[0].is_meta:
            return True
        return func(*args, **(kwargs or {}))


def table(costs: Mapping[str, Mapping[str, Cost]]) -> list[str]:
    """Format teraflop of one image by part, forward and backward, as lines of Markdown.

    Args:
        costs: parts of a step with one image, by the name of the sizes.
    """
    lines = ["| TFLOP an image, forward + backward | " + " | ".join(costs) + " |", "|---" * (len(costs) + 1) + "|"]
    names = next(iter(costs.values()))
    for part in names:
        row = (f"{parts[part].forward / 1e12:.2f} + {parts[part].backward / 1e12:.2f}" for parts in costs.values())
        lines.append(f"| {part} | {' | '.join(row)} |")
    total = (f"{sum(cost.total for cost in parts.values()) / 1e12:.2f}" for parts in costs.values())
    return [*lines, f"| **together** | {' | '.join(total)} |"]


if __name__ == "__main__":
    print("\n".join(table({name: step_cost(recipe(name)) for name in sys.argv[1:] or NAMES})))
