"""An episode as a GIF: its frames, its captions, and what it refuses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import gymnasium
import numpy as np
import pytest
from PIL import Image

from skillsd.analysis.gif import LAST_MS, TURN_MS, Gif
from skillsd.errors import ConfigError

RED, GREEN, BLUE = (np.full((40, 120, 3), rgb, np.uint8) for rgb in ((200, 0, 0), (0, 200, 0), (0, 0, 200)))


class Painter(gymnasium.Env):
    """Draws the picture that is named; it counts what was not closed."""

    alive = 0
    shows: dict[str, Any] = {
        "red": RED,
        "green": GREEN,
        "tall": np.concatenate([BLUE, BLUE]),
        "float": RED / 255,
        "flat": RED[0],
        "": RED[:0],
    }

    def __init__(self) -> None:
        Painter.alive += 1

    def picture(self, observation: str) -> Any:
        return self.shows[observation] if observation != "dark" else None

    def close(self) -> None:
        Painter.alive -= 1


@pytest.fixture
def data(monkeypatch):
    gymnasium.register("skillsd_test/Painter-v0", Painter)
    monkeypatch.setattr(Painter, "alive", 0)
    yield SimpleNamespace(env_id="skillsd_test/Painter-v0", env_kwargs={})
    del gymnasium.registry["skillsd_test/Painter-v0"]
    assert Painter.alive == 0


def frames(path):
    with Image.open(path) as gif:
        out = []
        for i in range(gif.n_frames):
            gif.seek(i)
            out.append((np.asarray(gif.convert("RGB")), gif.info["duration"]))
        return out, gif.info["loop"]


def test_frames_and_captions(data, tmp_path, capsys):
    path = tmp_path / "new" / "a.GIF"
    with Gif(str(path), data) as gif:
        gif.add("dark", "nothing to see yet")
        gif.add("red", "turn 1: up")
        gif.add("green", "turn 2: " + "down\n" * 100)
        gif.add("dark", "turn 3: \x1b[2J\ud800")
        gif.add("tall", "solved")
        gif.save()
    assert [p.name for p in path.parent.iterdir()] == ["a.GIF"] and capsys.readouterr().out == f"gif: {path}\n"
    shown, loop = frames(path)
    assert loop == 0 and [ms for _, ms in shown] == [TURN_MS] * 3 + [LAST_MS]
    assert len({image.shape for image, _ in shown}) == 1
    for (image, _), colour in zip(shown, (RED, GREEN, GREEN, BLUE), strict=True):
        assert np.abs(image[:40].astype(int) - colour).max() < 8
        strip = image[80:]
        assert (strip < 100).all(2).any() and (strip[:, -4:] > 200).all()  # a caption, which ends before the edge
    assert (shown[0][0][40:80] > 240).all()


def test_without_a_path_nothing_is_written(data):
    with Gif(None, data) as gif:
        gif.add("no such", "")
        gif.save()
    assert Painter.alive == 0 and gif.env is None


@pytest.mark.parametrize("name", ["a.png", "gif", "folder.gif", ".gif"])
def test_the_name_ends_in_gif(data, tmp_path, name):
    (tmp_path / "folder.gif").mkdir()
    with pytest.raises(ConfigError, match=r"^gif is .*: give the name of a file that ends in \.gif\.$"):
        Gif(str(tmp_path / name), data)


def test_an_environment_that_does_not_draw(data, tmp_path, monkeypatch):
    monkeypatch.delattr(Painter, "picture")
    with pytest.raises(ConfigError, match=r"^gif: skillsd_test/Painter-v0 offers no picture\(observation\) to draw: leave out --gif\.$"):
        Gif(str(tmp_path / "a.gif"), data)


@pytest.mark.parametrize("observation", ["raises", "float", "flat", ""])
def test_a_picture_of_another_shape_is_refused(data, tmp_path, observation):
    with Gif(str(tmp_path / "a.gif"), data) as gif, pytest.raises(ConfigError, match=r"Painter-v0: picture\(\) failed \(raised: "):
        gif.add(observation, "")


def test_nothing_to_show_and_nowhere_to_write(data, tmp_path):
    (tmp_path / "file").write_text("")
    with Gif(str(tmp_path / "a.gif"), data) as gif:
        with pytest.raises(ConfigError, match="no observation of this episode shows a picture"):
            gif.save()
        gif.path = tmp_path / "file" / "a.gif"
        gif.add("red", "")
        with pytest.raises(ConfigError, match=r"^gif: .* cannot be written"):
            gif.save()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]
