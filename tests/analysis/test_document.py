"""Blocks as Markdown and as HTML: what a stranger wrote stays text in both."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from tests.properties.profile import examples

from skillsd.analysis.document import Cards, Code, Heading, Picture, Table, entities, fenced, html, markdown

MARKUP = st.lists(
    st.sampled_from(["*", "_", "`", "[", "]", "(", ")", "<b>", "!", "|", "~~", "\\", "&lt;", "://", "a", "1", " ", "\n", "#"])
)
READER = MarkdownIt("commonmark").enable(["strikethrough", "table"])


@examples(200)
@given(MARKUP.map("".join) | st.text(st.characters(codec="utf-8", exclude_categories=["Cc"])))
@example("[click](javascript:alert(1)) ![x](http://x) <script> `c` *e* __s__ a_b_c_ <http://x> ~~d~~ &amp; \\* | $x$")
def test_what_a_stranger_wrote_is_shown_as_it_is(text):
    wanted = " ".join(["x", *text.split()])
    (_, inline, _) = READER.parse(f"x {entities(text)}")
    assert {t.type for t in inline.children} <= {"text"} and "".join(t.content for t in inline.children) == wanted
    cells = [t.content for t in READER.parse(markdown([Table(("a", "b"), [("x", f"x {text}")])], entities)) if t.type == "inline"]
    assert len(cells) == 4 and "".join(t.content for t in READER.parseInline(cells[3])[0].children) == wanted


@examples(100)
@given(st.lists(st.sampled_from(["`", "```", "~~~", "a", "\n", " ", "<"])).map("".join))
def test_nothing_gets_out_of_a_fence(text):
    (block,) = READER.parse(fenced(Code(text, "python")))
    assert (block.type, block.info, block.content) == ("fence", "python", f"{text}\n")
    assert READER.parse(fenced(Code("x", "a\n# b")))[0].info == ""  # an environment names the language


def test_the_blocks():
    png, svg = b"\x89PNG", "<svg></svg>"
    report = [
        Heading("A & B", 1), Picture("a.png", "an <a>", png), Picture("b.png", "b", png, svg), Table(("n", "x|y"), [("<1>", "2")]),
        Code("a = '<b>'", "python"), Code(" <", folded="as <text>"), Cards([["one", Code("1")], ["two"]], "large"), ["- <i>"], "<p>",
    ]  # fmt: skip
    page = html(report, "p{}", "<meta>")
    assert page.startswith('<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta><title>A &amp; B</title><style>p{}</style>')
    for part in (
        "<h1>A &amp; B</h1>",
        '<p><img alt="an &lt;a&gt;" src="data:image/png;base64,iVBORw=="></p>',
        '<figure role="img" aria-label="b"><svg></svg></figure>',
        "<tr><td class=name>&lt;1&gt;</td><td>2</td></tr>",
        '<span class="n">a</span>',
        "<details><summary>as &lt;text&gt;</summary><pre>\n &lt;</pre></details>",
        '<div class="cards large">\n<div class="card"><p>one</p><pre>\n1</pre></div>\n<div class="card"><p>two</p></div>\n</div>',
        "<ul>\n<li>- &lt;i&gt;</li>\n</ul>\n<p>&lt;p&gt;</p>",
    ):
        assert part in page
    assert "<b>" not in page and "&lt;b&gt;" in page
    assert markdown(report).split("\n\n") == [
        "# A & B", "![an <a>](a.png)", "![b](b.png)", "| n | x\\|y |\n| --- | ---: |\n| <1> | 2 |", "```python\na = '<b>'\n```",
        "```\n <\n```", "one", "```\n1\n```", "two", "- - <i>", "<p>\n",
    ]  # fmt: skip
    told = markdown(report, entities).split("\n\n")
    for part in ("- - &#60;i&#62;", "&#60;p&#62;\n", "![an &#60;a&#62;](a.png)", "```python\na = '<b>'\n```"):
        assert part in told
