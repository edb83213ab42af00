"""Answers of a network that has learned nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle

import torch
from torch import Tensor

from vessel.data.prompt import ANSWERS, Prompt
from vessel.model.sa2va import Sa2VA


def standard_answer(prompt: Prompt) -> list[int]:
    """Ids of the answer that is taught outside training, with what ends it."""
    ids: list[int] = prompt.tokenizer(ANSWERS[0] + prompt.template.end, add_special_tokens=False).input_ids
    return ids


@contextmanager
def saying(network: Sa2VA, answer: Sequence[int]) -> Iterator[None]:
    """Have it give an answer over and over, all images of a batch at once; what it says costs what it always does."""
    words = cycle(answer)

    def speak(_module: object, _inputs: object, logits: Tensor) -> Tensor:
        said = torch.zeros_like(logits)
        said[..., next(words)] = 1
        return said

    handle = network.mllm.lm_head.register_forward_hook(speak)
    try:
        yield
    finally:
        handle.remove()
