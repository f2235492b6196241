"""The space of all texts."""

from typing import Any

from gymnasium import spaces


class AnyText(spaces.Text):
    """Every str is a member, "" and any character included; `spaces.Text` refuses both. Samples are up to 32 letters and digits."""

    def __init__(self) -> None:
        super().__init__(max_length=32, min_length=0)

    def contains(self, x: Any) -> bool:
        return isinstance(x, str)

    def __repr__(self) -> str:
        return "AnyText()"
