"""From a configuration to a network ready for a task: built, loaded, adapted, frozen where it does not train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from accelerate import init_empty_weights
from torch import nn

from vessel.batch import TokenIds
from vessel.errors import VesselError
from vessel.model.architecture import public_names
from vessel.model.checks import check_adapters, check_order, check_sizes, know_seg, require_same_base
from vessel.model.groups import choose_trainable, group_of, trained_by
from vessel.model.lora import Lora, add_lora
from vessel.model.partition import Ranks, gathered, resting
from vessel.model.sa2va import Sa2VA, Sizes, build_sa2va
from vessel.model.weights.entry import Weights
from vessel.model.weights.load import load
from vessel.model.weights.report import LoadReport
from vessel.model.weights.sources import RUN, Source, open_source

_TOKEN_TABLES = ("model.language_model.embed_tokens.weight", "lm_head.weight")  # peft copies them


@dataclass
class NetworkPlan:
    """How to make a network; `reports` fills when it is made.

    Attributes:
        sizes: shape of the network.
        tokens: ids that the prompt uses.
        new_tokens: ids of the tokens added to the base vocabulary.
        lora: adapters on the language model; rank 0 for none.
        trainable: `lora`, `decoder_only` or `all`.
        weights: sources in the order of loading, a later one on top of those before; empty for random weights.
        frozen_dtype: dtype of parameters that do not train; under ZeRO-3 all have the one that DeepSpeed is set to.
        checkpointing: keep only what enters each layer that gradients pass, and compute the layer again for them.
        seg_is_trained: whether a source gave rows of `[SEG]` that it trained; known when the network is made.
    """

    sizes: Sizes
    tokens: TokenIds
    new_tokens: range
    lora: Lora = field(default_factory=lambda: Lora(r=0))
    trainable: str = "lora"
    weights: Sequence[Weights] = ()
    frozen_dtype: torch.dtype = torch.float32
    checkpointing: bool = False
    reports: list[LoadReport] = field(default_factory=list)
    seg_is_trained: bool = False

    def build(self) -> Sa2VA:
        """Make the network; under ZeRO-3 partitioned over the ranks, all of which call this.

        Raises:
            VesselError: the vocabulary is too small for the tokens, weights are not found, do not fit or leave a part
                of the network without any, a choice is unknown, or `lora.tokens` would leave `[SEG]` random for ever.
        """
        if self.new_tokens.stop > self.sizes.language.vocabulary:
            raise VesselError(
                f"model.language.vocabulary={self.sizes.language.vocabulary} but the tokenizer has "
                f"{self.new_tokens.stop} entries: set it to at least that"
            )
        sources = [open_source(entry) for entry in self.weights]
        check_order(sources)
        for source in sources:
            check_sizes(source, self.sizes)
        self.seg_is_trained = know_seg(sources, public_names(self.sizes.language), self.sizes.language.vocabulary)
        self.reports = []
        with resting() as ranks:
            return self._made(sources, ranks)

    def _made(self, sources: Sequence[Source], ranks: Ranks | None) -> Sa2VA:
        network = self._base([source for source in sources if not source.kind.on_top], ranks)
        if self.lora.r > 0:
            with gathered([network.mllm.get_parameter(name) for name in _TOKEN_TABLES]):
                add_lora(network, self.lora, new_tokens=self.new_tokens, seg_is_trained=self.seg_is_trained)
        if ranks is not None:
            ranks.share(network)
        for source in sources:
            if source.kind.on_top:
                check_adapters(source, self.lora, self.new_tokens)
                if source.kind is RUN and not source.entry.partial:
                    require_same_base(source.files.beside["vessel"]["weights"], self.reports)
                self._load(network, source, ranks)
        choose_trainable(network, self.trainable)
        if self.checkpointing:
            network.checkpoint_layers()
        for parameter in network.parameters() if ranks is None else ():
            dtype = torch.float32 if parameter.requires_grad else self.frozen_dtype
            if parameter.dtype != dtype:
                parameter.data = parameter.data.to(dtype)
        return network

    def nbytes(self) -> int:
        """Bytes of the parameters when built, adapters not counted: from the headers of the sources, or by building."""
        names = public_names(self.sizes.language)
        outlines = [open_source(entry).outline(names) for entry in self.weights]
        if not outlines:
            with init_empty_weights(include_buffers=False):
                outlines = [build_sa2va(self.sizes, self.tokens).state_dict()]
        tensors = {name: tensor for outline in outlines for name, tensor in outline.items()}
        return sum(tensor.numel() * self._dtype(name, tensor.dtype).itemsize for name, tensor in tensors.items())

    def _base(self, sources: Sequence[Source], ranks: Ranks | None) -> Sa2VA:
        """The network without adapters; with sources it is never held twice, nor in more than the dtypes it needs."""
        # What is drawn at random is drawn as without ranks, and so whole; the others get their parts from the first.
        if not sources and (ranks is None or ranks.is_first):
            return build_sa2va(self.sizes, self.tokens)
        with init_empty_weights(include_buffers=False):
            network = build_sa2va(self.sizes, self.tokens)
        if not sources:
            return network
        for source in sources:
            self._load(network, source, ranks)
        _begin_at_random(network.text_hidden_fcs)
        empty = [name for name, parameter in network.named_parameters() if parameter.is_meta]
        if empty:
            parts = ", ".join(sorted({name.split(".")[0] for name in empty}))
            raise VesselError(
                f"weights={[source.entry.source for source in sources]}: nothing gives {parts} ({len(empty)} tensors, "
                f"first: {empty[0]}); name a Sa2VA folder, or an InternVL folder and a SAM 2.0 file"
            )
        return network

    def _load(self, network: Sa2VA, source: Source, ranks: Ranks | None) -> None:
        names, tokens = public_names(self.sizes.language), self.new_tokens.start
        self.reports.append(load(network, source, names, tokens=tokens, keep=self._dtype, ranks=ranks))

    def _dtype(self, name: str, stored: torch.dtype) -> torch.dtype:
        """What trains keeps all its digits until it is adapted."""
        return stored if group_of(name) in trained_by(self.trainable) else self.frozen_dtype


def _begin_at_random(module: nn.Module) -> None:
    """Initialise, as torch does, what no source gave; of a layer it may have given a part."""
    for layer in module.modules():
        if any(parameter.is_meta for parameter in layer.parameters(recurse=False)):
            assert isinstance(layer, nn.Linear)
            fresh = nn.Linear(layer.in_features, layer.out_features)
            for name, parameter in fresh.named_parameters():
                if layer.get_parameter(name).is_meta:
                    setattr(layer, name, parameter)
