"""What a run folder from elsewhere may hold costs no more than it is worth."""

from __future__ import annotations

import pytest

from skillsd import cli
from skillsd.bounded import MAX_FILLED_CHARS, fill
from skillsd.config_file import MAX_CHARS, parse_config
from skillsd.errors import ConfigError
from skillsd.skills.skill import Skill


def nested(first: str, item: str) -> str:
    """Nine times nine aliases, nine levels deep; `item` wraps those of a level."""
    return f"a0: &a0 {first}\n" + "".join(f"a{i}: &a{i} {item.format(', '.join([f'*a{i - 1}'] * 9))}\n" for i in range(1, 10))


BOMBS = {
    "lists": nested("[x]", "[{}]"),
    "merges": nested("{x: 1}", "{{<<: [{}]}}"),
    "an alias within itself": "a: &a [*a]",
    "a chain of aliases": "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 100)),
    "brackets": "[" * 2000,
    "a long text": "a: " + "x" * MAX_CHARS,
}


@pytest.mark.parametrize("name", BOMBS)
def test_yaml_that_grows_is_refused(name):
    with pytest.raises(ConfigError, match=r"values|within|part of|characters"):
        parse_config(BOMBS[name], "config.yaml")


def test_a_file_that_one_only_looks_at_is_bounded(tmp_path, capsys):
    """`skillsd config` is for files that one does not trust yet."""
    (tmp_path / "bomb.yaml").write_text(BOMBS["lists"])
    assert cli.main(["config", "-c", str(tmp_path / "bomb.yaml")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_template_is_filled():
    values = {"text": "{completion}", "completion": 0.5, "turns": 3}
    assert fill("{text}: {completion:.0%} ({completion:.2f}) in {turns}, {{x}}", values) == "{completion}: 50% (0.50) in 3, {x}"


@pytest.mark.parametrize(
    "template",
    [
        "{text:>50000000}",
        "{text!r}",
        "{text.x}",
        "{text[0]}",
        "{text:{turns}}",
        "{turns:9}",
        "{completion:>9}",
        "{}",
        "{0}",
        "{nosuch}",
        "{",
        "}",
        "{text}" * 9,
    ],
)
def test_a_template_is_bare_names(template):
    with pytest.raises(ValueError, match=r".+"):
        fill(template, {"text": "x" * (MAX_FILLED_CHARS // 8), "completion": 0.5, "turns": 3})


def test_a_skill_s_template_is_bare_names():
    with pytest.raises(ValueError, match="success_analysis"):
        Skill("s", "m", "g").render("{success_analysis:>50000000}")
