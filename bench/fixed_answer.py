"""Make a network with random weights generate a fixed answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle

import torch
from torch import Tensor

from vessel.data.prompt import ANSWERS, Prompt
from vessel.model.sa2va import Sa2VA


def standard_answer(prompt: Prompt) -> list[int]:
    """Return the token ids of the first answer template, with the tokens that end it."""
    ids: list[int] = prompt.tokenizer(ANSWERS[0] + prompt.template.end, add_special_tokens=False).input_ids
    return ids


@contextmanager
def fix_answer(network: Sa2VA, answer: Sequence[int]) -> Iterator[None]:
    """Have the network generate one answer over and over, for all images of a batch; the work is that of any answer."""
    words = cycle(answer)

    def replace_logits(_module: object, _inputs: object, logits: Tensor) -> Tensor:
        fixed = torch.zeros_like(logits)
        fixed[..., next(words)] = 1
        return fixed

    handle = network.mllm.lm_head.register_forward_hook(replace_logits)
    try:
        yield
    finally:
        handle.remove()
