"""Load weights into a network: exactly or not at all, with a report by module."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vessel.errors import VesselError
from vessel.model.groups import HEADS, module_of
from vessel.weights.digests import combine_digests, digests
from vessel.weights.kinds import RUN
from vessel.weights.names import PublicNames
from vessel.weights.partition import ZeroRanks, assign, full_shape
from vessel.weights.refusals import require_fit
from vessel.weights.report import LoadReport, ModuleReport
from vessel.weights.sources import EMBEDDING, HEAD, WeightSource, covers


def load(
    network: nn.Module,
    source: WeightSource,
    names: PublicNames,
    *,
    tokens: int,
    choose_dtype: ChooseDtype | None = None,
    ranks: ZeroRanks | None = None,
) -> LoadReport:
    """Load a source into a network; headers are compared first, so that a source that does not fit changes nothing.

    Tensors of a network without content (meta device) are allocated as they arrive, so that a network and one shard are
    the most that is in memory. Under ZeRO-3 every rank calls this, and keeps its own part of each tensor.

    Args:
        network: with our names.
        source: to load.
        names: public names of this network.
        tokens: entries of the tokenizer before the five tokens were added.
        choose_dtype: returns the dtype in memory of a tensor, given name and dtype in the source; None for that of the
            source.
        ranks: under ZeRO-3, those that a tensor is partitioned over as it arrives.

    Raises:
        VesselError: the source does not hold exactly the tensors that its kind must for this network, or, found while
            loading, holds a number that is not finite or a head that its own configuration excludes.
    """
    own: dict[str, Tensor] = dict(network.state_dict(keep_vars=True))
    plan = _compare(own, source, names, tokens)
    report = _report(own, source, plan, fingerprint="")
    require_fit(report, source, names)
    found: dict[str, str] = {}
    tables: set[str] = set()
    with torch.no_grad():
        for name, tensor in source.tensors(names):
            if name not in plan.rows:
                continue
            rows = plan.rows[name]
            taken = tensor if rows is None else tensor[:rows]
            _require_finite(source, name, taken)
            if source.requires_tied_head and name in (EMBEDDING, HEAD):
                tables |= set(digests([("table", tensor)]).values())
                _require_one_table(source, tables)
            found |= digests([(name, tensor)])
            dtype = choose_dtype(name, tensor.dtype) if choose_dtype else tensor.dtype
            fresh = assign(network, name, taken, dtype)
            if ranks is not None and fresh is not None:
                ranks.partition([fresh])
            del taken  # a view would hold its shard in memory
    return _report(own, source, plan, fingerprint=combine_digests(found))


ChooseDtype = Callable[[str, torch.dtype], torch.dtype]


@dataclass
class _Plan:
    """The plan of a load: rows to take of each tensor (None: all), and tensors that do not fit."""

    rows: dict[str, int | None]
    unexpected: list[str]
    mismatched: dict[str, str]
    missing: list[str]
    outline: Mapping[str, Tensor]
    left_out: int


def _compare(own: Mapping[str, Tensor], source: WeightSource, names: PublicNames, tokens: int) -> _Plan:
    outline = source.outline(names)
    wanted = {name: tensor for name, tensor in outline.items() if source.takes(module_of(name))}
    rows: dict[str, int | None] = {}
    unexpected, mismatched = [], {}
    for name, tensor in wanted.items():
        if name not in own:
            unexpected.append(name)
        elif own[name].is_floating_point() != tensor.is_floating_point():
            mismatched[name] = f"{name}: {tensor.dtype} for {own[name].dtype}"
        elif full_shape(own[name]) == tuple(tensor.shape):
            rows[name] = None
        elif source.kind.resizes and name in (EMBEDDING, HEAD) and _lacks_only_added_tokens(tensor, own[name], tokens):
            rows[name] = tokens
        else:
            mismatched[name] = f"{name}: {tuple(tensor.shape)} for {full_shape(own[name])}"
    missing = [n for n in _required_tensors(own, source, wanted) if n not in rows and n not in mismatched]
    return _Plan(rows, unexpected, mismatched, missing, outline, len(outline) - len(wanted))


def _lacks_only_added_tokens(tensor: Tensor, own: Tensor, tokens: int) -> bool:
    """Return True for a base vocabulary, padded or not, that lacks the added tokens."""
    return tensor.shape[1:] == full_shape(own)[1:] and tokens <= tensor.shape[0] and tokens < full_shape(own)[0]


def _required_tensors(own: Mapping[str, Tensor], source: WeightSource, wanted: Mapping[str, Tensor]) -> Iterator[str]:
    """Yield the tensors of the network that the source must give."""
    if source.kind.needs_base:
        # Parameters that trained: modules are complete, but for base layers of adapters and heads that never train.
        if source.entry.partial:
            held = {module for name in own if source.takes(module := module_of(name))}
        else:
            # ZeRO-3 saves SAM2's one buffer with the trained parameters; it does not stand for a whole prompt encoder.
            held = {module_of(name) for name in wanted if not name.endswith("gaussian_matrix")}
            if source.kind is RUN:  # may have trained single tensors of a module; inference.loading checks them
                held &= {"mllm.lora"}
        skipped = (".base_layer.", ".original_module.", *HEADS)
        yield from (name for name in own if module_of(name) in held and not any(part in name for part in skipped))
    elif source.entry.partial:
        yield from (name for name in own if source.takes(module_of(name)))
    else:
        yield from (name for name in own if covers(source.kind.modules, module_of(name)))


def _report(own: Mapping[str, Tensor], source: WeightSource, plan: _Plan, fingerprint: str) -> LoadReport:
    by_module: dict[str, dict[str, list[str]]] = {}
    lists = {
        "loaded": plan.rows, "missing": plan.missing, "unexpected": plan.unexpected, "mismatched": plan.mismatched,
    }  # fmt: skip
    for what, names in lists.items():
        for name in names:
            entry = plan.mismatched[name] if what == "mismatched" else name
            by_module.setdefault(module_of(name), {}).setdefault(what, []).append(entry)
    order = dict.fromkeys(map(module_of, own)) | dict.fromkeys(by_module)
    modules = []
    for module in (module for module in order if module in by_module):
        found = {what: tuple(by_module[module].get(what, ())) for what in lists}
        loaded = sum(plan.outline[n].numel() for n in found["loaded"])
        names = (*found["loaded"], *(n for n in (*plan.missing, *plan.mismatched) if module_of(n) == module))
        required = sum(math.prod(full_shape(own[n])) for n in names)
        dtypes = sorted({str(plan.outline[n].dtype).removeprefix("torch.") for n in found["loaded"]})
        modules.append(ModuleReport(module, elements=(loaded, required), dtypes=tuple(dtypes), **found))
    grown = next((int(plan.outline[n].shape[0]) for n, rows in plan.rows.items() if rows is not None), None)
    return LoadReport(
        source.entry.source, source.kind.name, source.revision, tuple(modules), plan.left_out, grown, fingerprint
    )


def _require_finite(source: WeightSource, name: str, tensor: Tensor) -> None:
    if tensor.is_floating_point() and tensor.numel():
        # The extremes carry a NaN with them, and need no second tensor of that size.
        low, high = tensor.aminmax()
        if not (low.isfinite() and high.isfinite()):
            raise VesselError(
                f"{source.entry.source} ({source.kind.name}): {name} holds NaN or infinite numbers; its training "
                "diverged or the file is damaged: take another"
            )


def _require_one_table(source: WeightSource, tables: Collection[str]) -> None:
    if len(tables) > 1:
        raise VesselError(
            f"{source.entry.source} ({source.kind.name}): config.json states that the embedding is the head "
            "(tie_word_embeddings), and the file holds a head that differs from it. untie: true takes a copy of the "
            f"embedding, as the public code would; partial: [{', '.join(source.kind.modules)}] takes the file's head"
        )
