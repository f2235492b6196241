"""What can be said without the engine: texts, places, and errors of the arguments."""

from __future__ import annotations

import json

import pytest

from skillsd_appworld import AppWorldEnv, paths
from skillsd_appworld.explorer import Explorer
from skillsd_appworld.prompts import DEFAULTS, FIELDS, check_prompts, code_of, printable


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("```python\nprint(1)\n```", "print(1)"),
        ("First\n```python\na = 1\n```\nthen\n```python\nb = 2\n```\nDone.", "b = 2"),
        ("```py\r\nprint(1)\r\n```", "print(1)"),
        ("```Python \nfor x in y:\n    print(x)\n```", "for x in y:\n    print(x)"),
        ("it was cut off here: ```python\nprint(1)\nprint(", "print(1)\nprint("),
        ("print(1)", None),
        ("```\nprint(1)\n```", None),
        ("```json\n{}\n```", None),
        ("```python\n\n```", None),
        ("```python\nprint(1)\n```\n```python\n  \n```", None),
        ("", None),
    ],
)
def test_the_action_is_the_last_python_block(answer, code):
    assert code_of(answer) == code


def test_actions_are_python_and_there_is_no_picture():
    language = AppWorldEnv.metadata["action_language"]
    assert code_of(f"```{language}\nprint(1)\n```") == "print(1)" and not hasattr(AppWorldEnv, "picture")


def test_the_instruction_says_what_it_must():
    text = DEFAULTS["instruction"].format(turns=40, max_chars=6000)
    calls = [text.index(f"apis.api_docs.{name}(") for name in ("show_app_descriptions", "show_api_descriptions", "show_api_doc")]
    example, rules = text.index("An example"), text.index("Rules:")
    assert calls == sorted(calls) and calls[-1] < example < rules
    assert code_of(text[example:rules]) == "apis.supervisor.complete_task(answer=23)"
    numbered = [line for line in text[rules:].splitlines() if line[:1].isdigit()]
    assert [int(line.partition(".")[0]) for line in numbered] == list(range(1, len(numbered) + 1)) and len(numbered) >= 8
    assert "40 turns" in text and "6000 characters" in text and "costs a turn" in text


@pytest.mark.parametrize("name", DEFAULTS)
def test_every_text_can_be_replaced(name):
    template = " ".join(f"{{{field}}}" for field in FIELDS[name])
    assert check_prompts({name: template}) == {**DEFAULTS, name: template}
    for bad in ("{no_such}", f"{{{FIELDS[name][0]}:>50000000}}", f"{{{FIELDS[name][0]}!r}}"):
        with pytest.raises(ValueError, match=rf"prompts\['{name}'\]"):
            check_prompts({name: bad})


def test_an_unknown_text_is_named():
    with pytest.raises(ValueError, match="prompts: unknown key 'intro'; use instruction, task"):
        check_prompts({"intro": ""})


def test_printable():
    assert printable("a\r\nb\tc\x00\x1b[0m\ud800é\U0001f600") == "a\nb\tc\ufffd\ufffd[0m?é\U0001f600"


# -- places -----------------------------------------------------------------------------------------------------------------


def root(folder, tiny):
    (folder / "data" / "tasks" / "x_1").mkdir(parents=True)
    (folder / "data" / "datasets").mkdir()
    for name in ("train", "dev"):
        (folder / "data" / "datasets" / f"{name}.txt").write_text("x_1\n")
    if tiny:
        (folder / paths.MARKER).write_text(json.dumps({"kind": "tiny AppWorld-format tasks"}))
    return folder


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch, request):
    for name in ("APPWORLD_ROOT", "APPWORLD_PYTHON", "SKILLSD_APPWORLD"):
        monkeypatch.delenv(name, raising=False)


def test_neither_kind_of_tasks_is_taken_for_the_other(tmp_path, monkeypatch):
    tiny, official = root(tmp_path / "a", True), root(tmp_path / "b", False)
    assert paths.find_root("tiny", str(tiny)) == tiny and paths.find_root("official", str(official)) == official
    assert paths.split_names(official) == ["dev", "train"]
    with pytest.raises(ValueError, match="holds tiny AppWorld-format tasks, not AppWorld's own"):
        paths.find_root("official", str(tiny))
    with pytest.raises(ValueError, match="holds no tiny AppWorld-format tasks"):
        paths.find_root("tiny", str(official))
    monkeypatch.setenv("APPWORLD_ROOT", str(official))
    assert paths.find_root("official") == official
    monkeypatch.setenv("SKILLSD_APPWORLD", str(tmp_path / "nothing"))
    with pytest.raises(FileNotFoundError, match="make appworld"):  # APPWORLD_ROOT is no place for tiny tasks
        paths.find_root("tiny")


def test_a_damaged_root_is_not_taken_for_whole(tmp_path):
    tiny = root(tmp_path / "a", True)
    (tiny / "data" / "datasets" / "dev.txt").write_text("x_1\nx_2\n")
    with pytest.raises(ValueError, match=r"is incomplete, 1 of its 3 tasks are not there \(x_2, ...\): run `make appworld`"):
        paths.find_root("tiny", str(tiny))


def test_what_is_missing_says_how_to_get_it(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"appworld download data.*APPWORLD_ROOT"):
        paths.find_root("official")
    monkeypatch.setenv("SKILLSD_APPWORLD", str(tmp_path))
    for find in (paths.find_python, lambda: paths.find_root("tiny")):
        with pytest.raises(FileNotFoundError, match="make appworld"):
            find()
    monkeypatch.setenv("APPWORLD_PYTHON", str(tmp_path / "python"))
    with pytest.raises(FileNotFoundError, match="APPWORLD_PYTHON: AppWorld's interpreter is not at"):
        paths.find_python()
    with pytest.raises(ValueError, match="word memory"):
        paths.find_root("tiny", str(root(tmp_path / "in_memory", True)))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"source": "real"}, "source = 'real'"),
        ({"completion": "most"}, "completion = 'most'"),
        ({"max_turns": 0}, "max_turns = 0"),
        ({"max_chars": 5}, "max_chars = 5"),
        ({"limit": 0}, "limit = 0"),
        ({"turn_seconds": 1.5}, "turn_seconds = 1.5"),
        ({"memory_mb": 1}, "memory_mb = 1"),
        ({"forks": True}, "forks = True"),
        ({"render_mode": "human"}, "render_mode = 'human'"),
        ({"prompts": {"x": ""}}, "prompts: unknown key"),
    ],
)
def test_a_wrong_argument_is_named(tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        AppWorldEnv(**{"root": str(root(tmp_path / "a", True)), "python": __file__, **kwargs})


def test_the_explorer_survives_any_output():
    for observation in ("", "Output:\n```\nExecution failed.\n```", "Output:\n```\n{}\n```", "Output:\n```\n[1]\n```", "no code"):
        agent = Explorer()
        assert all(code_of(agent.act(observation)) for _ in range(8)) and "complete_task" in agent.act(observation)
