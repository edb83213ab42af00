"""Find raw identifiers, names and ids of patients, in texts that are about to leave the machine.

Dashboards, reports, exports with their card, and the hub all use this one scanner.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product
from pathlib import Path

from vessel.data.mapping import MAPPING_FILE, mapping_folder, read_mapping
from vessel.errors import VesselError

# A run of ten digits inside a number, a hash or a time stamp with decimals is no hospital id.
_ID = re.compile(r"(?<![0-9A-Za-z.])\d{10}(?![0-9A-Za-z]|\.\d)")
_BEFORE_CARET = re.compile(r"[^\W\d_]{2,}(?: [^\W\d_]+)*$")
_AFTER_CARET = re.compile(r"[^\W\d_]{2,}")
_CARET_REACH = 100  # characters of a DICOM name before its caret; without a limit long prose takes quadratic time
_HOME = re.compile(r"(?<!\w)(?:/home|/Users|[A-Za-z]:\\Users)[/\\]+[^/\\\s\"'<>:;,)]+")
_WORD = re.compile(r"[^\W_]+")

_SHORTEST_STEM = 6
# Study numbers such as 001 stand in every table, and in a large study any six digits are somebody's.
_SHORTEST_NUMBER = 7
_MOST_PARTS = 5


@dataclass(slots=True)
class _Node:
    """A node of the tree of words that holds the names of a mapping.

    Attributes:
        next: child nodes by the word that follows.
        any_separator: the words up to here are a name, with any separators between them.
        length: the words up to here are a name of this length, with one character between each two of them.
        exact: the spellings in which the words up to here are a file's stem.
    """

    next: dict[str, _Node] = field(default_factory=dict)
    any_separator: bool = False
    length: int | None = None
    exact: set[str] | None = None

    def at(self, words: Iterable[str]) -> _Node:
        """Return the node of these words; make it where there is none."""
        node = self
        for word in words:
            node = node.next.setdefault(word, _Node())
        return node

    def ends(self, text: str) -> bool:
        """Return whether the words up to here, which are written as `text`, are a name or a stem."""
        return self.any_separator or len(text) == self.length or (self.exact is not None and text in self.exact)


class Scanner:
    """A search for names and ids of patients in text that is about to leave the machine.

    Patterns find ten-digit ids, names with a DICOM caret, and home folders, which are named after people. A mapping
    folder adds every patient and file that it knows; one without a mapping adds nothing. The time taken grows with the
    text and hardly with the mapping, as words are looked up in a tree.

    Attributes:
        mapping: the folder whose names are known; None where there are patterns only.
    """

    def __init__(self, mapping: Path | None = None) -> None:
        self.mapping = mapping
        self._names = _Node()
        self._patterns = [_ID, _HOME]
        home = os.path.expanduser("~")
        if len(Path(home).parts) > 2:
            self._patterns.append(re.compile(rf"{re.escape(home)}(?!\w)"))
        if mapping is None:
            return
        kept = read_mapping(mapping)
        for key in kept["patients"]:
            if key.isdecimal() and len(key) >= _SHORTEST_NUMBER:
                self._names.at([key]).any_separator = True
        for name in kept["names"]:
            self._add_name(_plain(name))
        for stem in kept["files"]:
            self._add_stem(_plain(stem))

    @classmethod
    def beside(cls, root: str | Path | None) -> Scanner:
        """Make a scanner that knows the mapping beside this data set, or beside the one it links to, if any."""
        roots = () if root is None else (Path(root).absolute(), Path(root).resolve())
        folders = map(mapping_folder, roots)
        return cls(next((folder for folder in folders if (folder / MAPPING_FILE).is_file()), None))

    def find(self, text: str) -> list[str]:
        """List the raw identifiers in `text`, sorted; none if it may leave. Names of the mapping are in lower case."""
        text = unicodedata.normalize("NFC", text)
        found = {match[0] for pattern in self._patterns for match in pattern.finditer(text)}
        return sorted({*found, *_caret_names(text), *self._known(_plain(text))})

    def require_clean(self, texts: Iterable[tuple[str, str]], *, doing: str) -> int:
        """Refuse to let raw identifiers leave.

        Args:
            texts: for each the source, in words or as a file name, and the text.
            doing: the operation that needs them, such as `the export`.

        Returns:
            number of texts searched.

        Raises:
            VesselError: names the source and the identifiers in it.
        """
        count = 0
        for where, text in texts:
            if found := self.find(text):
                raise VesselError(
                    f"{where} holds what looks like a patient's name or id, or a folder named after a person "
                    f"({', '.join(found[:3])}): {doing} was stopped; take it out of the run's name, phrases or options"
                )
            count += 1
        return count

    def _add_name(self, name: str) -> None:
        """Add a name with its parts joined in any way and in any order; initials only when something joins them."""
        parts = _WORD.findall(name)
        letters = "".join(parts)
        # In bytes: two signs of a Korean or Chinese name identify as much as four Latin letters.
        if not re.search(r"[^\W\d_]", name) or (len(parts) == 1 and len(letters.encode()) < 4):
            return
        if len(letters) <= 4 and len(parts) > 1:
            self._names.at(parts).length = len(letters) + len(parts) - 1
            return
        for turn in range(len(parts)) if len(parts) <= _MOST_PARTS else (0,):
            for words in _joined(parts[turn:] + parts[:turn]):
                self._names.at(words).any_separator = True
                self._names.at(map(_without_accents, words)).any_separator = True

    def _add_stem(self, stem: str) -> None:
        words = list(_WORD.finditer(stem))
        if not words or (end := words[-1].end()) - (start := words[0].start()) < _SHORTEST_STEM:
            return
        node = self._names.at(word[0] for word in words)
        node.exact = (node.exact or set()) | {stem[start:end]}

    def _known(self, text: str) -> Iterator[str]:
        """Yield the names and stems of the mapping in `text`, which is plain."""
        begins = self._names.next.keys() & set(_WORD.findall(text)) if self._names.next else set()
        if not begins:
            return
        for begin in _WORD.finditer(text):
            if begin[0] not in begins:
                continue
            node: _Node | None = self._names
            word: re.Match[str] | None = begin
            while word is not None and node is not None and (node := node.next.get(word[0])) is not None:
                if node.ends(text[begin.start() : word.end()]) and not _in_a_number(text, begin.start(), word.end()):
                    yield text[begin.start() : word.end()]
                word = _WORD.search(text, word.end()) if node.next else None


def _plain(text: str) -> str:
    return (text if text.isascii() else unicodedata.normalize("NFKC", text)).casefold()


def _without_accents(word: str) -> str:
    """Remove accents: `jose` for `josé`; other alphabets stay as they are."""
    letters = unicodedata.normalize("NFD", word)
    return unicodedata.normalize("NFC", "".join(c for c in letters if not "\u0300" <= c <= "\u036f"))


def _joined(parts: Sequence[str]) -> Iterator[list[str]]:
    """Yield the words that these parts make, each two of them joined or apart."""
    if len(parts) > _MOST_PARTS:
        yield from (list(parts), ["".join(parts)])
        return
    for apart in product((False, True), repeat=len(parts) - 1):
        cuts = [0, *(at for at, cut in enumerate(apart, 1) if cut), len(parts)]
        yield ["".join(parts[start:end]) for start, end in pairwise(cuts)]


def _in_a_number(text: str, start: int, end: int) -> bool:
    """Return whether text[start:end] is digits of a decimal number."""
    if not text[start:end].isdecimal():
        return False
    return text[max(start - 1, 0) : start] == "." or re.match(r"\.\d", text[end : end + 2]) is not None


def _caret_names(text: str) -> Iterator[str]:
    """Yield names as DICOM writes them, Family^Given."""
    for caret in re.finditer(r"\^", text):
        before = _BEFORE_CARET.search(text[max(0, caret.start() - _CARET_REACH) : caret.start()])
        after = _AFTER_CARET.match(text, caret.end())
        if before and after:
            yield f"{before[0]}^{after[0]}"
