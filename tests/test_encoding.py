"""Files are UTF-8, whatever the locale says."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OTHERS = ("os", "engine", "session", "self")
"""What else has a method `open`."""
LATIN = "Löse es, 漢字"
READ = """
import sys
from pathlib import Path
from skillsd.config_file import read_config
from skillsd.policy.load import _template
from skillsd.tasks import read_tasks
said = [read_config(sys.argv[1])["instruction"], _template(sys.argv[2]), read_tasks(Path(sys.argv[3]), "train", "x")[0].task_id]
assert said == [said[0]] * 3 and [ord(c) for c in said[0]] == list(map(int, sys.argv[4].split())), ascii(said)
"""


def without_encoding(tree: ast.AST) -> Iterator[ast.Call]:
    """Calls that open a file or a pipe as text in the encoding of the locale."""
    for n in ast.walk(tree):
        if not isinstance(n, ast.Call) or {"encoding", None} & {k.arg for k in n.keywords}:
            continue
        method = isinstance(n.func, ast.Attribute)
        name = n.func.attr if isinstance(n.func, ast.Attribute) else getattr(n.func, "id", "")
        if name in ("read_text", "write_text") or (
            name in ("run", "Popen") and any(k.arg in ("text", "universal_newlines") for k in n.keywords)
        ):
            yield n
        if name == "open" and not (isinstance(n.func, ast.Attribute) and getattr(n.func.value, "id", "") in OTHERS):
            mode = next((k.value for k in n.keywords if k.arg == "mode"), (n.args[1 - method :] or [ast.Constant("r")])[0])
            if isinstance(mode, ast.Constant) and isinstance(mode.value, str) and "b" not in mode.value:
                yield n


@pytest.mark.parametrize("folder", ["src", "envs", "benchmarks"])
def test_every_text_file_names_its_encoding(folder):
    code = "open(a); p.open('w'); p.read_text(); run(x, text=True); p.open('rb'); p.open('w', encoding='utf-8')"
    assert [ast.unparse(n) for n in without_encoding(ast.parse(code))] == code.split("; ")[:4]
    found = [
        f"{path}:{n.lineno}: {ast.unparse(n)}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for n in without_encoding(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert found == []


def test_a_locale_that_is_not_utf8_changes_no_text(tmp_path):
    """A configuration, a chat template and a file of tasks are read as they were written."""
    files = {"a.yaml": f'instruction: "{LATIN}"\n', "a.jinja": LATIN, "a.jsonl": f'{{"task_id": "{LATIN}", "split": "train"}}\n'}
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    env = {**os.environ, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C", "PYTHONPATH": os.pathsep.join(sys.path)}
    args = [*(str(tmp_path / name) for name in files), " ".join(str(ord(c)) for c in LATIN)]
    completed = subprocess.run([sys.executable, "-c", READ, *args], env=env, capture_output=True, encoding="utf-8", errors="replace")
    assert completed.returncode == 0, completed.stderr
