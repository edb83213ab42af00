"""The folder of an export, file by file: configuration, tensors, tokenizer, manifest, card, public code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vessel.data.prompt import Prompt
from vessel.files import read_json
from vessel.hub import is_hub_name
from vessel.inference.decision import Decision
from vessel.inference.loading import LoadedModel
from vessel.model.lora import adapter_config
from vessel.publishing.card import CardContent, model_card
from vessel.runs.manifest import EXPORT_MANIFEST, LOCAL, Manifest, without_places
from vessel.weights.architecture import public_names
from vessel.weights.entry import Weights
from vessel.weights.export import DTYPES, read_back, write_layout
from vessel.weights.hub_config import REMOTE_CODE, limits_of_public_code, native_config, public_config
from vessel.weights.recognition import open_source

_EVALUATION = "evaluate/test/metrics.json"  # where vessel.evaluate leaves it in a run
_OF_TRANSFORMERS_5 = ("backend", "is_local", "local_files_only")
_KEPT = ("name", "seed", "model", "prompt", "lora", "trainable", "weights", "loss", "optimizer", "data", "trainer")


@dataclass(frozen=True)
class WrittenExport:
    """The files of an export, as written.

    Attributes:
        tensors: their number; read back, each equals the one in memory.
        fingerprint: of the tensors under our names, as a load report of them has it.
    """

    tensors: int
    fingerprint: str


def write_export(folder: Path, model: LoadedModel, *, layout: str, dtype: str, code: Sequence[Path]) -> WrittenExport:
    """Write every file of an export, and read the tensors again.

    Args:
        folder: empty.
        model: what is exported.
        layout: of the tensors.
        dtype: of the tensors.
        code: files of the public code, to be copied.

    Raises:
        VesselError: a tensor on the disk is not the one in memory; names it.
    """
    names, chosen = public_names(model.sa2va_config.language), DTYPES[dtype]
    # Of merged weights the base need not be at hand.
    base = model.base or Weights.listed(model.manifest.config.get("weights"))
    public = [name for entry in base if (name := entry.hub_name) is not None]
    if layout == "adapter":
        first = public[0] if public else None
        base_id, revision = (first.repository, first.revision) if first else (None, None)
        adapter_config(model.sa2va, base=base_id, revision=revision).save_pretrained(str(folder))
    else:
        config = public_config if layout == "sa2va" else native_config
        tokens, template = model.prompt.token_ids, model.prompt.name
        _write_json(folder / "config.json", config(model.sa2va_config, tokens, template=template, dtype=chosen))
    in_memory = write_layout(folder, model.sa2va, names, layout=layout, dtype=chosen)
    fingerprint = read_back(open_source(str(folder)), names, in_memory)
    for file in code:
        shutil.copyfile(file, folder / file.name)
    write_tokenizer(folder, model.prompt)
    decision = model.decision
    searched = None if decision == Decision(model.threshold) else decision.to_json()
    manifest = exported_manifest(replace(model.manifest, decision=searched), fingerprint=fingerprint)
    if model.tuned:  # a public network's own files say everything
        _write_json(folder / EXPORT_MANIFEST, manifest.as_dict())
    remarks = limits_of_public_code(model.sa2va_config) if code else []
    bases = [name.repository for name in public]
    card = model_card(CardContent(manifest, layout, dtype, bases, bool(code), _evaluation(model), remarks))
    (folder / "README.md").write_text(card, encoding="utf-8")
    return WrittenExport(len(in_memory), fingerprint)


def write_tokenizer(folder: Path, prompt: Prompt) -> None:
    """Write a tokenizer so that transformers 4, which the public code runs with, reads it as 5 does."""
    prompt.save(folder)
    file = folder / "tokenizer_config.json"
    config = {key: value for key, value in read_json(file).items() if key not in _OF_TRANSFORMERS_5}
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    _write_json(file, config)


def public_code_files(places: Sequence[Path]) -> list[Path]:
    """The files of the public code in the first of these folders that has them; they are copied, never imported."""
    folder = next((place for place in places if (place / REMOTE_CODE).is_file()), None)
    return [] if folder is None else sorted(folder.glob("*.py"))


def exported_manifest(manifest: Manifest, *, fingerprint: str) -> Manifest:
    """The manifest that travels: what the run was, without folders of this machine.

    Args:
        manifest: of the checkpoint.
        fingerprint: of the exported tensors; that of the checkpoint becomes the parent's.
    """
    config = {key: value for key, value in manifest.config.items() if key in _KEPT}
    config["data"] = {key: value for key, value in (config.get("data") or {}).items() if key != "root"}
    config["weights"] = [_without_place(asdict(entry)) for entry in Weights.listed(config.get("weights"))]
    return replace(
        manifest,
        config=without_places(config),
        weights=tuple(without_places(_without_place(report)) for report in manifest.weights),
        parent={"name": manifest.name, "fingerprint": manifest.fingerprint},
        fingerprint=fingerprint,
    )


def _without_place(source: Mapping[str, Any]) -> dict[str, Any]:
    return {**source, "source": source["source"] if is_hub_name(source["source"]) else LOCAL}


def _evaluation(model: LoadedModel) -> Mapping[str, Any] | None:
    """The report on the test part, if it is about these very weights."""
    if model.run is None or not (file := model.run / _EVALUATION).is_file():
        return None
    report = read_json(file)
    return report if report.get("fingerprint") == model.manifest.fingerprint else None


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
