"""Verify an export: load the folder in a fresh process, and compare masks and answers with the training network's.

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
# How far a network's best token must lie before its second best, as a logit, for the choice to count.
LEAD = {"fp32": 1e-3, "bf16": 0.2}
_ASKED_OF_PUBLIC = ("blood vessel",)  # of a network whose phrases are not known
_MAX_NEW_TOKENS = 64
_MASKS, _WORDS, _ASKED = "masks.npz", "words.json", "asked.json"


@dataclass(frozen=True)
class Said:
    """A greedy answer.

    Attributes:
        phrase: that was asked for.
        text: special tokens kept.
        tokens: at most 64.
        leads: for each token, how far its logit lay before the second best.
    """

    phrase: str
    text: str
    tokens: tuple[int, ...]
    leads: tuple[float, ...]


@dataclass(frozen=True)
class Account:
    """The results of a network for some images.

    Attributes:
        maps: probabilities by image, float32 [K, H, W], in the order of the phrases.
        said: by image, an answer a phrase, each asked for alone.
        fingerprint: of the tensors that the network was read from.
    """

    maps: Mapping[str, NDArray[np.float32]]
    said: Mapping[str, Sequence[Said]]
    fingerprint: str


def account_of(restored: LoadedModel, images: Images) -> Account:
    """Ask a network about images, in float32 on the CPU: the masks of its taught answer, and its own words.

    Args:
        restored: with or without adapters.
        images: uint8 [H, W, 3] by name.

    Raises:
        VesselError: there is no result for an image; names it.
    """
    phrases = restored.manifest.phrases or _ASKED_OF_PUBLIC
    targets = [InputImage(name, Path(name), name) for name in images]
    samples = [make_sample(image, phrases, restored.prompt, restored.geometry) for image in images.values()]
    maps: dict[str, NDArray[np.float32]] = {}
    said: dict[str, list[Said]] = {}
    answers = Predictor(restored, device="cpu").predict(targets, samples.__getitem__, batch_size=1)
    for name, sample, answer in zip(images, samples, answers, strict=True):
        if isinstance(answer, Failure):
            raise VesselError(f"sample {name}: {answer.reason}")
        maps[name] = np.stack([one.numpy() for one in answer.probabilities if one is not None])
        said[name] = [_ask(restored, sample, phrase) for phrase in phrases]
    return Account(maps, said, restored.reports[-1].fingerprint)


def _ask(restored: LoadedModel, sample: Sample, phrase: str) -> Said:
    """The network's own answer to one phrase, and how sure it was of each token."""
    network, prompt = restored.sa2va, restored.prompt
    question, image_tokens = QUESTIONS[0].format(phrase=phrase), len(sample.tiles) * restored.geometry.tokens_per_tile
    asked, _ = prompt.conversation([question], [], image_tokens)
    batch = collate([sample], prompt.token_ids.pad)
    [tokens] = Conversations(network, prompt, batch, max_new_tokens=_MAX_NEW_TOKENS).ask([asked])
    ids, labels = prompt.conversation([question], [tokens], image_tokens)
    batch = collate([replace(sample, input_ids=ids, labels=labels)], prompt.token_ids.pad)
    with torch.inference_mode():
        before = network.hidden_states(batch)[0, :-1][labels[1:] != IGNORED][: len(tokens)]
        logits = network.mllm.lm_head(before).float()
        logits[:, prompt.token_ids.image] = -torch.inf  # which no answer holds
    best, second = logits.topk(2).values.T
    return Said(phrase, prompt.decode(tokens), tuple(tokens), tuple((best - second).tolist()))


def account_in_a_fresh_process(folder: Path, images: Images, reading: LoadSettings) -> Account:
    """As `account_of`, in a new interpreter that knows nothing but the folder.

    Args:
        folder: the export.
        images: uint8 [H, W, 3] by name.
        reading: what its files do not say: the base of an adapter, the sizes of an unknown SAM2.

    Raises:
        VesselError: the process failed; with the last line it said.
    """
    with tempfile.TemporaryDirectory() as temporary:
        exchange = Path(temporary)
        grounding = None if reading.grounding is None else asdict(reading.grounding)
        base = [asdict(entry) for entry in reading.base]
        asked = {"images": list(images), "base": base, "grounding": grounding}
        (exchange / _ASKED).write_text(json.dumps(asked), encoding="utf-8")
        np.savez(exchange / "images.npz", *images.values())
        command = [sys.executable, "-m", "vessel.publishing.verification", str(folder), str(exchange)]
        process = subprocess.run(command, capture_output=True, text=True, check=False)
        if process.returncode:
            last = (process.stderr.strip().splitlines() or ["no message"])[-1]
            raise VesselError(f"the export does not load in a fresh process, nothing was exported: {last}")
        words = json.loads((exchange / _WORDS).read_text(encoding="utf-8"))
        said = {name: [_said(one) for one in words["said"][name]] for name in images}
        return Account(_read_arrays(exchange / _MASKS, images), said, words["fingerprint"])


def _said(values: Mapping[str, Any]) -> Said:
    return Said(values["phrase"], values["text"], tuple(values["tokens"]), tuple(values["leads"]))


def _read_arrays(file: Path, names: Iterable[str]) -> dict[str, NDArray[Any]]:
    with np.load(file) as arrays:
        return {name: arrays[f"arr_{index}"] for index, name in enumerate(names)}


def compare(expected: Account, found: Account, *, threshold: float, dtype: str) -> str:
    """Compare what an export draws and says with the training network's.

    Masks: fp32 allows probabilities to differ by 1e-4. bf16 wants 99.9 % of the mask pixels equal; pixels whose
    probability lies within 0.05 of the threshold do not count there, since a rounding of any kind sends them to either
    side. Words: the greedy answers are equal, except from a token on where the training network itself was undecided:
    its best token lay less than 0.001 (fp32) or 0.2 (bf16) before its second best, as a logit.

    Args:
        expected: of the training network.
        found: of the export.
        threshold: at which masks are compared.
        dtype: `fp32` or `bf16`.

    Returns:
        what was measured, a sentence.

    Raises:
        VesselError: naming the sample that differs.
    """
    remedy = ": too much for bf16, export with dtype=fp32" if dtype != "fp32" else ""
    differences, equal, judged, same_words, answers = [], [], [], 0, 0
    for name, maps in expected.maps.items():
        same = (maps > threshold) == (found.maps[name] > threshold)
        decided = np.abs(maps - threshold) > UNDECIDED
        differences.append(float(np.abs(maps - found.maps[name]).max()))
        equal.append(float(same.mean()))
        judged.append(float(same[decided].mean()) if decided.any() else 1.0)
        if differences[-1] > FP32_TOLERANCE if dtype == "fp32" else same[decided].sum() < AGREEMENT * decided.sum():
            raise VesselError(
                f"sample {name}: the export's probabilities differ from the training network's by up to "
                f"{differences[-1]:.2g}, and {1 - equal[-1]:.3%} of its mask pixels change{remedy}"
            )
        for one, other in zip(expected.said[name], found.said[name], strict=True):
            _compare_words(name, one, other, lead=LEAD[dtype], remedy=remedy)
            answers, same_words = answers + 1, same_words + (one.tokens == other.tokens)
    undecided = (
        "" if same_words == answers else f" (the rest part where the best two tokens are within {LEAD[dtype]:g})"
    )
    return (
        f"{len(expected.maps)} images in a fresh process: {min(equal):.3%} of mask pixels equal ({min(judged):.3%} of "
        f"those that a rounding does not decide), probabilities differ by at most {max(differences):.2g}, "
        f"{same_words} of {answers} answers equal{undecided}"
    )


def _compare_words(name: str, expected: Said, found: Said, *, lead: float, remedy: str) -> None:
    if expected.tokens == found.tokens:
        return
    pairs = zip(expected.tokens, found.tokens, strict=False)
    at = next((i for i, (one, other) in enumerate(pairs) if one != other), len(expected.tokens) - 1)
    if expected.leads[at] > lead:
        raise VesselError(
            f"sample {name}: asked for {expected.phrase}, the export answers {found.text!r} where the training network "
            f"answers {expected.text!r}{remedy}"
        )


def drawn_image(side: int = 256) -> NDArray[np.uint8]:
    """A bright ring on a dark gradient, for where no image of the run is at hand: uint8 [side, side, 3]."""
    y, x = np.mgrid[:side, :side] / side
    radius = np.hypot(x - 0.45, y - 0.55)
    grey = 40 * x + 30 * y + 160 * np.exp(-(((radius - 0.28) / 0.04) ** 2))
    return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)


def main() -> None:
    """The fresh process."""
    with report_errors():
        folder, exchange = sys.argv[1], Path(sys.argv[2])
        asked = json.loads((exchange / _ASKED).read_text(encoding="utf-8"))
        grounding = None if asked["grounding"] is None else GroundingConfig(**asked["grounding"])
        restored = load_model(folder, LoadSettings(base=Weights.listed(asked["base"]), grounding=grounding))
        account = account_of(restored, _read_arrays(exchange / "images.npz", asked["images"]))
        np.savez(exchange / _MASKS, *account.maps.values())
        words = {
            "said": {name: [asdict(one) for one in said] for name, said in account.said.items()},
            "fingerprint": account.fingerprint,
        }
        (exchange / _WORDS).write_text(json.dumps(words), encoding="utf-8")


if __name__ == "__main__":
    main()
