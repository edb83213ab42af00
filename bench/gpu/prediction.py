"""Measure images a second of prediction, of the product and of the reference, answers forced and generated."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from bench.fixed_answer import fix_answer, standard_answer
from bench.gpu.trial import Trial
from bench.stopwatch import in_turns
from bench.true_sizes import for_prediction, network_of, sample_for

from bench import reference
from vessel.data.inputs import InputImage
from vessel.inference.generation import MAX_NEW_TOKENS
from vessel.inference.predictor import Predictor
from vessel.inference.results import Prediction
from vessel.model.sa2va import Sa2VA

IMAGES = 8  # of the product, in one batch; the reference takes them one by one, so that fewer give its rate
PLAIN_IMAGES = 2
PHRASES = (1, 4)


def chapter(trial: Trial) -> list[dict[str, Any]]:
    """Measure forced and generated prediction with one phrase an image and with several."""
    setup = for_prediction(trial.setup)
    network = network_of(setup, trial.prompt, trial.device).eval()
    answer = standard_answer(trial.prompt)
    rows: list[dict[str, Any]] = []
    for phrases in PHRASES:
        for decode in ("forced", "generate"):
            if trial.late:
                return rows
            # A network of random weights would neither generate [SEG] nor end its answer.
            with fix_answer(network, answer) if decode == "generate" else nullcontext():
                times = in_turns(_runs(trial, network, phrases, decode), trial.device, rounds=trial.rounds)
            images = {"product": IMAGES, "reference": PLAIN_IMAGES}
            rows += [
                {
                    "mode": mode,
                    "decode": decode,
                    "phrases": phrases,
                    "seconds": measured.seconds,
                    "images_per_second": images[mode] / measured.median,
                }
                for mode, measured in times.items()
            ]
    return rows


def _runs(trial: Trial, network: Sa2VA, phrases: int, decode: str) -> dict[str, Callable[[], None]]:
    sample = sample_for(trial.setup, trial.prompt, phrases=phrases)
    model: Any = SimpleNamespace(network=network, prompt=trial.prompt, geometry=trial.setup.sizes.geometry)
    predictor = Predictor(model, device=trial.device, decode=decode)
    inputs = [InputImage(str(i), Path(), str(i)) for i in range(IMAGES)]

    def product() -> None:
        # Not `predict`, which predicts image by image where the memory is too small for all.
        assert all(isinstance(result, Prediction) for result in predictor._pass([(t, sample) for t in inputs]))

    def plain() -> None:
        with trial.autocast():
            for _ in range(PLAIN_IMAGES):
                if decode == "forced":
                    maps = reference.predict_forced(network, trial.prompt, sample)
                else:
                    answers = reference.predict_generated(network, trial.prompt, sample, max_new_tokens=MAX_NEW_TOKENS)
                    maps = [mask for answer in answers for mask in answer]
                assert [tensor.cpu() for tensor in maps]

    return {"product": product, "reference": plain}
