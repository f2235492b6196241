"""Text coloured by a number for each of its tokens, as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import isfinite

from skillsd.bounded import visible

STRENGTH = 0.6
"""Most opaque colour of a background: text of either scheme can be read on it."""


def heat(texts: Sequence[str], values: Sequence[float], limit: float = 2.0) -> str:
    """The tokens' texts one after the other: blue where the value is positive, orange where it is negative, the number on hovering.

    With log-prob of the teacher - log-prob of the student, blue is what the teacher finds likelier.

    Args:
        texts: What each token adds to the text (`Scorer.texts`).
        values: The number of each token; NaN (the environment's tokens) stays plain.
        limit: The value, in either direction, from which on a colour is at its strongest.

    Returns:
        HTML, the texts escaped, to be put where white space counts (`white-space: pre-wrap`).

    Raises:
        ValueError: there are not as many values as texts, or the limit is not positive.
    """
    if len(texts) != len(values) or not limit > 0:
        raise ValueError(f"{len(texts)} texts and {len(values)} values with limit {limit}: give one value a token and a limit > 0")
    return "".join(_token(text, float(value), limit) for text, value in zip(texts, values, strict=True))


def _token(text: str, value: float, limit: float) -> str:
    if not isfinite(value):
        return escape(visible(text))
    strength = STRENGTH * min(1.0, abs(value) / limit)
    colour = "0, 114, 178" if value > 0 else "213, 94, 0"  # of Okabe & Ito: distinct with any colour vision
    return f'<span title="{value:+.3f}" style="background: rgba({colour}, {strength:.2f})">{escape(visible(text))}</span>'
