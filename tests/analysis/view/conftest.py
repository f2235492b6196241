"""Two runs to look at: a real one of a tiny random model, and one whose agents and environment wrote scripts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from threading import Thread

import pytest
from tests.analysis.folders import SHORT, append, write_metrics
from tests.test_cli import Run as Fit
from werkzeug.serving import make_server

from skillsd.analysis.view.app import create_app
from skillsd.analysis.view.site import Site
from skillsd.files.run_folder import write_record
from skillsd.skills import Skill, SkillBank
from skillsd.trajectory import Turn

TOKEN = "s3cret"
EVIL = "</pre><script>window.pwned=1</script><img src=x onerror='window.pwned=1'>\"'><svg onload=window.pwned=1>{{ 7*7 }}\ud800\u202e"


def hostile(folder: Path) -> Path:
    """Every text that comes from outside is EVIL: tasks, observations, actions, failures, skills, the panel's levels."""
    folder.mkdir()
    write_record(folder)
    (folder / "config.yaml").write_text(json.dumps({"seed_everything": 7, "data": {"env": EVIL.encode(errors="replace").decode()}}))
    rows = [
        replace(SHORT, iteration=i, member=m, task_id=EVIL, instruction=EVIL, skill_id=1 if i else None, reward=float(m), success=bool(m),
                turns=(Turn(EVIL, EVIL, 0.0), Turn('{"a": "<script>window.pwned=1</script>"}', f"```python\n{EVIL}\n```", 1.0)),
                final_observation=EVIL)
        for i in range(2) for m in range(2)
    ]  # fmt: skip
    rows.append(replace(rows[-1], member=2, finish_reason="failed", failure=f"raised: {EVIL}", success=False, reward=0.0))
    append(folder / "trajectories.jsonl", rows)
    write_metrics(folder, [{"reward/success": "0.5"}] * 2)
    clean = EVIL.replace("\ud800", "")
    with SkillBank(folder / "bank.sqlite") as bank:
        bank.insert([Skill(clean, clean, clean, clean), Skill(clean + " a", clean, clean + " b", "another")], 0)
        bank.record_use(1, 1, reward=0.5, gap=0.25)
    return folder


@pytest.fixture(scope="package")
def site(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[[str], str]) -> Iterator[Site]:
    """`real` and `hostile`."""
    folder = tmp_path_factory.mktemp("view")
    fit = Fit(folder, tiny_model("qwen3"), None)
    assert fit("--trainer.max_epochs=2") == 0
    with Site([fit.folder, hostile(folder / "hostile")]) as site:
        site.runs = dict(zip(("real", "hostile"), site.runs.values(), strict=True))
        for name, opened in site.runs.items():
            opened.name = name
        yield site


@pytest.fixture(scope="package")
def address(site: Site) -> Iterator[str]:
    """Where it is served."""
    server = make_server("127.0.0.1", 0, create_app(site, TOKEN), threaded=True)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/{TOKEN}"
    server.shutdown()
    thread.join()
    server.server_close()
