"""Segment pullbacks: prompt the network with the first frames; SAM2's memory carries the masks through the others.

Frames are read one by one: memory does not grow with their number.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import PurePosixPath

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vessel.batch import Sample, collate, upsample
from vessel.data.catalog import Catalog
from vessel.data.images import common_depth, read_rgb
from vessel.data.inputs import InputImage
from vessel.data.prompt import ANSWERS, QUESTIONS
from vessel.data.transforms import cut_tiles, whole_frame
from vessel.errors import VesselError, is_out_of_memory
from vessel.inference.generation import AnsweredConversation
from vessel.inference.predictor import Failure, Predictor
from vessel.inference.results import Prediction
from vessel.model.network import normalise
from vessel.model.tracking import PROMPTED_FRAMES, Tracker
from vessel.paths import expanded


@dataclass(frozen=True)
class Pullback:
    """Frames of one vessel, one after the other.

    Attributes:
        id: the video of a prepared data set, or the folder relative to the one that the user named, which is `.`.
        frames: in order.
        depth: bits of 16-bit grey frames, one for all so that the brightness does not flicker; None without such.
    """

    id: str
    frames: tuple[InputImage, ...]
    depth: int | None


def find_pullbacks(source: str, images: Sequence[InputImage]) -> list[Pullback]:
    """Group images into pullbacks: by the video of a prepared data set, else by folder, `frame_2` before `frame_10`.

    Args:
        source: the value of the option `images`.
        images: that `find_images` found there.
    """
    try:
        known = Catalog.open(expanded(source)).frames
    except VesselError:  # no data set: `find_images` would have refused a broken one
        known = {}
    groups: dict[str, list[tuple[tuple[object, ...], InputImage]]] = defaultdict(list)
    for image in images:
        if frame := known.get(image.id):
            groups[frame.video].append(((frame.frame,), image))
        else:
            path = PurePosixPath(image.name)
            groups[path.parent.as_posix()].append((_natural(path.name), image))
    pullbacks = []
    for name in sorted(groups, key=_natural):
        frames = tuple(image for _, image in sorted(groups[name], key=lambda pair: pair[0]))
        pullbacks.append(Pullback(name, frames, common_depth(frame.file for frame in frames)))
    return pullbacks


def _natural(name: str) -> tuple[object, ...]:
    """Return a key that sorts the numbers in names by value."""
    parts = re.split(r"(\d+)", name)
    return tuple(int(part) if i % 2 else part for i, part in enumerate(parts)), name


def segment_pullback(
    predictor: Predictor, pullback: Pullback, phrases: Sequence[str], *, question: str | None = None
) -> Iterator[Prediction | Failure]:
    """Predict the masks of every frame in order; a `Failure` ends them, and then the whole pullback has failed.

    Args:
        predictor: of the network, with its way of decoding.
        pullback: at least one frame.
        phrases: to segment, all in one conversation about the first frames.
        question: a free question instead of phrases; each `[SEG]` of the answer is one object.
    """
    try:
        yield from _predictions(predictor, pullback, phrases, question)
    except (VesselError, OSError) as error:
        # Folders of this machine are no business of a report.
        first = pullback.frames[0]
        folder = str(first.file).removesuffix(first.name)
        yield _failure(pullback, str(error).replace(folder, "") if folder else str(error))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        yield _failure(pullback, f"out of memory on {predictor.device.type}")


def _failure(pullback: Pullback, reason: str) -> Failure:
    ends = dict.fromkeys((pullback.frames[0].name, pullback.frames[-1].name))
    return Failure(pullback.id, " … ".join(ends), reason)


def _predictions(
    predictor: Predictor, pullback: Pullback, phrases: Sequence[str], question: str | None
) -> Iterator[Prediction]:
    frames, geometry = _read(pullback), predictor.geometry
    prompted = list(islice(frames, PROMPTED_FRAMES))
    tiles = torch.cat([cut_tiles(pixels, replace(geometry, max_tiles=1)) for _, pixels in prompted])
    sample = _sample(predictor, tiles, phrases, question, size=prompted[0][1].shape[:2])
    prompts, emitted, answer = _generate_prompts(predictor, sample, frames=len(tiles))
    segmented = [at for at in answer.seg_indices if at is not None]
    grounding = predictor.sa2va.grounding
    tracker = Tracker(grounding, prompts[segmented].to(grounding.device))
    for image, pixels in chain(prompted, frames):
        sample = replace(answer.sample, phrases=answer.phrases, frame=whole_frame(pixels, geometry))
        masks = iter(_segment_frame(predictor, tracker, sample) if segmented else ())
        yield Prediction(
            target=image,
            sample=sample,
            answers=answer.answers,
            probabilities=tuple(None if at is None else next(masks) for at in answer.seg_indices),
            emitted=tuple(at is not None and bool(emitted[at]) for at in answer.seg_indices),
        )


def _read(pullback: Pullback) -> Iterator[tuple[InputImage, NDArray[np.uint8]]]:
    """Read the frames one by one.

    Raises:
        VesselError: one is unreadable, or of another size than the first.
    """
    size = None
    for image in pullback.frames:
        pixels = read_rgb(image.file, depth=pullback.depth)
        size = size or pixels.shape
        if pixels.shape != size:
            raise VesselError(
                f"{image.name}: {pixels.shape[1]} x {pixels.shape[0]} pixels, but {pullback.frames[0].name} has "
                f"{size[1]} x {size[0]}; the frames of a pullback have one size, put other images into another folder"
            )
        yield image, pixels


def _sample(
    predictor: Predictor, tiles: Tensor, phrases: Sequence[str], question: str | None, *, size: tuple[int, ...]
) -> Sample:
    """Make the sample of the question about the first frames, one tile each (uint8 [T, 3, t, t]), with its answers."""
    questions = [QUESTIONS[0].format(phrase=phrase) for phrase in phrases] if question is None else [question]
    tokens = predictor.geometry.tokens_per_tile
    ids, labels = predictor.prompt.conversation(questions, ANSWERS[:1] * len(phrases), tokens, frames=len(tiles))
    height, width = size
    return Sample(
        id="", patient="", video="", phrases=tuple(phrases), tiles=tiles, frame=torch.empty(0),
        input_ids=ids, labels=labels, size=(height, width),
    )  # fmt: skip


@torch.inference_mode()
def _generate_prompts(
    predictor: Predictor, sample: Sample, *, frames: int
) -> tuple[Tensor, Tensor, AnsweredConversation]:
    """Answer the question about the first frames.

    Returns:
        prompts [N, C] of the N `[SEG]` of the answer; bool [N], whether the network itself emits each; the answer.
    """
    network, seg = predictor.sa2va, predictor.prompt.token_ids.seg
    with _precision(predictor):
        [answer] = predictor.answer_questions([sample], frames=frames)
        states = answer.seg_states
        if states is None:
            batch = collate([answer.sample], predictor.prompt.token_ids.pad).to(predictor.device)
            hidden = network.hidden_states(batch)[0]
            is_seg = answer.sample.input_ids == seg
            states = hidden[is_seg]
            emitted = network.mllm.lm_head(hidden[:-1][is_seg[1:]]).argmax(-1) == seg
        else:
            emitted = torch.ones(len(states), dtype=torch.bool)
        prompts = network.text_hidden_fcs(states)
    return prompts, emitted.cpu(), answer


@torch.inference_mode()
def _segment_frame(predictor: Predictor, tracker: Tracker, sample: Sample) -> Tensor:
    """Segment the next frame: probabilities float32 [K, H, W].

    Raises:
        VesselError: they are not finite.
    """
    grounding = tracker.grounding
    with _precision(predictor):
        frame = normalise(sample.frame[None].to(grounding.device)).to(grounding.no_mem_embed.dtype)
        logits = tracker.step(grounding.encode(frame))
    probabilities = upsample(logits, grounding.image_size, sample.size).sigmoid().cpu()
    if not torch.isfinite(probabilities).all():
        raise VesselError("the network gave values that are not finite")
    return probabilities


def _precision(predictor: Predictor) -> torch.autocast:
    kind = predictor.device.type
    return torch.autocast(kind, dtype=torch.bfloat16, enabled=kind == "cuda")
