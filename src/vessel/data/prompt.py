"""Prompts: from phrases to token ids. The only module that knows chat templates, image tokens and prompt templates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vessel.batch import TokenIds
from vessel.data.tokenizer import read_tokenizer, small_tokenizer
from vessel.errors import VesselError

SEG, IMAGE = "[SEG]", "<IMG_CONTEXT>"
ADDED = (SEG, "<p>", "</p>", "<vp>", "</vp>")
PLACEHOLDER = "<image>"  # where users of the public code put the image
IGNORED = -100
_KNOWN_TEXTS = 1024  # of which a prompt keeps the ids; training has few prompt templates of a phrase
_NO_BREAKS = str.maketrans("", "", "\r\n")

# Prompt templates. The first of each is used outside training; training draws among all.
QUESTIONS = (
    "Please segment the {phrase} in this image.",
    "Show me the {phrase} in this image as a mask.",
    "Where is the {phrase}? Answer with a segmentation mask.",
    "Outline the {phrase} visible here.",
    "Segment the {phrase}.",
    "Which pixels belong to the {phrase}? Give their mask.",
)
ANSWERS = (f"Sure, {SEG}.", f"Here it is: {SEG}.", f"The mask is {SEG}.", f"{SEG}.")


@dataclass(frozen=True)
class ChatTemplate:
    """A chat format.

    Attributes:
        turn: the text around a question, up to the beginning of the answer.
        end: the text that closes an answer; supervised.
        stop_words: each ends a generated text.
        separator: the text between an answer and the next question; not supervised.
    """

    turn: str
    end: str
    stop_words: tuple[str, ...]
    separator: str = "\n"


_CHAT = "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
TEMPLATES = {
    "qwen_chat": ChatTemplate(_CHAT, "<|im_end|>", ("<|im_end|>", "<|endoftext|>")),
    "internlm2_chat": ChatTemplate(_CHAT, "<|im_end|>", ("<|im_end|>",)),
    "phi3_chat": ChatTemplate("<|user|>\n{question}<|end|>\n<|assistant|>\n", "<|end|>", ("<|end|>",)),
}


class Prompt:
    """A maker of conversations about an image or the first frames of a video, as token ids.

    Args:
        tokenizer: folder, or `hf://` name on the hub, with the tokenizer of the checkpoint; None makes the small
            tokenizer that a network trained from scratch uses.
        template: name of the chat format, as the checkpoint's `config.json` names it.

    Attributes:
        name: of the template.
        has_seg: whether the tokenizer had `[SEG]`, as that of every Sa2VA has, before it was added here.
        new_tokens: ids of the tokens added to the base vocabulary, `[SEG]` first.
        token_ids: ids that the network needs.

    Raises:
        VesselError: unknown template, or a tokenizer that cannot be read or lacks the image token.
    """

    def __init__(self, tokenizer: str | None = None, template: str = "qwen_chat") -> None:
        if template not in TEMPLATES:
            raise VesselError(f"prompt.template={template}: known templates are {', '.join(TEMPLATES)}")
        self.name = template
        self.template = TEMPLATES[template]
        self.tokenizer = _small() if tokenizer is None else read_tokenizer(tokenizer)
        base = len(self.tokenizer)
        self.has_seg = SEG in self.tokenizer.get_vocab()
        self.tokenizer.add_tokens(list(ADDED), special_tokens=True)
        self._known: dict[str, list[int]] = {}
        self.new_tokens = range(min(base, self._id(SEG)), len(self.tokenizer))
        # A tokenizer that begins every text with a token begins a conversation with it, once.
        self._first = [i for i in self.tokenizer("").input_ids if i == self.tokenizer.bos_token_id]
        self._end = self._ids(self.template.end)
        eos = self._end[-1] if self.tokenizer.eos_token_id is None else self.tokenizer.eos_token_id
        self.token_ids = TokenIds(
            seg=self._id(SEG),
            image=self._id(IMAGE),
            pad=eos if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id,
            eos=eos,
        )
        stops = {word: self._ids(word) for word in self.template.stop_words}
        self._last = {eos, *(ids[0] for ids in stops.values() if len(ids) == 1)}
        self._long_stop_words = tuple(word for word, ids in stops.items() if len(ids) > 1)

    def encode(self, phrases: Sequence[str], image_tokens: int, *, rng: Random | None = None) -> tuple[Tensor, Tensor]:
        """Encode one conversation with a question, an answer and one `[SEG]` for each phrase.

        Args:
            phrases: at least one.
            image_tokens: number of vision features of the image, over all its tiles.
            rng: chooses the prompt templates; None takes the standard ones.

        Returns:
            input ids and labels, int64 [L]; labels are -100 outside answers.
        """
        questions = [(rng.choice(QUESTIONS) if rng else QUESTIONS[0]).format(phrase=p) for p in phrases]
        answers = [rng.choice(ANSWERS) if rng else ANSWERS[0] for _ in phrases]
        return self.conversation(questions, answers, image_tokens)

    def conversation(
        self,
        questions: Sequence[str],
        answers: Sequence[str | Sequence[int]],
        image_tokens: int,
        *,
        frames: int = 1,
        regions: Sequence[int] = (),
    ) -> tuple[Tensor, Tensor]:
        """Encode a conversation about an image as ids and labels.

        Args:
            questions: of the user, turn by turn. The image is put before the first, on a line of its own, or in the
                place of `<image>` in it.
            answers: of the model, as text or as the ids it generated; with one answer less than questions, the ids end
                where generation begins.
            image_tokens: as in `encode`, of one frame.
            frames: of a video; each is a block of `image_tokens`.
            regions: number of vision features of each region that the first question refers to.

        Raises:
            VesselError: the first question holds `<image>` twice, or a later one holds it.
        """
        ids, labels = list(self._first), [IGNORED] * len(self._first)
        features = iter([image_tokens] * frames + list(regions))
        for turn, question in enumerate(self._with_image(questions, frames, len(regions))):
            unsupervised = self._expand_images(self._ids(self.template.turn.format(question=question)), features)
            ids += unsupervised
            labels += [IGNORED] * len(unsupervised)
            if turn == len(answers):
                break
            supervised = self._closed(answers[turn])
            between = self._ids(self.template.separator)
            ids += supervised + between
            labels += supervised + [IGNORED] * len(between)
        return torch.tensor(ids), torch.tensor(labels)

    def is_finished(self, ids: Sequence[int]) -> bool:
        """Return whether generated ids end an answer: by their last token, or by a stop word of several tokens."""
        if not ids:
            return False
        if ids[-1] in self._last or not self._long_stop_words:
            return ids[-1] in self._last
        # Line breaks do not count, as in the public code: "|>\n" is one token of Qwen.
        return self.decode(ids).translate(_NO_BREAKS).endswith(self._long_stop_words)

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids to text, special tokens kept."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False))

    def save(self, folder: Path) -> None:
        """Write the tokenizer with its added tokens."""
        self.tokenizer.save_pretrained(folder)

    def _with_image(self, questions: Sequence[str], frames: int, regions: int) -> tuple[str, ...]:
        first, *later = questions
        if first.count(PLACEHOLDER) > 1 or any(PLACEHOLDER in question for question in later):
            raise VesselError(
                f"a conversation is about one image: write {PLACEHOLDER} once in the first question, or leave it away"
            )
        image = "\n".join([f"<img>{IMAGE}</img>"] * frames)
        if regions:
            named = (f"region{i}<vp>{IMAGE}</vp>" for i in range(1, regions + 1))
            image += f"\nThere are {regions} part regions in the picture: {', '.join(named)}.\n"
        if PLACEHOLDER not in first:
            first = f"{PLACEHOLDER}\n{first}"
        return (first.replace(PLACEHOLDER, image), *later)

    def _closed(self, answer: str | Sequence[int]) -> list[int]:
        if isinstance(answer, str):
            return self._ids(answer + self.template.end)
        return [*answer] if self.is_finished(answer) else [*answer, *self._end]

    def _expand_images(self, ids: list[int], features: Iterator[int]) -> list[int]:
        """Repeat each image token once for each feature; the text of a prompt does not depend on their number."""
        expanded: list[int] = []
        for token in ids:
            expanded += [token] * next(features, 1) if token == self.token_ids.image else [token]
        return expanded

    def _ids(self, text: str) -> list[int]:
        """Encode a text; the list is cached, so callers must not change it."""
        ids: list[int] | None = self._known.get(text)
        if ids is None:
            ids = self.tokenizer(text, add_special_tokens=False).input_ids
            if len(self._known) >= _KNOWN_TEXTS:
                self._known = {}
            self._known[text] = ids
        return ids

    def _id(self, token: str) -> int:
        found = self._ids(token)
        if len(found) != 1:
            raise VesselError(
                f"the tokenizer splits {token} into {len(found)} pieces: it does not belong to an InternVL or Sa2VA "
                f"checkpoint with template {self.name}"
            )
        return found[0]


def _small() -> PreTrainedTokenizerBase:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", IMAGE]
    return small_tokenizer(special, [*QUESTIONS, *ANSWERS, *(t.turn for t in TEMPLATES.values())] * 2)
