"""A report as a list of blocks, written as Markdown and as one HTML file."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from skillsd.analysis import syntax

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:75rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .7rem;border-bottom:1px solid #ddd;text-align:right}th{border-bottom:2px solid #888}
.name{text-align:left}img{max-width:100%}.wide{overflow-x:auto}"""
_MARKS = re.compile(r"[&<>`*|\\~$]|\](?=\()|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\.", re.IGNORECASE)
"""What begins code, emphasis, a link, a table's cell, mathematics or HTML; a bracket alone or an underscore inside a word does not."""


@dataclass(frozen=True)
class Heading:
    """A title of the report (level 1) or of a part (level 2, 3)."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Picture:
    """A figure.

    Attributes:
        name: Its file beside the Markdown.
        alt: What it shows.
        png: The file's content.
        svg: Instead of it in the HTML, an SVG element; "" takes the PNG.
    """

    name: str
    alt: str
    png: bytes
    svg: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of text.

    Attributes:
        header: Of each column.
        rows: A text a column.
        names: Leading columns that are text; the others are numbers.
    """

    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    names: int = 1


@dataclass(frozen=True)
class Code:
    """Text whose lines and spaces count.

    Attributes:
        text: The text.
        language: One that pygments colours; "" for none.
        folded: In the HTML, the words under which it is folded away; "" shows it.
    """

    text: str
    language: str = ""
    folded: str = ""


@dataclass(frozen=True)
class Cards:
    """Groups of blocks, side by side where there is room; in Markdown one after the other.

    Attributes:
        cards: The groups.
        size: Of a card: small, medium or large.
    """

    cards: Sequence[Sequence[Block]]
    size: str = "small"


Block = Heading | Picture | Table | Code | Cards | list[str] | str
"""A list is one of bullets; a str is a paragraph."""


def entities(text: str) -> str:
    """`text` in one line that Markdown shows as it is, behind another word: what would be taken for markup becomes a numeric entity."""
    return _MARKS.sub(lambda m: f"&#{ord(m[0])};", " ".join(text.split()))


def fenced(code: Code) -> str:
    """A Markdown block whose fence is longer than any run of backticks in it."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", code.text)), default=0))
    return f"{fence}{code.language if code.language.isalnum() else ''}\n{code.text}\n{fence}"


def data_uri(png: bytes) -> str:
    """A picture file as an address that holds it."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def markdown(report: Sequence[Block], safe: Callable[[str], str] = str) -> str:
    """The report as Markdown.

    Args:
        report: Its blocks.
        safe: Applied to every text outside of code; `entities` where somebody else has written some of them.
    """
    return "\n\n".join(_markdown(b, safe) for b in report) + "\n"


def _markdown(b: Block, safe: Callable[[str], str]) -> str:
    match b:
        case Heading():
            return f"{'#' * b.level} {safe(b.text)}"
        case Picture():
            return f"![{safe(b.alt)}]({b.name})"
        case Table():
            rule = ("---",) * b.names + ("---:",) * (len(b.header) - b.names)
            texts = [b.header, *b.rows]
            head, *rows = [[safe(x).replace("|", chr(92) + "|") for x in row] for row in texts]
            return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))
        case Code():
            return fenced(b)
        case Cards():
            return "\n\n".join(_markdown(x, safe) for card in b.cards for x in card)
        case list():
            return "\n".join(f"- {safe(x)}" for x in b)
        case _:
            return safe(b)


def html(report: Sequence[Block], style: str = STYLE, meta: str = "") -> str:
    """One file that needs no other: pictures are inside. All texts are escaped.

    Args:
        report: Its blocks, a heading among them.
        style: The style sheet.
        meta: Further elements of the head.
    """
    title = escape(next(b.text for b in report if isinstance(b, Heading)))
    head = f'<meta charset="utf-8">{meta}<title>{title}</title><style>{style}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(map(_html, report)) + "\n</body></html>\n"


def _html(b: Block) -> str:
    match b:
        case Heading():
            return f"<h{b.level}>{escape(b.text)}</h{b.level}>"
        case Picture(svg=""):
            return f'<p><img alt="{escape(b.alt)}" src="{data_uri(b.png)}"></p>'
        case Picture():
            return f'<figure role="img" aria-label="{escape(b.alt)}">{b.svg}</figure>'
        case Table():
            rows = [_row(b.header, "th", b.names), *(_row(r, "td", b.names) for r in b.rows)]
            return '<div class="wide"><table>\n' + "\n".join(rows) + "\n</table></div>"
        case Code():
            text = f"<pre>\n{syntax.action(b.text, b.language) if b.language else escape(b.text)}</pre>"  # its first line feed is not shown
            return f"<details><summary>{escape(b.folded)}</summary>{text}</details>" if b.folded else text
        case Cards():
            cards = "\n".join(f'<div class="card">{"".join(map(_html, card))}</div>' for card in b.cards)
            return f'<div class="cards {b.size}">\n{cards}\n</div>'
        case list():
            return "<ul>\n" + "\n".join(f"<li>{escape(x)}</li>" for x in b) + "\n</ul>"
        case _:
            return f"<p>{escape(b)}</p>"


def _row(cells: Sequence[str], tag: str, names: int) -> str:
    return "<tr>" + "".join(f"<{tag}{' class=name' if i < names else ''}>{escape(c)}</{tag}>" for i, c in enumerate(cells)) + "</tr>"
