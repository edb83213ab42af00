"""A source of weights: its kind, its tensors under our names, and its configuration."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from vessel.errors import VesselError
from vessel.runs.old_names import present_config
from vessel.weights.adapters import alpha_ratio
from vessel.weights.entry import Weights
from vessel.weights.files import NamedTensor, TensorFiles
from vessel.weights.kinds import ADAPTER, RUN, Kind
from vessel.weights.names import PublicNames

_QWEN2 = PublicNames()
LANGUAGE_PARTS = ("llm_config", "text_config")  # of config.json
HEAD, EMBEDDING = "mllm.lm_head.weight", "mllm.model.language_model.embed_tokens.weight"
ADAPTER_WEIGHTS, ADAPTER_CONFIG, OTHER_WEIGHTS = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "non_lora.safetensors",
)


@dataclass(frozen=True)
class WeightSource:
    """A source of weights that can be read.

    Attributes:
        entry: of the configuration.
        kind: by its contents.
        path: on this machine.
        files: its tensors under its own names.
        translate: renames them to ours; a file that does not state the heads of its language model is read with those
            of the network.
        config: of a folder that has one.
        revision: commit of a hub id.
    """

    entry: Weights
    kind: Kind
    path: Path
    files: TensorFiles
    translate: Callable[[Iterable[NamedTensor], PublicNames], Iterator[NamedTensor]]
    config: Mapping[str, Any] = field(default_factory=dict)
    revision: str | None = None

    def takes(self, module: str) -> bool:
        """Return True if the module, such as `mllm.language`, is taken from this source."""
        return not self.entry.partial or covers(self.entry.partial, module)

    @property
    def has_tied_head(self) -> bool:
        """Return True if its configuration ties the head of its language model to the embedding."""
        return _ties(self.config) or self._language_ties

    @property
    def requires_tied_head(self) -> bool:
        """Return True if the configuration of its language model ties the head, and the entry does not choose one."""
        return self._language_ties and not self.entry.untie and not self.entry.partial

    @property
    def _language_ties(self) -> bool:
        return any(_ties(self.config.get(part)) for part in LANGUAGE_PARTS)

    def run_config(self, part: str) -> Mapping[str, Any]:
        """Return a part of the configuration of the run that wrote a checkpoint, such as `model`.

        Raises:
            VesselError: its manifest has none.
        """
        try:
            found: Mapping[str, Any] = present_config(self.files.metadata["vessel"]["config"])[part]
        except (AttributeError, KeyError, TypeError) as error:
            raise VesselError(f"{self.path}: its manifest has no config.{part}; copy the checkpoint again") from error
        return found

    def alpha_ratio(self) -> float | None:
        """Return alpha over rank of its adapters; None if it states none, or has no adapters.

        Raises:
            VesselError: an adapter folder or a run that does not state it.
        """
        if self.kind is ADAPTER:
            return alpha_ratio(self.config, self.path)
        if self.kind is RUN:
            lora = self.run_config("lora")
            return float(lora["alpha_ratio"]) if lora["r"] else None
        # The public training code keeps its configuration as text.
        text = str((self.files.metadata.get("meta") or {}).get("cfg", ""))
        alpha, rank = (re.search(rf"\b{name}\s*=\s*(\d+)", text) for name in ("lora_alpha", "r"))
        return int(alpha[1]) / int(rank[1]) if alpha and rank and int(rank[1]) else None

    def tensors(self, names: PublicNames = _QWEN2) -> Iterator[NamedTensor]:
        """Yield tensors under our names, shard by shard."""
        return self._with_head(self.translate(self.files.read(), names))

    def outline(self, names: PublicNames = _QWEN2) -> dict[str, Tensor]:
        """Return tensors without content (meta device) under our names.

        Raises:
            VesselError: two tensors have the same name.
        """
        outline: dict[str, Tensor] = {}
        for name, tensor in self._with_head(self.translate(self.files.outline.items(), names)):
            if name in outline:
                raise VesselError(
                    f"{self.path}: holds {name} twice, under two spellings of its name, and which one is valid cannot "
                    "be known; take a file that one program wrote"
                )
            outline[name] = tensor
        return outline

    def _with_head(self, state: Iterable[NamedTensor]) -> Iterator[NamedTensor]:
        """Replace the head by the embedding with `untie`; otherwise yield all as they are."""
        for name, tensor in state:
            if not (self.entry.untie and name == HEAD):
                yield name, tensor
            if self.entry.untie and name == EMBEDDING:
                yield HEAD, tensor


def _ties(config: Any) -> bool:
    return isinstance(config, Mapping) and config.get("tie_word_embeddings") is True


def covers(modules: Sequence[str], module: str) -> bool:
    """Return True if a module is one of these or lies within one."""
    return any(module == name or module.startswith(f"{name}.") for name in modules)
