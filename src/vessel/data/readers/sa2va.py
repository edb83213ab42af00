"""Layout `annotations`: `annotations.json` of Sa2VA, in its three shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vessel.data.phrases import normal_phrase
from vessel.data.readers.layout import Labels, SourceLayout, SourcePaths, image_key
from vessel.data.readers.polygons import PhrasePolygons, parse_polygon, read_annotations, read_canvas
from vessel.errors import Problem, VesselError

FILE = "annotations.json"
# A human turn of a conversation that requests a mask, with the phrase of the mask.
_QUESTION = re.compile(
    r"(?:segment|highlight|outline|masks? (?:for|of)|(?:what|where) (?:is|are))\s+(?:(?:the|a|an|all)\s+)*"
    r"(?P<phrase>.+?)(?:\s+(?:in|on|from|of)\s+(?:this|the)\s+(?:image|picture|frame)\b.*)?[\s.?!]*$",
    re.IGNORECASE | re.DOTALL,
)


def read_sa2va(file: Path) -> tuple[dict[str, PhrasePolygons], list[Problem]]:
    """Read `annotations.json`: nested polygons, the flat variant, or `segmentation` with `conversations`.

    Every polygon of one phrase belongs to one object; several entries of one image are put together.

    Returns:
        polygons by image file name, and every entry that could not be read.
    """
    entries = read_annotations(file)
    if not isinstance(entries, list):
        return {}, [Problem(str(file), "is not a list of entries", "write a list of {image, mask, text}")]
    by_image: dict[str, PhrasePolygons] = {}
    problems = []
    for index, entry in enumerate(entries):
        where = f"{file}, entry {index}"
        try:
            name, polygons = _entry(entry, where)
        except VesselError as error:
            problems.append(error.args[0])
            # It is annotated, if badly: one message about it is enough.
            if isinstance(entry, dict) and isinstance(entry.get("image"), str):
                by_image.setdefault(entry["image"], {})
            continue
        known = by_image.setdefault(name, {})
        for phrase, of_phrase in polygons.items():
            known[phrase] = (*known.get(phrase, ()), *of_phrase)
    return by_image, problems


def _entry(entry: Any, where: str) -> tuple[str, PhrasePolygons]:
    if not isinstance(entry, dict) or not isinstance(entry.get("image"), str):
        raise VesselError(Problem(where, "has no text `image`", "write {image, mask, text}"))
    where = f"{where} ({entry['image']})"
    objects = entry.get("mask")
    if not isinstance(objects, list):
        raise VesselError(Problem(where, "has no list `mask`", "write a list; [] with text [] declares an empty image"))
    grouped = [_polygons_of(item, f"{where}, mask {index}") for index, item in enumerate(objects)]
    phrases = _phrases(entry, where)
    if len(phrases) == 1 and grouped:
        phrases = phrases * len(grouped)
    if len(phrases) != len(grouped):
        reason = f"{len(grouped)} masks and {len(phrases)} phrases"
        raise VesselError(Problem(where, reason, "give one phrase for all masks, or one phrase a mask"))
    canvas = read_canvas(entry, "height", "width")
    polygons: PhrasePolygons = {}
    for mask, (phrase, pieces) in enumerate(zip(phrases, grouped, strict=True)):
        for index, piece in enumerate(pieces):
            polygon = parse_polygon(piece, f"{where}, mask {mask}, polygon {index}", canvas)
            polygons[phrase] = (*polygons.get(phrase, ()), polygon)
    return entry["image"], polygons


def _polygons_of(item: Any, where: str) -> list[Any]:
    """Return the polygons of one object in any of the three shapes of an entry."""
    if isinstance(item, dict):
        item = item.get("segmentation")
    if not isinstance(item, list) or not item:
        raise VesselError(Problem(where, "holds no polygon", "give flat lists of x, y; run-length codes are not read"))
    return item if all(isinstance(piece, list) for piece in item) else [item]


def _phrases(entry: Mapping[str, Any], where: str) -> list[str]:
    text = entry.get("text")
    if text is None and isinstance(entry.get("conversations"), list):
        text = [_phrase_of(turn, where) for turn in entry["conversations"] if _is_human(turn)]
    # A string is one phrase; iterating it would make a phrase of each letter.
    texts = [text] if isinstance(text, str) else text
    if not isinstance(texts, list) or not all(isinstance(t, str) and normal_phrase(t) for t in texts):
        reason = "`text` is not a list of phrases"
        raise VesselError(Problem(where, reason, "write one phrase for all masks, or one phrase a mask"))
    return [normal_phrase(t) for t in texts]


def _is_human(turn: Any) -> bool:
    return isinstance(turn, dict) and turn.get("from") in {"human", "user"}


def _phrase_of(turn: Mapping[str, Any], where: str) -> str:
    question = str(turn.get("value", "")).replace("<image>", " ")
    found = _QUESTION.search(question.strip())
    if not found:
        reason = f"no phrase found in the question {question.strip()[:80]!r}"
        raise VesselError(Problem(where, reason, "add `text: [phrase]` to the entry"))
    return found["phrase"]


def _is_present(paths: SourcePaths) -> bool:
    return (paths.folder / FILE).is_file()


def _read(paths: SourcePaths, _: str) -> tuple[Labels, list[Problem]]:
    by_image, problems = read_sa2va(paths.folder / FILE)
    return {image_key(Path(name).stem): dict(polygons) for name, polygons in by_image.items()}, problems


LAYOUT = SourceLayout("annotations.json in the Sa2VA form", _is_present, _read)
