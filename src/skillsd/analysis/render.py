"""Pages and files from the templates of `skillsd view`. Every text is data: the templates escape it, in HTML as in Markdown.

A report is one template for both: it extends file.html or file.md, and takes its tables, figures and turns from the macros of parts.html,
which are those of the viewer's pages, or of parts.md.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from skillsd.analysis import syntax
from skillsd.bounded import visible
from skillsd.words import count

VIEW = Path(__file__).parent / "view"
_MARKS = re.compile(r"[&>`*|\\~$]|<(?=[a-z/!?])|\](?=\()|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\.", re.IGNORECASE)
"""What begins code, emphasis, a link, a table's cell, mathematics or HTML; a bracket alone or an underscore inside a word does not."""


@dataclass(frozen=True)
class Picture:
    """A figure.

    Attributes:
        name: The file that holds `png` beside a Markdown report.
        alt: What it shows, in words.
        png: The file's content.
        svg: An SVG element that HTML shows instead of `png`; "" for none.
    """

    name: str
    alt: str
    png: bytes = b""
    svg: str = ""

    @property
    def uri(self) -> str:
        """`png` as an address that holds the picture itself."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"


@dataclass(frozen=True)
class Table:
    """Rows of text.

    Attributes:
        header: The columns' titles.
        rows: A text for each column.
        names: How many leading columns are text; the others are numbers.
    """

    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    names: int = 1


def number(value: Any, digits: int = 3) -> str:
    """A table's number; - where it is missing."""
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return f"{value:.{digits}f}" if isinstance(value, float | np.floating) else str(value)


def entities(text: str) -> str:
    """`text` in one line that Markdown shows as it is: characters that would be taken for markup become numeric entities."""
    return _MARKS.sub(lambda m: f"&#{ord(m[0])};", " ".join(text.split()))


def fenced(text: str, language: str = "") -> Markup:
    """A Markdown code block whose fence is longer than any run of backticks in `text`."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return Markup(f"{fence}{language if language.isalnum() else ''}\n{visible(text)}\n{fence}")


def prepare(env: Environment) -> None:
    """Give a Jinja environment what the templates use. It must escape every text; only Markup is inserted as it is."""
    env.trim_blocks = env.lstrip_blocks = True
    env.finalize = lambda x: visible(x) if type(x) is str else x
    env.filters |= {
        "number": number,
        "noun": count,
        "action": lambda text, language="": Markup(syntax.action(text, language)),
        "output": lambda text: Markup(syntax.output(text)),
        "fenced": fenced,
    }


def environment(form: str) -> Environment:
    """The templates for files: `form` is html or md."""
    env = Environment(loader=FileSystemLoader(VIEW / "templates"), autoescape=True)
    prepare(env)
    if form == "md":
        env.finalize = lambda x: Markup(entities(visible(x))) if type(x) is str else x
    return env


def html(template: str, **values: Any) -> str:
    """A template as one HTML file that needs no other: pictures and style sheet are inside, and no script."""
    css = (VIEW / "static" / "view.css").read_text(encoding="utf-8") + syntax.style()
    return f"{environment('html').get_template(template).render(values, form='html', css=Markup(css))}\n"


def markdown(template: str, **values: Any) -> str:
    """The same template as Markdown, whose pictures lie beside it under their names."""
    return f"{environment('md').get_template(template).render(values, form='md').strip()}\n"
