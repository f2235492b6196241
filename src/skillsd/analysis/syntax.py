"""Code in what agents and environments say, highlighted as HTML."""

from __future__ import annotations

import json
import re
from html import escape

from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import JsonLexer, PythonLexer, PythonTracebackLexer, get_lexer_by_name
from pygments.util import ClassNotFound

from skillsd.bounded import visible

_FENCE = re.compile(r"^(```+)[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:^\1[ \t]*$|\Z)", re.MULTILINE | re.DOTALL)
_FORMAT = HtmlFormatter(nowrap=True)
_MAX_CHARS = 50_000
"""Characters; what is longer stays plain."""


def style() -> str:
    """The colours as CSS, in the light and in the dark."""
    rules = [HtmlFormatter(style=name).get_style_defs(".code").splitlines() for name in ("default", "github-dark")]
    kept, darker = ("\n".join(r for r in rule if r.startswith(".code .") and ".err " not in r) for rule in rules)
    return f"{kept}\n@media screen and (prefers-color-scheme: dark) {{\n{darker}\n}}\n"


def action(text: str, language: str = "") -> str:
    """An answer: what stands in code fences is highlighted, or all of it where there is none and it is in a language.

    Args:
        text: As it was sampled.
        language: A name that Pygments knows; "" for prose.

    Returns:
        HTML for a `<pre>` of class `code`; text is escaped.
    """
    text, out, at = visible(text), [], 0
    for fence in _FENCE.finditer(text):
        start, end = fence.span(3)
        out += [escape(text[at:start]), _coloured(text[start:end], fence[2] or language)]
        at = end
    if not out:
        return _coloured(text, language)
    return "".join([*out, escape(text[at:])])


def output(text: str) -> str:
    """What an environment printed: JSON and tracebacks are highlighted. Returns HTML as `action` does."""
    text = visible(text)
    if "Traceback (most recent call last)" in text:
        return _with(PythonTracebackLexer(), text)
    if text.lstrip()[:1] in ("{", "["):
        try:
            json.loads(text)
            return _with(JsonLexer(), text)
        except (ValueError, RecursionError):
            return _with(PythonLexer(), text)  # Python's own way to print lists and dictionaries
    return escape(text)


def _coloured(text: str, language: str) -> str:
    try:
        return _with(get_lexer_by_name(language), text) if language else escape(text)
    except ClassNotFound:  # an environment may say anything
        return escape(text)


def _with(lexer: object, text: str) -> str:
    if len(text) > _MAX_CHARS:
        return escape(text)
    lexer.stripnl = lexer.ensurenl = False  # type: ignore[attr-defined]  # the text stays what it was
    html = str(highlight(text, lexer, _FORMAT))
    return html if text.endswith("\n") else html.removesuffix("\n")
