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
    """B conversations, each about an image, carried on together.

    Keys and values of what was read stay: a token passes through the language model once, however many turns follow.
    What is read together is padded on the right; nothing attends to padding, and positions do not count it.

    Args:
        network: in evaluation mode.
        prompt: that belongs to it.
        batch: the images, and what of them is pointed at; its own tokens are not read.
        max_new_tokens: where an answer that does not end is cut.

    Attributes:
        states: for each conversation those of the N `[SEG]` that the network said, [N, d].
    """

    @torch.inference_mode()
    def __init__(self, network: Sa2VA, prompt: Prompt, batch: Batch, *, max_new_tokens: int = MAX_NEW_TOKENS) -> None:
        self.network, self.prompt, self.max_new_tokens = network, prompt, max_new_tokens
        self.states: list[Tensor] = []
        self._cache = DynamicCache(config=network.mllm.model.language_model.config)
        self._lengths = torch.zeros(len(batch), dtype=torch.int64)  # of what was read
        self._is_token = torch.zeros(len(batch), 0, dtype=torch.bool)  # what of the cache is no padding
        self._unseen = network.tile_features(batch)
        self._regions = batch.regions and tuple(held.to(self._unseen.device) for held in batch.regions)

    @torch.inference_mode()
    def ask(self, conversations: Sequence[Tensor]) -> list[list[int]]:
        """Let the network answer.

        Args:
            conversations: int64 [L] each, from the beginning to where an answer begins. The earlier ones, with their
                answers, are the beginnings of the later ones; one without anything new waits.

        Returns:
            ids of each answer, with the token or the stop word that ended it; none for a conversation that waits.
        """
        seg = self.prompt.token_ids.seg
        unread = [ids[length:].tolist() for ids, length in zip(conversations, self._lengths.tolist(), strict=True)]
        answers: list[list[int]] = [[] for _ in unread]
        going = list(map(bool, unread))
        last = self._read(unread)
        self.states = self.states or [last[:0]] * len(unread)
        while any(going):
            said = [[token] if goes else [] for token, goes in zip(self._choose(last), going, strict=True)]
            for row, new in enumerate(said):
                answers[row] += new
                going[row] = going[row] and not self._is_over(answers[row])
            # What ends an answer is read with the next question, if one comes. A `[SEG]` is drawn by its state.
            unread = [new if goes or new == [seg] else [] for new, goes in zip(said, going, strict=True)]
            if any(unread):
                last = self._read(unread)
            for row in (row for row, new in enumerate(unread) if new == [seg]):
                self.states[row] = torch.cat([self.states[row], last[row : row + 1]])
        return answers

    def _read(self, unread: Sequence[Sequence[int]]) -> Tensor:
        """Read on in each conversation: the state of its last new token, [B, d], without meaning where none is new."""
        rows = [torch.tensor(new, dtype=torch.int64) for new in unread]
        ids = pad_sequence(rows, batch_first=True, padding_value=self.prompt.token_ids.pad)
        counts, places = torch.tensor([len(new) for new in unread]), torch.arange(ids.shape[1])
        embeddings = self.network.embed(ids, self._unseen, self._regions)
        self._unseen, self._regions = self._unseen[:0], None
        self._is_token = torch.cat([self._is_token, places < counts[:, None]], dim=1)
        device = embeddings.device
        with torch.compiler.set_stance("force_eager"):  # layers would be compiled anew as the cache grows
            hidden = self.network.mllm.model.language_model(
                inputs_embeds=embeddings,
                attention_mask=self._is_token.to(device),
                position_ids=(self._lengths[:, None] + places).to(device),
                past_key_values=self._cache,
                use_cache=True,
            ).last_hidden_state
        self._lengths = self._lengths + counts
        return hidden[torch.arange(len(ids)), (counts - 1).clamp(min=0)]

    def _choose(self, states: Tensor) -> list[int]:
        """The next token of each conversation, by states [B, d]."""
        logits = self.network.mllm.lm_head(states)
        logits[:, self.prompt.token_ids.image] = -torch.inf  # stands for what is seen, which an answer has none of
        return logits.argmax(-1).tolist()

    def _is_over(self, answer: Sequence[int]) -> bool:
        return len(answer) == self.max_new_tokens or self.prompt.is_over(answer)


@dataclass(frozen=True)
class Spoken:
    """A conversation with its answers.

    Attributes:
        sample: without truth; a phrase for every `[SEG]` of the answers.
        phrases: what results are for.
        answers: as in `vessel.inference.results.Prediction`.
        at: for each phrase its `[SEG]`, counted over the conversation; None without one.
        states: [N, d], of the N `[SEG]` when the network said them; None when the answers are imposed.
    """

    sample: Sample
    phrases: tuple[str, ...]
    answers: tuple[str, ...]
    at: tuple[int | None, ...]
    states: Tensor | None = None


@torch.inference_mode()
def converse(
    network: Sa2VA, prompt: Prompt, samples: Sequence[Sample], *, frames: int = 1, max_new_tokens: int = MAX_NEW_TOKENS
) -> list[Spoken]:
    """Ask for the phrases of each sample, one after the other in one conversation; the samples together.

    Args:
        network: in evaluation mode.
        prompt: that belongs to it.
        samples: one without phrases holds a free question.
        frames: of a pullback, one tile each.
        max_new_tokens: as in `Conversations`.
    """
    batch = collate([replace(sample, masks=None) for sample in samples], prompt.token_ids.pad)
    together = Conversations(network, prompt, batch, max_new_tokens=max_new_tokens)
    talks = [_Talk(prompt, sample, frames) for sample in samples]
    while not all(talk.is_over for talk in talks):
        for talk, answer in zip(talks, together.ask([talk.so_far() for talk in talks]), strict=True):
            if answer:
                talk.answers.append(answer)
    return [talk.result(states) for talk, states in zip(talks, together.states, strict=True)]


@dataclass
class _Talk:
    """One conversation: about the phrases of a sample, or the question that a sample without phrases holds."""

    prompt: Prompt
    sample: Sample
    frames: int
    answers: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.questions = [QUESTIONS[0].format(phrase=phrase) for phrase in self.sample.phrases]
        self.image_tokens = int((self.sample.input_ids == self.prompt.token_ids.image).sum()) // self.frames

    @property
    def is_over(self) -> bool:
        return len(self.answers) == max(len(self.questions), 1)

    def so_far(self) -> Tensor:
        """Ids up to where the next answer begins, int64 [L]; none when every question has its answer."""
        if self.is_over:
            return torch.empty(0, dtype=torch.int64)
        return self._ids(len(self.answers) + 1)[0] if self.questions else self.sample.input_ids

    def _ids(self, turns: int) -> tuple[Tensor, Tensor]:
        asked = self.questions[:turns]
        return self.prompt.conversation(asked, self.answers, self.image_tokens, frames=self.frames)

    def result(self, states: Tensor) -> Spoken:
        """Build the result from the states [N, d] of the `[SEG]` in the answers."""
        found = [answer.count(self.prompt.token_ids.seg) for answer in self.answers]
        asked, at = self.sample.phrases, tuple(sum(found[:turn]) if n else None for turn, n in enumerate(found))
        owners = tuple(phrase for phrase, n in zip(asked, found, strict=False) for _ in range(n))
        if self.questions:
            ids, labels = self._ids(len(self.questions))
        else:
            asked = owners = tuple(f"seg_{i}" for i in range(1, found[0] + 1))
            at = tuple(range(found[0]))
            answer = torch.tensor(self.answers[0])
            ids, labels = (torch.cat([before, answer]) for before in (self.sample.input_ids, self.sample.labels))
        return Spoken(
            sample=replace(self.sample, phrases=owners, input_ids=ids, labels=labels, masks=None),
            phrases=asked,
            answers=tuple(self.prompt.decode(answer).strip() for answer in self.answers),
            at=at,
            states=states,
        )
