"""The blocks of a page. HTML and Markdown are two writings of the same blocks, so their numbers cannot differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Number:
    """A number of a results file: rounded to be read, and exact for whoever checks it."""

    text: str
    value: float


Prose = tuple[str | Number, ...]


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        main: what it says.
        under: a smaller second line.
        note: number of the table's note that belongs to it; 0 for none.
        tone: "", "good", "bad" or "quiet".
    """

    main: Prose = ()
    under: Prose = ()
    note: int = 0
    tone: str = ""


@dataclass(frozen=True)
class Table:
    """Rows under a head; the first cell of a row names it.

    Attributes:
        caption: what it shows.
        mark: a warning that belongs to every number in it, such as a split that is not by patient.
        notes: numbered from 1.
        wording: its cells are words, to be set from the left.
    """

    kind: ClassVar[str] = "table"
    caption: str
    head: Sequence[Cell]
    rows: Sequence[Sequence[Cell]]
    mark: str = ""
    notes: Sequence[str] = ()
    wording: bool = False


@dataclass(frozen=True)
class Drawing:
    """A figure that was drawn for the page: `svg` in light colours, written to `figures/<name>.svg` for Markdown."""

    kind: ClassVar[str] = "drawing"
    name: str
    svg: str
    alt: str
    caption: str
    mark: str = ""


@dataclass(frozen=True)
class Picture:
    """A PNG of the results folder, named relative to it."""

    kind: ClassVar[str] = "picture"
    file: str
    png: bytes
    alt: str
    caption: str


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    prose: Prose


@dataclass(frozen=True)
class Code:
    """Text to be shown as it is."""

    kind: ClassVar[str] = "code"
    text: str


@dataclass(frozen=True)
class Group:
    """Figures that stand side by side where there is room."""

    kind: ClassVar[str] = "group"
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Fold:
    """A part of a page that is folded until a reader opens it."""

    kind: ClassVar[str] = "fold"
    title: str
    blocks: Sequence[Block]


Block = Table | Drawing | Picture | Text | Code | Group | Fold


@dataclass(frozen=True)
class Section:
    """A part of a page with its heading; `anchor` is its address."""

    anchor: str
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """A whole page.

    Attributes:
        kicker: small line above the title.
        title: of the page.
        lead: the result in one or two sentences.
        facts: a label and what it says, for the strip under the lead.
        warnings: what a reader has to know before the numbers.
        sections: in order.
        foot: last line.
    """

    kicker: str
    title: str
    lead: Prose
    facts: Sequence[tuple[str, Prose]]
    warnings: Sequence[str]
    sections: Sequence[Section]
    foot: str


def cell(text: object, **more: object) -> Cell:
    """A cell that says one thing."""
    return Cell((text if isinstance(text, Number) else str(text),), **more)  # type: ignore[arg-type]


def facts_table(caption: str, facts: Sequence[tuple[str, str]]) -> Table:
    """A label and its value a row; rows without a value are left out."""
    rows = [(cell(label), cell(value)) for label, value in facts if value]
    return Table(caption, (), rows, wording=True)


def drawings(blocks: Sequence[Block]) -> list[Drawing]:
    """All drawings among the blocks, however deep."""
    found: list[Drawing] = []
    for block in blocks:
        if isinstance(block, Drawing):
            found.append(block)
        elif isinstance(block, Group | Fold):
            found += drawings(block.blocks)
    return found
