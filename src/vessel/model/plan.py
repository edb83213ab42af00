"""From a configuration to a network ready for a task: built, loaded, adapted, frozen where it does not train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from vessel.batch import TokenIds
from vessel.errors import VesselError
from vessel.model.groups import choose_trainable
from vessel.model.lora import Lora, add_lora
from vessel.model.sa2va import Sa2VA, Sizes, build_sa2va
from vessel.model.weights import LoadReport, load_state, read_safetensors, to_native


@dataclass
class NetworkPlan:
    """How to make a network; `reports` fills when it is made.

    Attributes:
        sizes: shape of the network.
        tokens: ids that the prompt uses.
        new_tokens: ids of the tokens added to the base vocabulary.
        lora: adapters on the language model; rank 0 for none.
        trainable: `lora`, `decoder_only` or `all`.
        weights: folders or hub ids in the public Sa2VA layout; empty for random weights.
        frozen_dtype: dtype of tensors that do not train.
    """

    sizes: Sizes
    tokens: TokenIds
    new_tokens: range
    lora: Lora = field(default_factory=lambda: Lora(r=0))
    trainable: str = "lora"
    weights: Sequence[str] = ()
    frozen_dtype: torch.dtype = torch.float32
    reports: list[LoadReport] = field(default_factory=list)

    def build(self) -> Sa2VA:
        """Make the network.

        Raises:
            VesselError: the vocabulary is too small for the tokens, weights are not found or do not fit, a choice is
                unknown, or `lora.tokens` would leave `[SEG]` random for ever.
        """
        if self.new_tokens.stop > self.sizes.language.vocabulary:
            raise VesselError(
                f"model.language.vocabulary={self.sizes.language.vocabulary} but the tokenizer has "
                f"{self.new_tokens.stop} entries: set it to at least that"
            )
        network = build_sa2va(self.sizes, self.tokens)
        self.reports = [_load(network, source) for source in self.weights]
        if self.lora.r > 0:
            add_lora(network, self.lora, new_tokens=self.new_tokens, seg_is_trained=bool(self.weights))
        choose_trainable(network, self.trainable)
        for parameter in network.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(self.frozen_dtype)
        return network


def local_folder(source: str) -> Path:
    """A folder as it is, or a hub id as the folder it was downloaded to.

    Raises:
        VesselError: neither a folder nor a hub id that can be reached.
    """
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(snapshot_download(source))
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise VesselError(
            f"{source}: no folder of that name, and the hub does not give it ({type(error).__name__}); "
            "check the spelling, or download it elsewhere and name the folder"
        ) from error


def _load(network: Sa2VA, source: str) -> LoadReport:
    report = load_state(network, to_native(read_safetensors(local_folder(source))), source)
    report.require_complete()
    return report
