"""The blocks of a page. HTML and Markdown are rendered from the same blocks, so their numbers cannot differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Number:
    """A number of a results file: rounded for the reader, with its exact value."""

    text: str
    value: float


Prose = tuple[str | Number, ...]


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        main: its content.
        under: a smaller second line.
        note: number of the table's note about it; 0 for none.
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
        caption: above the table.
        mark: a warning about every number in it, such as a split that is not by patient.
        notes: numbered from 1.
        left_aligned: for cells of words; numbers are set from the right.
    """

    kind: ClassVar[str] = "table"
    caption: str
    head: Sequence[Cell]
    rows: Sequence[Sequence[Cell]]
    mark: str = ""
    notes: Sequence[str] = ()
    left_aligned: bool = False


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
    """Preformatted text."""

    kind: ClassVar[str] = "code"
    text: str


@dataclass(frozen=True)
class FigureRow:
    """Figures that stand side by side where there is room."""

    kind: ClassVar[str] = "figure row"
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Details:
    """A part of a page that is folded until the reader opens it."""

    kind: ClassVar[str] = "details"
    title: str
    blocks: Sequence[Block]


Block = Table | Drawing | Picture | Text | Code | FigureRow | Details


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
        facts: labels with their values, for the strip under the lead.
        warnings: shown before the numbers.
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
    """Make a cell of one text or number."""
    return Cell((text if isinstance(text, Number) else str(text),), **more)  # type: ignore[arg-type]


def facts_table(caption: str, facts: Sequence[tuple[str, str]]) -> Table:
    """Make a table of labels and values; rows without a value are left out."""
    rows = [(cell(label), cell(value)) for label, value in facts if value]
    return Table(caption, (), rows, left_aligned=True)


def drawings(blocks: Sequence[Block]) -> list[Drawing]:
    """Collect all drawings among the blocks, at any depth."""
    found: list[Drawing] = []
    for block in blocks:
        if isinstance(block, Drawing):
            found.append(block)
        elif isinstance(block, FigureRow | Details):
            found += drawings(block.blocks)
    return found
