"""Weights into a network: exact or refused, and told module by module."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vessel.errors import VesselError
from vessel.model.groups import HEADS, MODULES, module_of
from vessel.model.partition import Ranks, put, whole_shape
from vessel.model.weights.digests import combined, digests
from vessel.model.weights.names import PublicNames
from vessel.model.weights.report import LoadReport, ModuleReport
from vessel.model.weights.sources import EMBEDDING, HEAD, RUN, Source

# Tensors of SAM 2.1 that SAM 2.0 does not have.
_SAM2_1 = ("grounding.no_obj_embed_spatial", "grounding.obj_ptr_tpos_proj")


def load(
    network: nn.Module,
    source: Source,
    names: PublicNames,
    *,
    tokens: int,
    keep: Keep | None = None,
    ranks: Ranks | None = None,
) -> LoadReport:
    """Load a source into a network; headers are compared first, so that a refused source changes nothing.

    Tensors of a network without content (meta device) are allocated as they arrive, so that a network and one shard are
    the most that is in memory. Under ZeRO-3 every rank calls this, and keeps its own part of each tensor.

    Args:
        network: whose names are ours.
        source: what to load.
        names: public names of this network.
        tokens: entries of the tokenizer before the five tokens were added.
        keep: dtype in which a tensor is kept, by name and dtype in the source; None keeps that of the source.
        ranks: under ZeRO-3, those that a tensor is partitioned over as it arrives.

    Raises:
        VesselError: the source is not exactly what its kind must hold for this network.
    """
    own: dict[str, Tensor] = dict(network.state_dict(keep_vars=True))
    plan = _compare(own, source, names, tokens)
    report = _report(own, source, plan, fingerprint="")
    _require(report, source)
    seen: dict[str, str] = {}
    with torch.no_grad():
        for name, tensor in source.tensors(names):
            if name not in plan.rows:
                continue
            seen |= digests([(name, tensor)])
            rows = plan.rows[name]
            dtype = keep(name, tensor.dtype) if keep else tensor.dtype
            fresh = put(network, name, tensor if rows is None else tensor[:rows], dtype)
            if ranks is not None and fresh is not None:
                ranks.partition([fresh])
    return _report(own, source, plan, fingerprint=combined(seen))


Keep = Callable[[str, torch.dtype], torch.dtype]


@dataclass
class _Plan:
    """What a load will do: rows to take of each tensor (None: all), and what does not fit."""

    rows: dict[str, int | None]
    unexpected: list[str]
    mismatched: dict[str, str]
    missing: list[str]
    outline: Mapping[str, Tensor]
    left_out: int


def _compare(own: Mapping[str, Tensor], source: Source, names: PublicNames, tokens: int) -> _Plan:
    outline = source.outline(names)
    wanted = {name: tensor for name, tensor in outline.items() if _asked(name, source.entry.partial)}
    rows: dict[str, int | None] = {}
    unexpected, mismatched = [], {}
    for name, tensor in wanted.items():
        if name not in own:
            unexpected.append(name)
        elif whole_shape(own[name]) == tuple(tensor.shape):
            rows[name] = None
        elif source.kind.resizes and name in (EMBEDDING, HEAD) and _grows(tensor, own[name], tokens):
            rows[name] = tokens
        else:
            mismatched[name] = f"{name}: {tuple(tensor.shape)} for {whole_shape(own[name])}"
    missing = [n for n in _expected(own, source, wanted) if n not in rows and n not in mismatched]
    return _Plan(rows, unexpected, mismatched, missing, outline, len(outline) - len(wanted))


def _asked(name: str, modules: Sequence[str]) -> bool:
    module = module_of(name)
    return not modules or any(module == asked or module.startswith(f"{asked}.") for asked in modules)


def _grows(tensor: Tensor, own: Tensor, tokens: int) -> bool:
    """A base vocabulary, padded or not, that lacks the added tokens."""
    return tensor.shape[1:] == whole_shape(own)[1:] and tokens <= tensor.shape[0] and tokens < whole_shape(own)[0]


def _expected(own: Mapping[str, Tensor], source: Source, wanted: Mapping[str, Tensor]) -> Iterator[str]:
    """Tensors of the network that the source must give."""
    if partial := source.entry.partial:
        yield from (name for name in own if _asked(name, partial))
    elif not source.kind.on_top:
        yield from (name for name in own if _asked(name, source.kind.modules))
    else:
        # What trained: modules are whole, except for what lies under an adapter and heads that never train.
        # ZeRO-3 saves SAM2's one buffer with what trained; it does not stand for a whole prompt encoder.
        held = {module_of(name) for name in wanted if not name.endswith("gaussian_matrix")}
        if source.kind is RUN:  # may have trained single tensors of a module; whoever knows the run checks them
            held &= {"mllm.lora"}
        under = (".base_layer.", ".original_module.")
        for name in own:
            if module_of(name) in held and not any(part in name for part in (*under, *HEADS)):
                yield name


def _report(own: Mapping[str, Tensor], source: Source, plan: _Plan, fingerprint: str) -> LoadReport:
    by_module: dict[str, dict[str, list[str]]] = {}
    lists = {
        "loaded": plan.rows, "missing": plan.missing, "unexpected": plan.unexpected, "mismatched": plan.mismatched,
    }  # fmt: skip
    for what, names in lists.items():
        for name in names:
            told = plan.mismatched[name] if what == "mismatched" else name
            by_module.setdefault(module_of(name), {}).setdefault(what, []).append(told)
    order = dict.fromkeys(map(module_of, own)) | dict.fromkeys(by_module)
    modules = []
    for module in (module for module in order if module in by_module):
        found = {what: tuple(by_module[module].get(what, ())) for what in lists}
        have = sum(plan.outline[n].numel() for n in found["loaded"])
        names = (*found["loaded"], *(n for n in (*plan.missing, *plan.mismatched) if module_of(n) == module))
        must = sum(math.prod(whole_shape(own[n])) for n in names)
        dtypes = sorted({str(plan.outline[n].dtype).removeprefix("torch.") for n in found["loaded"]})
        modules.append(ModuleReport(module, elements=(have, must), dtypes=tuple(dtypes), **found))
    grown = next((int(plan.outline[n].shape[0]) for n, rows in plan.rows.items() if rows is not None), None)
    return LoadReport(
        source.entry.source, source.kind.name, source.revision, tuple(modules), plan.left_out, grown, fingerprint
    )


def _require(report: LoadReport, source: Source) -> None:
    """Refuse what does not fit, with the remedy that fits."""
    where = f"{source.entry.source} ({source.kind.name})"
    if source.entry.partial:
        _require_share(report, source, where)
        return
    if report.all("unexpected") and any(name.startswith(_SAM2_1) for name in report.all("unexpected")):
        raise VesselError(f"{where}: this is SAM 2.1, and Sa2VA is built on SAM 2.0; name sam2_hiera_*.pt of 2.0")
    if HEAD in report.all("missing") and source.ties_its_head:
        raise VesselError(
            f"{where}: its language model uses the embedding as head, and Sa2VA has a head of its own. "
            f"weights=[{{source: {source.entry.source}, untie: true}}] begins with a copy of the embedding"
        )
    if any("lm_head.lora_" in name for name in report.all("unexpected")):
        raise VesselError(
            f"{where}: holds adapters on the head, as the first public training code made them for InternLM2; vessel "
            "trains the head itself. Merge them with the code that made them, and name the merged folder"
        )
    if any("lora_" in name for name in report.all("unexpected") + report.all("mismatched")):
        rank = next(t.shape[0] for n, t in source.outline(PublicNames()).items() if "lora_A" in n)
        raise VesselError(
            f"{where}: its adapters of rank {rank} have no place in this network{_first(report)}; choose lora.r={rank}"
        )
    if any("modules_to_save" in name for name in report.all("unexpected")):
        raise VesselError(f"{where}: holds whole copies of embedding and head; choose lora.tokens=full")
    if report.all("missing") or report.all("unexpected") or report.all("mismatched"):
        raise VesselError(
            f"{where}: does not fit this network{_first(report)}. Choose the model= that it was made for, or name the "
            "modules to take: {source: ..., partial: [grounding.mask_decoder]}"
        )


def _require_share(report: LoadReport, source: Source, where: str) -> None:
    wanted = {module.module: module.share for module in report.modules}
    for asked in source.entry.partial:
        below = {m: share for m, share in wanted.items() if m == asked or m.startswith(f"{asked}.")}
        if not below:
            modules = ", ".join(dict.fromkeys(module for module, _ in MODULES))
            raise VesselError(f"{where}: partial={asked} is no module that it holds; modules are {modules}")
        for module, share in below.items():
            if share < source.entry.share:
                raise VesselError(
                    f"{where}: {share:.1%} of the elements of {module} fit, {source.entry.share:.1%} are asked for"
                    f"{_first(report)}"
                )


def _first(report: LoadReport) -> str:
    kinds = {"missing": "missing", "unexpected": "unexpected", "mismatched": "of another shape"}
    told = [f"{len(names)} {kind} (first: {names[0]})" for what, kind in kinds.items() if (names := report.all(what))]
    return f": {'; '.join(told)}" if told else ""
