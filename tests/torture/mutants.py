"""Mutation run: mutmut changes one thing in objective/ and skills/ at a time, and a test must notice.

    python -m tests.torture mutants                            # all that [tool.mutmut] in pyproject.toml names
    python tests/torture/mutants.py 'skillsd.objective.gates*'  # those of one module, or of one function

mutmut changes the inside of functions: operators, numbers, texts, arguments. It drops no statement and changes nothing at a module's or a
class's level. survivors.txt lists the mutants that are equivalent to the source, each with its reason. Exit code 1 if another survives.
`mutmut browse` shows each; what it makes lies in mutants/.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SURVIVORS = Path(__file__).with_name("survivors.txt")


def mutmut(*args: str) -> list[str]:
    """The lines that one of its commands prints. Raises CalledProcessError if it fails."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}  # the source as it is would come before its mutants
    command = [sys.executable, "-m", "mutmut", *args]
    return subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()


def survivors(patterns: list[str]) -> Iterator[tuple[str, str]]:
    """Name and key of each mutant that no test has noticed, in the last run."""
    for line in mutmut("results"):
        name, _, result = line.strip().partition(": ")
        if result in ("survived", "no tests") and (not patterns or any(fnmatch(name, p) for p in patterns)):
            changes = [x for x in mutmut("show", name) if re.match(r"[-+](?![-+]{2} )", x)]
            yield name, key(name, changes)


def key(name: str, changes: list[str]) -> str:
    """What a mutant is called in survivors.txt: the number in its own name moves with the lines above.

    Args:
        name: `skillsd.skills.bank.xǁSkillBankǁinsert__mutmut_7`.
        changes: The lines of its diff that are taken away, with a minus, and those that take their place, with a plus.
    """
    module, _, mutant = name.rpartition(".")
    function = re.sub(r"__mutmut_\d+$", "", mutant).removeprefix("x_").removeprefix("xǁ").replace("ǁ", ".")
    before, after = (" ".join(line[1:].strip() for line in changes if line[0] == sign) for sign in "-+")
    return f"{module.removeprefix('skillsd.')} | {function} | {before} -> {after}"


def excused() -> dict[str, str]:
    """survivors.txt: key -> reason."""
    lines = SURVIVORS.read_text(encoding="utf-8").splitlines()
    return {k: reason for k, _, reason in (line.rpartition("  # ") for line in lines if line and not line.startswith("#"))}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("patterns", nargs="*", help="names of mutants, as mutmut takes them; all if none is given")
    parser.add_argument("--jobs", type=int, default=1, help="mutants beside each other")
    parser.add_argument("--list", action="store_true", help="run nothing: what the last run has left")
    args = parser.parse_args()
    if not args.list:
        mutmut("run", f"--max-children={args.jobs}", *args.patterns)
    known, found = excused(), dict(survivors(args.patterns))
    for name, what in found.items():
        if what not in known:
            print(f"{name}: {what}")
    new = sum(what not in known for what in found.values())
    print(
        f"{len(found)} mutants survive, {new} of them without an excuse; {len(known.keys() - set(found.values()))} excuses without a mutant"
    )
    return int(new > 0)


if __name__ == "__main__":
    sys.exit(main())
