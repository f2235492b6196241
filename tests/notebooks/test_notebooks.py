"""The notebooks run from top to bottom on what a short run left, and git holds no results of theirs."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
NAMES = [
    "01_first_run", "02_reading_a_trajectory", "03_exploring_skills", "04_your_own_environment", "05_your_own_objective",
    "06_finetuning_qwen3_4b",
]  # fmt: skip
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}, "language_info": {"name": "python"},
}  # fmt: skip
PRIVATE = re.compile(r"import .*\b_\w|\w\._[a-z]|skillsd\._")
PLOTS = dict(zip(NAMES, (3, 3, 4, 1, 2, 0), strict=True))


def executed(name: str, folder: Path, **variables: str) -> dict[str, Any]:
    """The notebook with its outputs; any error in it is raised."""
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    client.execute(env=os.environ | {"HF_HUB_OFFLINE": "1"} | variables)
    nbformat.validate(notebook)
    return notebook


def check(notebook: dict[str, Any], name: str) -> None:
    """Each cell has run, none has warned, and the pictures are there."""
    outputs = [o for cell in notebook["cells"] for o in cell.get("outputs", [])]
    said = [line for o in outputs if o.get("name") == "stderr" for line in o["text"].splitlines()]
    assert [line for line in said if "nobody will see a skill" not in line] == []  # true of two iterations, which show that all works
    assert all(cell["execution_count"] for cell in notebook["cells"] if cell["cell_type"] == "code")
    assert sum("image/png" in o.get("data", {}) for o in outputs) == PLOTS[name]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The run that the first notebook makes, which the next two read; and that notebook."""
    folder = tmp_path_factory.mktemp("notebooks")
    run = folder / "first"
    return run, executed(NAMES[0], folder, SKILLSD_FIRST_RUN=str(run))


@pytest.mark.slow
def test_the_first_notebook_makes_a_run(first):
    run, notebook = first
    check(notebook, NAMES[0])
    assert len((run / "trajectories.jsonl").read_text().splitlines()) == 12 * 6 * 4


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES[1:3])
def test_notebooks_that_read_a_run(first, tmp_path, name):
    check(executed(name, tmp_path, SKILLSD_RUN=str(first[0])), name)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES[3:])
def test_notebooks_that_make_their_own(tmp_path, name):
    check(executed(name, tmp_path), name)
    assert not list(tmp_path.iterdir())  # they write elsewhere


def test_these_are_all():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_git_holds_outputs_that_a_page_can_show(name):
    text = (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8")
    assert len(text) < 150_000 and not re.search(r"/tmp/|/home/|/root/", text)
    notebook = json.loads(text)
    nbformat.validate(nbformat.from_dict(notebook))
    assert notebook["metadata"] == METADATA
    check(notebook, name)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert code and all(cell["metadata"] == {} for cell in code)
    opening = "".join(notebook["cells"][0]["source"])
    assert re.match(rf"# {int(name[:2])}\. \w.*\n\n\*\*You learn\*\* ", opening), opening
    assert not [line for cell in code for line in cell["source"] if PRIVATE.search(line)]
