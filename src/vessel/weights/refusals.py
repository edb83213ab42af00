"""Refusals of a source, each with the remedy that fits: from the plan of a load, before it is carried out."""

from __future__ import annotations

from vessel.errors import VesselError
from vessel.model.groups import MODULES
from vessel.weights.names import PublicNames
from vessel.weights.report import LoadReport
from vessel.weights.sources import EMBEDDING, HEAD, WeightSource, covers

# Tensors of SAM 2.1 that SAM 2.0 does not have.
_SAM2_1 = ("grounding.no_obj_embed_spatial", "grounding.obj_ptr_tpos_proj")


def require_fit(report: LoadReport, source: WeightSource, names: PublicNames) -> None:
    """Refuse what does not fit; by `partial` and `share` fewer tensors may be there, never more.

    Args:
        report: of what a load would do.
        source: what it would load.
        names: public names of the network.

    Raises:
        VesselError: the source is not exactly what its kind must hold for this network.
    """
    where, partial = f"{source.entry.source} ({source.kind.name})", source.entry.partial
    outline = source.outline(names)
    if any(name.startswith(_SAM2_1) for name in outline):
        raise VesselError(f"{where}: this is SAM 2.1, and Sa2VA is built on SAM 2.0; name sam2_hiera_*.pt of 2.0")
    exact = source.entry.share == 1
    if exact and HEAD in report.all("missing") and source.ties_its_head:
        raise VesselError(
            f"{where}: its language model uses the embedding as head, and Sa2VA has a head of its own. "
            f"weights=[{{source: {source.entry.source}, untie: true}}] begins with a copy of the embedding"
        )
    _require_adapters(report, source, where)
    if EMBEDDING in report.all("unexpected"):
        raise VesselError(
            f"{where}: holds embedding and head themselves, where this network has trained copies or rows beside them; "
            "choose lora.tokens=frozen"
        )
    if report.all("unexpected") or (not partial and (report.all("missing") or report.all("mismatched"))):
        other = "" if partial else ", or name the modules to take: {source: ..., partial: [grounding.mask_decoder]}"
        raise VesselError(
            f"{where}: does not fit this network{_first(report)}. Choose the model= that it was made for{other}"
        )
    _require_share(report, source, where)


def _require_adapters(report: LoadReport, source: WeightSource, where: str) -> None:
    unexpected, mismatched = report.all("unexpected"), report.all("mismatched") if source.entry.share == 1 else []
    if any("lm_head.lora_" in name for name in unexpected):
        raise VesselError(
            f"{where}: holds adapters on the head, as the first public training code made them for InternLM2; vessel "
            "trains the head itself. Merge them with the code that made them, and name the merged folder"
        )
    if any("lora_" in name for name in unexpected + mismatched):
        rank = next(t.shape[0] for n, t in source.outline().items() if "lora_A" in n)
        raise VesselError(
            f"{where}: its adapters of rank {rank} have no place in this network{_first(report)}; choose lora.r={rank}"
        )
    if any("modules_to_save" in name for name in unexpected):
        raise VesselError(f"{where}: holds whole copies of embedding and head; choose lora.tokens=full")


def _require_share(report: LoadReport, source: WeightSource, where: str) -> None:
    wanted = {module.module: module.share for module in report.modules}
    for asked in source.entry.partial:
        below = {module: share for module, share in wanted.items() if covers([asked], module)}
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
    kinds = {"missing": "missing", "unexpected": "unexpected", "mismatched": "of another shape or type"}
    told = [f"{len(names)} {kind} (first: {names[0]})" for what, kind in kinds.items() if (names := report.all(what))]
    return f": {'; '.join(told)}" if told else ""
