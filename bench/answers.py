"""Prediction of a batch, as the product's `Predictor` does it and as the reference does, image by image."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from bench.pairs import Pairs, in_turns
from bench.sizes import Case
from bench.speech import saying, standard_answer
from torch import Tensor

from bench import reference
from vessel.data.inputs import InputImage
from vessel.data.prompt import Prompt
from vessel.inference.predictor import Predictor
from vessel.inference.results import Prediction
from vessel.model.lora import Lora

IMAGES = 4
PHRASES = 4


class Answers:
    """The same images asked for the same phrases.

    Args:
        case: the network; without its adapters, which an export has folded in, that of vessel as the public one.
        prompt: wording.
        phrases: of each image.
    """

    def __init__(self, case: Case, prompt: Prompt, *, phrases: int = PHRASES) -> None:
        self.network, self.prompt = replace(case, lora=Lora(r=0), trainable="nothing").network(prompt).eval(), prompt
        self.samples = [case.sample(prompt, i, phrases=phrases) for i in range(IMAGES)]
        self.geometry = case.sizes.geometry
        self.answer = standard_answer(prompt)

    def product(self, decode: str) -> list[tuple[Tensor | None, ...]]:
        """Probabilities of each phrase of each image, by one pass or in the network's own words."""
        restored: Any = SimpleNamespace(network=self.network, prompt=self.prompt, geometry=self.geometry)
        predictor = Predictor(restored, device="cpu", decode=decode, max_new_tokens=len(self.answer))
        targets = [InputImage(str(i), Path(), str(i)) for i in range(IMAGES)]
        found = predictor.predict(targets, lambda i: self.samples[i], batch_size=IMAGES)
        with saying(self.network, self.answer) if decode == "generate" else nullcontext():
            return [one.probabilities for one in found if isinstance(one, Prediction)]

    def taught(self) -> list[list[Tensor]]:
        """The reference's, answers given."""
        return [reference.taught(self.network, self.prompt, sample) for sample in self.samples]

    def spoken(self) -> list[list[Tensor]]:
        """The reference's, in the network's own words: an answer with one `[SEG]` for each phrase."""
        most = len(self.answer)
        with saying(self.network, self.answer):
            said = [reference.spoken(self.network, self.prompt, s, max_new_tokens=most) for s in self.samples]
        return [[drawn for [drawn] in one] for one in said]


def compared(case: Case, prompt: Prompt, *, pairs: int) -> dict[str, Pairs]:
    """Seconds for a batch: `predict_phrases`, answers given in both; `one_pass`, given against spoken one by one."""
    answers = Answers(case, prompt)
    one_pass = partial(answers.product, "forced")
    return {
        "predict_phrases": in_turns(one_pass, answers.taught, pairs=pairs),
        "one_pass": in_turns(one_pass, answers.spoken, pairs=pairs),
    }
