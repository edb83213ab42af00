"""An export: trained weights with everything that belongs to them, proved before they are put in place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from vessel.data.catalog import Catalog
from vessel.data.images import read_rgb
from vessel.data.inputs import find_images
from vessel.data.mapping import MAPPING_FILE
from vessel.errors import VesselError
from vessel.files import PART, flush, put_in_place, readable, require_space, write_folder
from vessel.inference.loading import LoadedModel, load_model
from vessel.inference.options import LoadSettings, NetworkOptions
from vessel.paths import expanded
from vessel.privacy.scanner import Scanner
from vessel.privacy.texts import texts_of
from vessel.publishing.base_check import compare_with_base
from vessel.publishing.card import HOW_TO_GET_CODE
from vessel.publishing.folder import public_code_files, write_export
from vessel.publishing.upload import check_repository, push
from vessel.publishing.verification import compare_results, network_results, results_of_fresh_process, synthetic_image
from vessel.weights.architecture import public_names
from vessel.weights.export import DTYPES, exported_size, write_pth
from vessel.weights.hub_config import REMOTE_CODE
from vessel.weights.layouts import EXPORT_LAYOUTS

_SAMPLES = 3
_SPARE_BYTES = 100 * 10**6  # tokenizer, texts, and room for the system to breathe


@dataclass
class ExportNetworkOptions:
    """Return the settings that the checkpoint does not hold, as in vessel.predict."""

    base: Any
    grounding: Any

    def load_settings(self) -> LoadSettings:
        """In float32, in which adapters are merged."""
        return NetworkOptions("fp32", None, self.base, self.grounding).load_settings(torch.device("cpu"))


@dataclass
class ExportOptions:
    """The options of the command; conf/export.yaml has the defaults, `--help` the explanations."""

    ckpt: str
    out: str
    layout: str
    dtype: str
    to_pth: bool
    remote_code: str | None
    images: str | None
    mapping: str | None
    push: str | None
    private: bool
    network: ExportNetworkOptions

    @property
    def target(self) -> Path:
        """The folder to make, absolute."""
        return expanded(self.out).absolute()

    @property
    def pth(self) -> Path | None:
        """The file to make beside it, if any."""
        return self.target.with_name(f"{self.target.name}.pth") if self.to_pth else None


def export(options: ExportOptions) -> Path:
    """Write the folder, prove it, and only then give it its name.

    Returns:
        the folder.

    Raises:
        VesselError: the checkpoint or the place will not do, raw identifiers were found, or the proof failed, and
            nothing is left behind; or the hub refused, and the folder stays.
    """
    console = Console()
    _check(options)
    model = load_model(options.ckpt, options.network.load_settings())
    model.require_language("vessel.export")
    if options.layout == "adapter" and "lora" not in model.network.trainable_groups():
        raise VesselError("layout=adapter: this network has no adapters that trained; choose layout=sa2va or native")
    code = _public_code(options, model)
    _require_space(options, model, console)
    images = _samples(options, model)
    expected = network_results(model, images)
    with write_folder(options.target) as folder, _write_pth(options.pth) as pth:
        fingerprint, told = _write(folder, pth, model, options, code)
        searched = _refuse_raw_identifiers(folder, model, options)
        fresh = _load_settings_of_export(model, options)
        threshold = model.decision.threshold
        del model  # the comparison needs room for one network at a time
        found = results_of_fresh_process(folder, images, fresh)
        if found.fingerprint != fingerprint:
            raise VesselError(
                f"a fresh process read other tensors (fingerprint {found.fingerprint}) than were written "
                f"({fingerprint}); something else writes there, nothing was exported"
            )
        told.append(compare_results(expected, found, threshold=threshold, dtype=options.dtype))
    for sentence in told:
        console.print(f"verified: {sentence}", soft_wrap=True, markup=False)
    console.print(f"raw identifiers: {searched}", soft_wrap=True, markup=False)
    if options.pth:
        console.print(f"for the public training code: {options.pth}", soft_wrap=True)
    console.print(f"export: {options.target}", soft_wrap=True)
    if options.push is not None:
        address = push(options.target, options.push, private=options.private, console=console)
        console.print(f"pushed: {address}", soft_wrap=True)
    if options.layout == "sa2va" and not code:
        console.print(f"the public code is not among its files. {HOW_TO_GET_CODE}", soft_wrap=True, markup=False)
    return options.target


def _check(options: ExportOptions) -> None:
    if options.dtype not in DTYPES:
        raise VesselError(f"dtype={options.dtype}: choose one of {', '.join(DTYPES)}")
    if options.layout not in EXPORT_LAYOUTS:
        raise VesselError(f"layout={options.layout}: choose one of {', '.join(EXPORT_LAYOUTS)}")
    for place in (options.target, options.pth):
        if place is not None and place.exists():
            raise VesselError(f"{place} exists; an export is never written over anything, choose another out=")
    if options.mapping is not None and not (expanded(options.mapping) / MAPPING_FILE).is_file():
        raise VesselError(f"mapping={options.mapping} holds no mapping.json; give the folder that prepare named")
    if options.remote_code is not None:
        if options.layout != "sa2va":
            raise VesselError(f"remote_code= goes with layout=sa2va; the public code cannot read {options.layout}")
        if not (expanded(options.remote_code) / REMOTE_CODE).is_file():
            raise VesselError(f"remote_code={options.remote_code} holds no {REMOTE_CODE}; give a public Sa2VA folder")
    if options.push is not None:
        check_repository(options.push)


def _require_space(options: ExportOptions, model: LoadedModel, console: Console) -> None:
    size = exported_size(model.sa2va, options.layout, DTYPES[options.dtype])
    console.print(f"weights: {readable(size)} as {options.dtype}")
    needed = size + _SPARE_BYTES
    if options.pth:
        more = exported_size(model.sa2va, "sa2va", DTYPES[options.dtype])
        console.print(f"{options.pth.name}: {readable(more)}")
        needed += more
    remedy = "choose another disk with out=DIR" + (", or dtype=bf16" if options.dtype == "fp32" else "")
    require_space(options.target.parent, needed, "the files of the export", remedy)


@contextmanager
def _write_pth(path: Path | None) -> Iterator[Path | None]:
    """Yield a hidden file beside `path` to write to, which gets its name at the end; None where none is wanted."""
    if path is None:
        yield None
        return
    part = path.with_name(f".{path.name}{PART}")
    try:
        yield part
        flush(part)
        put_in_place(part, path, part.with_name(f"{part.name}.old"))
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _samples(options: ExportOptions, model: LoadedModel) -> dict[str, NDArray[np.uint8]]:
    """Images that the proof is made on: those asked for, else of the run's validation set, else a synthetic one."""
    if options.images is not None:
        chosen = find_images(options.images)[:_SAMPLES]
        return {target.id: read_rgb(target.file) for target in chosen}
    data = model.manifest.config.get("data") or {}
    try:
        catalog = Catalog.open(Path(data["root"]))
        frames = catalog.part("val", data.get("fold"))[:_SAMPLES]
        return {frame.id: read_rgb(catalog.root / frame.image) for frame in frames}
    except (KeyError, TypeError, VesselError):  # an export knows no root; a run's data set may have moved
        return {"synthetic": synthetic_image()}


def _public_code(options: ExportOptions, model: LoadedModel) -> list[Path]:
    """The files of the folder named, else of what the network was read from."""
    if options.layout != "sa2va":
        return []
    if options.remote_code is not None:
        return public_code_files([expanded(options.remote_code)])
    return public_code_files([model.source, *(entry.fetch()[0] for entry in model.base)])


def _write(
    folder: Path, pth: Path | None, model: LoadedModel, options: ExportOptions, code: Sequence[Path]
) -> tuple[str, list[str]]:
    """Write everything, and compare what lies on the disk with what is in memory and with the base.

    Returns:
        fingerprint of the export, and what was found, in sentences.
    """
    dtype, names = DTYPES[options.dtype], public_names(model.sa2va_config.language)
    written = write_export(folder, model, layout=options.layout, dtype=options.dtype, code=code)
    told = [f"{written.tensors} tensors read back equal the merged network", compare_with_base(model, dtype)]
    if pth is not None:
        count = write_pth(pth, model.sa2va, names, dtype)
        told.append(f"{count} tensors of {options.target.name}.pth read back equal the merged network")
    return written.fingerprint, told


def _load_settings_of_export(model: LoadedModel, options: ExportOptions) -> LoadSettings:
    """Return the settings that the export's own files do not hold."""
    base = model.base if options.layout == "adapter" else ()
    return LoadSettings(base=base, grounding=None if model.tuned else model.sa2va_config.grounding)


def _refuse_raw_identifiers(folder: Path, model: LoadedModel, options: ExportOptions) -> str:
    """Search what is public text by the mapping given, else the one beside the data set; says what was searched."""
    root, given = (model.manifest.config.get("data") or {}).get("root"), options.mapping
    scanner = Scanner(expanded(given)) if given else Scanner.beside(root)
    name = [("the name of the repository", options.push)] if options.push else []
    count = scanner.require_clean([*name, *texts_of(folder)], doing="the export") - len(name)
    if scanner.mapping is None:
        return (
            f"{count} files searched, no mapping beside the data set, only patterns were checked; mapping=DIR names one"
        )
    return f"{count} files searched, names checked against {scanner.mapping}"
