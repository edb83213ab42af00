"""From images to probabilities: the one place where a trained network is asked, for evaluation, prediction and proof.

Nothing here invents a result: what fails is handed on as a `Failure` with its reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from lightning.pytorch.utilities.memory import is_oom_error
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vessel.batch import Sample, Views, collate
from vessel.data.dataset import make_sample
from vessel.data.images import read_rgb
from vessel.data.inputs import Target
from vessel.data.prompt import ANSWERS, QUESTIONS, SEG, Prompt
from vessel.errors import VesselError
from vessel.restore import Restored

DECODERS = ("forced", "generate")
_LONGEST_ANSWER = 48


@dataclass(frozen=True)
class Failure:
    """An image without a result.

    Attributes:
        id: of the image.
        file: its relative name.
        reason: why there is none.
    """

    id: str
    file: str
    reason: str


@dataclass(frozen=True)
class Prediction:
    """What the network says about an image.

    Attributes:
        target: the image.
        sample: what the network was shown, with truth where the data set has it.
        answers: K texts, imposed with `forced`, the network's own with `generate`.
        probabilities: K float32 [H, W] in [0, 1], on the CPU; None where the answer holds no `[SEG]`.
        emitted: K times, whether the network itself chose `[SEG]`.
    """

    target: Target
    sample: Sample
    answers: tuple[str, ...]
    probabilities: tuple[Tensor | None, ...]
    emitted: tuple[bool, ...]


def choose_device(device: str) -> torch.device:
    """The device named, or with `auto` a GPU when there is one.

    Raises:
        VesselError: unknown, or a GPU where there is none.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise VesselError(f"device={device}: choose one of auto, cpu, cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise VesselError("device=cuda: torch finds no GPU here; use device=auto or device=cpu")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def without_truth(targets: Sequence[Target], phrases: Sequence[str], restored: Restored) -> Callable[[int], Sample]:
    """What loads the sample of a target by its index."""
    return partial(_read_sample, targets, phrases, restored.prompt, restored.views)


class Predictor:
    """A trained network that is asked for masks.

    Args:
        restored: network, prompt and views.
        device: `auto`, `cpu` or `cuda`; a GPU computes in bf16.
        decode: `forced` teaches the answer and takes one pass a batch; `generate` lets the network speak, phrase by
            phrase in one conversation, and reads the masks of what it said.
    """

    def __init__(self, restored: Restored, *, device: str = "auto", decode: str = "forced") -> None:
        if decode not in DECODERS:
            raise VesselError(f"decode={decode}: choose one of {', '.join(DECODERS)}")
        self.device, self.decode = choose_device(device), decode
        self.prompt, self.views = restored.prompt, restored.views
        self.network = restored.network.eval().to(self.device)

    def predict(
        self, targets: Sequence[Target], load: Callable[[int], Sample], *, batch_size: int = 4, workers: int = 0
    ) -> Iterator[Prediction | Failure]:
        """Ask for every target, in order; memory does not grow with their number.

        Args:
            targets: the images.
            load: gives the sample of the target at an index.
            batch_size: images a pass.
            workers: loader processes; 0 loads in this one.
        """
        if batch_size < 1 or workers < 0:
            raise VesselError(f"batch_size={batch_size} workers={workers}: at least 1 image and 0 workers")
        loader = DataLoader(_Guarded(targets, load), batch_size=batch_size, num_workers=workers, collate_fn=list)
        for loaded in loader:
            good = [item for item in loaded if isinstance(item, tuple)]
            results = iter(self._answer(good)) if good else iter(())
            for item in loaded:
                yield next(results) if isinstance(item, tuple) else item

    def _answer(self, asked: list[tuple[Target, Sample]]) -> list[Prediction | Failure]:
        """One result for each; a batch too large for the memory is asked again image by image."""
        try:
            return self._pass(asked)
        except (RuntimeError, MemoryError) as error:
            if not (isinstance(error, MemoryError | torch.OutOfMemoryError) or is_oom_error(error)):
                raise
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if len(asked) == 1:
            target = asked[0][0]
            return [Failure(target.id, target.name, f"out of memory on {self.device.type}, alone in its batch")]
        return [result for one in asked for result in self._answer([one])]

    @torch.inference_mode()
    def _pass(self, asked: list[tuple[Target, Sample]]) -> list[Prediction | Failure]:
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda"):
            spoken = [self._speak(sample) if self.decode == "generate" else _taught(sample) for _, sample in asked]
            drawn = iter(self._draw([said.sample for said in spoken if said.sample.phrases]))
        nothing = (torch.empty(0), torch.empty(0, dtype=torch.bool))
        return [
            _result(target, sample, said, *(next(drawn) if said.sample.phrases else nothing))
            for (target, sample), said in zip(asked, spoken, strict=True)
        ]

    def _draw(self, samples: list[Sample]) -> list[tuple[Tensor, Tensor]]:
        """For each conversation with its N `[SEG]`: probabilities float32 [N, H, W], and `emitted` bool [N]."""
        if not samples:
            return []
        batch = collate(samples, self.prompt.token_ids.pad).to(self.device)
        output = self.network(batch)
        emitted = self.network.emitted(output).cpu().split([len(sample.phrases) for sample in samples])
        maps = [probabilities.cpu() for probabilities in self.network.probabilities(output, batch)]
        return list(zip(maps, emitted, strict=True))

    def _speak(self, sample: Sample) -> _Spoken:
        """Greedy answers, each in the light of those before it."""
        ids = self.prompt.token_ids
        image_tokens = len(sample.tiles) * self.views.tokens_per_tile
        questions = [QUESTIONS[0].format(phrase=phrase) for phrase in sample.phrases]
        answers: list[str] = []
        for turn in range(len(questions)):
            asked, _ = self.prompt.conversation(questions[: turn + 1], answers, image_tokens)
            embeddings = self.network.embed(asked[None].to(self.device), sample.tiles.to(self.device))
            generated = self.network.mllm.generate(  # type: ignore[misc]  # transformers annotates self by a protocol
                inputs_embeds=embeddings,
                attention_mask=torch.ones(embeddings.shape[:2], dtype=torch.int64, device=self.device),
                max_new_tokens=_LONGEST_ANSWER,
                do_sample=False,
                eos_token_id=ids.eos,
                pad_token_id=ids.pad,
                suppress_tokens=[ids.image],  # stands for a feature of the image, which an answer has none of
            )[0].tolist()
            words = generated[: generated.index(ids.eos)] if ids.eos in generated else generated
            answers.append(self.prompt.decode(words))
        found = [answer.count(SEG) for answer in answers]
        first = [sum(found[:turn]) if n else None for turn, n in enumerate(found)]
        said, labels = self.prompt.conversation(questions, answers, image_tokens)
        owners = tuple(phrase for phrase, n in zip(sample.phrases, found, strict=True) for _ in range(n))
        shown = replace(sample, phrases=owners, input_ids=said, labels=labels, masks=None)
        return _Spoken(shown, tuple(answers), tuple(first))


@dataclass(frozen=True)
class _Spoken:
    """A conversation with its answers.

    Attributes:
        sample: without truth; a phrase for every `[SEG]` of the answers.
        answers: one text a phrase that was asked for.
        at: for each of them the first `[SEG]` of its answer, counted over the conversation; None without one.
    """

    sample: Sample
    answers: tuple[str, ...]
    at: tuple[int | None, ...]


def _taught(sample: Sample) -> _Spoken:
    n = len(sample.phrases)
    return _Spoken(replace(sample, masks=None), (ANSWERS[0],) * n, tuple(range(n)))


def _result(
    target: Target, sample: Sample, said: _Spoken, probabilities: Tensor, emitted: Tensor
) -> Prediction | Failure:
    if not torch.isfinite(probabilities).all():
        return Failure(target.id, target.name, "the network gave values that are not finite")
    return Prediction(
        target=target,
        sample=sample,
        answers=said.answers,
        probabilities=tuple(None if at is None else probabilities[at] for at in said.at),
        emitted=tuple(at is not None and bool(emitted[at]) for at in said.at),
    )


def _read_sample(targets: Sequence[Target], phrases: Sequence[str], prompt: Prompt, views: Views, index: int) -> Sample:
    return make_sample(read_rgb(targets[index].file), phrases, prompt, views)


class _Guarded(Dataset["tuple[Target, Sample] | Failure"]):
    """Samples with their targets; what cannot be read becomes a failure, so that the others go on."""

    def __init__(self, targets: Sequence[Target], load: Callable[[int], Sample]) -> None:
        self.targets, self.load = targets, load

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Target, Sample] | Failure:
        target = self.targets[index]
        try:
            return target, self.load(index)
        except (VesselError, OSError, MemoryError) as error:
            # Folders of this machine are no business of a report.
            folder = str(target.file).removesuffix(target.name)
            reason = str(error) or type(error).__name__
            return Failure(target.id, target.name, reason.replace(folder, "") if folder else reason)
