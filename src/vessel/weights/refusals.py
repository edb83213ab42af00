"""Refuse a source that does not fit, with the remedy; from the plan of a load, before any tensor is read."""

from __future__ import annotations

from vessel.errors import VesselError
from vessel.model.groups import MODULES
from vessel.weights.names import PublicNames
from vessel.weights.report import LoadReport
from vessel.weights.sources import EMBEDDING, HEAD, WeightSource, covers

# Tensors of SAM 2.1 that SAM 2.0 does not have.
_SAM2_1 = ("grounding.no_obj_embed_spatial", "grounding.obj_ptr_tpos_proj")


def require_fit(report: LoadReport, source: WeightSource, names: PublicNames) -> None:
    """Refuse a source that does not fit; with `partial` and `share` it may lack tensors, never hold more.

    Args:
        report: of the planned load.
        source: to load.
        names: public names of the network.

    Raises:
        VesselError: the source does not hold exactly the tensors that its kind must for this network.
    """
    where, partial = f"{source.entry.source} ({source.kind.name})", source.entry.partial
    outline = source.outline(names)
    if any(name.startswith(_SAM2_1) for name in outline):
        raise VesselError(f"{where}: this is SAM 2.1, and Sa2VA is built on SAM 2.0; name sam2_hiera_*.pt of 2.0")
    exact = source.entry.share == 1
    if exact and HEAD in report.names("missing") and source.has_tied_head:
        raise VesselError(
            f"{where}: its language model uses the embedding as head, and Sa2VA has a head of its own. "
            f"weights=[{{source: {source.entry.source}, untie: true}}] begins with a copy of the embedding"
        )
    _require_adapters(report, source, where)
    if EMBEDDING in report.names("unexpected"):
        raise VesselError(
            f"{where}: holds embedding and head themselves, where this network has trained copies or rows beside them; "
            "choose lora.tokens=frozen"
        )
    if report.names("unexpected") or (not partial and (report.names("missing") or report.names("mismatched"))):
        other = "" if partial else ", or name the modules to take: {source: ..., partial: [grounding.mask_decoder]}"
        raise VesselError(
            f"{where}: does not fit this network{_first(report)}. Choose the model= that it was made for{other}"
        )
    _require_share(report, source, where)


def _require_adapters(report: LoadReport, source: WeightSource, where: str) -> None:
    unexpected, mismatched = report.names("unexpected"), report.names("mismatched") if source.entry.share == 1 else []
    if any("lm_head.lora_" in name for name in unexpected):
        raise VesselError(
            f"{where}: holds adapters on the head, as the first public training code made them for InternLM2; vessel "
            "trains the head itself. Merge them with the code that made them, and name the merged folder"
        )
    if any("lora_" in name for name in unexpected + mismatched):
        rank = next(t.shape[0] for n, t in source.outline().items() if "lora_A" in n)
        raise VesselError(
            f"{where}: its adapters of rank {rank} do not fit this network{_first(report)}; choose lora.r={rank}"
        )
    if any("modules_to_save" in name for name in unexpected):
        raise VesselError(f"{where}: holds whole copies of embedding and head; choose lora.tokens=full")


def _require_share(report: LoadReport, source: WeightSource, where: str) -> None:
    fractions = {module.module: module.fraction for module in report.modules}
    for name in source.entry.partial:
        inside = {module: fraction for module, fraction in fractions.items() if covers([name], module)}
        if not inside:
            modules = ", ".join(dict.fromkeys(module for module, _ in MODULES))
            raise VesselError(f"{where}: partial={name} is no module that it holds; modules are {modules}")
        for module, fraction in inside.items():
            if fraction < source.entry.share:
                raise VesselError(
                    f"{where}: {fraction:.1%} of the elements of {module} fit, share={source.entry.share:g} requires "
                    f"{source.entry.share:.1%}{_first(report)}"
                )


def _first(report: LoadReport) -> str:
    kinds = {"missing": "missing", "unexpected": "unexpected", "mismatched": "of another shape or type"}
    counts = [
        f"{len(names)} {kind} (first: {names[0]})" for what, kind in kinds.items() if (names := report.names(what))
    ]
    return f": {'; '.join(counts)}" if counts else ""
