"""`prepare`: a source of images and labels becomes a data set, or nothing is written and every reason is listed."""

from __future__ import annotations

import hashlib
import hmac
import json
import multiprocessing
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from vessel.data.catalog import KIND, VERSION, Catalog, check_split, digest, slug
from vessel.data.identity import Identity, Pseudonyms, compile_grammar, pseudonymise
from vessel.data.images import common_depth
from vessel.data.mapping import MappingFolder, mapping_folder
from vessel.data.overview import tables
from vessel.data.readers.source import SOURCE_LAYOUTS, SourceFolder, read_source
from vessel.data.splits import NOTES, make_split
from vessel.data.writing import Job, Origin, Written, make_folders, spacing_of, write_frame, write_summary
from vessel.errors import BadItemsError, Problem, VesselError
from vessel.hub import HubName, hub_hint, is_hub_name
from vessel.paths import expanded

SYNTHETIC = "synthetic"
# Starting processes takes longer than this many images do.
_SERIAL_BELOW = 40


@dataclass
class Synthetic:
    """The options of `source=synthetic`; conf/prepare.yaml has the defaults."""

    kind: str
    patients: int
    frames: int
    size: int
    seed: int


@dataclass
class PrepareOptions:
    """The options of the command; conf/prepare.yaml has the defaults, `--help` the explanations."""

    source: str
    out: str
    layout: str
    phrase: str
    pixel_spacing: Any
    missing: str
    identity: str
    mapping: str | None
    split: str
    folds: int
    gap: int
    seed: int
    workers: int | str
    overwrite: bool
    synthetic: Synthetic

    @property
    def target(self) -> Path:
        """Folder of the data set, absolute."""
        return expanded(self.out).absolute()

    @property
    def processes(self) -> int:
        """Number of processes that read and write images beside the main one; 0: the main process does it."""
        if self.workers != "auto":
            return int(self.workers)
        cores = os.cpu_count() or 1
        return cores if cores > 1 else 0

    @property
    def identities(self) -> Path:
        """Folder of the mapping, absolute."""
        return expanded(self.mapping).absolute() if self.mapping else mapping_folder(self.target)


def prepare(options: PrepareOptions) -> Catalog:
    """Make the data set that `options` describe, or find that it is there already.

    Raises:
        BadItemsError: listing every image and label that cannot be used; nothing is written then.
        VesselError: when the source, an option, the split or the output path is unusable.
    """
    _check(options)
    console = Console()
    mapping = MappingFolder(options.identities)
    with source_folder(options) as folder:
        source = read_source(folder, layout=options.layout, phrase=options.phrase, missing=options.missing)
        # Synthetic patients need no secret; a fixed salt makes the whole data set a function of its seed.
        salt = b"synthetic" if options.source == SYNTHETIC else mapping.salt()
        fingerprint = _source_fingerprint(source, options, salt)
        if unchanged := _already_there(options, fingerprint):
            console.print(f"already prepared, unchanged: {options.target}", soft_wrap=True)
            return unchanged
        options.target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{options.target.name}.", dir=options.target.parent) as temporary:
            making = Path(temporary) / "new"
            pseudonyms = _make(source, options, salt, making, fingerprint)
            if options.source != SYNTHETIC:
                mapping.write(salt, pseudonyms, [item.image.stem for item in source.items])
            _put_in_place(making, options.target, Path(temporary) / "old")
    catalog = Catalog.open(options.target)
    _report(catalog, options, console)
    return catalog


def _check(options: PrepareOptions) -> None:
    choices = {"layout": ("auto", *SOURCE_LAYOUTS), "missing": ("error", "empty"), "split": tuple(NOTES)}
    for name, allowed in choices.items():
        if (value := getattr(options, name)) not in allowed:
            raise VesselError(f"{name}={value}: choose one of {', '.join(allowed)}")
    for name in ("folds", "gap"):
        if getattr(options, name) < 0:
            raise VesselError(f"{name}={getattr(options, name)}: must be 0 or more")
    if options.workers != "auto" and (not isinstance(options.workers, int) or options.workers < 0):
        raise VesselError(f"workers={options.workers}: must be auto (one process per core), or 0 or more")
    spacing_of(options.pixel_spacing)
    if not slug(options.phrase).strip("_"):
        raise VesselError("phrase=: say what the masks show, such as phrase='blood vessel'")
    out, source = options.target.resolve(), expanded(options.source).resolve()
    if source.is_dir() and options.source != SYNTHETIC and (out.is_relative_to(source) or source.is_relative_to(out)):
        raise VesselError(f"out={options.out} and source={options.source}: neither may be inside the other")
    if options.source != SYNTHETIC:
        MappingFolder(options.identities).check()
    if options.identities.resolve().is_relative_to(out):
        raise VesselError(f"mapping={options.mapping} is inside the data set; names must not travel with it")


@contextmanager
def source_folder(options: PrepareOptions) -> Iterator[Path]:
    """Yield the folder to read: as named, downloaded from the hub, or a synthetic one that is removed at the end."""
    folder = expanded(options.source)
    if options.source == SYNTHETIC:
        from vessel.data.synthetic.source import write_source

        wanted = options.synthetic
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / SYNTHETIC
            write_source(
                folder,
                kind=wanted.kind,
                patients=wanted.patients,
                frames=wanted.frames,
                size=wanted.size,
                seed=wanted.seed,
            )
            yield folder
    elif folder.is_dir():
        yield folder
    elif is_hub_name(options.source):
        yield HubName.parse(options.source).download(repo_type="dataset")[0]
    elif folder.is_file():
        raise VesselError(f"source={options.source} is a file; give the folder that holds images and labels")
    else:
        raise VesselError(f"source={options.source}: no such folder{hub_hint(options.source)}")


def _source_fingerprint(source: SourceFolder, options: PrepareOptions, salt: bytes) -> str:
    """Compute a digest of every pixel, label and option of the data set; it reveals nothing without the salt."""

    def content(path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest()

    items = [
        {
            "stem": item.image.stem,
            "image": content(item.image),
            "labels": {
                phrase: content(label) if isinstance(label, Path) else [[p.points, p.canvas] for p in label]
                for phrase, label in item.labels.items()
            },
        }
        for item in source.items
    ]
    settings = [VERSION, options.identity, options.split, options.folds, options.gap, options.seed]
    settings += spacing_of(options.pixel_spacing) or ()
    return hmac.new(salt, digest([settings, items]).encode(), "sha256").hexdigest()


def _already_there(options: PrepareOptions, fingerprint: str) -> Catalog | None:
    """Open the data set at `out` when it came from the same source by the same options; None when `out` is free."""
    out = options.target
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        manifest = None
    if not isinstance(manifest, dict) or manifest.get("kind") != KIND:
        raise VesselError(f"out={options.out} exists and is no prepared data set; choose another folder")
    if options.overwrite:
        return None
    if manifest.get("source_fingerprint") != fingerprint:
        raise VesselError(
            f"out={options.out} holds a data set of another source, other options, or another mapping folder; "
            "choose another out=, or replace it with overwrite=true"
        )
    return Catalog.open(out)


def _make(source: SourceFolder, options: PrepareOptions, salt: bytes, making: Path, fingerprint: str) -> Pseudonyms:
    """Write the data set into the folder `making`."""
    problems = [*source.problems, *_clashing_folders(source.phrases)]
    files = [item.image for item in source.items]
    pseudonyms = None
    try:
        pseudonyms = pseudonymise(files, compile_grammar(options.identity), salt)
        identities = pseudonyms.identities
    except BadItemsError as error:
        # Continue under numbers: images and labels are checked too, so that all errors are listed at once.
        problems += error.problems
        identities = tuple(Identity("p", "v", number) for number in range(len(files)))
    make_folders(making, source.phrases)
    depth = common_depth(files)  # one for all: frames of one series must keep their relative brightness
    jobs = [Job(item, who, source.phrases, making, depth) for item, who in zip(source.items, identities, strict=True)]
    written: list[Written] = []
    for result in track(_run(jobs, options.processes), "reading and writing", len(jobs), transient=True):
        if isinstance(result, Written):
            written.append(result)
        else:
            problems += result
    if problems or pseudonyms is None:
        raise BadItemsError(f"source={options.source}", problems)
    frames = [each.frame for each in written]
    # Before sorting by pseudonym: the split follows the order of the files, whatever the salt.
    split = make_split(frames, unit=options.split, folds=options.folds, gap=options.gap, seed=options.seed)
    if leaks := check_split(frames, split):
        names = {who.id: file.name for who, file in zip(identities, files, strict=True)}
        told = [re.sub(r"p[0-9a-f]{8}_v\d+_\d{6,}", lambda found: names[found[0]], leak) for leak in leaks]
        remedy = "remove one, or name the files so that both belong to one patient"
        raise BadItemsError("split", [Problem(options.source, leak, remedy) for leak in told])
    written.sort(key=lambda each: each.frame.id)
    origin = Origin(options.target.name, fingerprint, depth, spacing_of(options.pixel_spacing))
    write_summary(making, written, split, origin=origin)
    return pseudonyms


def _clashing_folders(phrases: Iterable[str]) -> list[Problem]:
    owners: dict[str, str] = {}
    return [
        Problem(f"phrase {phrase!r}", f"would share a folder with {owners[slug(phrase)]!r}", "rename one")
        for phrase in phrases
        if owners.setdefault(slug(phrase), phrase) != phrase
    ]


def _run(jobs: list[Job], processes: int) -> Iterator[Written | list[Problem]]:
    if processes == 0 or len(jobs) < _SERIAL_BELOW:
        yield from map(write_frame, jobs)
        return
    # Fresh processes: forking one that shows a progress bar copies a thread's locks.
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(write_frame, jobs, chunksize=4)


def _put_in_place(made: Path, out: Path, aside: Path) -> None:
    """Rename `made` to `out`; what was there goes to `aside`, and comes back when the rename fails."""
    if out.exists():
        shutil.move(out, aside)
    try:
        made.rename(out)
    except OSError:
        if aside.exists():
            aside.rename(out)
        raise


def _report(catalog: Catalog, options: PrepareOptions, console: Console) -> None:
    for table in tables(catalog.manifest["statistics"], catalog.split):
        console.print(table)
    if bits := catalog.manifest.get("grey_bits"):
        console.print(
            f"16-bit grey images: all scaled from {bits} bits, the depth that holds every one", soft_wrap=True
        )
    for warning in catalog.manifest["warnings"]:
        console.print(f"warning: {warning}", style="yellow", soft_wrap=True, markup=False)
    if catalog.split.note:
        console.print(f"note: {catalog.split.note}", style="yellow", soft_wrap=True)
    console.print(f"data set:      {catalog.root}", soft_wrap=True)
    console.print(f"contact sheet: {catalog.root / 'contact_sheet.png'}", soft_wrap=True)
    if options.source != SYNTHETIC:
        console.print(f"mapping:       {options.identities} (names; keep it apart and private)", soft_wrap=True)
        burnt = "names or ids burnt into the pixels stay: nothing searches for them, look at the contact sheet"
        console.print(f"warning: {burnt}", style="yellow", soft_wrap=True)
