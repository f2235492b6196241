"""An episode as an animated GIF: what the environment draws of each observation, the turn and the action under it."""

from __future__ import annotations

from io import BytesIO
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from skillsd.bounded import visible
from skillsd.environment import TextEnv, make_env
from skillsd.errors import ConfigError
from skillsd.files.durable import write, writing
from skillsd.files.paths import read_path

TURN_MS, LAST_MS = 700, 2500
"""How long a frame stands, milliseconds."""
COMMENT = b"skillsd play"
"""In a file of ours, which may be made again."""
_TEXT, _PAD = 14, 5  # pixels
_MAX_CHARS = 200  # of a caption, before it is cut to the picture's width
_FOR_PALETTE = 32  # frames that the palette is made from


class Gif:
    """Frames of one episode. A context manager, for its environment; without a path it does nothing.

    Args:
        path: The file to write; null for none.
        data: The data module, whose environment draws.

    Raises:
        ConfigError: The path is no .gif file, or the environment offers no pictures.
    """

    def __init__(self, path: str | None, data: Any) -> None:
        self.path = None if path is None else read_path(path, "gif")
        self.env: TextEnv | None = None
        self.frames: list[tuple[NDArray[np.uint8], str]] = []
        if self.path is None:
            return
        if self.path.suffix.lower() != ".gif" or self.path.is_dir():
            raise ConfigError(f"gif is {visible(str(path))}: give the name of a file that ends in .gif.")
        self._check_replaceable()
        self.env = make_env(data.env_id, data.env_kwargs)
        if not self.env.offers("picture"):
            self.env.close()
            raise ConfigError(f"gif: {data.env_id} offers no picture(observation) to draw: leave out --gif.")

    def _check_replaceable(self) -> None:
        """Raises ConfigError if there is a file that is no animation of ours."""
        assert self.path is not None
        try:
            if not self.path.exists():
                return
            with Image.open(self.path) as image:
                ours = image.info.get("comment") == COMMENT and not self.path.is_symlink()
        except OSError:
            ours = False
        if not ours:
            raise ConfigError(f"gif: {visible(str(self.path))} is there, and was not made by this command: name another file.")

    def __enter__(self) -> Gif:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.env is not None:
            self.env.close()

    def add(self, observation: str, caption: str) -> None:
        """A frame; one whose observation shows nothing keeps the picture before it.

        Raises:
            ConfigError: The environment fails.
        """
        if self.env is None:
            return
        picture = self.env.picture(observation)
        if picture is None and self.frames:
            picture = self.frames[-1][0]
        if picture is not None:
            self.frames.append((picture, visible(" ".join(caption[:_MAX_CHARS].split()))))

    def save(self) -> None:
        """Write the file, whole or not at all, and say so.

        Raises:
            ConfigError: There is nothing to show, or the file cannot be written.
        """
        if self.path is None:
            return
        if not self.frames:
            raise ConfigError("gif: no observation of this episode shows a picture: leave out --gif.")
        out = BytesIO()
        first, *others = _compose(self.frames)
        times = [TURN_MS] * len(others) + [LAST_MS]
        first.save(out, format="gif", save_all=True, append_images=others, duration=times, loop=0, disposal=1, comment=COMMENT)
        with writing(self.path, "gif"):
            write(self.path, out.getbuffer())
        print(f"gif: {visible(str(self.path))}")


def _compose(frames: list[tuple[NDArray[np.uint8], str]]) -> list[Image.Image]:
    """Images of one size, with captions, on one palette: nothing flickers."""
    height, width = (max(picture.shape[i] for picture, _ in frames) for i in (0, 1))
    font = ImageFont.load_default(_TEXT)
    strip = _TEXT + 2 * _PAD
    out = []
    for picture, caption in frames:
        image = Image.new("RGB", (width, height + strip), "white")
        image.paste(Image.fromarray(picture))
        pen = ImageDraw.Draw(image)
        pen.text((_PAD, height + _PAD - 1), _fitting(caption, width - 2 * _PAD, pen, font), fill="black", font=font)
        out.append(image)
    some = [*out[:: 1 + len(out) // _FOR_PALETTE], out[-1]]
    palette = Image.fromarray(np.concatenate([np.asarray(image) for image in some])).quantize(dither=Image.Dither.NONE)
    return [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in out]


def _fitting(text: str, width: int, pen: ImageDraw.ImageDraw, font: Any) -> str:
    if pen.textlength(text, font) <= width:
        return text
    while text and pen.textlength(f"{text}...", font) > width:
        text = text[:-1]
    return f"{text}..."
