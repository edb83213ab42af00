"""Results of a prediction: masks as probabilities, and failures."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vessel.batch import Sample
from vessel.data.inputs import InputImage


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
    """The network's results for an image.

    Attributes:
        target: the image.
        sample: what the network was shown, with truth where the data set has it; after a free question its phrases
            are `seg_1`, `seg_2`, …, one a `[SEG]` of the answer.
        answers: a text a phrase that was asked for, or one to a free question. Imposed with `forced`; the network's own
            with `generate`, special tokens kept as the public code keeps them; none of a network without words.
        probabilities: K float32 [H, W] in [0, 1], on the CPU; None where the answer holds no `[SEG]`.
        emitted: K times, whether the network itself chose `[SEG]`; empty of a network without words.
    """

    target: InputImage
    sample: Sample
    answers: tuple[str, ...]
    probabilities: tuple[Tensor | None, ...]
    emitted: tuple[bool, ...]
