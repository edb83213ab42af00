"""Predict a batch with the product's `Predictor`, and image by image with the reference."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from bench.fixed_answer import fix_answer, standard_answer
from bench.pairs import Pairs, in_turns
from bench.sizes import Case
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
    """Predictions of the same images and phrases in either way.

    Args:
        case: the network; without its adapters, which an export has folded in, that of vessel as the public one.
        prompt: questions and answers.
        phrases: of each image.
    """

    def __init__(self, case: Case, prompt: Prompt, *, phrases: int = PHRASES) -> None:
        self.network, self.prompt = replace(case, lora=Lora(r=0), trainable="nothing").network(prompt).eval(), prompt
        self.samples = [case.sample(prompt, i, phrases=phrases) for i in range(IMAGES)]
        self.geometry = case.sizes.geometry
        self.answer = standard_answer(prompt)

    def product(self, decode: str) -> list[tuple[Tensor | None, ...]]:
        """Predict the probabilities of each phrase of each image, by one pass or by generated answers."""
        model: Any = SimpleNamespace(network=self.network, prompt=self.prompt, geometry=self.geometry)
        predictor = Predictor(model, device="cpu", decode=decode, max_new_tokens=len(self.answer))
        inputs = [InputImage(str(i), Path(), str(i)) for i in range(IMAGES)]
        found = predictor.predict(inputs, lambda i: self.samples[i], batch_size=IMAGES)
        with fix_answer(self.network, self.answer) if decode == "generate" else nullcontext():
            return [one.probabilities for one in found if isinstance(one, Prediction)]

    def predict_forced(self) -> list[list[Tensor]]:
        """Predict with the reference, answers given."""
        return [reference.predict_forced(self.network, self.prompt, sample) for sample in self.samples]

    def predict_generated(self) -> list[list[Tensor]]:
        """Predict with the reference, answers generated: one with one `[SEG]` for each phrase."""
        most = len(self.answer)
        with fix_answer(self.network, self.answer):
            generated = [
                reference.predict_generated(self.network, self.prompt, s, max_new_tokens=most) for s in self.samples
            ]
        return [[mask for [mask] in one] for one in generated]


def compare(case: Case, prompt: Prompt, *, pairs: int) -> dict[str, Pairs]:
    """Measure seconds a batch: `predict_phrases`, answers given in both; `one_pass`, given against generated ones."""
    answers = Answers(case, prompt)
    one_pass = partial(answers.product, "forced")
    return {
        "predict_phrases": in_turns(one_pass, answers.predict_forced, pairs=pairs),
        "one_pass": in_turns(one_pass, answers.predict_generated, pairs=pairs),
    }
