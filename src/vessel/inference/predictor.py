"""From images to probabilities: the one place where a trained network is asked, for evaluation, prediction and proof.

Nothing here invents a result: what fails is handed on as a `Failure` with its reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from itertools import chain, islice

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from vessel.batch import Batch, Output, Sample, collate
from vessel.data.inputs import InputImage
from vessel.data.prompt import ANSWERS, IGNORED
from vessel.errors import VesselError, is_out_of_memory
from vessel.inference.decoders import DECODERS
from vessel.inference.generation import MAX_NEW_TOKENS, AnsweredConversation, generate_answers
from vessel.inference.loading import LoadedModel
from vessel.inference.options import choose_device
from vessel.inference.results import Failure, Prediction
from vessel.inference.samples import AugmentedSamples, SamplesOrFailures
from vessel.inference.tta import average_augmented, check_augmentations
from vessel.model.placement import distribute
from vessel.model.sa2va import Sa2VA


class Predictor:
    """A trained network that is asked for masks.

    Args:
        model: network, prompt and views.
        device: `auto`, `cpu` or `cuda`; a GPU computes in bf16.
        device_map: parts of the network on several devices, as `vessel.model.placement.distribute` takes it.
        decode: `forced` teaches the answer and takes one pass a batch; `generate` lets the network speak, phrase by
            phrase in one conversation, and reads the masks of what it said. A free question needs `generate`.
        max_new_tokens: where `generate` cuts an answer that does not end.
        tta: names of views whose probabilities are averaged with those of the image itself, with `forced` only.
    """

    def __init__(
        self,
        model: LoadedModel,
        *,
        device: str | torch.device = "auto",
        device_map: str | Mapping[str, str | int] | None = None,
        decode: str = "forced",
        max_new_tokens: int = MAX_NEW_TOKENS,
        tta: Sequence[str] = (),
    ) -> None:
        if decode not in DECODERS:
            raise VesselError(f"decode={decode}: choose one of {', '.join(DECODERS)}")
        if max_new_tokens < 1:
            raise VesselError(f"max_new_tokens={max_new_tokens}: an answer takes one token at least")
        self.augmented = _checked(tta, decode)
        self.device = device if isinstance(device, torch.device) else choose_device(device)
        self.decode, self.max_new_tokens = decode, max_new_tokens
        self.prompt, self.geometry = model.prompt, model.geometry
        network = model.network.eval()
        self.network = network.to(self.device) if device_map is None else distribute(network, device_map)

    def with_tta(self, tta: Sequence[str]) -> Predictor:
        """The same network, asked with other views."""
        other = copy(self)
        other.augmented = _checked(tta, self.decode)
        return other

    def predict(
        self, targets: Sequence[InputImage], load: Callable[[int], Sample], *, batch_size: int = 4, workers: int = 0
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
        shown = SamplesOrFailures(targets, load, AugmentedSamples(self.augmented, self.prompt, self.geometry))
        # An image with its views has passes of its own, so that memory does not grow with the number of views.
        together = 1 if self.augmented else batch_size
        for loaded in DataLoader(shown, batch_size=together, num_workers=workers, collate_fn=list):
            asked = [(item[0], sample) for item in loaded if isinstance(item, tuple) for sample in item[1]]
            passes = (asked[i : i + batch_size] for i in range(0, len(asked), batch_size))
            results = chain.from_iterable(map(self._answer, passes))
            for item in loaded:
                yield self._mean(list(islice(results, len(item[1])))) if isinstance(item, tuple) else item

    def _mean(self, results: list[Prediction | Failure]) -> Prediction | Failure:
        """The result of an image from its own and those of its views; where one failed, the image has."""
        good = [result for result in results if isinstance(result, Prediction)]
        if len(good) < len(results):
            return next(result for result in results if isinstance(result, Failure))
        if not self.augmented:
            return good[0]
        own, *others = (torch.stack([one for one in result.probabilities if one is not None]) for result in good)
        return replace(good[0], probabilities=tuple(average_augmented(own, zip(self.augmented, others, strict=True))))

    def _answer(self, asked: list[tuple[InputImage, Sample]]) -> list[Prediction | Failure]:
        """One result for each; a batch too large for the memory is asked again image by image."""
        try:
            return self._pass(asked)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if len(asked) == 1:
            target = asked[0][0]
            return [Failure(target.id, target.name, f"out of memory on {self.device.type}, alone in its batch")]
        return [result for one in asked for result in self._answer([one])]

    @torch.inference_mode()
    def _pass(self, asked: list[tuple[InputImage, Sample]]) -> list[Prediction | Failure]:
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda"):
            spoken = self.answer_questions([sample for _, sample in asked])
            drawn = iter(self._draw([said for said in spoken if said.sample.phrases]))
        nothing = (torch.empty(0), torch.empty(0, dtype=torch.bool))
        return [
            _result(target, sample, said, *(next(drawn) if said.sample.phrases else nothing))
            for (target, sample), said in zip(asked, spoken, strict=True)
        ]

    def answer_questions(self, samples: Sequence[Sample], *, frames: int = 1) -> list[AnsweredConversation]:
        """The conversation about each sample: taught, or the network's own, each answer in the light of those before.

        Args:
            samples: one with a free question has no phrases.
            frames: of a pullback, one tile each.
        """
        if self.decode == "generate":
            return generate_answers(self.sa2va, self.prompt, samples, frames=frames, max_new_tokens=self.max_new_tokens)
        imposed = ANSWERS[:1] if self.network.phrases is None else ()
        return [
            AnsweredConversation(replace(sample, masks=None), asked, imposed * len(asked), tuple(range(len(asked))))
            for sample, asked in ((sample, sample.phrases) for sample in samples)
        ]

    def _draw(self, spoken: Sequence[AnsweredConversation]) -> list[tuple[Tensor, Tensor | None]]:
        """For each conversation with its N `[SEG]`: probabilities float32 [N, H, W], and `emitted` bool [N].

        A network without a language model has emitted None.
        """
        if not spoken:
            return []
        batch = collate([said.sample for said in spoken], self.prompt.token_ids.pad)
        if self.decode == "generate":  # whose words were said in the light of the tiles
            batch = replace(batch, tiles=batch.tiles[:0])
        if self.device.type == "cuda":
            batch = batch.pin_memory().to(self.device, non_blocking=True)
        counts = [len(said.sample.phrases) for said in spoken]
        emitted: Sequence[Tensor | None] = [None] * len(spoken)
        if self.decode == "generate":
            output = self._drawn(batch, torch.cat([said.seg_states for said in spoken if said.seg_states is not None]))
            emitted = [torch.ones(n, dtype=torch.bool) for n in counts]
        else:
            # Of the words only whether they are `[SEG]` is asked: the head need not see the others.
            others = batch.input_ids != self.prompt.token_ids.seg
            output = self.network(replace(batch, labels=batch.labels.masked_fill(others, IGNORED)))
            if self.network.phrases is None:
                emitted = self.network.emitted(output).cpu().split(counts)
        maps = [probabilities.cpu() for probabilities in self.network.probabilities(output, batch)]
        return list(zip(maps, emitted, strict=True))

    def _drawn(self, batch: Batch, states: Tensor) -> Output:
        """Masks by the states [N, d] of the `[SEG]` that the network said; its words are behind it."""
        self.network.require_frames(batch)
        images = [i for i, phrases in enumerate(batch.phrases) for _ in phrases]
        of_image, nothing = torch.tensor(images), torch.empty(0, dtype=torch.int64)
        logits = self.sa2va.decode_masks(self.sa2va.frame_pyramid(batch), states, of_image)
        return Output(logits, of_image, lm_logits=logits.new_empty(0, 0), lm_targets=nothing)

    @property
    def sa2va(self) -> Sa2VA:
        """The network, of which only that kind speaks and follows pullbacks."""
        assert isinstance(self.network, Sa2VA)
        return self.network


def _checked(tta: Sequence[str], decode: str) -> tuple[str, ...]:
    if tta and decode != "forced":
        raise VesselError(f"tta= with decode={decode}: several predictions make no one answer; use decode=forced")
    return check_augmentations(tta)


def _result(
    target: InputImage, sample: Sample, said: AnsweredConversation, probabilities: Tensor, emitted: Tensor | None
) -> Prediction | Failure:
    if not torch.isfinite(probabilities).all():
        return Failure(target.id, target.name, "the network gave values that are not finite")
    chosen = () if emitted is None else tuple(at is not None and bool(emitted[at]) for at in said.seg_indices)
    return Prediction(
        target=target,
        sample=replace(sample, phrases=said.phrases),
        answers=said.answers,
        probabilities=tuple(None if at is None else probabilities[at] for at in said.seg_indices),
        emitted=chosen,
    )
