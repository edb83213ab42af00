"""The catalog of a prepared data set: frames, phrases and split, checked to belong together."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vessel.errors import VesselError
from vessel.paths import expanded

KIND = "vessel dataset"
VERSION = 1
PARTS = ("train", "val", "test")


@dataclass(frozen=True)
class Frame:
    """One image of the data set.

    Attributes:
        id: unique name, a pseudonym.
        image: path relative to the root, an RGB PNG.
        width: of the image, in pixels.
        height: of the image, in pixels.
        patient: pseudonym of the patient.
        video: pseudonym of the pullback or run, unique over patients.
        frame: number within the video.
        masks: path relative to the root for every phrase of the data set; None declares the phrase absent.
        sha256: of the decoded pixels.
    """

    id: str
    image: str
    width: int
    height: int
    patient: str
    video: str
    frame: int
    masks: Mapping[str, str | None]
    sha256: str


@dataclass(frozen=True)
class Split:
    """The ids of the images of each part: train, val and test, and of each fold.

    Attributes:
        unit: `patient`, `block` or `frame`.
        seed: of the assignment.
        gap: frames left out at each border of two blocks; 0 for the other units.
        note: a warning that every report prints about this split; empty for `patient`.
        parts: frame ids by `train`, `val`, `test`.
        folds: frame ids by `train`, `val` for each fold; the test part belongs to none.
    """

    unit: str
    seed: int
    gap: int
    note: str
    parts: Mapping[str, tuple[str, ...]]
    folds: tuple[Mapping[str, tuple[str, ...]], ...]

    @property
    def hash(self) -> str:
        """Return the SHA-256 of the whole content of the split."""
        return digest(self._content())

    def to_json(self) -> dict[str, Any]:
        """Return the content of splits.json."""
        return {**self._content(), "hash": self.hash}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Split:
        """Read the content of splits.json.

        Raises:
            VesselError: when the content is not what its hash was made of.
        """
        split = cls(
            unit=content["unit"],
            seed=content["seed"],
            gap=content["gap"],
            note=content["note"],
            parts={name: tuple(content[name]) for name in PARTS if name in content},
            folds=tuple({name: tuple(ids) for name, ids in fold.items()} for fold in content["folds"]),
        )
        if split.hash != content["hash"]:
            raise VesselError("splits.json was changed after it was made: its hash differs; prepare the data set again")
        return split

    def _content(self) -> dict[str, Any]:
        listed = {name: list(ids) for name, ids in self.parts.items()}
        folds = [{name: list(ids) for name, ids in fold.items()} for fold in self.folds]
        return {"unit": self.unit, "seed": self.seed, "gap": self.gap, "note": self.note, **listed, "folds": folds}


@dataclass(frozen=True)
class Catalog:
    """A prepared data set whose files have been checked against each other.

    Attributes:
        root: its folder.
        frames: by id.
        phrases: every phrase, sorted.
        split: train, validation and test.
        manifest: the content of manifest.json.
        fingerprint: of images, masks, identities and pixel spacing.
    """

    root: Path
    frames: Mapping[str, Frame]
    phrases: tuple[str, ...]
    split: Split
    manifest: Mapping[str, Any]
    fingerprint: str

    @classmethod
    def open(cls, root: Path) -> Catalog:
        """Read manifest, frames and split, and check that they agree.

        Raises:
            VesselError: when the folder is no prepared data set, was changed by hand, or its split leaks.
        """
        root = expanded(root)
        manifest = _read(root, "manifest.json")
        if not isinstance(manifest, dict) or manifest.get("kind") != KIND:
            raise VesselError(_not_prepared(root, "its manifest.json is of another kind"))
        if manifest.get("version") != VERSION:
            raise VesselError(_not_prepared(root, f"format {manifest.get('version')}, this vessel reads {VERSION}"))
        try:
            frames = [Frame(**record) for record in _read(root, "frames.json")]
            split = Split.from_json(_read(root, "splits.json"))
            phrases, fingerprint = tuple(manifest["phrases"]), str(manifest["fingerprint"])
            expected = (fingerprint_of(frames, manifest["masks_hash"], manifest.get("pixel_spacing")), split.hash)
        except (KeyError, TypeError, AttributeError) as error:
            raise VesselError(_not_prepared(root, f"a file lacks or misnames {error}")) from error
        if expected != (fingerprint, manifest.get("split_hash")):
            raise VesselError(_not_prepared(root, "frames.json, splits.json and manifest.json do not belong together"))
        if leaks := check_split(frames, split):
            raise VesselError(f"{root}: " + "; ".join(leaks))
        return cls(root, {frame.id: frame for frame in frames}, phrases, split, manifest, fingerprint)

    @property
    def pixel_spacing(self) -> tuple[float, float] | None:
        """Return the millimetres per pixel along rows and columns of every image; None when unknown."""
        given = self.manifest.get("pixel_spacing")
        return (given[0], given[1]) if given else None

    def part(self, name: str, fold: int | None = None) -> list[Frame]:
        """List the frames of `train`, `val` or `test`; a fold, counted from 0, has its own train and val.

        Raises:
            VesselError: when there is no such part or fold, naming those there are.
        """
        parts: dict[str, tuple[str, ...]] = dict(self.split.parts)
        if fold is not None:
            if not 0 <= fold < len(self.split.folds):
                folds = f"folds 0 to {len(self.split.folds) - 1}" if self.split.folds else "no folds"
                raise VesselError(f"{self.root}: no fold {fold}; it has {folds}; prepare it with another folds=")
            parts |= self.split.folds[fold]
        if not parts.get(name):
            present = ", ".join(part for part, ids in parts.items() if ids)
            raise VesselError(f"{self.root}: no split {name!r}; it has {present}")
        return [self.frames[frame_id] for frame_id in parts[name]]


def digest(content: Any) -> str:
    """Compute the SHA-256 of the canonical JSON of `content`."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def fingerprint_of(frames: Iterable[Frame], masks_hash: str, pixel_spacing: Sequence[float] | None = None) -> str:
    """Compute the fingerprint of a data set, of its frame records with their image hashes, its masks and pixel spacing.

    Lengths in millimetres are comparable only where the spacing is the same. An unknown one leaves no trace, so that
    data sets made before there was one keep their fingerprint.
    """
    return digest([[asdict(frame) for frame in frames], masks_hash, *([pixel_spacing] if pixel_spacing else [])])


def check_split(frames: Sequence[Frame], split: Split) -> list[str]:
    """List everything that would leak test images into training.

    Returns:
        sentences; none when the split is sound.
    """
    by_id = {frame.id: frame for frame in frames}
    found = [f"{len(frames) - len(by_id)} frame ids occur twice"] if len(by_id) < len(frames) else []
    test = split.parts.get("test", ())
    divisions = [("", split.parts)]
    divisions += [(f"fold {k}: ", {**fold, "test": test}) for k, fold in enumerate(split.folds)]
    for label, parts in divisions:
        if unknown := sorted({frame_id for ids in parts.values() for frame_id in ids} - by_id.keys()):
            found.append(f"{label}the split names unknown frames: {', '.join(unknown[:5])}")
        else:
            overlaps = _overlaps(by_id, parts, whole_patients=split.unit == "patient")
            found += [f"{label}{overlap}" for overlap in overlaps]
        if found:  # the folds of a leaking split would repeat it
            break
    return list(dict.fromkeys(found))


def _overlaps(frames: Mapping[str, Frame], parts: Mapping[str, Sequence[str]], *, whole_patients: bool) -> list[str]:
    first: dict[str, tuple[str, str]] = {}
    found = []
    for part, ids in parts.items():
        for frame in map(frames.__getitem__, ids):
            keys = {f"frame {frame.id}": "", f"images of equal pixels, {frame.sha256}": f" and {frame.id}"}
            if whole_patients:
                keys[f"patient {frame.patient}"] = ""
            for key, second in keys.items():
                other, first_id = first.setdefault(key, (part, frame.id))
                if other != part:
                    named = f"identical images {first_id}{second}" if second else key
                    found.append(f"{named} in both {other} and {part}")
    return found


def _read(root: Path, name: str) -> Any:
    try:
        return json.loads((root / name).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise VesselError(_not_prepared(root, f"it has no {name}")) from error
    except (OSError, ValueError) as error:
        raise VesselError(_not_prepared(root, f"{name} cannot be read ({error})")) from error


def _not_prepared(root: Path, reason: str) -> str:
    return f"{root} is not a prepared data set: {reason}; make one by `python -m vessel.prepare source=... out={root}`"


def slug(phrase: str) -> str:
    """Return the folder name of a phrase."""
    return re.sub(r"[^\w-]+", "_", phrase)
