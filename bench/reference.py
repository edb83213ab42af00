"""Compute what the public training and inference code computes, on the weights of a vessel network, nothing left out.

Every step is one that Sa2VA's own code takes: `text_hidden_fcs` and the LM head on every position and cross-entropy
over the whole vocabulary; five object slots a frame, each with a copy of the frame's features and a run of the mask
decoder; prediction one image and one phrase at a time, the image encoded again for each. vessel leaves out what does
not change the result; here it is not left out, so that the two can be compared, in numbers and in seconds.

Two things are not the public code's. An object's mask is the mean of its slots, which are alike: the public code keeps
five objects of a frame at random, and an object that fills two slots counts twice. Here there are as many fives as the
objects need, and each object counts once, as in vessel; for up to five objects the decoder does the same work. And the
mask losses are vessel's, once for each object, where the public code draws points: both modes are to compute one
number, with the same work. Left out of the public inference is the memory that SAM2 makes of an image after its mask is
decoded, and never uses.

Letters: B images, K objects of an image, N objects of the batch, M slots of the batch, L tokens, V vocabulary.
"""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vessel.batch import Batch, Sample, upsample
from vessel.data.prompt import QUESTIONS, Prompt
from vessel.losses import NativeLoss
from vessel.model.grounding import best_candidate
from vessel.model.sa2va import Sa2VA

SLOTS = 5  # objects of a frame in the public code


class Forward(NamedTuple):
    """The output of the teacher-forced pass.

    Attributes:
        mask_logits: float32 [M, S/4, S/4].
        slots: objects that fill the slots, int64 [M], counted over the batch.
        lm_logits: [B, L, V], of every position.
    """

    mask_logits: Tensor
    slots: Tensor
    lm_logits: Tensor


def forward(network: Sa2VA, batch: Batch) -> Forward:
    """Run the teacher-forced pass: specification 3.1 to 3.4."""
    assert batch.features is None, "the reference keeps no features"
    hidden = network.mllm.model.language_model(
        inputs_embeds=network.embed(batch.input_ids, network.encode_tiles(batch.tiles), batch.regions),
        attention_mask=batch.attention_mask,
        output_hidden_states=True,
        use_cache=False,
    ).hidden_states[-1]
    projected = network.text_hidden_fcs(hidden)
    prompts = projected[batch.input_ids == network.tokens.seg] + projected.mean() * 0.0
    filled = [fill(len(phrases), device=prompts.device) for phrases in batch.phrases]
    first = accumulate((len(phrases) for phrases in batch.phrases), initial=0)
    copies = torch.tensor([len(own) for own in filled], device=prompts.device)
    slots = torch.cat([own + start for own, start in zip(filled, first, strict=False)])
    return Forward(
        mask_logits=decode_slots(network, batch.frames, prompts[slots], copies),
        slots=slots,
        lm_logits=network.mllm.lm_head(hidden),
    )


def fill(objects: int, *, device: torch.device | None = None) -> Tensor:
    """Fill the slots of a frame with its objects, in turns: 2 -> [0, 1, 0, 1, 0]; int64, a multiple of five long."""
    return torch.arange(-(-objects // SLOTS) * SLOTS, device=device) % objects


def decode_slots(network: Sa2VA, frames: Tensor, prompts: Tensor, copies: Tensor) -> Tensor:
    """Decode mask logits float32 [M, S/4, S/4] of frames uint8 [B, 3, S, S].

    Args:
        network: whose SAM2 decodes.
        frames: encoded here.
        prompts: [M, C].
        copies: int64 [B], prompts of each frame.
    """
    grounding = network.grounding
    features = grounding.features(network.encode_frame(frames))
    top, *high = (level.repeat_interleave(copies, dim=0) for level in (features.top, *features.high))
    masks, ious, *_ = grounding.candidates(grounding.without_memory(top), (high[0], high[1]), prompts)
    # SAM2 brings every candidate to the size of the frame; training has no use for it.
    F.interpolate(masks, (network.frame_size, network.frame_size), mode="bilinear", align_corners=False)
    return best_candidate(masks, ious)


def losses(network: Sa2VA, batch: Batch, loss_function: NativeLoss) -> dict[str, Tensor]:
    """Compute the weighted scalars `mask_loss`, `dice_loss` and `lm_loss`.

    Args:
        network: in training mode.
        batch: with masks.
        loss_function: vessel's, computed once for each object, on the mean of its slots.
    """
    assert batch.masks is not None
    made = forward(network, batch)
    filled = made.slots.bincount()[:, None, None]
    empty = torch.zeros_like(made.mask_logits[: len(filled)])
    logits = empty.index_add(0, made.slots, made.mask_logits) / filled
    words = made.lm_logits[:, :-1].reshape(-1, made.lm_logits.shape[-1])
    lm = F.cross_entropy(words, batch.labels[:, 1:].reshape(-1), ignore_index=-100)
    return {**loss_function(logits, batch.masks, network.frame_size), "lm_loss": loss_function.lm_weight * lm}


@torch.no_grad()
def predict_forced(network: Sa2VA, prompt: Prompt, sample: Sample) -> list[Tensor]:
    """Predict probabilities float32 [H, W] of each phrase, each by a pass of its own, its answer given.

    The conversation is carried on as text: a phrase follows those before it, and all of it is read again.
    """
    probabilities = []
    for turn in range(1, len(sample.phrases) + 1):
        ids, _ = prompt.encode(sample.phrases[:turn], _image_tokens(network, sample))
        hidden = network.mllm.model.language_model(
            inputs_embeds=network.embed(ids[None].to(network.mllm.device), network.encode_tiles(sample.tiles)),
            use_cache=False,
        ).last_hidden_state[0]
        probabilities.append(_probability(network, sample, hidden[ids.to(hidden.device) == network.tokens.seg][-1]))
    return probabilities


@torch.no_grad()
def predict_generated(network: Sa2VA, prompt: Prompt, sample: Sample, *, max_new_tokens: int) -> list[list[Tensor]]:
    """Predict for each phrase the probabilities float32 [H, W] of every `[SEG]` of its answer: specification 4.

    Answers are the network's own, greedy, by transformers' `generate`; the conversation is carried on as text.
    """
    questions = [QUESTIONS[0].format(phrase=phrase) for phrase in sample.phrases]
    answers: list[list[int]] = []
    probabilities = []
    for turn in range(1, len(questions) + 1):
        ids, _ = prompt.conversation(questions[:turn], answers, _image_tokens(network, sample))
        embeddings = network.embed(ids[None].to(network.mllm.device), network.encode_tiles(sample.tiles))
        made = network.mllm.generate(  # type: ignore[misc]  # transformers annotates self by a protocol
            inputs_embeds=embeddings,
            attention_mask=torch.ones(embeddings.shape[:2], dtype=torch.int64, device=embeddings.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=prompt.token_ids.eos,
            pad_token_id=prompt.token_ids.pad,
            return_dict_in_generate=True,
            output_hidden_states=True,
        )
        generated = made.sequences[0]
        # Of the last token there is no state: it was never an input.
        states = torch.cat([step[-1][0] for step in made.hidden_states])[len(ids) :]
        probabilities.append(
            [_probability(network, sample, state) for state in states[generated[:-1] == network.tokens.seg]]
        )
        answers.append(generated.tolist())
    return probabilities


def _image_tokens(network: Sa2VA, sample: Sample) -> int:
    return len(sample.tiles) * network.mllm.config.image_seq_length


def _probability(network: Sa2VA, sample: Sample, state: Tensor) -> Tensor:
    prompts = network.text_hidden_fcs(state[None])
    logits = decode_slots(network, sample.frame[None], prompts, torch.ones(1, dtype=torch.int64, device=prompts.device))
    return upsample(logits, network.frame_size, sample.size)[0].sigmoid()
