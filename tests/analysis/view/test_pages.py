"""What the pages say is what the run holds, nobody without the token sees anything, and no text is markup."""

from __future__ import annotations

import re
import shutil
from html import unescape
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
from tests.analysis.folders import Page
from tests.analysis.view.conftest import TOKEN

from skillsd import cli
from skillsd.analysis import Run, Scorer, SkillIndex
from skillsd.analysis.view import pages
from skillsd.analysis.view.app import create_app
from skillsd.analysis.view.site import Site
from skillsd.files.run_folder import write_record

PAGES = ("", "?all=1", "tasks", "trajectory/0", "trajectory/4", "skills", "skills?q=script", "skill/1", "skills/compare?a=1&b=2", "compare")


@pytest.fixture(scope="module")
def client(site):
    return create_app(site, TOKEN).test_client()


@pytest.fixture
def get(client):
    def get(path: str, status: int = 200, host: str = "127.0.0.1:1") -> str:
        answer = client.get(f"/{TOKEN}/run/{path}", headers={"Host": host})
        assert answer.status_code == status, answer.text
        return str(answer.text)

    return get


def cells(html: str) -> list[list[str]]:
    """The texts of a page's table rows."""
    rows = re.findall(r"<tr>(.*?)</tr>", html, re.DOTALL)
    return [
        [" ".join(unescape(re.sub("<.*?>", "", c)).split()) for c in re.findall(r"<t[dh].*?>(.*?)</t[dh]>", r, re.DOTALL)] for r in rows
    ]


# -- who sees anything -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["/", "/wrong/", "/wrong/run/real/", f"/{TOKEN}x/run/real/tasks", "/static/view.css", "/wrong/static/view.css"]
)
def test_without_the_token_there_is_nothing(client, path):
    answer = client.get(path, headers={"Host": "127.0.0.1:1"})
    assert answer.status_code == 404 and "real" not in answer.text and TOKEN not in answer.text


def test_another_host_gets_nothing(get):
    """A page elsewhere whose name is made to point to this machine."""
    get("real/", 404, host="evil.example:1")
    get("real/", 200, host="localhost:8000")


def test_headers_forbid_foreign_content(client):
    answer = client.get(f"/{TOKEN}/run/real/", headers={"Host": "127.0.0.1:1"})
    policy = dict(part.split(" ", 1) for part in answer.headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == "'none'" and policy["script-src"] == "'self'" and answer.headers["Referrer-Policy"] == "no-referrer"


def test_it_listens_to_this_machine_alone(site, monkeypatch, capsys):
    made: list[Any] = []

    def server(host, port, app, threaded):
        made.append(host)
        return SimpleNamespace(server_port=4711, serve_forever=lambda: None, server_close=lambda: made.append("closed"))

    monkeypatch.setattr("skillsd.analysis.view.make_server", server)
    folder = str(site.runs["hostile"].run.folder)
    for _ in range(2):
        assert cli.main(["view", folder]) == 0
    assert made == ["127.0.0.1", "closed"] * 2
    tokens = re.findall(r"http://127\.0\.0\.1:4711/([\w-]{20,})/", capsys.readouterr().out)
    assert len(set(tokens)) == 2


@pytest.mark.parametrize(
    ("args", "says"),
    [(["nowhere"], "no run folder"), (["RUN", "--port", "70000"], "--port is 70000"), (["RUN", "--token", "a/b"], "--token"), ([], "RUN")],
)
def test_bad_arguments(site, capsys, args, says):
    assert cli.main(["view", *(str(site.runs["hostile"].run.folder) if a == "RUN" else a for a in args)]) == 2
    assert says in capsys.readouterr().err


# -- text is text ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PAGES)
def test_planted_markup_is_text(get, path):
    html = get(f"hostile/{path}")
    markup = Page(html).elements
    assert [a["src"].rpartition("/")[2] for tag, a in markup if tag == "script"] == ["view.js"]
    assert not [(tag, name) for tag, a in markup for name in a if name.startswith("on")]
    assert not [a for tag, a in markup if tag == "img" and not a["src"].startswith("data:image/png")]
    assert "&lt;script&gt;" in html and ">49<" not in html
    assert "\u202e" not in html and "\ud800" not in html  # no character turns the text around


# -- the run's own numbers -------------------------------------------------------------------------------------------------------------


def test_tasks_show_the_run_s_numbers(get, site):
    run = Run(site.runs["real"].run.folder)
    html = get("real/tasks")
    rows = {row[0]: row for row in cells(html)[1:]}
    assert set(rows) == set(run.trajectories["task_id"])
    for task_id, played in run.trajectories.groupby("task_id"):
        groups = [g["reward"] for _, g in played.groupby("iteration")]
        even = sum(g.nunique() == 1 for g in groups) / len(groups)
        shown = [
            len(groups),
            len(played),
            f"{played['reward'].mean():.3f}",
            f"{groups[-1].mean():.3f}",
            f"{played['success'].mean():.3f}",
            f"{even:.3f}",
        ]
        assert rows[task_id][1:7] == list(map(str, shown))
        solved = played[played["success"]]
        if len(solved):
            best = run.trajectory(int(solved["n_turns"].idxmin()))
            assert rows[task_id][7:] == [str(len(best.turns)), " · ".join(t.action.strip() for t in best.turns)]
        else:
            assert rows[task_id][7:] == ["-", "-"]


def test_tasks_are_sorted_and_filtered(get, site):
    names = sorted(set(site.runs["real"].run.trajectories["task_id"]))
    assert [row[0] for row in cells(get("real/tasks?sort=-task_id"))[1:]] == names[::-1]
    assert [row[0] for row in cells(get(f"real/tasks?q={names[1].upper()}"))[1:]] == [names[1]]
    rewards = [float(row[3]) for row in cells(get("real/tasks?sort=-reward"))[1:]]
    assert rewards == sorted(rewards, reverse=True)
    parts = [{row[0] for row in cells(get(f"real/tasks?only={kind}"))[1:]} for kind in ("solved", "unsolved")]
    assert parts[0] | parts[1] == set(names) and not parts[0] & parts[1]
    assert cells(get("real/tasks?sort=no_such_column&page=99"))[1:] == cells(get("real/tasks"))[1:]


def test_pages_of_a_long_table(get, monkeypatch, site):
    monkeypatch.setattr(pages, "ROWS", 1)
    n = len(set(site.runs["real"].run.trajectories["task_id"]))
    seen = [cells(get(f"real/tasks?page={k}"))[1][0] for k in range(1, n + 1)]
    assert seen == sorted(seen) and len(set(seen)) == n


@pytest.mark.parametrize("kind", ["none", "skill", "shuffled"])
def test_the_heatmap_is_the_teacher_s_gap(get, site, kind):
    run = Run(site.runs["real"].run.folder)
    known = run.trajectories[run.trajectories["skill_id"].notna()]
    n = int(known.index[-1])
    own = int(known["skill_id"][n])
    others = run.skills.index[run.skills["task_id"] != known["task_id"][n]]
    skill = {"none": "", "skill": own, "shuffled": int(others[n % len(others)])}[kind]
    scorer = Scorer(run)
    gap = (scorer.logprobs(n, "teacher", skill) - scorer.logprobs(n))[list(run.trajectory(n).action_mask)]
    html = get(f"real/trajectory/{n}?heat={kind}")
    assert [f"{g:+.3f}" for g in gap] == re.findall(r'<span title="(.*?)"', html)
    assert f"Sum {float(gap.sum()):.3f} nats over {len(gap)} tokens" in html
    assert unescape(re.findall(r'<pre class="prompt">(.*?)</pre>', html, re.DOTALL)[0]) == scorer.prompt(n, skill)


def test_a_teacher_that_saw_no_skill_is_not_given_one(get, site):
    run = site.runs["real"].run
    n = int(run.trajectories.index[run.trajectories["skill_id"].isna()][0])
    assert "with its skill" not in get(f"real/trajectory/{n}")
    assert "saw no skill" in get(f"real/trajectory/{n}?heat=skill", 404)


def test_boards_are_pictures(get):
    html = get("real/trajectory/0")
    assert html.count('<img src="data:image/png;base64,') == html.count('class="turn"') > 0
    assert html.count("trajectory 0, end") == 1


def test_a_run_without_a_checkpoint_is_not_scored(get):
    assert "names no policy" in get("hostile/trajectory/0?heat=none", 500)


def test_a_skill_s_page_shows_its_texts_uses_and_source(get, site):
    run = site.runs["real"].run
    used = int(run.retrievals["skill_id"].iloc[0])
    html = get(f"real/skill/{used}")
    row, uses = run.skills.loc[used], run.retrievals[run.retrievals["skill_id"] == used]
    assert all(unescape(text) in unescape(html) for text in row[["success_analysis", "mistake_analysis", "golden_workflow"]])
    assert [[str(u.iteration), f"{u.reward:.3f}", f"{u.gap:.3f}"] for u in uses.itertuples()] == cells(html)[1 : len(uses) + 1]
    source = re.findall(r"trajectory/(\d+)", html)[0]
    found = run.trajectories.loc[int(source), ["iteration", "task_id", "member"]].tolist()
    assert found == [row["source_iteration"], row["task_id"], row["source_member"]]


def test_two_skills_marked():
    a, b = pages._marked("go left <b> up", "go right <b> up")
    assert a == "go <mark>left</mark> &lt;b&gt; up" and b == "go <mark>right</mark> &lt;b&gt; up"
    assert pages._marked("a a", "a a") == ("a a", "a a")


def test_the_difference_of_two_panels_is_paired():
    def panel(*success: bool, attempts: int = 1) -> Any:
        levels = [{"task_id": f"t{i}", "member": m, "seed": 0, "success": s} for i, s in enumerate(success) for m in range(attempts)]
        return SimpleNamespace(panel={"after": {"levels": levels}})

    found = pages._difference(panel(True, False, False, False), panel(True, True, True, False))
    assert found is not None and found["n"] == 4 and found["mean"] == 0.5 and 0.0 <= found["low"] <= 0.5 <= found["high"] <= 1.0
    assert pages._difference(panel(True, False, False, False, attempts=8), panel(True, True, True, False, attempts=8)) == found | {"n": 32}
    assert pages._difference(panel(True), panel(True, True)) is None
    assert pages._difference(SimpleNamespace(panel={}), SimpleNamespace(panel={})) is None


def test_settings_that_differ(get):
    rows = cells(get("real/compare?with=hostile"))
    seed = next(row for row in rows if row[0] == "seed_everything")
    assert seed[1:] == ["0", "7"]


@pytest.mark.parametrize("path", ["nobody/", "real/trajectory/99999", "real/skill/99999", "real/skills/compare?a=1&b=99999"])
def test_what_is_not_there_is_404(get, path):
    assert "<h1>404</h1>" in get(path, 404)


def test_a_task_that_was_never_played(get):
    assert "Task nothing was never played" in get("real/task?id=nothing", 404)


def test_a_run_that_is_not_shown(get):
    assert "There is no run nobody here" in get("real/compare?with=nobody", 404)


# -- what files may do --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def another(site, tmp_path):
    """A copy of the real run, and a way to ask for its pages."""
    folder = tmp_path / "another"
    shutil.copytree(site.runs["real"].run.folder, folder)
    with Site([folder, site.runs["hostile"].run.folder]) as own:
        client = create_app(own, TOKEN).test_client()

        def get(path: str, status: int = 200) -> str:
            answer = client.get(f"/{TOKEN}/run/another/{path}", headers={"Host": "127.0.0.1"})  # as a browser asks at port 80
            assert answer.status_code == status, answer.text
            return str(answer.text)

        yield folder, get


def test_a_run_without_its_bank(another):
    folder, get = another
    n = int(Run(folder).trajectories["skill_id"].last_valid_index())
    (folder / "bank.sqlite").unlink()
    assert re.search(r"Its teacher saw skill \d+, which is not in this", get(f"trajectory/{n}"))
    for path in ("", "tasks", "skills", "compare", f"trajectory/{n}?heat=none"):
        get(path)


def test_pages_open_with_odd_configurations(another):
    folder, get = another
    for text in ("skills: null\ndata: null\nmodel: null\n", "data: 5\nmodel: {policy: x}\nskills: [1]\n", ""):
        write_record(folder)
        (folder / "config.yaml").write_text(text)
        for path in ("", "trajectory/0", "compare"):
            get(path)


def test_a_damaged_panel_is_named(another):
    folder, get = another
    (folder / "panel.json").write_text('{"after": {"n": 3}}')
    assert "panel.json is damaged (after has no success)" in unescape(get("", 500))


def test_a_folder_that_is_gone(another):
    folder, get = another
    get("")
    shutil.rmtree(folder)
    assert "is gone" in get("", 500)


def test_reading_changes_nothing(another, site):
    folder, get = another
    first = get("stamp")
    get("skills")
    assert get("stamp") == first and get("stamp?with=hostile") == f"{first} {get('stamp?with=hostile').split()[1]}"
    assert 'stamp?with=hostile"' in get("compare") and f'data-stamp="{get("stamp?with=hostile")}"' in get("compare")


def test_titles_of_one_page_are_not_anothers(another):
    _, get = another
    assert "reward/success" not in get("") and "reward/success" in get("?all=1") and "episodes solved" in get("")


def test_two_pages_that_show_both_runs_wait_for_each_other_and_end(site):
    app, statuses = create_app(site, TOKEN), []

    def ask(a: str, b: str) -> None:
        for _ in range(6):
            for opened in site.runs.values():
                opened.stamp = ""  # all is made anew
            answer = app.test_client().get(f"/{TOKEN}/run/{a}/compare?with={b}", headers={"Host": "localhost:1"})
            statuses.append(answer.status_code)

    threads = [Thread(target=ask, args=pair, daemon=True) for pair in (("real", "hostile"), ("hostile", "real"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert statuses == [200] * 12


@pytest.mark.parametrize("path", PAGES)
def test_a_key_does_one_thing(get, site, path):
    n = site.runs["real"].run.trajectories["skill_id"].last_valid_index()
    keys = [a["data-key"] for _, a in Page(get(f"real/{path}".replace("trajectory/4", f"trajectory/{n}"))).elements if "data-key" in a]
    assert len(keys) == len(set(keys)) and not {"j", "k", "?"} & set(keys)


def test_a_search_counts_and_sorts(get, site):
    run = site.runs["real"].run
    word = run.skills["golden_workflow"].iloc[0].split()[0]
    found = SkillIndex(run.skills).search(word, len(run.skills))
    ids = [int(row[0]) for row in cells(get(f"real/skills?q={word}"))[1:]]
    assert ids == found.index.tolist() and f"<small>{len(ids)} of {len(run.skills)}</small>" in get(f"real/skills?q={word}")
    by_uses = [int(row[2]) for row in cells(get(f"real/skills?q={word}&sort=-uses"))[1:]]
    assert by_uses == sorted(by_uses, reverse=True) and len(by_uses) == len(ids)
    assert "No skill shares a word with it" in get("real/skills?q=zzzz")


def test_long_texts_are_not_compared_word_by_word():
    long = "u " * 12_000
    assert pages._marked(long, f"{long}<b>") == (long, f"{long}&lt;b&gt;")
