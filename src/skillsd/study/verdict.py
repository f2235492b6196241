"""Sentences that the numbers force; nobody writes a conclusion by hand.

With p the Holm-adjusted p of the paired t test over seeds, d the mean difference and ALPHA = 0.05, a method, against the baseline:

1. no seed finished by both: "cannot be compared";
2. one seed: "one seed says nothing about others";
3. p <= ALPHA and d > 0: "beats"; 4. p <= ALPHA and d < 0: "is worse than";
5. the same numbers in every seed: "came out the same as";
6. otherwise: "cannot be told from", with d, its interval and the seeds that a difference of this size would need for 90% power
   (a rough figure: it takes the observed d and spread for the true ones; where d is 0, no number of seeds is enough).

A controlled method - its control, Holm-adjusted over the controls, by the same rules:

3. its gain over the control is established, and whether one over the baseline is;
4. the control is better: what the method has and its control lacks does harm;
5. and 6. no gain over the control is established: if the method beats the baseline, that gain is not shown to come from what the control
   lacks (the skill, if it is a control without the right skill); if it does not, there is no gain to explain.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, isinf, isnan

from skillsd.study.comparison import Comparison
from skillsd.words import count

ALPHA = 0.05


def points(mean: float, low: float, high: float) -> str:
    """A difference of shares in percentage points, signed, with its interval."""
    return f"{_signed(mean)} [{_signed(low)}, {_signed(high)}]"


def _signed(x: float) -> str:
    return "n/a" if isnan(x) else f"{100 * x:+.1f}"


def p_value(p: float) -> str:
    """0.0341; < 0.001; n/a for NaN."""
    return "n/a" if isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3g}"


def numbers(c: Comparison) -> str:
    """Difference, seeds and p, as a sentence has them."""
    return f"{points(c.mean, c.low, c.high)} points over {c.n} seeds, Holm p = {p_value(c.p_holm)}".replace("= <", "<")


def finding(c: Comparison) -> str:
    """Which rule a comparison falls under: none, one, better, worse, same, unclear."""
    if c.n < 2:
        return "one" if c.n else "none"
    if c.p_holm <= ALPHA:
        return "better" if c.mean > 0 else "worse"
    return "same" if not any(c.differences) else "unclear"


def about_method(c: Comparison) -> str:
    """The sentence on a method and the baseline."""
    found = numbers(c)
    match finding(c):
        case "none":
            return f"{c.method} cannot be compared with {c.other}: no seed was finished by both."
        case "one":
            return f"{c.method} - {c.other} is {_signed(c.mean)} points with seed {c.seeds[0]}; one seed says nothing about others."
        case "better":
            return f"{c.method} beats {c.other}: {found}."
        case "worse":
            return f"{c.method} is worse than {c.other}: {found}."
        case "same":
            return f"{c.method} came out the same as {c.other} with each of {c.n} seeds."
    return f"{c.method} cannot be told from {c.other}: {found}; {needed(c)}."


def about_control(c: Comparison, method: Comparison | None) -> str:
    """The sentence on a method and its control.

    Args:
        c: Method - control.
        method: The method against the baseline; None if it is the baseline.
    """
    found = numbers(c)
    match finding(c):
        case "none":
            return f"Control: {c.method} cannot be compared with {c.other}: no seed was finished by both."
        case "one":
            return (
                f"Control: {c.method} - {c.other} is {_signed(c.mean)} points with seed {c.seeds[0]}; one seed says nothing about others."
            )
        case "better":
            over = "" if method is None else f"; over {method.other} {'one' if finding(method) == 'better' else 'none'} is"
            return f"Control: the gain of {c.method} over {c.other} is established ({found}){over}."
        case "worse":
            return f"Control: {c.method} is worse than {c.other} ({found}): what {c.method} has and {c.other} lacks does harm."
        case "same":
            how = f"came out the same as {c.other} with each of {c.n} seeds"
        case _:
            how = f"cannot be told from {c.other} ({found}; {needed(c)})"
    if method is None or finding(method) == "better":
        gain = "a gain" if method is None else f"its gain over {method.other}"
        return f"Control: {c.method} {how}: {gain} is not shown to come from what {c.other} lacks."
    return f"Control: {c.method} {how}, and no gain over {method.other} is established that {c.other} could explain."


def needed(c: Comparison) -> str:
    """How many seeds a difference of this size would need."""
    if isinf(c.needed):
        return "no number of seeds would show a difference of 0"
    return f"about {ceil(c.needed)} seeds would be needed to see a difference of this size with 90% power in a single test"


def verdict(methods: Sequence[Comparison], controls: Sequence[Comparison]) -> list[str]:
    """All sentences: the count, every method, what few seeds cannot show, every control."""
    found = [finding(c) for c in methods]
    kinds = [
        ("beats it", "beat it", ("better",)),
        ("is worse", "are worse", ("worse",)),
        ("cannot be told from it", "cannot be told from it", ("unclear", "same")),
        ("could not be tested", "could not be tested", ("none", "one")),
    ]
    counts = [(n, one if n == 1 else several) for one, several, which in kinds for n in [sum(f in which for f in found)]]
    sentences = (
        [f"Of {count(len(found), 'method')} compared with the baseline: " + ", ".join(f"{n} {what}" for n, what in counts if n) + "."]
        if found
        else []
    )
    sentences += [about_method(c) for c in methods]
    sizes = sorted({c.n for c in [*methods, *controls] if c.n > 1})
    sentences += [f"With {n} seeds the sign-flip test cannot give a p below {2 / 2**n:.3g}, however large the difference." for n in sizes]
    by_name = {c.method: c for c in methods}
    return sentences + [about_control(c, by_name.get(c.method)) for c in controls]
