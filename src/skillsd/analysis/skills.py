"""`skillsd skills`: a bank's skills as JSON lines, into another run's bank, and searched."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from skillsd.analysis.run import Run, read_bank
from skillsd.analysis.show import plain
from skillsd.analysis.similar import SkillIndex
from skillsd.bounded import one_line
from skillsd.errors import ConfigError, Parser
from skillsd.files.durable import write, writing
from skillsd.files.paths import read_path
from skillsd.files.run_folder import BANK_FILE, CHECKPOINTS, CONFIG_FILE, LOCK_FILE, check_format, folder_of, read_record
from skillsd.files.run_lock import RunLock
from skillsd.skills import Skill, SkillBank
from skillsd.skills.exchange import FORMAT, bounded_lines, from_lines, to_lines
from skillsd.skills.imported import counted, earlier, in_use
from skillsd.skills.skill import FIELDS
from skillsd.skills.tables import BEFORE
from skillsd.words import count

_BANK_HELP = f"a run folder (trainer.default_root_dir), also one that is training, or a {BANK_FILE}"


def skills(args: Sequence[str]) -> None:
    """`skillsd skills ARGS`: write a bank's skills as JSON lines, let a run begin with such lines, or search a bank.

    Raises:
        ConfigError: unknown arguments, no bank or a damaged one, a bad line, or a run that has begun.
    """
    parser = Parser(prog="skillsd skills", description="A run's skills: write them out, let another run begin with them, search them.")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, does: str, run: Callable[[Any], None]) -> Any:
        made = commands.add_parser(name, help=does, description=f"{does[0].upper()}{does[1:]}.")
        made.set_defaults(run=run)
        return made

    out = command("export", f"print the skills that a bank holds, each a line of JSON (format {FORMAT})", _export)
    out.add_argument("bank", metavar="RUN_OR_BANK", help=_BANK_HELP)
    out.add_argument("-o", metavar="FILE", dest="out", help="write there instead")
    out.add_argument("--all", action="store_true", help="also those that were evicted")
    into = command(
        "import", "let a run that has not begun begin with such skills, under its settings (config.yaml) if there are any", _import
    )
    into.add_argument("run_folder", metavar="RUN", help="its folder, also one that is not there yet")
    into.add_argument("file", metavar="FILE", help="what export has written; - is the standard input. All of it enters, or nothing")
    into.add_argument("--steal-lock", action="store_true", help="take the folder from a process on another host, which is known to be dead")
    find = command("search", "print the skills that are most like a text, evicted ones included", _search)
    find.add_argument("bank", metavar="RUN_OR_BANK", help=_BANK_HELP)
    find.add_argument("query", metavar="QUERY", help="words, or moves")
    find.add_argument("-n", type=int, default=10, metavar="N", help="at most so many (10)")
    find.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    given = parser.parse_args(args)
    given.run(given)


def _export(given: Any) -> None:
    out = None if given.out is None else read_path(given.out, "-o")
    if out is not None and os.path.lexists(out):
        raise ConfigError(f"-o: {given.out} is there already: remove it, or name another file.")
    try:
        with SkillBank(_bank_file(given.bank), read_only=True) as bank:
            lines = to_lines(bank, given.all)
            if out is None:
                for line in lines:
                    print(line)
            else:
                text = "".join(f"{line}\n" for line in lines).encode()
    except ValueError as e:
        raise ConfigError(f"RUN_OR_BANK: {e}") from e
    if out is not None:
        with writing(out, "-o"):
            write(out, text)
        print(f"{count(text.count(10), 'skill')}: {out}")


def _import(given: Any) -> None:
    folder, file = folder_of(read_path(given.run_folder, "RUN")), read_path(given.file, "FILE")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"RUN: {folder} is no folder: name that of the run to come.")
    if given.file == "-":
        new = from_lines(bounded_lines(sys.stdin.buffer))
    elif file.is_file():
        with file.open("rb") as f:
            new = from_lines(bounded_lines(f))
    else:
        raise ConfigError(
            f"FILE: there is no {given.file}: name a file that `skillsd skills export` has written, or - for the standard input."
        )
    if not new:
        raise ConfigError("FILE: it holds no skill: nothing was imported.")
    lock = RunLock(folder, given.steal_lock, "RUN")
    try:
        _insert(folder, new)
    finally:
        lock.release()


def _insert(folder: Path, new: list[Skill]) -> None:
    """Put skills into the bank of a run folder that is ours."""
    given = Run(folder).config.get("skills") if (folder / CONFIG_FILE).is_file() else None
    settings = {k: given[k] for k in ("capacity", "eviction", "value_estimate") if k in given} if isinstance(given, dict) else {}
    path = folder / BANK_FILE
    try:
        record = read_record(folder)
        if any((folder / CHECKPOINTS).glob("*.ckpt")) or counted(path)[1] or (record is not None and record.checkpoints is not None):
            raise ConfigError(f"RUN: the run in {folder} has begun, and could not go on with other skills: name a new folder.")
        if in_use(path):
            raise ConfigError(f"RUN: {path} is open in another process, a run that begins, say: name a new folder.")
        with SkillBank(path, **settings) as bank:
            known = {(s.task_id, *s.texts) for task_id in {s.task_id for s in new} for s in bank.skills(task_id)}
            unknown = list({key: s for s in new if (key := (s.task_id, *s.texts)) not in known}.values())
            before = bank.stats()
            bank.insert(earlier(unknown), BEFORE)
            after, most = bank.stats(), bank.capacity
    except (ValueError, TypeError) as e:
        raise e if isinstance(e, ConfigError) else ConfigError(f"skills: {e}") from e
    evicted, tasks = int(after["evicted"] - before["evicted"]), len({skill.task_id for skill in unknown})
    print(f"imported {count(len(unknown), 'new skill')} of {count(tasks, 'task')}: {path} holds {int(after['size'])}")
    print(f"{len(new) - len(unknown)} were there already; {evicted} were evicted, as a task keeps {'all' if most is None else most}")
    others = any(p.name not in (BANK_FILE, LOCK_FILE) for p in folder.iterdir())
    print(f"begin with them: skillsd fit ... --trainer.default_root_dir={folder}{' --ckpt_path last' if others else ''}")


def _search(given: Any) -> None:
    if given.n < 1:
        raise ConfigError(f"-n: {given.n} skills cannot be listed: ask for 1 or more.")
    frame = read_bank(_bank_file(given.bank)).frame
    found = SkillIndex(frame).search(given.query, given.n)
    rows = [{"skill_id": int(skill_id)} | plain(row) for skill_id, row in found.iterrows()]  # type: ignore[call-overload]
    if given.json:
        print(json.dumps(rows, indent=1, allow_nan=False))
        return
    for s in rows:
        gone = "" if s["evicted"] is None else f", evicted in iteration {s['evicted']}"
        head = f"skill {s['skill_id']}, task {one_line(s['task_id'])}: mean reward {s['mean_reward']:.3f}, {count(s['uses'], 'use')}{gone}"
        print(f"{s['similarity']:.3f}  {head}")
        for name in FIELDS:
            print(f"       {name}: {one_line(' '.join(s[name].split()))}")
    if not rows:
        print("no skill shares a word with it" if len(frame) else "the bank holds no skill")


def _bank_file(given: str) -> Path:
    path = folder_of(read_path(given, "RUN_OR_BANK"))
    if path.is_dir():
        check_format(path)
        path = path / BANK_FILE
    if not path.is_file():
        raise ConfigError(f"RUN_OR_BANK: there is no {path}: name a run folder, or a bank's file.")
    return path
