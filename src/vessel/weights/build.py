"""Build a network from a configuration: load weights, add adapters, freeze all that does not train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate import init_empty_weights
from hydra.utils import instantiate
from torch import Tensor, nn

from vessel.batch import TokenIds
from vessel.errors import VesselError
from vessel.model.groups import choose_trainable, module_of, parameter_group, trained_by
from vessel.model.lora import Lora, add_lora
from vessel.model.network import Network, NetworkConfig
from vessel.model.sa2va import Sa2VA, Sa2VAConfig
from vessel.weights.architecture import public_names
from vessel.weights.checks import check_adapters, check_order, check_sizes, is_seg_trained, require_same_base
from vessel.weights.entry import Weights
from vessel.weights.kinds import RUN
from vessel.weights.load import load
from vessel.weights.names import PublicNames
from vessel.weights.partition import ZeroRanks, gathered, suspend_zero_init
from vessel.weights.recognition import open_source
from vessel.weights.report import LoadReport
from vessel.weights.sources import EMBEDDING, HEAD, WeightSource, covers


@dataclass
class NetworkPlan:
    """A plan of a network; `build` fills `reports` and `seg_is_trained`.

    Attributes:
        sizes: shape of the network.
        tokens: ids that the prompt uses.
        new_tokens: ids of the tokens added to the base vocabulary.
        phrases: of the run; a network without a language model knows no others.
        lora: adapters on the language model; rank 0 for none.
        trainable: `lora`, `decoder_only` or `all`.
        weights: sources in the order of loading, a later one on top of those before; empty for random weights.
        frozen_dtype: dtype of parameters that do not train; under ZeRO-3 all have the one that DeepSpeed is set to.
        activation_checkpointing: keep only the input of each layer that gradients pass, and compute the layer again in
            the backward pass.
        compile: have torch compile the layers that take most of the time.
        seg_is_trained: whether a source gave trained rows of `[SEG]`; set by `build`.
    """

    sizes: NetworkConfig
    tokens: TokenIds
    new_tokens: range
    phrases: Sequence[str] = ()
    lora: Lora = field(default_factory=lambda: Lora(r=0))
    trainable: str = "lora"
    weights: Sequence[Weights] = ()
    frozen_dtype: torch.dtype = torch.float32
    activation_checkpointing: bool = False
    compile: bool = False
    reports: list[LoadReport] = field(default_factory=list)
    seg_is_trained: bool = False

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], *, tokens: TokenIds, new_tokens: range, **fields: Any
    ) -> NetworkPlan:
        """Make the plan of a training configuration.

        Args:
            config: `model`, `lora` and `trainable` of it are read; as Hydra composed it, or as a manifest holds it.
            tokens: ids that the prompt uses.
            new_tokens: ids of the tokens added to the base vocabulary.
            fields: the other fields, and values that replace the configuration's.
        """
        stated = {"lora": instantiate(config["lora"]), "trainable": config["trainable"]}
        sizes = instantiate(config["model"])
        return cls(sizes=sizes, tokens=tokens, new_tokens=new_tokens, **{**stated, **fields})

    def build(self) -> Network:
        """Build the network; under ZeRO-3 partitioned over the ranks, all of which call this.

        Raises:
            VesselError: the vocabulary is too small for the tokens, weights are not found, do not fit or leave a part
                of the network without any, a choice is unknown, or `lora.tokens` would leave `[SEG]` random for ever.
        """
        opened = [open_source(entry) for entry in self.weights]
        check_order(opened)
        sources = [self._limited(source) for source in opened]
        for source in sources:
            check_sizes(source, self.sizes)
        if isinstance(self.sizes, Sa2VAConfig):
            rows = self.sizes.language.vocabulary
            if self.new_tokens.stop > rows:
                raise VesselError(
                    f"model.language.vocabulary={rows} but the tokenizer has {self.new_tokens.stop} entries: set it to "
                    "at least that"
                )
            self.seg_is_trained = is_seg_trained(sources, self.names, rows)
        self.reports = []
        with suspend_zero_init() as ranks:
            if self.compile and ranks is not None:
                raise VesselError("compile=true: ZeRO-3 gathers layers one by one, so none can be compiled; leave it")
            return self._assemble(sources, ranks)

    @property
    def names(self) -> PublicNames:
        """Return the public names of the network."""
        return public_names(self.sizes.language) if isinstance(self.sizes, Sa2VAConfig) else PublicNames()

    def _assemble(self, sources: Sequence[WeightSource], ranks: ZeroRanks | None) -> Network:
        network = self._base_network([source for source in sources if not source.kind.needs_base], ranks)
        if self.lora.r > 0:
            tables = [p for name, p in network.named_parameters() if name in (EMBEDDING, HEAD)]
            with gathered(tables):  # peft copies them
                add_lora(network, self.lora, new_tokens=self.new_tokens, seg_is_trained=self.seg_is_trained)
        if ranks is not None:
            ranks.partition_network(network)
        for source in sources:
            if source.kind.needs_base:
                check_adapters(source, self.lora, self.new_tokens)
                if source.kind is RUN and not source.entry.partial:
                    require_same_base(source.files.metadata["vessel"]["weights"], self.reports)
                self._load(network, source, ranks)
        choose_trainable(network, self.trainable)
        if self.activation_checkpointing:
            network.checkpoint_activations()
        if self.compile:
            network.compile_layers()
        for parameter in network.parameters() if ranks is None else ():
            dtype = torch.float32 if parameter.requires_grad else self.frozen_dtype
            if parameter.dtype != dtype:
                parameter.data = parameter.data.to(dtype)
        return network

    def require_learning(self, network: Network) -> None:
        """Refuse a choice that would train nothing, or leave random parameters untrained.

        Raises:
            VesselError: with the choices there are.
        """
        groups, has_language_model = network.trainable_groups(), network.phrases is None
        if self.trainable == "lora" and "lora" not in groups:
            if has_language_model:
                raise VesselError(
                    "trainable=lora, but lora.r=0: choose adapters, such as lora.r=128, or another trainable="
                )
            raise VesselError("trainable=lora: this network has no language model; choose trainable=all")
        if not groups:
            others = "lora, decoder_only or all" if has_language_model else "all"
            raise VesselError(f"trainable={self.trainable}: nothing would train; choose {others}")
        if has_language_model and not self.seg_is_trained and "tokens" not in groups:
            raise VesselError(
                f"trainable={self.trainable} from weights that do not know [SEG]: it would stay random for ever. Start "
                "from the weights of a Sa2VA, weights=[...], or choose trainable=all"
            )
        if not has_language_model and not self.weights and self.trainable != "all":
            raise VesselError(
                f"trainable={self.trainable} from random weights: what does not train would stay random for ever. "
                "Start from the weights of a SAM2, weights=[...], or choose trainable=all"
            )

    def nbytes(self) -> int:
        """Count the bytes of the parameters when built, without adapters, in the dtypes of the sources' headers."""
        tensors: dict[str, Tensor] = {}
        if not (self.weights and isinstance(self.sizes, Sa2VAConfig)):  # whose sources give all of it
            with init_empty_weights(include_buffers=False):
                tensors |= self._random_network().state_dict()
        for source in (self._limited(open_source(entry)) for entry in self.weights):
            outline = source.outline(self.names)
            tensors |= {name: tensor for name, tensor in outline.items() if source.takes(module_of(name))}
        return sum(tensor.numel() * self._dtype(name, tensor.dtype).itemsize for name, tensor in tensors.items())

    def _random_network(self) -> Network:
        return self.sizes.build(self.tokens, self.phrases)

    def _limited(self, source: WeightSource) -> WeightSource:
        """Limit a source to the modules that networks of this kind load.

        Raises:
            VesselError: it holds none of them.
        """
        held, loadable = source.kind.modules, self.sizes.loadable
        if held and not any(covers(loadable, module) for module in held):
            raise VesselError(
                f"weights: {source.entry.source} is a {source.kind.name} and holds nothing of {', '.join(loadable)}, "
                "which is what this network loads; name another, or take weights=[]"
            )
        if source.entry.partial or all(covers(loadable, module) for module in held):
            return source
        return replace(source, entry=replace(source.entry, partial=loadable))

    def _base_network(self, sources: Sequence[WeightSource], ranks: ZeroRanks | None) -> Network:
        """Build the network without adapters; with sources it is never in memory twice, nor in a needless dtype."""
        # Random weights are drawn whole, as without ranks; the other ranks get their parts from the first.
        if not sources and (ranks is None or ranks.is_first):
            return self._random_network()
        if sources and not isinstance(self.sizes, Sa2VAConfig):
            return self._loaded_baseline(sources, ranks)
        with init_empty_weights(include_buffers=False):
            network = self._random_network()
        if not sources:
            return network
        assert isinstance(network, Sa2VA)
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

    def _loaded_baseline(self, sources: Sequence[WeightSource], ranks: ZeroRanks | None) -> Network:
        """Build a baseline with random weights, small enough for that, then load the sources into it."""
        network = self._random_network()
        for source in sources:
            self._load(network, source, ranks)
        given = {name for report in self.reports for name in report.names("loaded")}
        wanted = [name for name, _ in network.named_parameters() if covers(self.sizes.loadable, module_of(name))]
        if absent := [name for name in wanted if name not in given]:
            raise VesselError(
                f"weights={[source.entry.source for source in sources]}: nothing gives {len(absent)} of {len(wanted)} "
                f"tensors of {', '.join(self.sizes.loadable)} (first: {absent[0]}); name a source that has them all"
            )
        return network

    def _load(self, network: Network, source: WeightSource, ranks: ZeroRanks | None) -> None:
        tokens = self.new_tokens.start
        self.reports.append(load(network, source, self.names, tokens=tokens, choose_dtype=self._dtype, ranks=ranks))

    def _dtype(self, name: str, stored: torch.dtype) -> torch.dtype:
        """Choose the dtype: weights that train keep all their digits until they are adapted."""
        return stored if parameter_group(name) in trained_by(self.trainable) else self.frozen_dtype


def _begin_at_random(module: nn.Module) -> None:
    """Initialise, as torch does, the parameters that no source gave; it may have given a part of a layer."""
    for layer in module.modules():
        if any(parameter.is_meta for parameter in layer.parameters(recurse=False)):
            assert isinstance(layer, nn.Linear)
            fresh = nn.Linear(layer.in_features, layer.out_features)
            for name, parameter in fresh.named_parameters():
                if layer.get_parameter(name).is_meta:
                    setattr(layer, name, parameter)
