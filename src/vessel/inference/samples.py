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
from vessel.inference.tta import changed


def without_truth(
    targets: Sequence[InputImage], phrases: Sequence[str], restored: LoadedModel
) -> Callable[[int], Sample]:
    """Return a function that loads the sample of an input image by its index, without ground truth."""
    return partial(_read_sample, targets, phrases, restored.prompt, restored.geometry)


def asking(
    targets: Sequence[InputImage], question: str, restored: LoadedModel, *, regions: Path | None = None
) -> Callable[[int], Sample]:
    """Return a function that loads the sample of an input image by its index: a free question, without phrases.

    Args:
        targets: the images.
        question: what the user says.
        restored: whose prompt and views these samples are for.
        regions: folder of masks that the question points at, as `read_regions` describes it.
    """
    return partial(_read_question, targets, question, restored.prompt, restored.geometry, regions)


def _read_sample(
    targets: Sequence[InputImage], phrases: Sequence[str], prompt: Prompt, geometry: InputGeometry, index: int
) -> Sample:
    return make_sample(read_rgb(targets[index].file), phrases, prompt, geometry)


def _read_question(
    targets: Sequence[InputImage],
    question: str,
    prompt: Prompt,
    geometry: InputGeometry,
    folder: Path | None,
    index: int,
) -> Sample:
    image, name = read_rgb(targets[index].file), targets[index].name
    regions = None if folder is None else read_regions(folder, name, image.shape[:2], geometry)
    return question_sample(image, question, prompt, geometry, regions=regions)


@dataclass(frozen=True)
class Cutter:
    """Makes the samples of an image's views.

    Attributes:
        names: of the views, as `vessel.inference.tta` has them.
        prompt: wording that belongs to the network.
        geometry: cutting that belongs to the network.
    """

    names: Sequence[str]
    prompt: Prompt
    geometry: InputGeometry

    def __call__(self, target: InputImage, phrases: Sequence[str]) -> list[Sample]:
        """A sample for each view, without truth."""
        if not self.names:
            return []
        image = read_rgb(target.file)
        return [make_sample(changed(image, name), phrases, self.prompt, self.geometry) for name in self.names]


class Guarded(Dataset["tuple[InputImage, list[Sample]] | Failure"]):
    """Samples of an image and of its views; what cannot be read becomes a failure, so that the others go on."""

    def __init__(self, targets: Sequence[InputImage], load: Callable[[int], Sample], cutter: Cutter) -> None:
        self.targets, self.load, self.cutter = targets, load, cutter

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[InputImage, list[Sample]] | Failure:
        target = self.targets[index]
        try:
            sample = self.load(index)
            return target, [sample, *self.cutter(target, sample.phrases)]
        except (VesselError, OSError, MemoryError) as error:
            # Folders of this machine are no business of a report.
            folder = str(target.file).removesuffix(target.name)
            reason = str(error) or type(error).__name__
            return Failure(target.id, target.name, reason.replace(folder, "") if folder else reason)
