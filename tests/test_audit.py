""".ci/audit with a stand-in for pip-audit: it fails for what is found, and for nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

AUDIT = Path(__file__).parents[1] / ".ci" / "audit"
CLEAN = {"name": "a", "version": "1", "vulns": []}
FOUND = {"name": "b", "version": "2", "vulns": [{"id": "PYSEC-1", "fix_versions": ["3"]}, {"id": "PYSEC-2", "fix_versions": []}]}
SKIPPED = {"name": "c", "skip_reason": "not found"}
pytestmark = pytest.mark.skipif(not AUDIT.is_file(), reason="an sdist has no .ci/")


def audit(tmp_path: Path, body: str, **more: str) -> tuple[int, str]:
    (tmp_path / "pip_audit.py").write_text(f"import sys, time\nif __name__ == '__main__':\n    {body}\n")
    env = {"PATH": os.environ["PATH"], "PYTHON": sys.executable, "PYTHONPATH": str(tmp_path), **more}
    completed = subprocess.run([str(AUDIT)], env=env, capture_output=True, text=True, timeout=60)
    return completed.returncode, completed.stdout + completed.stderr


def reports(*rows: object) -> str:
    return f"open(sys.argv[sys.argv.index('-o') + 1], 'w').write({json.dumps({'dependencies': rows})!r}); sys.exit(1)"


def test_a_known_vulnerability_fails_the_audit(tmp_path):
    code, out = audit(tmp_path, reports(CLEAN, FOUND, SKIPPED))
    assert code == 1 and "2 of 3 pinned packages looked up, 2 known" in out
    assert "b 2: PYSEC-1, fixed in 3" in out and "b 2: PYSEC-2, fixed in no release" in out
    assert audit(tmp_path, reports(CLEAN)) == (0, "dependency audit: 1 of 1 pinned packages looked up, 0 known vulnerabilities\n")


@pytest.mark.parametrize(
    ("body", "more", "why"),
    [
        ("sys.exit('no route to host')", {}, "no route to host"),
        ("sys.exit()", {}, ""),
        (reports(SKIPPED), {}, "the index knows none of the packages"),
        ("time.sleep(30)", {"AUDIT_SECONDS": "1"}, "no answer within 1 s"),
        ("", {"PYTHON": "/no/such/python"}, "pip-audit is not installed"),
    ],
)
def test_an_index_that_cannot_be_asked_does_not_fail_the_audit(tmp_path, body, more, why):
    code, out = audit(tmp_path, body or "pass", **more)
    assert code == 0 and out.startswith("dependency audit: left out (") and why in out and out.count("\n") == 1, out
