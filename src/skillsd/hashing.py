"""Draws by a hash of what they are for: the same in every process and Python version, whatever was drawn before."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from hashlib import blake2b
from typing import TypeVar

T = TypeVar("T")


def hash64(text: str) -> int:
    """A 64-bit number (signed)."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def seeded_order(items: Iterable[T], *purpose: object, name: Callable[[T], object] = str) -> list[T]:
    """The items in an order drawn from what it is for, e.g. (seed, "order", epoch), and their names: their own order does not count."""
    text = "/".join(map(str, purpose))
    return sorted(items, key=lambda item: blake2b(f"{text}/{name(item)}".encode()).digest())
