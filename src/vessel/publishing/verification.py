"""Verify an export: load the folder in a fresh process, and compare its masks and answers with the trained network's.

`python -m vessel.publishing.verification FOLDER EXCHANGE` is that process; `vessel.export` starts it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vessel.batch import Sample, collate
from vessel.cli.exits import report_errors
from vessel.data.dataset import make_sample
from vessel.data.inputs import InputImage
from vessel.data.prompt import IGNORED, QUESTIONS
from vessel.errors import VesselError
from vessel.inference.generation import Conversations
from vessel.inference.loading import LoadedModel, load_model
from vessel.inference.options import LoadSettings
from vessel.inference.predictor import Failure, Predictor
from vessel.model.grounding import GroundingConfig
from vessel.weights.entry import Weights

Images = Mapping[str, NDArray[np.uint8]]
FP32_TOLERANCE = 1e-4
AGREEMENT = 0.999
UNDECIDED = 0.05
# A token is undecided where the logits of the best two lie no further apart.
UNDECIDED_MARGIN = {"fp32": 1e-3, "bf16": 0.2}
_PHRASES_OF_PUBLIC = ("blood vessel",)  # for a network whose phrases are not known
_MAX_NEW_TOKENS = 64
_REQUEST, _IMAGES, _PROBABILITIES, _ANSWERS = "request.json", "images.npz", "probabilities.npz", "answers.json"


@dataclass(frozen=True)
class GreedyAnswer:
    """An answer of greedy decoding to one phrase.

    Attributes:
        phrase: that the question is about.
        text: special tokens kept.
        tokens: at most 64.
        margins: for each token, how far its logit lay above the second best.
    """

    phrase: str
    text: str
    tokens: tuple[int, ...]
    margins: tuple[float, ...]

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> GreedyAnswer:
        """Build an answer from the JSON of its fields."""
        return cls(content["phrase"], content["text"], tuple(content["tokens"]), tuple(content["margins"]))


@dataclass(frozen=True)
class NetworkResults:
    """The results of a network for some images.

    Attributes:
        probabilities: by image, float32 [K, H, W], in the order of the phrases.
        answers: by image, one for each phrase, each in a conversation of its own.
        fingerprint: of the tensors that the network was read from.
    """

    probabilities: Mapping[str, NDArray[np.float32]]
    answers: Mapping[str, Sequence[GreedyAnswer]]
    fingerprint: str


def network_results(model: LoadedModel, images: Images) -> NetworkResults:
    """Predict images in float32 on the CPU: the masks of the imposed answer, and the network's own answers.

    Args:
        model: with or without adapters.
        images: uint8 [H, W, 3] by name.

    Raises:
        VesselError: there is no result for an image; names it.
    """
    phrases = model.manifest.phrases or _PHRASES_OF_PUBLIC
    inputs = [InputImage(name, Path(name), name) for name in images]
    samples = [make_sample(image, phrases, model.prompt, model.geometry) for image in images.values()]
    probabilities: dict[str, NDArray[np.float32]] = {}
    answers: dict[str, list[GreedyAnswer]] = {}
    predictions = Predictor(model, device="cpu").predict(inputs, samples.__getitem__, batch_size=1)
    for name, sample, prediction in zip(images, samples, predictions, strict=True):
        if isinstance(prediction, Failure):
            raise VesselError(f"sample {name}: {prediction.reason}")
        probabilities[name] = np.stack([one.numpy() for one in prediction.probabilities if one is not None])
        answers[name] = [_greedy_answer(model, sample, phrase) for phrase in phrases]
    return NetworkResults(probabilities, answers, model.reports[-1].fingerprint)


def _greedy_answer(model: LoadedModel, sample: Sample, phrase: str) -> GreedyAnswer:
    """Generate the network's answer to one phrase, with the margin of each of its tokens."""
    network, prompt = model.sa2va, model.prompt
    question, image_tokens = QUESTIONS[0].format(phrase=phrase), len(sample.tiles) * model.geometry.tokens_per_tile
    question_ids, _ = prompt.conversation([question], [], image_tokens)
    batch = collate([sample], prompt.token_ids.pad)
    conversations = Conversations(network, prompt, batch, max_new_tokens=_MAX_NEW_TOKENS)
    [tokens] = conversations.generate([question_ids])
    ids, labels = prompt.conversation([question], [tokens], image_tokens)
    batch = collate([replace(sample, input_ids=ids, labels=labels)], prompt.token_ids.pad)
    with torch.inference_mode():
        states = network.hidden_states(batch)[0, :-1][labels[1:] != IGNORED][: len(tokens)]
        logits = network.mllm.lm_head(states).float()
        logits[:, prompt.token_ids.image] = -torch.inf  # which no answer holds
    best, second = logits.topk(2).values.T
    return GreedyAnswer(phrase, prompt.decode(tokens), tuple(tokens), tuple((best - second).tolist()))


def results_of_fresh_process(folder: Path, images: Images, settings: LoadSettings) -> NetworkResults:
    """Compute `network_results` of an export in a new interpreter, which knows nothing but the folder.

    Args:
        folder: the export.
        images: uint8 [H, W, 3] by name.
        settings: of what its files do not hold: the base of an adapter, the sizes of an unknown SAM2.

    Raises:
        VesselError: the process failed; with the last line of its standard error.
    """
    with tempfile.TemporaryDirectory() as temporary:
        exchange = Path(temporary)
        grounding = None if settings.grounding is None else asdict(settings.grounding)
        base = [asdict(entry) for entry in settings.base]
        request = {"images": list(images), "base": base, "grounding": grounding}
        (exchange / _REQUEST).write_text(json.dumps(request), encoding="utf-8")
        np.savez(exchange / _IMAGES, *images.values())
        command = [sys.executable, "-m", "vessel.publishing.verification", str(folder), str(exchange)]
        process = subprocess.run(command, capture_output=True, text=True, check=False)
        if process.returncode:
            last = (process.stderr.strip().splitlines() or ["no message"])[-1]
            raise VesselError(f"the export does not load in a fresh process, nothing was exported: {last}")
        content = json.loads((exchange / _ANSWERS).read_text(encoding="utf-8"))
        answers = {name: [GreedyAnswer.from_json(answer) for answer in content["answers"][name]] for name in images}
        return NetworkResults(_read_arrays(exchange / _PROBABILITIES, images), answers, content["fingerprint"])


def _read_arrays(file: Path, names: Iterable[str]) -> dict[str, NDArray[Any]]:
    with np.load(file) as arrays:
        return {name: arrays[f"arr_{index}"] for index, name in enumerate(names)}


def compare_results(expected: NetworkResults, found: NetworkResults, *, threshold: float, dtype: str) -> str:
    """Compare the masks and answers of an export with those of the trained network.

    Masks: fp32 allows probabilities to differ by 1e-4. bf16 wants 99.9 % of the mask pixels equal; pixels whose
    probability lies within 0.05 of the threshold do not count there, since a rounding of any kind sends them to either
    side. Answers: greedy answers are equal up to the first token that the trained network left undecided: its best
    logit lay less than 0.001 (fp32) or 0.2 (bf16) above the second best.

    Args:
        expected: of the trained network.
        found: of the export.
        threshold: at which masks are compared.
        dtype: `fp32` or `bf16`.

    Returns:
        the measured differences, a sentence.

    Raises:
        VesselError: naming the sample that differs.
    """
    remedy = ": too much for bf16, export with dtype=fp32" if dtype != "fp32" else ""
    margin = UNDECIDED_MARGIN[dtype]
    differences, equal, decided_equal, equal_answers, answers = [], [], [], 0, 0
    for name, probabilities in expected.probabilities.items():
        same = (probabilities > threshold) == (found.probabilities[name] > threshold)
        decided = np.abs(probabilities - threshold) > UNDECIDED
        differences.append(float(np.abs(probabilities - found.probabilities[name]).max()))
        equal.append(float(same.mean()))
        decided_equal.append(float(same[decided].mean()) if decided.any() else 1.0)
        if differences[-1] > FP32_TOLERANCE if dtype == "fp32" else same[decided].sum() < AGREEMENT * decided.sum():
            raise VesselError(
                f"sample {name}: the export's probabilities differ from the trained network's by up to "
                f"{differences[-1]:.2g}, and {1 - equal[-1]:.3%} of its mask pixels change{remedy}"
            )
        for one, other in zip(expected.answers[name], found.answers[name], strict=True):
            _compare_answers(name, one, other, undecided_margin=margin, remedy=remedy)
            answers, equal_answers = answers + 1, equal_answers + (one.tokens == other.tokens)
    undecided = (
        "" if equal_answers == answers else f" (the others differ where the best two tokens are within {margin:g})"
    )
    return (
        f"{len(equal)} images in a fresh process: {min(equal):.3%} of mask pixels equal ({min(decided_equal):.3%} of "
        f"those that a rounding does not decide), probabilities differ by at most {max(differences):.2g}, "
        f"{equal_answers} of {answers} answers equal{undecided}"
    )


def _compare_answers(
    name: str, expected: GreedyAnswer, found: GreedyAnswer, *, undecided_margin: float, remedy: str
) -> None:
    if expected.tokens == found.tokens:
        return
    pairs = zip(expected.tokens, found.tokens, strict=False)
    first = next((i for i, (one, other) in enumerate(pairs) if one != other), len(expected.tokens) - 1)
    if expected.margins[first] > undecided_margin:
        raise VesselError(
            f"sample {name}: to the phrase {expected.phrase}, the export answers {found.text!r} and the trained "
            f"network {expected.text!r}{remedy}"
        )


def synthetic_image(side: int = 256) -> NDArray[np.uint8]:
    """Draw a bright ring on a dark gradient, for a run without images: uint8 [side, side, 3]."""
    y, x = np.mgrid[:side, :side] / side
    radius = np.hypot(x - 0.45, y - 0.55)
    grey = 40 * x + 30 * y + 160 * np.exp(-(((radius - 0.28) / 0.04) ** 2))
    return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)


def main() -> None:
    """Compute the results of an export, in the fresh process."""
    with report_errors():
        folder, exchange = sys.argv[1], Path(sys.argv[2])
        request = json.loads((exchange / _REQUEST).read_text(encoding="utf-8"))
        grounding = None if request["grounding"] is None else GroundingConfig(**request["grounding"])
        model = load_model(folder, LoadSettings(base=Weights.listed(request["base"]), grounding=grounding))
        results = network_results(model, _read_arrays(exchange / _IMAGES, request["images"]))
        np.savez(exchange / _PROBABILITIES, *results.probabilities.values())
        content = {
            "answers": {name: [asdict(answer) for answer in answers] for name, answers in results.answers.items()},
            "fingerprint": results.fingerprint,
        }
        (exchange / _ANSWERS).write_text(json.dumps(content), encoding="utf-8")


if __name__ == "__main__":
    main()
