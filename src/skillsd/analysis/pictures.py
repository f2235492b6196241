"""Pictures of observations, drawn by a run's environment, and the language of its actions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import lru_cache
from io import BytesIO
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.registration import load_env_creator
from numpy.typing import NDArray
from PIL import Image

from skillsd.analysis.render import Picture
from skillsd.analysis.run import Run
from skillsd.environment import TextEnv, make_env
from skillsd.errors import ConfigError
from skillsd.timeouts import Failure, attempt

TRUST = "Boards are drawn by the environment that the run names, which is imported: look at runs of people you trust."


class Pictures:
    """Draws a run's observations, where its environment can.

    An environment may offer `picture(observation) -> [H, W, 3] uint8 or None` for its own observations, and name the language of its
    actions in `metadata["action_language"]`.

    Args:
        run: The run. Its environment is imported and made, so look only at runs of people you trust. An environment that cannot be made
            here (its engine is missing, say) gives no pictures.
    """

    def __init__(self, run: Run) -> None:
        self._env: TextEnv | None = None
        declared: Any = None
        with suppress(KeyError, TypeError, AttributeError, ConfigError):  # the page that shows the configuration says what is wrong with it
            env_id, kwargs = run.environment
            made = attempt(lambda: make_env(env_id, kwargs))  # whatever its code does here
            self._env = None if isinstance(made, Failure) else made
            declared = self._env.unwrapped if self._env is not None else attempt(lambda: _class_of(env_id))
        self.language = str((getattr(declared, "metadata", None) or {}).get("action_language", ""))
        self.png = lru_cache(maxsize=4096)(self._png)

    def close(self) -> None:
        """Let go of the environment."""
        if self._env is not None:
            self._env.close()

    def array(self, observation: str) -> NDArray[np.uint8] | None:
        """[H, W, 3]; None where there is no picture, or the environment fails to make one."""
        if (env := self._env) is None:
            return None
        found = attempt(lambda: env.picture(observation))
        return None if isinstance(found, Failure) else found

    def _png(self, observation: str) -> bytes | None:
        """The same as a PNG file."""
        if (found := self.array(observation)) is None:
            return None
        out = BytesIO()
        Image.fromarray(found).save(out, format="png")
        return out.getvalue()


def turns(seen: Mapping[str, Any], pictures: Pictures, shown: Callable[[str], str] = str) -> list[dict[str, Any]]:
    """An episode for the templates: a mapping for each turn, and one whose action is None for the final observation.

    Args:
        seen: What `show.trajectory` gives.
        pictures: Draws its observations.
        shown: Applied to every text.
    """
    n = seen["trajectory"]
    turns = enumerate(seen["turns"], 1)
    steps: list[tuple[Any, ...]] = [(f"turn-{k}", str(k), t["observation"], shown(t["action"]), t["reward"]) for k, t in turns]
    if seen["final_observation"] is not None:
        steps.append(("end", "end", seen["final_observation"], None, 0.0))
    out = []
    for index, (name, label, observation, action, reward) in enumerate(steps):
        png = pictures.png(observation)
        picture = Picture(f"trajectory-{n}-{name}.png", f"trajectory {n}, {name.replace('-', ' ')}", png) if png else None
        out.append({"index": index, "id": "end" if action is None else f"turn-{index}", "label": label, "picture": picture,
                    "observation": shown(observation), "action": action, "reward": reward})  # fmt: skip
    return out


def _class_of(env_id: str) -> Any:
    """The class of an environment that cannot be made here (its engine is missing, say)."""
    entry: Any = gymnasium.spec(env_id.rpartition(":")[2]).entry_point  # its module was imported when it was to be made
    return load_env_creator(entry) if isinstance(entry, str) else entry
