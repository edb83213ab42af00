"""Read the texts of a file that may hold names: plain text, JSON, metadata of pictures."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from vessel.errors import VesselError

_PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp")
# The vocabulary of a tokenizer: words of everybody's text, many of which are names.
_VOCABULARIES = ("vocab.json", "merges.txt")
_EMBEDDED = re.compile(r"[\"'(]data:[\w/+.-]+;base64,[A-Za-z0-9+/=\s]*+[\"')]")
_SVG_ID = re.compile(r"\bC[0-9a-f]+_[0-9a-f]+_[0-9a-f]{10}\b")  # matplotlib's, of a hash that may be all digits


def texts_of(folder: Path) -> Iterator[tuple[str, str]]:
    """Read the texts of the files of a folder: the name of each, and its text where it has one.

    Left out are tensors, a tokenizer's own vocabulary (its added tokens are not), numbers in JSON, which are counts and
    scores, and pictures embedded in a page. Of pictures it is the text that their files carry.
    """
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        name = file.relative_to(folder).as_posix()
        yield name, f"{name}\n{text_of(file)}"


def text_of(file: Path) -> str:
    """Read the text of one file, as `texts_of` does."""
    suffix = file.suffix.lower()
    if suffix == ".safetensors" or file.name in _VOCABULARIES:
        return ""
    if suffix in _PICTURES:
        return _picture_text(file)
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:  # such as a SentencePiece model
        return ""
    if suffix == ".json":
        return _json_text(text, file.name)
    if suffix in (".html", ".svg"):
        return _SVG_ID.sub("", html.unescape(_EMBEDDED.sub("", text)))
    if suffix == ".md":
        return re.sub(r"\\([\W_])", r"\1", html.unescape(text))
    return text


def _json_text(text: str, name: str) -> str:
    try:
        content = json.loads(text)
    except ValueError:
        return text
    if name == "tokenizer.json":
        content.pop("model", None)
    return "\n".join(_strings(content))


def _strings(value: Any) -> Iterator[str]:
    """Yield every key and every text of plain values."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield key
            yield from _strings(part)
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)
    elif isinstance(value, str):
        yield value


def _picture_text(file: Path) -> str:
    """Read comments, text chunks, XMP, EXIF and any other text of a picture."""
    try:
        with Image.open(file) as picture:
            picture.load()  # text may follow the pixels
            metadata = [*picture.info.items(), *picture.getexif().items()]
    except (OSError, ValueError, SyntaxError) as error:
        raise VesselError(f"{file.name} is no whole picture ({type(error).__name__}); make it again") from error
    parts = (part for pair in metadata for part in pair)
    return "\n".join(part.decode("latin-1") if isinstance(part, bytes) else str(part) for part in parts)
