"""Any YAML over an experiment: it is taken, or refused in one line that names a key; never a traceback."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from tests.properties.profile import examples

import skillsd.cli.launch
from skillsd import conf_dir
from skillsd.rollout import RolloutSettings

CONF: dict[str, Any] = yaml.safe_load((conf_dir() / "sokoban.yaml").read_text())


def _paths(node: Any, at: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if not isinstance(node, dict):
        return []
    return [path for key, value in node.items() for path in ((*at, key), *_paths(value, (*at, key)))]


PATHS = _paths(CONF) + [("data", "rollout", key) for key in RolloutSettings.__dataclass_fields__]
ODD = ["", "nosuch", "init_args", "class_path", "0", "é"]
CLASSES = ["os.system", "nosuch.X", "skillsd.objective.FullReverseKL", "skillsd.objective.Gate", "skillsd.skills.NoContext", 1, None, ""]
SCALARS = [None, True, 0, 1, -1, 1.5, float("nan"), float("inf"), 10**30, "x", "", "null", "1e400", "é\x00", "-", "${x}", "${..}", "a.b"]
OBJECTS = st.fixed_dictionaries({"class_path": st.sampled_from(CLASSES), "init_args": st.sampled_from([{}, {"a": 1}, 3])})
KEYS = st.sampled_from([*ODD, "lengths", "min_reward"])
VALUES = st.recursive(
    st.sampled_from(SCALARS) | OBJECTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=4,
)
ENTRIES = st.lists(st.tuples(st.sampled_from(PATHS), st.none() | st.sampled_from(ODD), VALUES), min_size=1, max_size=2)


def overlay(entries: list[tuple[tuple[str, ...], str | None, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for path, further, value in entries:
        node = made
        for key in (path if further is None else (*path, further))[:-1]:
            inner = node.setdefault(key, {})
            node[key] = node = inner if isinstance(inner, dict) else {}
        node[path[-1] if further is None else further] = value
    return made


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Text of an overlay -> exit code and what was said; everything is built, nothing is run."""

    class Built(skillsd.cli.launch.CLI):
        def _run_subcommand(self, subcommand: str) -> None:
            pass

    monkeypatch.setattr(skillsd.cli.launch, "CLI", Built)
    monkeypatch.chdir(tmp_path)

    def call(text: str | bytes) -> tuple[int, str]:
        file = tmp_path / "overlay.yaml"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        capsys.readouterr()
        code = skillsd.cli.main(["fit", "-c", "sokoban", "-c", str(file), f"--trainer.default_root_dir={tmp_path / 'run'}"])
        return code, capsys.readouterr().err

    return call


def check(code: int, said: str) -> None:
    assert code in (0, 2)
    if code == 2:
        assert re.fullmatch(r"error: .+\n", said), said


def names(said: str, entries: list[tuple[tuple[str, ...], str | None, Any]]) -> bool:
    """True if a line names in full a key that was given, or the one above it (`env_kwargs` for all below: what is there is not ours)."""
    for path, further, _ in entries:
        given = path if further is None else (*path, further)
        above = given[: 2 if "env_kwargs" in given else -1]
        while above and above[-1] in ("init_args", "class_path"):
            above = above[:-1]
        if any(key and re.search(rf"(?<![\w.])(fit\.)?{re.escape('.'.join(key))}(?!\w)", said) for key in (given, above)):
            return True
    return 'Empty nested key: ""' in said  # it is named alone


@pytest.mark.filterwarnings("ignore")
@examples(8)
@given(ENTRIES)
def test_any_value_is_taken_or_refused_with_its_key(run, entries):
    code, said = run(yaml.safe_dump(overlay(entries), allow_unicode=True))
    check(code, said)
    assert code == 0 or names(said, entries), said


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("class_path", ["os.system", "skillsd.objective.FullReverseKL"])
@pytest.mark.parametrize("key", ["model.policy.lora", "model.policy", "model.objective", "data.rollout"])
def test_another_class_for_a_dataclass_is_refused(run, key, class_path):
    code, said = run(yaml.safe_dump(overlay([(tuple(key.split(".")), "class_path", class_path)])))
    assert code == 2 and said.startswith(f"error: {key}: ") and class_path in said
    assert "set_parsing_settings" not in said  # the fix is the user's, not the parser's


TOKENS = ["\n", ": ", "- ", " ", "\t", *"trainer model data : { } [ ] &a *a | ' # !!python/name:os.system ${ ? % <<".split(" ")]


@pytest.mark.filterwarnings("ignore")
@examples(8)
@given(st.lists(st.sampled_from(TOKENS) | st.text(max_size=3), max_size=10).map("".join))
def test_any_text_is_taken_or_refused_in_one_line(run, text):
    check(*run(text))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "text", [b"\xff", b"trainer: {max_epochs: ${", b"skills: {template: '${'}", b"a: &x [*x]", b"- 1", b"3", b"? [1]\n: 2"]
)
def test_a_file_that_is_no_configuration_is_refused(run, text):
    code, said = run(text)
    check(code, said)
    assert code == 2
