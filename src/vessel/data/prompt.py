"""Prompts: from phrases to token ids. The only place that knows chat templates, image tokens and wordings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from vessel.batch import TokenIds
from vessel.errors import VesselError

SEG, IMAGE = "[SEG]", "<IMG_CONTEXT>"
ADDED = (SEG, "<p>", "</p>", "<vp>", "</vp>")
IGNORED = -100

# The first of each list is used outside training; training draws among all.
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
class Template:
    """A chat format.

    Attributes:
        turn: what surrounds a question, up to where the answer begins.
        end: what closes an answer; supervised.
        separator: what stands between an answer and the next question; not supervised.
    """

    turn: str
    end: str
    separator: str = "\n"


_CHAT = Template("<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>")
TEMPLATES = {
    "qwen_chat": _CHAT,
    "internlm2_chat": _CHAT,
    "phi3_chat": Template("<|user|>\n{question}<|end|>\n<|assistant|>\n", "<|end|>"),
}


class Prompt:
    """Conversations about one image.

    Args:
        tokenizer: folder or hub id with the tokenizer of the checkpoint; None makes the small tokenizer that a network
            trained from scratch uses.
        template: name of the chat format, as the checkpoint's `config.json` states it.

    Raises:
        VesselError: unknown template, or a tokenizer that cannot be read or lacks the image token.
    """

    def __init__(self, tokenizer: str | None = None, template: str = "qwen_chat") -> None:
        if template not in TEMPLATES:
            raise VesselError(f"prompt.template={template}: known templates are {', '.join(TEMPLATES)}")
        self.name = template
        self.template = TEMPLATES[template]
        self.tokenizer = _small_tokenizer() if tokenizer is None else _read_tokenizer(tokenizer)
        base = len(self.tokenizer)
        self.tokenizer.add_tokens(list(ADDED), special_tokens=True)
        self.new_tokens = range(min(base, self._id(SEG)), len(self.tokenizer))
        end = self._id(self.template.end)
        self.token_ids = TokenIds(
            seg=self._id(SEG),
            image=self._id(IMAGE),
            pad=end if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id,
            eos=end,
        )

    def encode(self, phrases: Sequence[str], image_tokens: int, *, draw: Random | None = None) -> tuple[Tensor, Tensor]:
        """One conversation with a question, an answer and one `[SEG]` for each phrase.

        Args:
            phrases: at least one.
            image_tokens: number of vision features of the image, over all its tiles.
            draw: source of the wordings; None takes the standard ones.

        Returns:
            input ids and labels, int64 [L]; labels are -100 outside answers.
        """
        questions = [(draw.choice(QUESTIONS) if draw else QUESTIONS[0]).format(phrase=p) for p in phrases]
        answers = [draw.choice(ANSWERS) if draw else ANSWERS[0] for _ in phrases]
        return self.conversation(questions, answers, image_tokens)

    def conversation(
        self, questions: Sequence[str], answers: Sequence[str], image_tokens: int
    ) -> tuple[Tensor, Tensor]:
        """Ids and labels of a conversation about an image.

        Args:
            questions: what the user says, turn by turn; the image is put before the first.
            answers: what the model says; with one answer less than questions, the ids end where generation begins.
            image_tokens: as in `encode`.
        """
        ids: list[int] = []
        labels: list[int] = []
        for turn, question in enumerate(questions):
            image = f"<img>{IMAGE * image_tokens}</img>\n" if turn == 0 else ""
            asked = self._ids(self.template.turn.format(question=image + question))
            ids += asked
            labels += [IGNORED] * len(asked)
            if turn == len(answers):
                break
            answered = self._ids(answers[turn] + self.template.end)
            between = self._ids(self.template.separator)
            ids += answered + between
            labels += answered + [IGNORED] * len(between)
        return torch.tensor(ids), torch.tensor(labels)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens kept."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False))

    def save(self, folder: Path) -> None:
        """Write the tokenizer with its added tokens."""
        self.tokenizer.save_pretrained(folder)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _id(self, token: str) -> int:
        found = self._ids(token)
        if len(found) != 1:
            raise VesselError(
                f"the tokenizer splits {token} into {len(found)} pieces: it does not belong to an InternVL or Sa2VA "
                f"checkpoint with template {self.name}"
            )
        return found[0]


def _read_tokenizer(source: str) -> PreTrainedTokenizerBase:
    # AutoTokenizer would run the checkpoint's own code; the class named in the folder is one of transformers'.
    try:
        config = get_tokenizer_config(source)
        name = config.get("tokenizer_class", "PreTrainedTokenizerFast")
        cls: Any = getattr(transformers, name, None) or getattr(transformers, f"{name}Fast", PreTrainedTokenizerFast)
        return cls.from_pretrained(source)
    except (OSError, json.JSONDecodeError, ValueError) as error:
        raise VesselError(f"prompt.tokenizer={source}: no tokenizer could be read there ({error})") from error


def _small_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE learnt from our own wordings: any phrase can be written, the usual ones in few tokens."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", IMAGE]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=448,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = [*QUESTIONS, *ANSWERS, *(t.turn for t in TEMPLATES.values())]
    tokenizer.train_from_iterator(text * 2, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
