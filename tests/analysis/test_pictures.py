"""What an environment draws, and that one which does not, or is not here, draws nothing."""

from __future__ import annotations

from contextlib import closing
from io import BytesIO
from typing import Any

import gymnasium
import numpy as np
import pytest
import yaml
from PIL import Image

from skillsd.analysis import Run
from skillsd.analysis.pictures import Pictures
from skillsd.environment import TextEnv
from skillsd.files.run_folder import write_record

SOKOBAN = "skillsd_sokoban:skillsd/Sokoban-v0"


@pytest.fixture
def pictures(tmp_path):
    def pictures(env: Any, **data: Any) -> Any:
        write_record(tmp_path)
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({"data": {"env": env, **data}}))
        return closing(Pictures(Run(tmp_path)))

    return pictures


def test_a_board_is_drawn_by_the_environment(pictures):
    kwargs = {"size": 6, "boxes": 1, "separator": " "}
    env = gymnasium.make(SOKOBAN, render_mode="rgb_array", **kwargs)
    observation, _ = env.reset(seed=3)
    with pictures(SOKOBAN, env_kwargs={"size": 5, "boxes": 1}, env_overrides={SOKOBAN: kwargs, "other:Env-v0": {"no": "such"}}) as drawn:
        png = drawn.png(observation)
        assert (np.asarray(Image.open(BytesIO(png))) == env.render()).all() and drawn.language == ""
        assert drawn.png("no board") is None
    env.close()


def test_the_language_of_actions(pictures):
    with pictures("skillsd_appworld:skillsd/AppWorld-v0") as drawn:
        assert drawn.png("output") is None
        assert drawn.language == "python"  # also where AppWorld is not set up


@pytest.mark.parametrize(
    ("env", "data"), [("no_such_module:Env-v0", {}), (SOKOBAN, {"env_kwargs": {"size": 1}}), (None, {}), (SOKOBAN, {"env_kwargs": 3})]
)
def test_an_environment_that_cannot_be_made(pictures, env, data):
    with pictures(env, **data) as drawn:
        assert drawn.png("######") is None and drawn.language == ""


class Failing(gymnasium.Env):
    def picture(self, observation):
        if observation == "raise":
            raise ValueError("no")
        return {"wrong": np.zeros((2, 2)), "right": np.zeros((2, 2, 3), np.uint8)}[observation]


@pytest.mark.parametrize("error", [ImportError("libGL.so.1"), RuntimeError("no display"), SystemError()])
def test_an_environment_that_fails_to_begin(pictures, monkeypatch, error):
    def fail(*_: Any) -> Any:
        raise error

    monkeypatch.setattr("skillsd.analysis.pictures.make_env", fail)
    with pictures(SOKOBAN) as drawn:
        assert drawn.png("######") is None and drawn.language == ""


def test_an_environment_that_fails_to_draw(pictures, monkeypatch):
    monkeypatch.setattr("skillsd.analysis.pictures.make_env", lambda *_: TextEnv(Failing()))
    with pictures("x:Failing-v0") as drawn:
        assert drawn.png("raise") is None and drawn.png("wrong") is None and drawn.png("right").startswith(b"\x89PNG")
