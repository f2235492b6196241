"""Random numbers that are the same on every machine and Python version.

`random.Random(int).getrandbits` is a fixed Mersenne Twister; `sample`, `shuffle` and `randrange` have changed between Python versions, so
they are written here.
"""

from collections.abc import Sequence
from hashlib import blake2b
from random import Random
from typing import TypeVar

T = TypeVar("T")


def digest(text: str) -> int:
    """A 64-bit integer that depends on nothing but `text`."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")


class Rng:
    """A stream of random choices, fixed by `key` (any text)."""

    __slots__ = ("bits",)

    def __init__(self, key: str) -> None:
        self.bits = Random(digest(key)).getrandbits

    def below(self, n: int) -> int:
        """Uniform integer in [0, n), n >= 1."""
        width = n.bit_length()
        value = self.bits(width)
        while value >= n:
            value = self.bits(width)
        return value

    def choice(self, items: Sequence[T]) -> T:
        return items[self.below(len(items))]

    def sample(self, items: Sequence[T], k: int) -> list[T]:
        """`k` distinct items in random order; `k <= len(items)`."""
        pool = list(items)
        for i in range(k):
            j = i + self.below(len(pool) - i)
            pool[i], pool[j] = pool[j], pool[i]
        return pool[:k]
