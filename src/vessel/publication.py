"""An export: merged weights with everything that belongs to them, proved before it is put in place."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from vessel.data.catalog import Catalog
from vessel.data.identity import RawIdentifiers, mapping_folder
from vessel.data.images import read_rgb
from vessel.data.inputs import find_images
from vessel.errors import VesselError
from vessel.model.hub import DTYPES, exported_size, exported_state, public_config, unchanged_groups, write_weights
from vessel.model.plan import local_folder
from vessel.model.weights import combined, digests, read_safetensors
from vessel.proof import compare, drawn_image, masks_in_a_fresh_process, masks_of
from vessel.restore import EXPORT_MANIFEST, Restored, restore
from vessel.run import Manifest, without_places

_SAMPLES = 3
_SPARE_BYTES = 100 * 10**6  # tokenizer, texts, and room for the system to breathe
_KEPT = ("name", "seed", "model", "prompt", "lora", "trainable", "weights", "objective", "optimizer", "data", "trainer")


@dataclass
class Options:
    """The options of the command; conf/export.yaml has the defaults, `--help` the explanations."""

    ckpt: str
    out: str
    dtype: str
    images: str | None
    mapping: str | None

    @property
    def target(self) -> Path:
        """The folder to make, absolute."""
        return Path(self.out).expanduser().absolute()


def export(options: Options) -> Path:
    """Write the folder, prove it, and only then give it its name.

    Returns:
        the folder.

    Raises:
        VesselError: the checkpoint or the place will not do, raw identifiers were found, or the proof failed; nothing
            is left behind.
    """
    console = Console()
    _check(options)
    restored = restore(options.ckpt)
    images = _samples(options, restored)
    size = exported_size(restored.network, DTYPES[options.dtype])
    options.target.parent.mkdir(parents=True, exist_ok=True)
    console.print(f"weights: {size / 1e9:.3f} GB as {options.dtype}")
    free = shutil.disk_usage(options.target.parent).free
    if free < (needed := size + _SPARE_BYTES):
        raise VesselError(
            f"out={options.out}: the export needs {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free; "
            "make room, choose another disk" + (", or dtype=bf16" if options.dtype == "fp32" else "")
        )
    with tempfile.TemporaryDirectory(prefix=f".{options.target.name}.", dir=options.target.parent) as temporary:
        making = Path(temporary) / "new"
        making.mkdir()
        told = [_write(making, restored, options.dtype), _differs_from_base(making, restored, options.dtype)]
        searched = _refuse_raw_identifiers(making, restored, options.mapping)
        threshold = restored.threshold
        del restored  # the comparison needs room for one network at a time
        expected = masks_of(options.ckpt, images)
        found = masks_in_a_fresh_process(making, images)
        told.append(compare(expected, found, threshold=threshold, dtype=options.dtype))
        making.rename(options.target)
    for sentence in told:
        console.print(f"proved: {sentence}", soft_wrap=True, markup=False)
    console.print(f"raw identifiers: {searched}", soft_wrap=True, markup=False)
    console.print(f"export: {options.target}", soft_wrap=True)
    return options.target


def _check(options: Options) -> None:
    if options.dtype not in DTYPES:
        raise VesselError(f"dtype={options.dtype}: choose one of {', '.join(DTYPES)}")
    if options.target.exists():
        raise VesselError(f"out={options.out} exists; an export is never written over anything, choose another folder")
    if options.mapping is not None and not (Path(options.mapping).expanduser() / "mapping.json").is_file():
        raise VesselError(f"mapping={options.mapping} holds no mapping.json; give the folder that prepare named")


def _samples(options: Options, restored: Restored) -> dict[str, NDArray[np.uint8]]:
    """Images that the proof is made on: those asked for, else of the run's validation set, else a drawn one."""
    if options.images is not None:
        chosen = find_images(options.images)[:_SAMPLES]
        return {target.id: read_rgb(target.file) for target in chosen}
    data = restored.manifest.config.get("data") or {}
    try:
        catalog = Catalog.open(Path(data["root"]))
        frames = catalog.part("val", data.get("fold"))[:_SAMPLES]
        return {frame.id: read_rgb(catalog.root / frame.image) for frame in frames}
    except (KeyError, TypeError, VesselError):  # an export knows no root; a run's data set may have moved
        return {"drawn": drawn_image()}


def _write(folder: Path, restored: Restored, dtype: str) -> str:
    """Write all files and read the weights again."""
    in_memory = write_weights(folder, exported_state(restored.network, DTYPES[dtype]))
    on_disk = digests(read_safetensors(folder))
    for name in in_memory.keys() | on_disk.keys():
        if in_memory.get(name) != on_disk.get(name):
            raise VesselError(f"tensor {name} on disk is not the one in memory, nothing was exported; check the disk")
    config = public_config(restored.network, template=restored.prompt.name, views=restored.views, dtype=dtype)
    _write_json(folder / "config.json", config)
    restored.prompt.save(folder)
    manifest = exported_manifest(restored.manifest, fingerprint=combined(on_disk))
    _write_json(folder / EXPORT_MANIFEST, manifest.as_dict())
    (folder / "README.md").write_text(model_card(manifest, dtype), encoding="utf-8")
    return f"{len(on_disk)} tensors read back equal the merged network"


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def exported_manifest(manifest: Manifest, *, fingerprint: str) -> Manifest:
    """The manifest that travels: what the run was, without folders of this machine.

    Args:
        manifest: of the checkpoint.
        fingerprint: of the exported tensors; that of the checkpoint becomes the parent's.
    """
    config = {key: value for key, value in manifest.config.items() if key in _KEPT}
    config["data"] = {key: value for key, value in (config.get("data") or {}).items() if key != "root"}
    return replace(
        manifest,
        config=without_places(config),
        weights=tuple(without_places(list(manifest.weights))),
        parent={"name": manifest.name, "fingerprint": manifest.fingerprint},
        fingerprint=fingerprint,
    )


def _differs_from_base(folder: Path, restored: Restored, dtype: str) -> str:
    sources = restored.manifest.config.get("weights") or []
    if not sources:
        return "no base to differ from: training began with random weights"
    try:
        base = local_folder(sources[-1])
    except VesselError:
        return f"not compared with its base {sources[-1]}, which is not at hand"
    same = unchanged_groups(restored.network, read_safetensors(folder), read_safetensors(base), DTYPES[dtype])
    if same:
        raise VesselError(
            f"{', '.join(same)}: to be trained, yet equal to the base in every tensor. Either the wrong checkpoint was "
            "named or nothing was learnt there; nothing was exported"
        )
    return f"differs from its base {without_places(sources[-1])} in every trained group"


def _refuse_raw_identifiers(folder: Path, restored: Restored, given: str | None) -> str:
    """Search what is public text by the mapping given, else the one beside the data set; says what was searched."""
    root = (restored.manifest.config.get("data") or {}).get("root")
    place = Path(given).expanduser() if given else mapping_folder(Path(root).absolute()) if root else None
    mapping = place if place is not None and (place / "mapping.json").is_file() else None
    scanner = RawIdentifiers(mapping)
    for name in (EXPORT_MANIFEST, "README.md", "config.json"):
        if found := scanner.find((folder / name).read_text(encoding="utf-8")):
            raise VesselError(
                f"{name} would hold what looks like a patient's name or id ({', '.join(found[:3])}); take it out of "
                "the run's name, phrases or options. Nothing was exported"
            )
    if mapping is None:
        return "no mapping beside the data set, only patterns were checked; mapping=DIR names one"
    return f"names checked against {mapping}"


def model_card(manifest: Manifest, dtype: str) -> str:
    """A short README.md, made of nothing but the manifest."""
    data = manifest.data
    counts = ", ".join(f"{data[key]} {key.removeprefix('n_')}" for key in ("n_images", "n_patients") if key in data)
    threshold = "none chosen, 0.5 is taken" if manifest.threshold is None else f"{manifest.threshold:.2f}"
    base = ", ".join(without_places(list(manifest.config.get("weights") or []))) or "none, random weights"
    parent = (manifest.parent or {}).get("fingerprint")
    note = f"{data['note']}\n\n" if data.get("note") else ""
    return f"""---
tags: [image-segmentation, medical, sa2va]
---
# {manifest.name}

A Sa2VA network trained by vessel to segment: {", ".join(manifest.phrases)}.

| | |
|---|---|
| data | {data.get("name")} ({counts}), fingerprint `{str(data.get("fingerprint"))[:16]}` |
| split | by {data.get("unit")}, hash `{str(data.get("split_hash"))[:16]}` |
| base weights | {base} |
| threshold on probabilities | {threshold} |
| weights | {dtype}, fingerprint `{manifest.fingerprint}`, merged from `{parent}` |
| made | {manifest.created} |

{note}Masks: `python -m vessel.predict ckpt=THIS_FOLDER images=FOLDER out=DIR`. The tensors have the names of the public
Sa2VA; to load them with its own code, put that code's `.py` files beside `config.json`.

For research. Nothing here says that it is fit for clinical use.
"""
