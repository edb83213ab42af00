"""Load the samples of images, and of their variants for test-time augmentation, one by one.

What cannot be read becomes a `Failure` with its reason; nothing stands in for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch.utils.data import Dataset

from vessel.batch import InputGeometry, Sample
from vessel.data.dataset import make_sample
from vessel.data.images import read_rgb
from vessel.data.inputs import InputImage
from vessel.data.prompt import Prompt
from vessel.data.questions import question_sample, read_regions
from vessel.errors import VesselError
from vessel.inference.loading import LoadedModel
from vessel.inference.results import Failure
from vessel.inference.tta import augment_image


def phrase_sample_loader(
    images: Sequence[InputImage], phrases: Sequence[str], model: LoadedModel
) -> Callable[[int], Sample]:
    """Return a function that loads the sample of an input image by its index, without ground truth."""
    return partial(_read_sample, images, phrases, model.prompt, model.geometry)


def question_sample_loader(
    images: Sequence[InputImage], question: str, model: LoadedModel, *, regions: Path | None = None
) -> Callable[[int], Sample]:
    """Return a function that loads the sample of an input image by its index: a free question, without phrases.

    Args:
        images: the input images.
        question: the user's question.
        model: whose prompt and geometry these samples are for.
        regions: folder of masks that the question points at, as `read_regions` describes it.
    """
    return partial(_read_question, images, question, model.prompt, model.geometry, regions)


def _read_sample(
    images: Sequence[InputImage], phrases: Sequence[str], prompt: Prompt, geometry: InputGeometry, index: int
) -> Sample:
    return make_sample(read_rgb(images[index].file), phrases, prompt, geometry)


def _read_question(
    images: Sequence[InputImage],
    question: str,
    prompt: Prompt,
    geometry: InputGeometry,
    folder: Path | None,
    index: int,
) -> Sample:
    pixels, name = read_rgb(images[index].file), images[index].name
    regions = None if folder is None else read_regions(folder, name, pixels.shape[:2], geometry)
    return question_sample(pixels, question, prompt, geometry, regions=regions)


@dataclass(frozen=True)
class AugmentedSamples:
    """The samples of an image for test-time augmentation, made when called.

    Attributes:
        names: of the augmentations, keys of `vessel.inference.tta`.
        prompt: of the network that the samples are for.
        geometry: of the same network.
    """

    names: Sequence[str]
    prompt: Prompt
    geometry: InputGeometry

    def __call__(self, image: InputImage, phrases: Sequence[str]) -> list[Sample]:
        """Make a sample of each augmentation of an image, without ground truth."""
        if not self.names:
            return []
        pixels = read_rgb(image.file)
        return [make_sample(augment_image(pixels, name), phrases, self.prompt, self.geometry) for name in self.names]


class SamplesOrFailures(Dataset["tuple[InputImage, list[Sample]] | Failure"]):
    """The samples of each image and of its augmentations; an image that cannot be read is a `Failure`."""

    def __init__(
        self, images: Sequence[InputImage], load: Callable[[int], Sample], augmented: AugmentedSamples
    ) -> None:
        self.images, self.load, self.augmented = images, load, augmented

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[InputImage, list[Sample]] | Failure:
        image = self.images[index]
        try:
            sample = self.load(index)
            return image, [sample, *self.augmented(image, sample.phrases)]
        except (VesselError, OSError, MemoryError) as error:
            # Folders of this machine are no business of a report.
            folder = str(image.file).removesuffix(image.name)
            reason = str(error) or type(error).__name__
            return Failure(image.id, image.name, reason.replace(folder, "") if folder else reason)
