"""Code is highlighted, everything else stays what it was, and nothing is markup."""

import re
from html import unescape

import pytest

from skillsd.analysis import syntax


def plain(html: str) -> str:
    return unescape(re.sub("<.*?>", "", html))


TEXTS = (
    "I look.\n```python\nprint(apis.phone.login(username='a'))\n```\nThen I wait.",
    "```\nx = 1\n```",
    "```python\nnot closed <b>",
    "````python\n```\nx\n````",
    "print(1) # <script>alert(1)</script>",
    "\n\n  two lines before, and after\n\n",
    "<script>alert(1)</script> \x1b[31m \ud800",
    "",
)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("language", ["", "python", "no such language", "<b>"])
def test_highlighting_an_action_changes_no_text(text, language):
    html = syntax.action(text, language)
    assert plain(html) == syntax.visible(text)
    assert set(re.findall(r"<(\w+)", html)) <= {"span"}


@pytest.mark.parametrize(
    "text", [*TEXTS, '{"a": [1, "<b>"]}', "{'a': None}", "Traceback (most recent call last):\n  File \"x\"\nKeyError: '<b>'", "[" * 9000]
)
def test_highlighting_an_output_changes_no_text(text):
    html = syntax.output(text)
    assert plain(html) == syntax.visible(text) and set(re.findall(r"<(\w+)", html)) <= {"span"}


def test_code_and_json_are_highlighted_and_prose_is_not():
    assert '<span class="nb">print</span>' in syntax.action("print(1)", "python")
    assert "<span" not in syntax.action("print(1)")
    fenced = syntax.action("print this:\n```python\nprint(1)\n```\nprint", "")
    assert fenced.count("<span") == syntax.action("print(1)\n", "python").count("<span") > 0  # prose around a fence is none
    assert "<span" in syntax.output('{"a": 1}') and "<span" not in syntax.output("a plain answer")
    assert "<span" not in syntax.action("x" * 60_000, "python")


def test_both_schemes_have_colours():
    light, dark = syntax.style().split("@media screen and (prefers-color-scheme: dark)")
    assert ".code .nb" in light and ".code .nb" in dark
