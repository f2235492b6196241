"""The pages' own code and commands: what a reader copies must run."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import gymnasium
import pytest
import yaml

from skillsd.analysis import Run
from skillsd.cli import COMMANDS, main
from skillsd.config_errors import leaves
from skillsd.metrics import METRICS
from skillsd.tasks import read_tasks
from skillsd.testing import check_text_env

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page in a language."""
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.S)


@pytest.fixture
def game(tmp_path, monkeypatch) -> Path:
    """A folder with the files that docs/your-environment.md and docs/own-tasks.md tell a reader to write."""
    for page, language, name in (
        ("your-environment.md", "python", "guess.py"),
        ("your-environment.md", "yaml", "guess.yaml"),
        ("own-tasks.md", "json", "numbers.jsonl"),
    ):
        (tmp_path / name).write_text(blocks(page, language)[0])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_game_keeps_the_contract(game):
    check_text_env(gymnasium.make("guess:Guess-v0"))
    check_text_env(gymnasium.make("guess:Guess-v0", max_turns=2), actions=["3", "nothing"])
    assert len((game / "guess.py").read_text().splitlines()) <= 45


def test_the_game_is_played_from_its_configuration(game, capsys):
    assert main(["play", "-c", "guess.yaml", "--policy", "oracle", "--level", "3"]) == 0
    assert "Find my number" in (out := capsys.readouterr().out) and "success True" in out
    assert main(["play", "-c", "guess.yaml", "--data.tasks_file", "numbers.jsonl", "--task", "high", "--policy", "oracle"]) == 0
    assert "> 19" in capsys.readouterr().out
    assert [t.options for t in read_tasks("numbers.jsonl", "train", "train_split")] == [{"number": 10}, {"number": 2}]


def test_classes_of_one_s_own_train(tmp_path, monkeypatch):
    """docs/methods.md: a loss, a gate and a summariser."""
    (tmp_path / "mine.py").write_text(blocks("methods.md", "python")[0])
    (tmp_path / "mine.yaml").write_text(blocks("methods.md", "yaml")[0])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    levels = ["--data.env_kwargs.splits.train.short=4", "--data.env_kwargs.splits.test.short=1", "--data.batch_tasks=4"]
    assert main(["fit", "-c", "sokoban", "-c", "mine.yaml", "--trainer.max_epochs=2", *levels]) == 0
    run = Run("runs/sokoban")
    assert run.metrics["teacher/skill_share"].iloc[1] > 0 and run.metrics["loss/distillation"].iloc[1] != 0
    assert set(run.skills["success_analysis"]) == {"solved"}


def test_every_command_is_listed():
    listed = re.findall(r"^skillsd (\w+)", (DOCS / "commands.md").read_text(encoding="utf-8"), re.M)
    assert set(listed) == set(COMMANDS)


def links(page: Path) -> list[str]:
    """Where a page's links and pictures lead within the repository."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    found = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    return [link for link in found if not link.startswith(("http", "#", "mailto"))]


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted(DOCS.glob("*.md"))], ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for link in links(page):
        name, _, anchor = link.partition("#")
        target = page.parent / name
        assert target.exists(), link
        headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.M) if anchor else []
        titles = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
        assert not anchor or anchor in {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}, link


def test_every_column_of_the_record_is_explained():
    page = (DOCS / "results-of-a-run.md").read_text(encoding="utf-8").partition("## Every column")[2]
    assert re.findall(r"^\| `([a-z_]+/[a-z0-9_]+)` \|", page, re.M) == list(METRICS)


KEY = r"(?<![\w./])((?:model|data|trainer|teacher|skills|log|panel|checkpoint)\.[a-z_]+(?:\.[a-z_]+)*)(?![\w.]*\.md)"


def test_every_key_that_pages_name_is_one(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "-c", "sokoban", "--print_config"])
    known = {key for key, _ in leaves(yaml.safe_load(capsys.readouterr().out))}
    known |= {key.rpartition(".")[0] for key in known} | {f"model.objective.{name}" for name in ("loss", "advantage", "multiplier", "gate")}
    rows = [line for line in (DOCS / "coming-from.md").read_text().splitlines() if line.startswith("| `")]
    ours = [key for row in rows for key in re.findall(KEY, row.rsplit(" | ", 1)[1])]
    for page in ("your-model.md", "troubleshooting.md", "your-environment.md", "own-tasks.md", "glossary.md"):
        ours += re.findall(KEY, (DOCS / page).read_text(encoding="utf-8"))
    assert len(ours) > 80 and [key for key in ours if key not in known and not key.endswith(".md")] == []


def test_the_readme_has_the_experiment_of_the_page():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert blocks("your-environment.md", "yaml")[0] in text and len(text.splitlines()) <= 120


def messages() -> str:
    """Every text in the source, a line each; what is filled in stands as an ellipsis."""
    found = []
    for path in (ROOT / "src" / "skillsd").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[a-z]", "…", node.value))
    return "\n".join(found)


@pytest.mark.parametrize("page", ["troubleshooting.md", "your-model.md"])
def test_the_messages_that_a_page_explains_exist(page):
    rows = [row.split(" | ")[0] for row in (DOCS / page).read_text(encoding="utf-8").splitlines() if row.startswith("| `")]
    quoted = [text for row in rows for text in re.findall(r"`([^`]+)`", row) if len(re.findall(r"\b[a-z']{2,}\b", text)) >= 4]
    texts = messages()
    for text in quoted:
        pattern = re.sub(r"\\\.\\\.\\\.|\b[A-Z]\b|\b[A-Z]{2,}\b", ".*", re.escape(text))
        assert re.search(pattern.replace(r"\ .*", ".*"), texts), text
    assert len(quoted) > 3
