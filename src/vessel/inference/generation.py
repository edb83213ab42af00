"""Generate answers by greedy decoding, as the public code does, for several conversations at a time.

Letters: B conversations, L tokens, d width of the language model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from vessel.batch import Batch, Sample, collate
from vessel.data.prompt import QUESTIONS, Prompt
from vessel.model.sa2va import Sa2VA

MAX_NEW_TOKENS = 2048


class Conversations:
    """B conversations, each about an image, that are answered together.

    Keys and values of the tokens stay cached: a token passes through the language model once, however many turns
    follow. Tokens of one pass are padded on the right; nothing attends to padding, and positions do not count it.

    Args:
        network: in evaluation mode.
        prompt: of this network.
        batch: the images and their regions; its own tokens are not used.
        max_new_tokens: the length at which an answer is cut.

    Attributes:
        seg_states: hidden states of the N `[SEG]` that the network generated, [N, d] for each conversation.
    """

    @torch.inference_mode()
    def __init__(self, network: Sa2VA, prompt: Prompt, batch: Batch, *, max_new_tokens: int = MAX_NEW_TOKENS) -> None:
        self.network, self.prompt, self.max_new_tokens = network, prompt, max_new_tokens
        self.seg_states: list[Tensor] = []
        self._cache = DynamicCache(config=network.mllm.model.language_model.config)
        self._lengths = torch.zeros(len(batch), dtype=torch.int64)  # tokens of each conversation in the cache
        self._is_token = torch.zeros(len(batch), 0, dtype=torch.bool)  # False where the cache holds padding
        self._tile_features = network.tile_features(batch)  # emptied once the image tokens are embedded
        self._regions = batch.regions and tuple(region.to(self._tile_features.device) for region in batch.regions)

    @torch.inference_mode()
    def generate(self, conversations: Sequence[Tensor]) -> list[list[int]]:
        """Generate the next answer of every conversation.

        Args:
            conversations: int64 [L] each, from the beginning to where an answer begins. Those of a later call begin
                with those of the earlier ones and their answers; one without a new token waits.

        Returns:
            ids of each answer, with the token or the stop word that ended it; none for a conversation that waits.
        """
        seg = self.prompt.token_ids.seg
        pending_tokens = [
            ids[length:].tolist() for ids, length in zip(conversations, self._lengths.tolist(), strict=True)
        ]
        answers: list[list[int]] = [[] for _ in pending_tokens]
        is_active = [bool(tokens) for tokens in pending_tokens]
        states = self._prefill(pending_tokens)
        self.seg_states = self.seg_states or [states[:0]] * len(pending_tokens)
        while any(is_active):
            chosen = self._greedy_next_tokens(states)
            new_tokens = [[token] if active else [] for token, active in zip(chosen, is_active, strict=True)]
            for row, tokens in enumerate(new_tokens):
                answers[row] += tokens
                is_active[row] = is_active[row] and not self._is_finished(answers[row])
            # The token that ends an answer is prefilled with the next question, if one comes; a `[SEG]` is prefilled
            # at once, since its mask is decoded from its state.
            pending_tokens = [
                tokens if active or tokens == [seg] else []
                for tokens, active in zip(new_tokens, is_active, strict=True)
            ]
            if any(pending_tokens):
                states = self._prefill(pending_tokens)
            for row in (row for row, tokens in enumerate(pending_tokens) if tokens == [seg]):
                self.seg_states[row] = torch.cat([self.seg_states[row], states[row : row + 1]])
        return answers

    def _prefill(self, pending_tokens: Sequence[Sequence[int]]) -> Tensor:
        """Pass new tokens of each conversation through the language model, and cache their keys and values.

        Returns:
            the state of the last new token of each conversation, [B, d]; without meaning where there is no new token.
        """
        rows = [torch.tensor(tokens, dtype=torch.int64) for tokens in pending_tokens]
        ids = pad_sequence(rows, batch_first=True, padding_value=self.prompt.token_ids.pad)
        counts, columns = torch.tensor([len(tokens) for tokens in pending_tokens]), torch.arange(ids.shape[1])
        embeddings = self.network.embed(ids, self._tile_features, self._regions)
        self._tile_features, self._regions = self._tile_features[:0], None
        self._is_token = torch.cat([self._is_token, columns < counts[:, None]], dim=1)
        device = embeddings.device
        with torch.compiler.set_stance("force_eager"):  # layers would be compiled again as the cache grows
            hidden = self.network.mllm.model.language_model(
                inputs_embeds=embeddings,
                attention_mask=self._is_token.to(device),
                position_ids=(self._lengths[:, None] + columns).to(device),
                past_key_values=self._cache,
                use_cache=True,
            ).last_hidden_state
        self._lengths = self._lengths + counts
        return hidden[torch.arange(len(ids)), (counts - 1).clamp(min=0)]

    def _greedy_next_tokens(self, states: Tensor) -> list[int]:
        """Return the most probable next token of each conversation from its state, [B, d]."""
        logits = self.network.mllm.lm_head(states)
        logits[:, self.prompt.token_ids.image] = -torch.inf  # a placeholder of the input, never part of an answer
        return logits.argmax(-1).tolist()

    def _is_finished(self, answer: Sequence[int]) -> bool:
        return len(answer) == self.max_new_tokens or self.prompt.is_finished(answer)


@dataclass(frozen=True)
class AnsweredConversation:
    """A conversation with its answers.

    Attributes:
        sample: without ground truth; a phrase for every `[SEG]` of the answers.
        phrases: those that results are for.
        answers: as in `vessel.inference.results.Prediction`.
        seg_indices: for each phrase the index of its `[SEG]` in the conversation; None without one.
        seg_states: [N, d], hidden states of the N `[SEG]` when they were generated; None when the answers are imposed.
    """

    sample: Sample
    phrases: tuple[str, ...]
    answers: tuple[str, ...]
    seg_indices: tuple[int | None, ...]
    seg_states: Tensor | None = None


@torch.inference_mode()
def generate_answers(
    network: Sa2VA, prompt: Prompt, samples: Sequence[Sample], *, frames: int = 1, max_new_tokens: int = MAX_NEW_TOKENS
) -> list[AnsweredConversation]:
    """Generate answers to the phrases of each sample, one phrase after the other in one conversation per sample.

    Args:
        network: in evaluation mode.
        prompt: of this network.
        samples: generated as one batch; one without phrases holds a free question.
        frames: of a pullback, one tile each.
        max_new_tokens: as in `Conversations`.
    """
    batch = collate([replace(sample, masks=None) for sample in samples], prompt.token_ids.pad)
    batched = Conversations(network, prompt, batch, max_new_tokens=max_new_tokens)
    conversations = [_Conversation(prompt, sample, frames) for sample in samples]
    while not all(conversation.is_finished for conversation in conversations):
        answers = batched.generate([conversation.next_prompt() for conversation in conversations])
        for conversation, answer in zip(conversations, answers, strict=True):
            if answer:
                conversation.answers.append(answer)
    pairs = zip(conversations, batched.seg_states, strict=True)
    return [conversation.result(states) for conversation, states in pairs]


@dataclass
class _Conversation:
    """One conversation: about the phrases of a sample, or the question that a sample without phrases holds."""

    prompt: Prompt
    sample: Sample
    frames: int
    answers: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.questions = [QUESTIONS[0].format(phrase=phrase) for phrase in self.sample.phrases]
        self.image_tokens = int((self.sample.input_ids == self.prompt.token_ids.image).sum()) // self.frames

    @property
    def is_finished(self) -> bool:
        return len(self.answers) == max(len(self.questions), 1)

    def next_prompt(self) -> Tensor:
        """Return the ids up to where the next answer begins, int64 [L]; none when every question has its answer."""
        if self.is_finished:
            return torch.empty(0, dtype=torch.int64)
        return self._ids(len(self.answers) + 1)[0] if self.questions else self.sample.input_ids

    def _ids(self, turns: int) -> tuple[Tensor, Tensor]:
        return self.prompt.conversation(self.questions[:turns], self.answers, self.image_tokens, frames=self.frames)

    def result(self, seg_states: Tensor) -> AnsweredConversation:
        """Build the result from the states [N, d] of the `[SEG]` in the answers."""
        counts = [answer.count(self.prompt.token_ids.seg) for answer in self.answers]
        phrases = self.sample.phrases
        seg_indices = tuple(sum(counts[:turn]) if n else None for turn, n in enumerate(counts))
        phrase_of_seg = tuple(phrase for phrase, n in zip(phrases, counts, strict=False) for _ in range(n))
        if self.questions:
            ids, labels = self._ids(len(self.questions))
        else:
            phrases = phrase_of_seg = tuple(f"seg_{i}" for i in range(1, counts[0] + 1))
            seg_indices = tuple(range(counts[0]))
            answer = torch.tensor(self.answers[0])
            ids, labels = (torch.cat([before, answer]) for before in (self.sample.input_ids, self.sample.labels))
        return AnsweredConversation(
            sample=replace(self.sample, phrases=phrase_of_seg, input_ids=ids, labels=labels, masks=None),
            phrases=phrases,
            answers=tuple(self.prompt.decode(answer).strip() for answer in self.answers),
            seg_indices=seg_indices,
            seg_states=seg_states,
        )
