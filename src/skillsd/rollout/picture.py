"""What an environment draws of its observations: `picture(observation)`, which it may offer."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def draws(env: Any) -> bool:
    """Whether the environment offers pictures."""
    return callable(getattr(env.unwrapped, "picture", None))


def picture_of(env: Any, observation: str) -> NDArray[np.uint8] | None:
    """The picture of an observation of this environment, [H, W, 3]; None where there is none.

    Raises:
        TypeError: The environment gives something else. What it raises itself comes as it is.
    """
    found = env.unwrapped.picture(observation) if draws(env) else None
    if found is None:
        return None
    if not isinstance(found, np.ndarray) or found.dtype != np.uint8 or found.ndim != 3 or found.shape[2] != 3 or not found.size:
        raise TypeError(f"picture() must give an array [H, W, 3] of uint8, or None, not {found!r:.80}")
    return found
