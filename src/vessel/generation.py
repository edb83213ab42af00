"""What the network says: greedy decoding as the public code does it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from vessel.data.prompt import Prompt
from vessel.model.sa2va import Sa2VA

MAX_NEW_TOKENS = 2048


@torch.inference_mode()
def say(
    network: Sa2VA,
    prompt: Prompt,
    ids: Tensor,
    tiles: Tensor,
    *,
    regions: Tensor | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> list[int]:
    """Continue a conversation until its answer is over.

    Args:
        network: in evaluation mode.
        prompt: that belongs to it.
        ids: int64 [L], a conversation up to where the answer begins.
        tiles: uint8 [T, 3, t, t], of the image or of the frames.
        regions: bool [R, s, s], as in `vessel.batch.Sample`.
        max_new_tokens: where an answer that does not end is cut.

    Returns:
        ids of the answer, with the token or the stop word that ended it.
    """
    device = network.mllm.device
    pointed = None if regions is None else [regions.to(device)]
    embeddings = network.embed(ids[None].to(device), tiles.to(device), pointed)
    generated = network.mllm.generate(  # type: ignore[misc]  # transformers annotates self by a protocol
        inputs_embeds=embeddings,
        attention_mask=torch.ones(embeddings.shape[:2], dtype=torch.int64, device=device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=prompt.token_ids.eos,
        pad_token_id=prompt.token_ids.pad,
        suppress_tokens=[prompt.token_ids.image],  # stands for a feature of the image, which an answer has none of
        stopping_criteria=StoppingCriteriaList([_Over(prompt)]),
    )
    return generated[0].tolist()


class _Over(StoppingCriteria):
    """Stops where the prompt says that an answer is over."""

    def __init__(self, prompt: Prompt) -> None:
        self.prompt = prompt

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        over = [self.prompt.is_over(ids) for ids in input_ids.tolist()]
        return torch.tensor(over, device=input_ids.device)
