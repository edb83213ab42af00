"""Identities: file names parsed into patient, video and frame, and pseudonyms in their place."""

from __future__ import annotations

import hmac
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vessel.errors import BadItemsError, Problem, VesselError

# The grammars of `identity=auto`; `frame` counts within `video`.
GRAMMARS = (
    re.compile(r"(?P<video>(?P<patient>.+))_frame_(?P<frame>\d+)"),
    re.compile(r"(?P<video>(?P<patient>[^_]+)_\d+)_(?P<frame>\d+)"),
)
HOSPITAL_ID = re.compile(r"(?<!\d)\d{10}(?!\d)")


@dataclass(frozen=True)
class RawIdentity:
    """Patient, video and frame as a file name has them.

    Attributes:
        patient: text that holds the name or the hospital id.
        video: the pullback or run of the patient.
        frame: number within the video; None when the grammar has none.
    """

    patient: str
    video: str
    frame: int | None


@dataclass(frozen=True)
class Identity:
    """Pseudonyms of one image: `patient` p7f3a91c2, `video` p7f3a91c2_v1, and `id` p7f3a91c2_v1_000012."""

    patient: str
    video: str
    frame: int

    @property
    def id(self) -> str:
        """Name of the frame in the data set."""
        return f"{self.video}_{self.frame:06d}"


def compile_grammar(identity: str) -> tuple[re.Pattern[str], ...]:
    """Return the patterns that a whole stem is matched against.

    Args:
        identity: `auto`, or a regular expression with the named group `patient`; `video` and `frame` are optional.

    Raises:
        VesselError: when it is no valid expression or has no group `patient`.
    """
    if identity == "auto":
        return GRAMMARS
    try:
        pattern = re.compile(identity)
    except re.error as error:
        raise VesselError(f"identity={identity}: not a regular expression ({error})") from error
    if "patient" not in pattern.groupindex:
        raise VesselError(
            f"identity={identity}: needs a group (?P<patient>…), and may have (?P<video>…) and (?P<frame>…)"
        )
    return (pattern,)


def parse(stem: str, grammar: Iterable[re.Pattern[str]]) -> RawIdentity | None:
    """Read a file stem by the first grammar that matches all of it; None when none does."""
    stem = unicodedata.normalize("NFC", stem)
    for pattern in grammar:
        if found := pattern.fullmatch(stem):
            groups = found.groupdict()
            frame = groups.get("frame") or ""
            number = int(frame) if frame.isdecimal() else None
            return RawIdentity(found["patient"], groups.get("video") or found["patient"], number)
    return None


def patient_keys(texts: Iterable[str]) -> tuple[dict[str, str], list[Problem]]:
    """Find one key for all spellings of a patient: the hospital id where there is one, else the normalised name.

    A name that occurs with an id in one text stands for that id in a text without.

    Returns:
        key by text, and every name that goes with several ids.
    """
    ids_of: defaultdict[str, set[str]] = defaultdict(set)
    split: dict[str, tuple[str | None, str]] = {}
    for text in texts:
        found = HOSPITAL_ID.search(text)
        name = normal_name(_name_part(text))
        split[text] = (found[0] if found else None, name)
        if found and name:
            ids_of[name].add(found[0])
    keys, problems = {}, []
    for text, (hospital_id, name) in split.items():
        known = sorted(ids_of[name])
        if hospital_id is None and len(known) > 1:
            reason = f"the name goes with {len(known)} hospital ids, so the patient is uncertain"
            problems.append(Problem(text, reason, "put the id into the file name"))
        keys[text] = hospital_id or (known[0] if known else name)
    return keys, problems


def pseudonym(key: str, salt: bytes) -> str:
    """Return `p` and eight hexadecimal digits, from which nobody gets the key back without the salt."""
    return "p" + hmac.new(salt, key.encode(), "sha256").hexdigest()[:8]


@dataclass(frozen=True)
class Pseudonyms:
    """The identities of files, with the names that they replace.

    Attributes:
        identities: one for each file.
        patients: pseudonym by patient key.
        names: spellings of names that occur in the files.
    """

    identities: tuple[Identity, ...]
    patients: Mapping[str, str]
    names: tuple[str, ...]


def pseudonymise(files: Sequence[Path], grammar: Iterable[re.Pattern[str]], salt: bytes) -> Pseudonyms:
    """Give each file its pseudonymous identity in the data set.

    Videos are numbered within a patient, and frames without a number within a video, by file name.

    Raises:
        BadItemsError: listing every file that the grammar does not match, or that has the same identity as another.
    """
    grammar = tuple(grammar)
    parsed = {file: parse(file.stem, grammar) for file in files}
    known = {file: raw for file, raw in parsed.items() if raw is not None}
    if len(known) < len(files):
        remedy = "rename it, or describe how names are built: identity='(?P<patient>…)_(?P<video>…)_(?P<frame>…)'"
        unknown = [file for file in files if file not in known]
        raise BadItemsError(
            "file names", [Problem(str(file), "tells no patient, video and frame", remedy) for file in unknown]
        )
    keys, problems = patient_keys(raw.patient for raw in known.values())
    patients = {key: pseudonym(key, salt) for key in keys.values()}
    if len(set(patients.values())) != len(patients):
        raise VesselError("two patients got the same pseudonym; delete the salt in the mapping folder and run again")
    identities = _identities(known, {text: patients[key] for text, key in keys.items()})
    owners: dict[str, Path] = {}
    for file, identity in zip(known, identities, strict=True):
        first = owners.setdefault(identity.id, file)
        if first != file:
            problems.append(
                Problem(str(file), f"same patient, video and frame as {first.name}", "rename or remove one")
            )
    if problems:
        raise BadItemsError("file names", problems)
    return Pseudonyms(tuple(identities), patients, tuple(sorted({_name_part(text) for text in keys})))


def _identities(known: Mapping[Path, RawIdentity], patients: Mapping[str, str]) -> list[Identity]:
    videos: defaultdict[str, set[str]] = defaultdict(set)
    for raw in known.values():
        videos[patients[raw.patient]].add(raw.video)
    counted: defaultdict[tuple[str, str], int] = defaultdict(int)
    identities = []
    for raw in known.values():
        patient = patients[raw.patient]
        counted[patient, raw.video] += 1
        video = f"{patient}_v{sorted(videos[patient]).index(raw.video) + 1}"
        identities.append(Identity(patient, video, counted[patient, raw.video] if raw.frame is None else raw.frame))
    return identities


def _name_part(text: str) -> str:
    found = HOSPITAL_ID.search(text)
    return (text[: found.start()] if found else text).strip(" _^(")


def normal_name(text: str) -> str:
    """Remove case, spaces, underscores, carets and brackets from a name: equal for every spelling of one patient."""
    return re.sub(r"[\W_]+", "", unicodedata.normalize("NFKC", text).casefold())
