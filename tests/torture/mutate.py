"""Mutation run: change one thing in the source at a time, and see whether a test notices.

    python tests/torture/mutate.py objective skills --skip bank.py,bank_file.py,ledger.py [--files gates.py] [--sample 100 --seed 0]

The tests are those of tests/<folder>. They run once on the source as it is, and tell which of them reach which line. A mutant is then run
in a fork of one process that has torch and the rest imported, with -x, on those that reach its statement, the quickest first; on all if
it is reached while something is imported, or in another process. A mutant that no test notices is a survivor; survivors.txt lists those
that are equivalent to the source, each with its reason. Exit code 1 if another survives.
Changes: comparisons, arithmetic, `not`, `and`, conditions, numbers and booleans, texts, returned values, statements left out.
"""

from __future__ import annotations

import argparse
import ast
import importlib.abc
import importlib.util
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from copy import deepcopy
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, NamedTuple

from coverage import CoverageData

ROOT = Path(__file__).resolve().parents[2]
SURVIVORS = Path(__file__).with_name("survivors.txt")
OTHERS: dict[type, tuple[type, ...]] = {  # operator -> what it becomes
    ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE), ast.GtE: (ast.Gt, ast.Lt), ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,), ast.In: (ast.NotIn,), ast.NotIn: (ast.In,), ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,), ast.Mult: (ast.Div,), ast.Div: (ast.Mult,), ast.FloorDiv: (ast.Mult,), ast.Mod: (ast.Mult,),
    ast.Pow: (ast.Mult,), ast.BitAnd: (ast.BitOr,), ast.BitOr: (ast.BitAnd,), ast.And: (ast.Or,), ast.Or: (ast.And,),
}  # fmt: skip


class Mutant(NamedTuple):
    """One change: where, and the statement's line before and after."""

    file: str
    line: int
    statement: int
    scope: str
    change: str
    source: str

    @property
    def key(self) -> str:
        """Its name in survivors.txt: it does not move with the lines above."""
        return f"{self.file} | {self.scope} | {self.change}"


def variants(node: ast.AST) -> Iterator[ast.AST]:
    """Other nodes in the place of `node`."""
    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            for other in OTHERS.get(type(op), ()):
                new = deepcopy(node)
                new.ops[i] = other()
                yield new
    elif isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp):
        for other in OTHERS.get(type(node.op), ()):
            new = deepcopy(node)
            new.op = other()
            yield new
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        if ast.unparse(node) != "-1":  # the last dimension: of a matrix it is 1 too; -2 is tried
            yield deepcopy(node.operand)
    elif isinstance(node, ast.Constant):
        value: Any = node.value
        if isinstance(value, bool):
            yield ast.Constant(not value)
        elif isinstance(value, int | float):
            yield ast.Constant(value + 1)
        elif isinstance(value, str):
            yield ast.Constant("XX" + value)
    negated = isinstance(node, ast.If | ast.IfExp | ast.While) and isinstance(node.test, ast.UnaryOp) and isinstance(node.test.op, ast.Not)
    if isinstance(node, ast.If | ast.IfExp | ast.While) and not negated:
        new = deepcopy(node)
        new.test = ast.UnaryOp(ast.Not(), node.test)
        yield new
    elif isinstance(node, ast.Return) and not (node.value is None or isinstance(node.value, ast.Constant)):
        yield ast.Return(ast.Constant(None))
    elif isinstance(node, ast.Break | ast.Continue):
        yield ast.Continue() if isinstance(node, ast.Break) else ast.Break()
    documents = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    stores = isinstance(node, ast.Assign) and not isinstance(node.targets[0], ast.Name | ast.Tuple)
    if (isinstance(node, ast.Expr) and not documents) or isinstance(node, ast.Raise | ast.AugAssign | ast.Assert) or stores:
        yield ast.Pass()


def mutants(path: Path) -> Iterator[Mutant]:
    """Every change to a file, in the order of the source."""
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    name = path.relative_to(ROOT / "src" / "skillsd").as_posix()

    def walk(node: ast.AST, scope: str, statement: ast.AST) -> Iterator[Mutant]:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            scope = f"{scope}.{node.name}".lstrip(".")
        for field, value in ast.iter_fields(node):
            if field in ("annotation", "returns", "decorator_list", "bases", "keywords") and not isinstance(node, ast.Call):
                continue
            for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
                if not isinstance(child, ast.AST) or _quiet(child):
                    continue
                inner = child if isinstance(child, ast.stmt) else statement
                for other in variants(child):
                    before = _shown(inner)
                    _put(node, field, index, other)
                    change = f"{before} -> {_shown(other if child is inner else inner)}"
                    changed = ast.unparse(ast.fix_missing_locations(tree))
                    yield Mutant(name, child.lineno, getattr(inner, "lineno", 0), scope, change, changed)  # type: ignore[attr-defined]
                    _put(node, field, index, child)
                yield from walk(child, scope, inner)

    yield from walk(tree, "", tree)


def _quiet(node: ast.AST) -> bool:
    """What is not changed: documentation, what an error says, the list of exports, imports, log messages, names of type variables."""
    if isinstance(node, ast.Import | ast.ImportFrom | ast.JoinedStr):
        return True
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return True
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id in ("__all__", "log"):
        return True
    if not isinstance(node, ast.Call):
        return False
    called = ast.unparse(node.func)
    return called in ("Damaged", "refused", "TypeVar") or called.startswith("log.") or called.endswith("Error")


def _shown(node: ast.AST) -> str:
    """A statement as one line, without its body and decorators."""
    if isinstance(getattr(node, "body", None), list):
        node = deepcopy(node)
        node.body, node.orelse, node.decorator_list = [ast.Pass()], [], []  # type: ignore[attr-defined]
    lines = ast.unparse(ast.fix_missing_locations(node)).splitlines()
    return (lines[0] if isinstance(getattr(node, "body", None), list) else "\\n".join(lines)).strip()


def _put(parent: ast.AST, field: str, index: int | None, node: ast.AST) -> None:
    if index is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[index] = node


class _Changed(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from a changed source."""

    def __init__(self, name: str, path: Path, source: str) -> None:
        self.name, self.path, self.source = name, path, source

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != self.name:
            return None
        found = importlib.util.spec_from_file_location(fullname, self.path, loader=self)  # type: ignore[arg-type]
        if found is not None and self.path.name == "__init__.py":
            found.submodule_search_locations = [str(self.path.parent)]
        return found

    def exec_module(self, module: Any) -> None:
        exec(compile(self.source, str(self.path), "exec"), module.__dict__)


def forked(work: Callable[[], bool]) -> int:
    """Do something in a fork, whose pid this is; its exit code is 0 if the result is true."""
    if pid := os.fork():
        return pid
    os.setsid()
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1), os.dup2(null, 2)
    good = False
    with suppress(BaseException):
        good = work()
    os._exit(not good)


def passes(tests: Sequence[str], *more: str, plugins: Sequence[object] = ()) -> bool:
    """Whether pytest passes them."""
    import pytest

    return not pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow and not torture", *more, *tests], plugins)


class _Told:
    """What pytest tells: seconds of each test, and which one failed."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration
        if report.failed:
            self.failed.append(f"{report.nodeid}\n{report.longreprtext}")


class Reach:
    """Which tests reach a statement. Raises RuntimeError if they fail on the source as it is."""

    def __init__(self, tests: list[str], source: Path) -> None:
        self.tests = tests
        with tempfile.TemporaryDirectory() as folder:
            data, told = Path(folder) / "coverage", Path(folder) / "told.json"

            def once() -> bool:
                os.environ["COVERAGE_FILE"], plugin = str(data), _Told()
                good = passes(tests, f"--cov={source}", "--cov-context=test", "--cov-report=", plugins=[plugin])
                told.write_text(json.dumps([plugin.seconds, plugin.failed]))
                return good

            ended = os.waitpid(forked(once), 0)[1]
            seconds, failed = json.loads(told.read_text()) if told.is_file() else ({}, [])
            if ended:
                raise RuntimeError("\n".join([f"{' '.join(tests)}: they fail on the source as it is", *failed]))
            found = CoverageData(str(data))
            found.read()
            self._of = {
                f: {line: sorted({t.partition("|")[0] for t in at}, key=lambda t: seconds.get(t, 0.0)) for line, at in lines.items()}
                for f in found.measured_files()
                for lines in [found.contexts_by_lineno(f)]
            }
            self.seconds = seconds

    def __call__(self, mutant: Mutant) -> tuple[list[str], float]:
        """The tests, and the seconds that they took."""
        found = self._of.get(str(ROOT / "src" / "skillsd" / mutant.file), {}).get(mutant.statement, [])
        if not found or "" in found:  # no test, or none in this process; "": while something is imported
            return self.tests, sum(self.seconds.values())
        return found, sum(self.seconds[t] for t in found)


def start(mutant: Mutant, tests: Sequence[str]) -> int:
    """Run tests on a mutant in a fork, whose pid this is."""
    path = ROOT / "src" / "skillsd" / mutant.file
    name = "skillsd." + mutant.file.removesuffix(".py").replace("/", ".").removesuffix(".__init__")

    def work() -> bool:
        sys.meta_path.insert(0, _Changed(name, path, mutant.source))
        return passes(tests)

    return forked(work)


def run(todo: Iterable[Mutant], reach: Reach, jobs: int) -> Iterator[tuple[Mutant, str]]:
    """Run the tests on each, `jobs` beside each other: `killed`, `survived` or, after five times what they took, `timeout`; as they end."""
    rest, running = iter(todo), dict[int, tuple[Mutant, float]]()
    while True:
        for mutant in islice(rest, jobs - len(running)):
            tests, seconds = reach(mutant)
            running[start(mutant, tests)] = mutant, time.monotonic() + 5 * seconds + 30
        if not running:
            return
        time.sleep(0.02)
        for pid, (mutant, end) in list(running.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if not done and time.monotonic() < end:
                continue
            if not done:
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            del running[pid]
            yield mutant, "timeout" if not done else "killed" if status else "survived"


def known() -> dict[str, str]:
    """survivors.txt: key -> reason."""
    lines = SURVIVORS.read_text().splitlines() if SURVIVORS.is_file() else []
    return {k: why for k, _, why in (line.partition("  # ") for line in lines if line and not line.startswith("#"))}


def _survived(line: str) -> str:
    """The key in a line that `main` has printed, without a reason behind it."""
    result, _, key = line.partition(": ")
    return key.partition("  # ")[0] if result in ("survived", "timeout", "new survivor") else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", nargs="+", help="under src/skillsd, or a file there; its tests are those under tests/ of that name")
    parser.add_argument("--skip", default="", help="names of files, with commas between")
    parser.add_argument("--files", default="", help="only these names")
    parser.add_argument("--again", help="a file with what an earlier run printed: only those that survived it or ran out of time")
    parser.add_argument("--tests", nargs="*", help="instead of tests/<folder>")
    parser.add_argument("--sample", type=int, help="a random part: this many mutants")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no further mutant after this")
    parser.add_argument("--jobs", type=int, default=1, help="mutants beside each other")
    parser.add_argument("--list", action="store_true", help="print the mutants, run nothing")
    args = parser.parse_args()
    again = None if args.again is None else {_survived(line) for line in Path(args.again).read_text(encoding="utf-8").splitlines()}
    os.chdir(ROOT)
    excused, skip, only = known(), args.skip.split(","), args.files.split(",") if args.files else None
    count, new, began = {"killed": 0, "survived": 0, "timeout": 0, "not run": 0}, [], time.monotonic()
    for folder in args.folders:
        path = ROOT / "src" / "skillsd" / folder
        files = [
            f for f in (sorted(path.rglob("*.py")) if path.is_dir() else [path]) if f.name not in skip and (not only or f.name in only)
        ]
        todo = [m for f in files for m in mutants(f) if again is None or m.key in again]
        if args.sample is not None and args.sample < len(todo):
            todo = sorted(random.Random(args.seed).sample(todo, args.sample))
        if args.list:
            print(*(f"{m.file}:{m.line} {m.scope}: {m.change}" for m in todo), sep="\n")
            continue
        tests = args.tests or [f"tests/{folder}"]
        sys.path[:0] = [str(ROOT / "src"), str(ROOT / "envs"), str(ROOT)]
        for name in ("gymnasium", "hypothesis", "pytest", "openai", "lightning", "skillsd.policy"):  # none of them is changed here
            with suppress(ImportError):
                __import__(name)
        for name in ("AutoModelForCausalLM", "LlamaConfig", "Qwen2Config", "Qwen3Config", "Gemma2Config", "MistralConfig"):
            getattr(sys.modules["transformers"], name)
        try:
            reach = Reach(tests, path if path.is_dir() else path.parent)
        except RuntimeError as e:
            print(e)
            return 2
        ran = 0
        for m, result in run(takewhile(lambda _: time.monotonic() - began < 60 * args.minutes, todo), reach, args.jobs):
            ran += 1
            count[result] += 1
            if result != "killed":
                why = excused.get(m.key)
                print(f"{result}: {m.key}" + (f"  # {why}" if why else ""), flush=True)
                if result == "survived" and not why:
                    new.append(m.key)
        count["not run"] += len(todo) - ran
        print(f"{folder}: {len(todo)} mutants, {count} so far, {time.monotonic() - began:.0f} s", flush=True)
    for key in new:
        print(f"new survivor: {key}")
    return int(bool(new))


if __name__ == "__main__":
    sys.exit(main())
