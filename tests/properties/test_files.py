"""A damaged file of a run is refused in one line that names it."""

from argparse import ArgumentError

import pytest

from skillsd.callbacks.log import COLUMNS
from skillsd.callbacks.panel import read_panel
from skillsd.errors import ConfigError
from skillsd.study.results import read_metrics
from skillsd.study.settings import read_settings


@pytest.mark.parametrize("content", [b"", b"{", b"\xc0]", b"-1", b"[1]", b"[" * 100_000])
def test_a_damaged_panel_is_named(tmp_path, content):
    (tmp_path / "panel.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"trainer\.default_root_dir: .*panel\.json is damaged"):
        read_panel(tmp_path)


@pytest.mark.parametrize("column", ["reward/success", "teacher/k3", "time/rollout_s"])
def test_metrics_that_are_no_numbers(tmp_path, column):
    row = dict.fromkeys(COLUMNS, "0") | {column: "\x7f.0"}
    (tmp_path / "metrics.csv").write_text(",".join(COLUMNS) + "\n" + ",".join(row.values()) + "\n")
    with pytest.raises(ConfigError, match=r"folder: .*metrics\.csv holds what is no number"):
        read_metrics(tmp_path)


@pytest.mark.parametrize("key", ["set", "controls", "methods", "configs", "workers"])
def test_a_study_file_with_an_empty_key(tmp_path, key):
    study = "configs: [sokoban]\nmethods: {grpo: []}\n".replace(f"{key}:", f"# {key}:")
    (tmp_path / "study.yaml").write_text(f"{study}{key}:\n")
    with pytest.raises((ConfigError, ArgumentError), match=key):
        read_settings(["-c", str(tmp_path / "study.yaml")])


def test_a_study_file_of_other_bytes(tmp_path):
    (tmp_path / "study.yaml").write_bytes(b"seeds: [1]\n# \x80\n")
    with pytest.raises(ConfigError, match="config: the study file is no UTF-8 text"):
        read_settings(["-c", str(tmp_path / "study.yaml")])
