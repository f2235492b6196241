"""`skillsd view` in a real Chromium: opened, clicked through, filtered, by keyboard, narrow, in the dark, and while a run goes on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from tests.analysis.folders import append
from tests.analysis.view.browser import chromium

PAGES = ("", "tasks", "trajectory/5?heat=none", "skills", "skill/1", "skills/compare?a=1&b=2", "compare")
# The least contrast of any text with what is behind it (WCAG 2).
CONTRAST = """() => {
  const parse = (c) => c.match(/[\\d.]+/g).map(Number);
  const over = (top, below) => { const a = top[3] ?? 1; return [0, 1, 2].map((i) => a * top[i] + (1 - a) * below[i]); };
  const light = (c) => c.map((x) => x / 255).map((x) => (x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4))
    .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
  let worst = [99, ""];
  for (const e of document.querySelectorAll("main *, header *")) {
    if (![...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()) || !e.getClientRects().length || e.closest("svg")) continue;
    const layers = [];
    for (let x = e; x; x = x.parentElement) layers.unshift(parse(getComputedStyle(x).backgroundColor));
    const back = layers.reduce((below, top) => over(top, below), [255, 255, 255]);
    const ink = over(parse(getComputedStyle(e).color), back);
    const [a, b] = [light(ink), light(back)].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < worst[0]) worst = [(a + 0.05) / (b + 0.05), e.outerHTML.slice(0, 200)];
  }
  return worst;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser, address) -> Iterator[Any]:
    """Whatever a page complains of fails the test."""
    page = browser.new_page()
    said: list[str] = []
    page.on("pageerror", lambda e: said.append(str(e)))
    page.on("console", lambda m: said.append(m.text) if m.type in ("error", "warning") else None)
    page.on("dialog", lambda d: said.append(d.message))
    yield page
    page.close()
    assert not said


def heading(page: Any) -> str:
    return str(page.inner_text("h1"))


def test_every_page_is_reached_by_clicking(page, address):
    page.goto(f"{address}/")
    assert page.url == f"{address}/run/real/" and heading(page) == "real"
    assert page.locator("figure svg").count() >= 6 and "held-out episodes" in page.inner_text("main")
    page.click("nav >> text=tasks")
    name = page.inner_text("[data-row] >> nth=0")
    page.click("[data-row] >> nth=0")
    assert heading(page) == name
    page.click("main table a.chip >> nth=0")
    assert heading(page).startswith("Trajectory ") and page.locator(".turns img").count() > 0
    page.click("text=without a skill")
    assert page.locator(".action span[title]").count() > 0
    page.click("summary:has-text('exact prompt')")
    assert page.locator("pre.prompt").is_visible()
    page.click("nav >> text=skills")
    page.click("[data-row] >> nth=0")
    assert heading(page).startswith("Skill 1 ")
    page.go_back()
    page.click("text=compare the two")
    assert heading(page) == "Two skills"
    page.click("nav >> text=compare")
    assert heading(page) == "real and hostile"
    page.click("nav.runs >> text=hostile")
    assert heading(page) == "hostile"


def test_a_filter_is_in_the_address(page, address, site):
    page.goto(f"{address}/run/real/tasks")
    names = sorted(set(site.runs["real"].run.trajectories["task_id"]))
    page.fill("input[name=q]", names[1])
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile(rf"q={names[1]}"))
    assert page.locator("[data-row]").all_inner_texts() == [names[1]]
    page.goto(page.url)  # the address says it all
    assert page.locator("[data-row]").all_inner_texts() == [names[1]] and page.input_value("input[name=q]") == names[1]


def test_keys_move_and_open(page, address, site):
    page.goto(f"{address}/run/real/")
    page.keyboard.press("2")
    page.wait_for_url("**/tasks")
    page.keyboard.press("/")
    page.keyboard.type("n1j")  # text, no commands
    assert page.input_value("input[name=q]") == "n1j"
    page.keyboard.press("Escape")
    for key in "jjk":
        page.keyboard.press(key)
    first = page.locator("[data-row]").nth(0)
    assert first.evaluate("e => e === document.activeElement")
    page.keyboard.press("Enter")
    page.wait_for_url("**/task?id=*")
    page.goto(f"{address}/run/real/trajectory/1")
    page.keyboard.press("n")
    page.wait_for_url("**/trajectory/2*")
    page.keyboard.press("p")
    page.wait_for_url("**/trajectory/1*")
    page.keyboard.press("?")
    assert "next trajectory" in page.inner_text("#help")
    page.keyboard.press("2")  # of an open dialog nothing is behind
    assert page.url.partition("?")[0].endswith("/trajectory/1")


def test_a_link_opens_a_turn_with_its_heatmap(page, address):
    page.goto(f"{address}/run/real/trajectory/3?heat=none#turn-1")
    assert heading(page).startswith("Trajectory 3 ") and page.locator(".action span[title]").count() > 0
    assert page.locator("#turn-1").is_visible()


@pytest.mark.parametrize(("width", "scheme"), [(400, "light"), (400, "dark"), (1600, "light"), (1600, "dark")])
def test_every_page_fits_and_can_be_read(browser, address, width, scheme):
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    for path in PAGES:
        page.goto(f"{address}/run/real/{path}")
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path
        contrast, where = page.evaluate(CONTRAST)
        assert contrast >= 4.5, (path, contrast, where)
    ink = page.evaluate("getComputedStyle(document.querySelector('figure svg text')).fill")
    assert ink == page.evaluate("getComputedStyle(document.body).color")  # also what is in pictures
    page.close()


def test_planted_scripts_do_not_run(browser, address):
    page = browser.new_page()
    said: list[str] = []
    page.on("console", lambda m: said.append(m.text))
    page.on("dialog", lambda d: said.append(d.message))
    for path in ("", "tasks", "trajectory/0", "trajectory/4", "skills", "skill/1", "skills/compare?a=1&b=2", "compare"):
        page.goto(f"{address}/run/hostile/{path}")
        assert page.evaluate("window.pwned") is None and not said
        assert page.locator("main script, main [onerror], main [onload]").count() == 0
    page.goto(f"{address}/run/hostile/tasks")
    page.click("[data-row] >> nth=0")  # a name like that is an address, too
    assert "<script>" in heading(page)
    page.close()


def test_it_follows_a_run(page, address, site):
    run = site.runs["hostile"].run
    page.goto(f"{address}/run/hostile/tasks")
    before = page.locator("[data-row]").count()
    page.focus("[data-row] >> nth=0")
    append(run.folder / "trajectories.jsonl", [replace(run.trajectory(0), iteration=2, task_id="quite new")])
    page.wait_for_selector("text=quite new", timeout=20_000)
    assert page.locator("[data-row]").count() == before + 1
    assert page.evaluate("document.activeElement.hasAttribute('data-row')")  # who walks through rows goes on


def test_a_choice_is_not_taken_away(page, address, site):
    """Neither what is chosen on a page of a run that goes on, nor what is open."""
    run = site.runs["hostile"].run
    page.goto(f"{address}/run/hostile/skills")
    page.check("input[name=a] >> nth=1")
    with page.expect_response(re.compile("run/hostile/skills$"), timeout=20_000):
        append(run.folder / "trajectories.jsonl", [replace(run.trajectory(0), iteration=3, task_id="later")])
    page.wait_for_timeout(300)
    assert page.locator("input[name=a]").nth(1).is_checked()
