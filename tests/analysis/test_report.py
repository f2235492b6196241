"""`skillsd report`: the run's own numbers; strangers' text stays text; one file that needs no other; the same folder, the same bytes."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from markdown_it import MarkdownIt
from tests.analysis.folders import SHORT, Page, append, write_metrics

from skillsd import cli
from skillsd.analysis import Run
from skillsd.analysis.examples import MAX_CHARS, TRAJECTORIES, choose
from skillsd.analysis.pictures import Pictures
from skillsd.analysis.plots import curve
from skillsd.analysis.provenance import recorded, versions
from skillsd.analysis.report import report
from skillsd.callbacks.log import COLUMNS
from skillsd.callbacks.panel import summarise, write_panel
from skillsd.errors import ConfigError
from skillsd.files.run_folder import write_record
from skillsd.skills import Skill, SkillBank
from skillsd.trajectory import Trajectory, Turn

EVIL = "</pre><script>alert(1)</script><img src=http://x.example onerror=alert(2)> ```` [a](http://y.example) \x1b[31m \ud800"
BOARDS = ("#####\n#P_O#\n#_X_#\n#####", "#####\n#_PO#\n#_X_#\n#####")
CHECKS = [{"check": "GPU", "state": "ok", "detail": f"{Path.home()}/x <b>", "fix": ""}]
CONFIG = {
    "seed_everything": 7, "teacher": {"mode": "frozen"}, "trainer": {"name": "</pre><script>alert(3)</script> ````"},
    "model": {"policy": {"model": "nano"}, "objective": {"loss": {"class_path": "a.L", "init_args": {}}}},
    "data": {
        "env": "skillsd_sokoban:skillsd/Sokoban-v0",
        "env_kwargs": {"size": 5, "boxes": 1, "difficulties": {"short": {"lengths": [2, 4]}}, "splits": {"train": {"short": 2}}},
    },
}  # fmt: skip


def episodes() -> list[Trajectory]:
    """Three iterations of 8: of two tasks, one of them with a hostile name; skills from the second on."""
    out = []
    for n in range(24):
        turns = tuple(Turn(board, action, 0.0) for board, action in zip(BOARDS, ("right", EVIL), strict=True))
        task = f"t|{EVIL}" if n % 8 < 4 else "t2"
        out.append(
            replace(SHORT, iteration=n // 8, task_id=task, member=n % 4, success=n % 3 == 0, turns=turns, skill_id=1 if n >= 8 else None)
        )
    out = [replace(t, final_observation=BOARDS[0]) for t in out]
    out[0] = replace(out[0], instruction=EVIL, turns=(Turn(EVIL, "up", 1.0),), finish_reason="failed", failure=f"raised: {EVIL}")
    return out


def build(made: Path) -> None:
    """A finished run."""
    made.mkdir()
    write_record(made)
    (made / "config.yaml").write_text("# lightning.pytorch==2.6.6\n" + yaml.safe_dump(CONFIG))
    append(made / "trajectories.jsonl", episodes())
    write_metrics(made, [{"reward/success": "0.375", "policy/entropy": f"0.{i}", "rollout/env_steps": "16"} for i in range(3)])
    for when, flags in (("before", (0, 0, 1, 0)), ("after", (1, 0, 1, 1))):
        played = [replace(SHORT, task_id=f"p{k}", success=bool(x), completion=x) for k, x in enumerate(flags)]
        write_panel(made, {when: summarise(played) | {"device": "<gpu>"}})
    with SkillBank(made / "bank.sqlite") as bank:
        bank.insert([Skill(EVIL.replace("\ud800", ""), f"mistake {k}", "go", f"t{k}") for k in range(25)], 0)
        for _ in range(3):
            bank.record_use(5, 1, reward=1.0)


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """The run's folder, its HTML and its Markdown."""
    made = tmp_path_factory.mktemp("report") / "a run"
    build(made)
    return made, *written(made)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The same run without metrics, to be changed: curves take time."""
    build(tmp_path / "a run")
    (tmp_path / "a run" / "metrics.csv").unlink()
    return tmp_path / "a run"


def written(folder: Path, *args: str, checks: Any = CHECKS) -> tuple[str, str]:
    """The HTML and the Markdown."""
    report([str(folder), *args], lambda: checks)
    out = Path(args[1]) if args else folder / "report"
    return (out / "report.html").read_text(), (out / "report.md").read_text()


def cells(markdown: str) -> dict[str, list[str]]:
    rows = [[x.strip() for x in line.strip("|").split(" | ")] for line in markdown.splitlines() if line.startswith("| ")]
    return {row[0].strip(): row[1:] for row in rows}


def test_the_report_s_numbers_are_the_run_s(reported):
    folder, page, text = reported
    run, found = Run(folder), cells(text)
    for when in ("before", "after"):
        part = run.panel[when]
        success = "{:.3f} [{:.3f}, {:.3f}]".format(part["success"], *part["success_interval"])
        assert found[when][0] == success and success in page and text.index(success) < text.index("## What was run")
    assert found["after - before, paired"][0] == "{:+.3f} [{:+.3f}, {:+.3f}]".format(*run.panel["difference"]["success"])
    facts = {k: found[k][0] for k in ("model", "loss", "teacher", "seed", "iterations", "trajectories", "environment steps")}
    assert facts == dict(zip(facts, ("nano", "a.L", "frozen", "7", "3", "24 of 2 tasks", "48"), strict=True))
    assert "skillsd's version not recorded" in text and "begun" not in found
    assert found["lightning"][0] == "2.6.6" and found["torch"][0] == "not recorded" and found["device"][0] == "&#60;gpu&#62;"
    assert found["GPU"] == ["ok", "&#126;/x &#60;b&#62;"] and str(Path.home()) not in page.split("Environment</h2>")[1]
    assert CONFIG["trainer"]["name"] in Page(page).text  # the configuration, escaped
    drawn = re.findall(r"!\[[^]]*\]\((.*)\)", text.split("## Trajectories")[0])
    assert drawn == ["reward-success.png", "policy-entropy.png"] and page.count("<svg") == 2
    assert curve(run, "reward/success")["low"].notna().any() and "Bands are 95% intervals" in page


def test_the_report_shows_chosen_trajectories_and_used_skills(reported):
    folder, page, text = reported
    run = Run(folder)
    numbers = [int(n) for n in re.findall(r"^### Trajectory (\d+): ", text, flags=re.MULTILINE)]
    assert numbers == choose(run.trajectories) == [int(n) for n in re.findall(r"<h3>Trajectory (\d+): ", page)]
    pictures = Pictures(run)
    for n in numbers[1:]:
        for k, turn in enumerate(run.trajectory(n).turns, 1):
            png = pictures.png(turn.observation)
            assert png and (folder / "report" / f"trajectory-{n}-turn-{k}.png").read_bytes() == png
            assert f"![trajectory {n}, turn {k}](trajectory-{n}-turn-{k}.png)\n\n```\n{turn.observation}\n```" in text
        assert f"At the end\n\n![trajectory {n}, end](trajectory-{n}-end.png)\n\n```\n{BOARDS[0]}\n```" in text
    assert page.count("data:image/png") == 3 * len(numbers[1:]) + 1 and not (folder / "report" / "trajectory-0-turn-1.png").exists()
    skills = [int(k) for k in re.findall(r"^Skill (\d+) of", text, flags=re.MULTILINE)]
    assert skills == [5, *(k for k in range(1, 21) if k != 5)] and "Skill 5 of task t4: used 3 times, mean reward" in page
    assert "The 20 most used of 25" in page and "<dt>mistake analysis</dt><dd>mistake 4</dd>" in page and "Its teacher saw skill 1." in page


def test_nothing_a_stranger_wrote_is_markup(reported):
    folder, page, text = reported
    parsed = Page(page)
    visible = EVIL.replace("\x1b", "\\x1b").replace("\ud800", "\\ud800")
    assert parsed.text.count(visible) >= 5 and "\x1b" not in page + text  # task, instruction, observation, action, failure, skills
    tags = {tag for tag, _ in parsed.elements if tag != "svg"}
    assert not tags & {"script", "iframe", "object", "embed", "base", "form", "audio", "video", "a"}
    assert not [name for _, attrs in parsed.elements for name in attrs if name.startswith("on")]
    tokens = [t for token in MarkdownIt("commonmark").enable("table").parse(text) for t in (token, *(token.children or []))]
    assert not {t.type for t in tokens} & {"html_block", "html_inline", "link_open", "code_inline", "em_open", "strong_open"}
    assert all(not t.attrs["src"].startswith("http") for t in tokens if t.type == "image")
    assert sum(visible in t.content for t in tokens) >= 5


def test_the_page_needs_nothing_else(reported):
    folder, page, text = reported
    for tag, attrs in Page(page).elements:
        assert tag not in ("script", "link")
        for name, value in attrs.items():
            if name.split(":")[-1] in ("src", "href", "srcset", "data", "action", "poster"):
                assert value.startswith(("data:image/png;base64,", "#")), (tag, value)
            assert not re.search(r"url\((?!#)", value or "")
    (style,) = re.findall(r"<head>.*?<style>(.*?)</style>", page, flags=re.DOTALL)
    assert "url(" not in style and "@import" not in style and "prefers-color-scheme: dark" in style and "@media print" in style


def test_the_same_folder_gives_the_same_bytes(reported, tmp_path, capsys):
    first, second = reported[0] / "report", tmp_path / "out"
    shutil.copytree(reported[0], tmp_path / "a run", ignore=shutil.ignore_patterns("report"))
    written(tmp_path / "a run", "-o", str(second))
    assert capsys.readouterr().out == f"report: {second}/report.html, {second}/report.md\n"
    names = sorted(p.name for p in first.iterdir())
    assert names == sorted(p.name for p in second.iterdir()) and len(names) > 10
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


def test_the_report_names_recorded_versions_and_times(folder):
    (folder / "adapter" / "student").mkdir(parents=True)
    (folder / "adapter" / "student" / "README.md").write_text("trained with Skill-SD by skillsd 9.8.7\nfor 3 iterations")
    (folder / "adapter" / "student" / "adapter_config.json").write_text('{"peft_version": "0.0.1"}')
    (folder / "tensorboard").mkdir()
    for second in (1700000060, 1700000000):
        (folder / "tensorboard" / f"events.out.tfevents.{second}.host.1.0").touch()
    _, text = written(folder)
    found = cells(text)
    assert "begun 2023-11-14 22:13 UTC, skillsd 9.8.7" in text and found["begun"] == ["2023-11-14 22:13 UTC"]
    assert found["skillsd"][0] == "9.8.7" and found["peft"][0] == "0.0.1"
    (folder / "cell.json").write_text(json.dumps({"version": "1.2.3", "commits": ["abc", "def-dirty"]}))
    rows = {row[0]: row[1] for row in versions(Run(folder)).rows}
    assert rows["skillsd"] == "1.2.3" and rows["commit"] == "abc, def-dirty" and rows["peft"] == "0.0.1"
    for damaged in ("{", "[]", "[" * 100_000):
        (folder / "cell.json").write_text(damaged)
        assert recorded(Run(folder))["skillsd"] == "9.8.7"


def test_secrets_are_left_out(folder, monkeypatch):
    """Those that the run used; what else has a secret's name may be a word of the data."""
    monkeypatch.setattr("skillsd.errors._held", {})
    monkeypatch.setenv("MY_API_TOKEN", "swordfish-9f8e7d6c5b")
    monkeypatch.setenv("POSTGRES_PASSWORD", "password1234")
    monkeypatch.setattr("skillsd.analysis.examples.MAX_CHARS", 60)  # cuts within the secret
    at = "swordfish-9f8e7d6c5b"
    append(folder / "trajectories.jsonl", [replace(SHORT, iteration=3, turns=(Turn(f"{'x' * 45}{at}", at, 0.0),), instruction=at)])
    write_record(folder)
    append(folder / "trajectories.jsonl", [replace(SHORT, iteration=3, task_id="password1234")])
    (folder / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "note": at, "skills": {"api_key_env": "MY_API_TOKEN"}}))
    page, text = written(folder, checks=[{**CHECKS[0], "detail": at}])
    assert (
        "swordfish" not in page + text
        and text.count("[MY_API_TOKEN]") == Page(page).text.count("[MY_API_TOKEN]") == 5
        and "password1234" in page
    )


def test_long_texts_and_many_turns_are_cut(folder):
    turns = tuple(Turn(f"o{k} " + "y" * MAX_CHARS * (k == 1), f"act{k}", 0.0) for k in range(100))
    append(folder / "trajectories.jsonl", [replace(SHORT, iteration=3, turns=turns)])
    page, text = written(folder)
    for out in (page, text):
        assert f"[... cut: {MAX_CHARS + 3} characters in all]" in out and "y" * (MAX_CHARS - 2) not in out
        assert "60 turns are left out here." in out
        assert [n for n in range(100) if f"\nact{n}\n" in out or f"\nact{n}<" in out] == [*range(20), *range(80, 100)]


@pytest.mark.parametrize("config", ["", "data:\n", "data: {env: nosuch_module:X-v0}\nmodel: [1]\n"])
def test_a_run_that_has_just_begun(tmp_path, config):
    write_record(tmp_path)
    (tmp_path / "config.yaml").write_text(config)
    for _ in range(2):
        page, text = written(tmp_path)
        for part in ("No panel was played yet.", "No iteration has finished yet.", "None are recorded.", "The run has none."):
            assert part in page and part in text
        assert ("There is no config.yaml." in text) is not bool(config)
        # It is training: lines without their end.
        (tmp_path / "trajectories.jsonl").write_text(SHORT.to_json()[:50])
        (tmp_path / "metrics.csv").write_text(",".join(COLUMNS) + "\n0,0")


def test_the_code_of_an_environment_that_cannot_be_made(tmp_path):
    data = {"env": "skillsd_appworld:skillsd/AppWorld-v0", "env_kwargs": {"python": str(tmp_path / "nosuch")}}
    write_record(tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"data": data}))
    append(tmp_path / "trajectories.jsonl", [replace(SHORT, turns=(Turn("done", "for x in y:\n    print('<b>')", 0.0),))])
    page, text = written(tmp_path)
    assert '<span class="k">for</span>' in page and "```python\nfor x in y:\n" in text and "<b>" not in page


def test_the_chosen_trajectories_follow_the_rule():
    def frame(*rows: tuple[int, int, int | None]) -> pd.DataFrame:
        made = pd.DataFrame(rows, columns=["iteration", "success", "skill_id"])
        return made.astype({"success": bool, "skill_id": "Int64"})

    assert choose(frame((0, 1, None))) == [0]
    assert choose(frame(*[(0, 0, None)] * 7)) == [*range(7)]
    many: list[tuple[int, int, int | None]] = [(i // 20, 0, None) for i in range(100)]
    found = choose(frame(*many))
    assert {0, 80} <= set(found) and len(found) == TRAJECTORIES and max(b - a for a, b in pairwise(found)) <= 20
    many[17], many[50], many[55], many[90] = (0, 1, None), (2, 1, 3), (2, 1, 4), (4, 0, 5)
    found = choose(frame(*many))
    assert {0, 17, 55, 80, 90} <= set(found) and len(found) == TRAJECTORIES == len(set(found)) and found == sorted(found)
    assert 50 not in found  # of the kind that is in neither, the last one


@pytest.mark.parametrize(("args", "message"), [(["--nosuch"], "unrecognized arguments"), (["-o", "FILE"], "-o: FILE is a file")])
def test_bad_flags_are_refused(folder, args, message, monkeypatch):
    monkeypatch.chdir(folder)
    Path("FILE").touch()
    with pytest.raises(ConfigError, match=message):
        report([str(folder), *args], lambda: CHECKS)
    assert not (folder / "report").exists()


def test_the_command_writes_a_report(tmp_path, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr("skillsd.doctor.rows", lambda network: asked.append(network) or CHECKS)
    assert cli.main(["report", str(tmp_path)]) == 2 and "is no run folder" in capsys.readouterr().err
    write_record(tmp_path)
    (tmp_path / "config.yaml").touch()
    assert cli.main(["report", str(tmp_path)]) == 0 and capsys.readouterr().err == "" and asked == [False]
    assert (tmp_path / "report" / "report.md").read_text().startswith(f"# Run {tmp_path.name}\n")
