"""The templates' macros as Markdown and as HTML: what a stranger wrote stays text in both."""

from __future__ import annotations

from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from tests.properties.profile import examples

from skillsd.analysis import render
from skillsd.analysis.render import Picture, Table, entities, fenced
from skillsd.bounded import visible

MARKUP = st.lists(
    st.sampled_from(["*", "_", "`", "[", "]", "(", ")", "<b>", "!", "|", "~~", "\\", "&lt;", "://", "a", "1", " ", "\n", "#"])
)
READER = MarkdownIt("commonmark").enable(["strikethrough", "table"])


def written(call: str, form: str = "md", **values: Any) -> str:
    """What a template that calls one macro gives."""
    env = render.environment(form)
    page = "{% import 'parts.' ~ form as parts %}{{ parts.CALL }}".replace("CALL", call)
    return env.from_string(page).render(values, form=form)


@examples(200)
@given(MARKUP.map("".join) | st.text(st.characters(codec="utf-8", exclude_categories=["Cc"])))
@example("[click](javascript:alert(1)) ![x](http://x) <script> `c` *e* __s__ a_b_c_ <http://x> ~~d~~ &amp; \\* | $x$")
def test_what_a_stranger_wrote_is_shown_as_it_is(text):
    wanted = " ".join(["x", *text.split()])
    (_, inline, _) = READER.parse(f"x {entities(text)}")
    assert {t.type for t in inline.children} <= {"text"} and "".join(t.content for t in inline.children) == wanted
    cells = [t.content for t in READER.parse(written("table(t)", t=Table(("a", "b"), [("x", f"x {text}")]))) if t.type == "inline"]
    assert len(cells) == 4 and "".join(t.content for t in READER.parseInline(cells[3])[0].children) == " ".join(
        ["x", *visible(text).split()]
    )


@examples(100)
@given(st.lists(st.sampled_from(["`", "```", "~~~", "a", "\n", " ", "<"])).map("".join))
def test_nothing_gets_out_of_a_fence(text):
    (block,) = READER.parse(fenced(text, "python"))
    assert (block.type, block.info, block.content) == ("fence", "python", f"{text}\n")
    assert READER.parse(fenced("x", "a\n# b"))[0].info == ""  # an environment names the language


def test_html_is_escaped():
    evil, picture = "<b>&", Picture("a.png", "an <a>", b"\x89PNG")
    turn = {"index": 0, "id": "turn-0", "label": "1", "picture": None, "observation": evil, "action": evil, "reward": 0.5}
    calls: dict[str, Any] = {
        "heading(x, 1)": evil, "paragraph(x)": evil, "bullets(x)": [evil], "table(x)": Table((evil,), [(evil,)]), "folded(x, x)": evil,
        "code(x, 'python')": evil, "texts(x)": {evil: evil}, "skills(x)": [{"title": evil, "texts": {evil: evil}}],
        "turns(x, x[0].label)": [turn],
        "panel(x)": {"title": evil, "table": Table((evil,), [(evil,)]), "notes": [evil]}, "figure(x)": picture, "figures(x)": [picture],
    }  # fmt: skip
    for call, value in calls.items():
        page = written(call, "html", x=value)
        assert "<b>" not in page and "<a>" not in page and "&lt;" in page, call
    assert 'alt="an &lt;a&gt;" src="data:image/png;base64,iVBORw=="' in written("figure(x)", "html", x=picture)
    assert '<figure role="img" aria-label="an"><svg></svg></figure>' in written("figure(x)", "html", x=Picture("", "an", svg="<svg></svg>"))
    assert "<pre>\n\n x</pre>" in written("folded('t', x)", "html", x="\n x")  # a reader drops a <pre>'s first line feed


def test_a_table_is_the_same_in_markdown_and_html():
    t = Table(("n", "x|y"), [("<i>", "2")])
    assert written("table(t)", t=t).splitlines() == ["| n | x&#124;y |", "| --- | ---: |", "| &#60;i&#62; | 2 |"]
    page = written("table(t)", "html", t=t)
    assert '<tr><th class="name">n</th><th>x|y</th></tr>' in page and '<tr><td class="name">&lt;i&gt;</td><td>2</td></tr>' in page
