"""What a run's environment offers for the eye: a picture of an observation, and the language of its actions."""

from __future__ import annotations

from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from skillsd.analysis.run import Run
from skillsd.errors import ConfigError
from skillsd.rollout import make_env


class Pictures:
    """Draws a run's observations, where its environment can.

    An environment may offer `picture(observation) -> [H, W, 3] uint8 or None` for its own observations, and name the language of its
    actions in `metadata["action_language"]`.

    Args:
        run: The run; an environment that cannot be made here (not installed, say) offers nothing.
    """

    def __init__(self, run: Run) -> None:
        self._env: Any = None
        data = run.config.get("data", {}).get("init_args", {})
        try:
            kwargs = {**(data.get("env_kwargs") or {}), **(data.get("env_overrides") or {}).get(data["env"], {})}
            self._env = make_env(data["env"], kwargs).unwrapped
        except (ConfigError, KeyError, TypeError, AttributeError):
            pass
        self.language = str((getattr(self._env, "metadata", None) or {}).get("action_language", ""))
        self.png = lru_cache(maxsize=4096)(self._png)

    def close(self) -> None:
        """Let go of the environment."""
        if self._env is not None:
            self._env.close()

    def array(self, observation: str) -> np.ndarray | None:
        """[H, W, 3] uint8; None where there is no picture."""
        picture = getattr(self._env, "picture", None)
        found = picture(observation) if callable(picture) else None
        return None if found is None else np.asarray(found, dtype=np.uint8)

    def _png(self, observation: str) -> bytes | None:
        """The same as a PNG file."""
        if (found := self.array(observation)) is None:
            return None
        out = BytesIO()
        Image.fromarray(found).save(out, format="png")
        return out.getvalue()
