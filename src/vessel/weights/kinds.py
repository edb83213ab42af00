"""Kinds of sources of weights."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """A kind of source.

    Attributes:
        name: in messages.
        modules: those it holds completely; empty for a kind that holds only the parameters that trained.
        has_trained_seg: its `[SEG]` is trained, where it holds the rows of it at all.
        resizes: its vocabulary lacks the added tokens.
    """

    name: str
    modules: tuple[str, ...] = ()
    has_trained_seg: bool = True
    resizes: bool = False

    @property
    def needs_base(self) -> bool:
        """Return True if a base must be loaded before."""
        return not self.modules


_ALL = ("mllm", "grounding", "text_hidden_fcs")
SA2VA = Kind("Sa2VA folder", _ALL)
NATIVE = Kind("vessel folder", _ALL)
INTERNVL = Kind("InternVL folder", ("mllm",), has_trained_seg=False, resizes=True)
SAM2 = Kind("SAM 2.0 file", ("grounding",), has_trained_seg=False)
ENCODER = Kind("ResNet file", ("unet.encoder",), has_trained_seg=False)
MMENGINE = Kind("full .pth of the public code", _ALL)
TRAINING = Kind("training .pth of the public code")
ADAPTER = Kind("adapter folder")
RUN = Kind("checkpoint of a run")
