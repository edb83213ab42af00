"""Checks of sources before any tensor is read: their order, and that they belong to this network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from torch import Tensor

from vessel.errors import VesselError
from vessel.model.lora import Lora
from vessel.model.network import NetworkConfig
from vessel.model.sa2va import Sa2VAConfig
from vessel.weights.adapters import require_plain_lora
from vessel.weights.architecture import read_sizes
from vessel.weights.kinds import ADAPTER, INTERNVL, NATIVE, RUN, SA2VA
from vessel.weights.names import PublicNames
from vessel.weights.report import LoadReport
from vessel.weights.sources import EMBEDDING, HEAD, WeightSource, covers

# Rows follow the tokenizer; dynamic scaling, as its factor, changes nothing for sequences that fit into the context.
_NOT_COMPARED = ("vocabulary", "context", "rope_factor")
# The modules that the sizes of each part decide about.
_PARTS = {
    "language": ("mllm.language", "mllm.lora"), "vision": ("mllm.vision",), "grounding": ("grounding.image_encoder",),
}  # fmt: skip


def check_order(sources: Sequence[WeightSource]) -> None:
    """Refuse sources of which one would overwrite all that an earlier one gave, unless an entry states it.

    Raises:
        VesselError: with the order, or the entry, to use instead.
    """
    if sources and sources[0].kind.needs_base:
        first = sources[0].entry.source
        if sources[0].kind is RUN and not sources[0].run_config("weights"):
            raise VesselError(
                f"{first}: a run that began with random weights is its own base; export it, and begin with the export: "
                f"vessel.export ckpt={first} out=DIR layout=native dtype=fp32, then weights=[DIR]"
            )
        raise VesselError(
            f"{first}: a {sources[0].kind.name} holds only what trained, so its base must come before it: "
            f"weights=[BASE,{first}]"
        )
    for position, source in enumerate(sources):
        for before in sources[:position] if not source.kind.needs_base else ():
            if before.kind.needs_base or (before.entry.partial and not source.entry.partial):
                raise VesselError(
                    f"weights: {source.entry.source} is a {source.kind.name} and would overwrite the weights of "
                    f"{before.entry.source}, which comes before it; put the base first"
                )
            if not source.entry.partial and (both := _common_modules(source.kind.modules, before.kind.modules)):
                raise VesselError(
                    f"weights: {source.entry.source} is a {source.kind.name} and would overwrite {', '.join(both)} of "
                    f"{before.entry.source}; leave one of them out, or name the modules to take from the later one: "
                    f"{{source: {source.entry.source}, partial: [...]}}"
                )


def check_sizes(source: WeightSource, sizes: NetworkConfig) -> None:
    """Refuse a source whose heads, rotary base and the like, which no tensor shows, differ from the network's.

    Raises:
        VesselError: with both values.
    """
    parts = [part for part, modules in _PARTS.items() if hasattr(sizes, part) and any(map(source.takes, modules))]
    stated: Mapping[str, Any]
    if source.kind is RUN and parts:
        stated = {part: _as_configured(source, part, type(getattr(sizes, part))) for part in parts}
    elif source.kind in (SA2VA, INTERNVL, NATIVE) and set(parts) - {"grounding"}:
        shapes = {name: tuple(tensor.shape) for name, tensor in source.outline().items()}
        assert isinstance(sizes, Sa2VAConfig), "no other network has these parts"
        found = read_sizes(source.config, shapes, grounding=sizes.grounding)
        stated = {part: getattr(found, part) for part in parts if part != "grounding"}
    else:
        return
    for part, theirs in stated.items():
        ours = getattr(sizes, part)
        for name in (entry.name for entry in fields(ours) if entry.name not in _NOT_COMPARED):
            own, stated_value = getattr(ours, name), getattr(theirs, name)
            if _plain(own) != _plain(stated_value):
                raise VesselError(
                    f"{source.entry.source}: model.{part}.{name}={own}, and the source has {stated_value}; choose the "
                    f"model= of the source, or set ++model.{part}.{name}={stated_value}, or name the modules to take: "
                    "{source: ..., partial: [grounding.mask_decoder]}"
                )


def check_adapters(source: WeightSource, lora: Lora, new_tokens: range) -> None:
    """Refuse adapters whose kind, tokens or scale differ from the network's; no tensor shows them.

    Raises:
        VesselError: with the option to choose.
    """
    if not source.takes("mllm.lora"):
        return
    if source.kind is ADAPTER:
        require_plain_lora(source.config, new_tokens, source.path)
    ratio = source.alpha_ratio()
    if ratio is not None and ratio != lora.alpha_ratio:
        raise VesselError(
            f"{source.entry.source}: its adapters were trained with alpha = {ratio:g} r, and the configuration has "
            f"{lora.alpha_ratio:g} r; choose lora.alpha_ratio={ratio:g}"
        )


def require_same_base(recorded: Sequence[Mapping[str, Any]], current: Sequence[LoadReport]) -> None:
    """Refuse a base that differs, in any tensor, from the one that a run was trained on.

    Args:
        recorded: load reports of the run's manifest.
        current: of the same sources, loaded now.

    Raises:
        VesselError: with both fingerprints.
    """
    trained_on = [str(report.get("fingerprint")) for report in recorded]
    found = [report.fingerprint for report in current]
    if trained_on != found:
        raise VesselError(
            f"base {', '.join(report.source for report in current) or 'none'}: its tensors (fingerprint "
            f"{', '.join(found)}) are not those that the run was trained on ({', '.join(trained_on)}); "
            "restore the weights that the run was trained on"
        )


def is_seg_trained(sources: Sequence[WeightSource], names: PublicNames, vocabulary: int) -> bool:
    """Return True if the rows of `[SEG]`, in embedding and head, come from a source that trained them.

    Args:
        sources: in the order of loading.
        names: public names of the network.
        vocabulary: rows of its embedding.
    """
    known = False
    for source in sources:
        outline = source.outline(names)
        tables = [
            any(_has_rows(name, tensor, table, vocabulary) for name, tensor in outline.items())
            for table in (EMBEDDING, HEAD)
        ]
        if source.takes("mllm.tokens") and any(tables):
            known = source.kind.has_trained_seg and (all(tables) or known)
    return known


def _has_rows(name: str, tensor: Tensor, table: str, vocabulary: int) -> bool:
    """Return True for a tensor with rows of added tokens: a whole table, its trained copy, or those rows alone."""
    if not name.startswith(table.removesuffix("weight")):
        return False
    if any(part in name for part in ("lora_", ".base_layer.", ".original_module.")):
        return False
    return tensor.shape[0] == vocabulary or "trainable_tokens" in name


def _common_modules(one: Sequence[str], two: Sequence[str]) -> list[str]:
    return [module for module in one if covers(two, module)]


def _as_configured(source: WeightSource, part: str, sizes: type[Any]) -> Any:
    """Read the configuration of a part of the network that a run trained."""
    try:
        stated = source.run_config("model")[part]
        return sizes(**{name: value for name, value in stated.items() if name != "_target_"})
    except (AttributeError, KeyError, TypeError) as error:
        raise VesselError(
            f"{source.path}: its manifest's config.model.{part} is not that of this version of vessel ({error}); read "
            "it with the version that wrote it"
        ) from error


def _plain(value: Any) -> Any:
    """Turn any sequence into a list, so that a tuple and a list of OmegaConf compare equal."""
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
